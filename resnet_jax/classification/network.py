"""From a config to a network and its optimizer, without data."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import ml_collections

from resnet_jax.distributed import platform
from resnet_jax.errors import UsageError
from resnet_jax.models.normalisation import count_groups
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.network import model_settings


def make_model(
    config: ml_collections.ConfigDict, num_classes: int | None = None, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network that a config describes, its long runs of identical blocks stored together (``models.stacking``).

    How it is stored follows from the network alone, so that checkpoints move between devices; how it is run
    (``model.scan``, ``model.remat``) does not change what is stored.

    Args:
      config: the whole config.
      num_classes: length of the logits.
      settings: attributes that the weights need, which go before the config's.

    Raises:
      UsageError: no such network, or it can't be run so.
    """
    model = create_model(num_classes=num_classes, **model_settings(config.model) | (settings or {}))
    scan, remat = config.model.scan, config.model.remat
    if isinstance(model, ResNet):
        # A loop makes blocks of two layers faster on TPUs, and those of three slower (benchmarks/RESULTS.md).
        gains = platform() != "cpu" and not model.bottleneck
        return model.clone(stacked=True, scan=gains if scan == "auto" else scan == "true", remat=remat)
    if remat or scan == "true":
        raise UsageError(f"model.{'remat' if remat else 'scan'}: {config.model.name} has no residual blocks")
    return model


def rate_factors(config: ml_collections.ConfigDict, model: nn.Module) -> dict[str, float]:
    """By what the learning rate of each of the network's modules is multiplied, where that is not 1."""
    frozen, parts = config.model.freeze_at, model.parts
    if frozen > len(parts):
        raise UsageError(f"model.freeze_at={frozen}: {config.model.name} has {len(parts)} parts: {', '.join(parts)}")
    head = {} if config.optimizer.head_rate == 1 else {"head": config.optimizer.head_rate}
    return dict.fromkeys(parts[:frozen], 0.0) | head


def check_groups(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises a UsageError where the BN groups don't divide what is normalised at once."""
    groups, parts = config.model.batch_norm, config.optimizer.accumulate
    # A group that spans devices would have other members in a part of the batch than in the whole.
    spans = devices if parts > 1 and groups.startswith("group:") else 1
    count_groups(groups, config.batch_size // (parts * spans))
