"""Our weights into files that others read: safetensors with torchvision's names where torchvision has the network."""

import base64
import io
import json
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np
from safetensors.numpy import save

from resnet_jax import __version__
from resnet_jax.output import write_whole
from resnet_jax.pretrained import formats
from resnet_jax.pretrained.load import FORMAT, Pretrained
from resnet_jax.pretrained.preprocessing import TIMM


def torchvision_names(model: str, weights: Pretrained) -> formats.Format | None:
    """The table of the network ``model``, or None where torchvision has no such network."""
    if model not in TIMM.values() or weights.settings:
        return None
    return {"vgg16": formats.VGG, "vgg16_bn": formats.VGG_BN}.get(model, formats.TORCHVISION)


def save_safetensors(path: pathlib.Path, model: str, weights: Pretrained) -> None:
    """Writes weights with their preprocessing and classes in the metadata; whole or not at all.

    Args:
      path: the file, ``.safetensors``.
      model: our name of the network.
      weights: what to write; its classes and preprocessing may be None.

    Raises:
      UsageError: it can't be written.
    """
    names = torchvision_names(model, weights)
    arrays: dict[str, np.ndarray] = {}
    for ours, array in traverse_util.flatten_dict(weights.variables, sep="/").items():
        array = np.asarray(array, np.float32)
        if names is None:
            arrays[ours] = np.ascontiguousarray(array)
            continue
        theirs = names.theirs(ours)
        arrays[theirs] = names.from_ours(ours, array)
        if theirs.endswith(".running_var"):  # torch keeps a count that nothing of ours needs.
            arrays[theirs.replace("running_var", "num_batches_tracked")] = np.array(0, np.int64)
    metadata: dict[str, Any] = {
        "model": model,
        "settings": weights.settings,
        "preprocessing": weights.preprocessing.to_json() if weights.preprocessing else None,
        "classes": list(weights.classes) if weights.classes else None,
        "history": weights.history,
        "version": __version__,
    }
    if weights.preprocessing and weights.preprocessing.mean_image is not None:
        # Not among the arrays: torch's strict loading would refuse what is no part of the network.
        content = io.BytesIO()
        np.save(content, weights.preprocessing.mean_image)
        metadata["mean_image"] = base64.b64encode(content.getvalue()).decode()
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    content = save(arrays, {"format": FORMAT, **text})
    write_whole(path, lambda file: file.write(content))
