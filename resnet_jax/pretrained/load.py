"""Weights of any known format into one of our networks: every array is used, or the one that isn't is named."""

import dataclasses
import json
import pathlib
import re
from typing import Any

from flax import linen as nn, traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS, create_model, default_input
from resnet_jax.pretrained import names as names_lib, preprocessing as preprocessing_lib
from resnet_jax.pretrained.files import read_arrays, read_metadata
from resnet_jax.pretrained.preprocessing import Preprocessing

FORMAT = "resnet_jax"  # In the metadata of our own files.
MEAN_IMAGE = "mean_image"  # An array beside the weights in them.


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights with what belongs to them.

    Attributes:
      settings: attributes of the network that the weights need, as ``shortcut_zeros``.
      variables: ``params`` and ``batch_stats``, nested, float32 NumPy arrays; None where a checkpoint has newer ones.
      preprocessing: how images are made into input; None where that is not known.
      classes: names in the order of the logits, where known.
      title: the format, for people.
      mean_image: what is subtracted in place of the channels' means, float32 [H, W, C], or None.
    """

    settings: dict[str, Any]
    variables: dict[str, Any] | None
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    title: str
    mean_image: np.ndarray | None = None


def load_pretrained(
    source: str, model: str, dtype: str = "auto", **overrides: Any
) -> tuple[nn.Module, dict[str, Any], Preprocessing]:
    """A network with weights from elsewhere.

    Args:
      source: a ``.safetensors`` or torch file of torchvision's, timm's, akamaster's or our own.
      model: our name of the network, as ``resnet50_v1_5``.
      dtype: compute dtype, as of ``create_model``.
      **overrides: attributes of the network, as of ``create_model``.

    Returns:
      ``(module, variables, preprocessing)``; ``module.apply(variables, images)`` gives logits of images normalised as
      ``preprocessing`` says.

    Raises:
      UsageError: no such file, or its arrays are not exactly those of the network.
    """
    found = read_pretrained(source, model)
    classes = found.variables["params"]["head"]["bias"].shape[0]
    module = create_model(model, classes, dtype, **(found.settings | overrides))
    return module, jax.tree.map(jnp.asarray, found.variables), found.preprocessing


def known_model(path: pathlib.Path) -> str | None:
    """The network that a file of ours says it is of; None for other files."""
    metadata = read_metadata(path)
    return metadata["model"] if metadata.get("format") == FORMAT else None


def read_pretrained(source: str, model: str) -> Pretrained:
    """Reads weights for the network ``model``.

    Raises:
      UsageError: see ``load_pretrained``.
    """
    path = pathlib.Path(source).expanduser()
    arrays, metadata = read_arrays(path)
    arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    ours = metadata.get("format") == FORMAT
    if ours and metadata["model"] != model:
        raise UsageError(f"{path}: holds {metadata['model']}, not {model}")
    settings = json.loads(metadata["settings"]) if ours else _settings(path, arrays, model)
    mean_image = arrays.pop(MEAN_IMAGE, None) if ours else None
    names = _recognise(path, arrays)
    variables = _fit(path, arrays, names, model, settings)
    if ours:
        preprocessing, classes = (json.loads(metadata[name]) for name in ("preprocessing", "classes"))
        return Pretrained(
            settings,
            variables,
            Preprocessing.from_json(preprocessing) if preprocessing else None,
            tuple(classes) if classes else None,
            "a file of ours",
            mean_image,
        )
    default = preprocessing_lib.CIFAR if default_input(model)[0] == 32 else preprocessing_lib.TORCHVISION
    classes = variables["params"]["head"]["bias"].shape[0]
    known = names.classes if names.classes and len(names.classes) == classes else None
    return Pretrained(settings, variables, preprocessing_lib.beside(path) or default, known, names.title)


def _recognise(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> names_lib.Names | None:
    """The table of a file's names, by keys that only its format has; None for our own names."""
    if any(name.startswith("params/") for name in arrays):
        return None
    if "conv1.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        return names_lib.AKAMASTER if "linear.weight" in arrays else names_lib.TORCHVISION
    if "features.0.weight" in arrays and "classifier.0.weight" in arrays:
        return names_lib.VGG_BN if "features.1.running_mean" in arrays else names_lib.VGG
    some = ", ".join(sorted(arrays)[:3])
    raise UsageError(
        f"{path}: names of no known format ({some}, ...); known are torchvision's, timm's, akamaster's, ours"
    )


