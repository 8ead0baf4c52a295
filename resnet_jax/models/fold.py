"""BatchNorm folded into the convolutions before it: the same network for inference, with less to compute."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from resnet_jax.models.normalisation import BatchNorm

Array = jax.Array | np.ndarray


def fold(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network whose convolutions do their BatchNorm's part: kernels are scaled, and of the norm a bias is left.

    With running statistics a norm is ``(x - mean) * factor + bias``, ``factor = scale / sqrt(var + epsilon)``, which
    a convolution with ``kernel * factor`` and a bias of ``bias - mean * factor`` computes (Jacob et al., 2017, section
    3.2). Kernels are scaled in the parameters' dtype, whatever the network then computes in.

    Args:
      model: a ``ResNet`` or ``VGG``.
      variables: ``params`` and ``batch_stats``, NumPy's or JAX's arrays; those of blocks may be stacked, with the
        same leading axes in each.

    Returns:
      The network with ``batch_norm="folded"``, for inference alone, and its variables, ``params``. Without
      running statistics (GroupNorm, plain VGG, folded already) both come back as they are.
    """
    if not variables.get("batch_stats"):
        return model, variables
    return model.clone(batch_norm="folded"), {"params": _fold(variables["params"], variables["batch_stats"])}


def _fold(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    folded = dict(params)
    for name, part in statistics.items():
        if "var" not in part:
            folded[name] = _fold(params[name], part)
            continue
        conv = name.replace("bn", "conv")  # bn1 comes after conv1, shortcut_bn after shortcut_conv.
        factor = params[name]["scale"] * (part["var"] + BatchNorm.epsilon) ** -0.5
        folded[name] = {"bias": params[name]["bias"] - part["mean"] * factor}
        folded[conv] = {kind: array * _beside(factor, array) for kind, array in params[conv].items()}
    return folded


def _beside(factor: Array, array: Array) -> Array:
    """A factor for each channel [..., C], shaped so that it goes with [..., h, w, C_in, C] or [..., C]."""
    return factor.reshape(*factor.shape[:-1], *(1,) * (array.ndim - factor.ndim), factor.shape[-1])