def _settings(path: pathlib.Path, arrays: dict[str, np.ndarray], model: str) -> dict[str, Any]:
    """What the names and shapes say of the network, once it is known to be ``model``."""
    blocks = _blocks(arrays)
    if not blocks:
        return {}
    module = create_model(model, dtype="float32")
    bottleneck = "layer1.0.conv3.weight" in arrays
    found = (blocks, bottleneck)
    if getattr(module, "blocks", None) != blocks or getattr(module, "bottleneck", None) != bottleneck:
        raise UsageError(f"{path}: holds {_name_of(*found)}, not {model}")
    if bottleneck and module.stride_in != "middle":
        raise UsageError(
            f"{path}: its names are torchvision's, whose networks are v1.5: ask for {model}_v1_5, not {model}"
        )
    if len(blocks) == 4 or module.shortcut == "none":
        return {}
    shortcuts = [name for name in arrays if name.endswith("downsample.0.weight")]
    if shortcuts:
        return {"shortcut": "C" if len(shortcuts) == sum(blocks) else "B"}
    return {"shortcut": "A", "shortcut_zeros": "both" if "linear.weight" in arrays else "end"}


def _blocks(arrays: dict[str, np.ndarray]) -> tuple[int, ...]:
    """How many blocks each ``layer`` of torch's names has."""
    found = {tuple(map(int, match.groups())) for name in arrays if (match := re.match(r"layer(\d+)\.(\d+)\.", name))}
    stages = max((stage for stage, _ in found), default=0)
    return tuple(sum(stage == number for number, _ in found) for stage in range(1, stages + 1))


def _name_of(blocks: tuple[int, ...], bottleneck: bool) -> str:
    """The name of the network that has these blocks, or their description."""
    if len(blocks) == 3 and len(set(blocks)) == 1:
        return f"cifar_resnet{6 * blocks[0] + 2}"
    for name, row in MODELS.items():
        settings = row.keywords
        if settings.get("blocks") == blocks and settings.get("bottleneck", False) == bottleneck:
            return f"{name}_v1_5" if bottleneck else name
    kind = "bottleneck" if bottleneck else "basic"
    return f"a network of {', '.join(map(str, blocks))} {kind} blocks"


def _fit(
    path: pathlib.Path,
    arrays: dict[str, np.ndarray],
    names: names_lib.Names | None,
    model: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The arrays as variables of the network; a UsageError names the first that does not fit."""
    head = names.theirs("params/head/bias") if names else "params/head/bias"
    classes = arrays[head].shape[0] if head in arrays and arrays[head].ndim else default_input(model)[1]
    module = create_model(model, classes, "float32", **settings)
    size = default_input(model)[0]
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    variables, used = {}, set()
    for ours, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        theirs = names.theirs(ours) if names else ours
        if theirs not in arrays:
            raise UsageError(f"{path}: {theirs} is missing, which {model} needs for {ours}")
        array, expected = arrays[theirs], names.their_shape(ours, leaf.shape) if names else leaf.shape
        if array.shape != expected:
            raise UsageError(f"{path}: {theirs} has shape {array.shape}, and {model} needs {expected}")
        if not np.isfinite(array).all():
            raise UsageError(f"{path}: {theirs} has values that are not finite")
        array = names.to_ours(array, leaf.shape) if names else array
        variables[ours] = np.ascontiguousarray(array, np.float32)
        used.add(theirs)
    unused = sorted(arrays.keys() - used)
    if unused:
        raise UsageError(f"{path}: {unused[0]} is no part of {model} ({len(unused)} such arrays)")
    return traverse_util.unflatten_dict(variables, sep="/")
