"""Arrays by a format's names into a network's variables: each one used, or the first that does not fit named."""

import pathlib
from typing import Any

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.errors import UsageError
from resnet_jax.models.registry import create_model, default_input
from resnet_jax.pretrained.files import Arrays
from resnet_jax.pretrained.formats import EPSILON, Format


def fit(
    path: pathlib.Path, arrays: Arrays, known: Format | None, model: str, settings: dict[str, Any], channels: int = 3
) -> dict[str, Any]:
    """The arrays as variables of the network.

    Args:
      path: their file.
      arrays: by their names.
      known: their format; None for our own names.
      model: our name of the network.
      settings: its attributes.
      channels: of the images it takes.

    Returns:
      ``params`` and ``batch_stats``, nested, float32.

    Raises:
      UsageError: an array is missing, too many, of another shape, or not finite.
    """
    head = known.theirs("params/head/bias") if known else "params/head/bias"
    classes = arrays[head].shape[0] if head in arrays and arrays[head].ndim else default_input(model)[1]
    module, size = create_model(model, classes, "float32", **settings), default_input(model)[0]
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, channels)))
    shapes = {ours: leaf.shape for ours, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    variables, used = {}, set()

    def take(theirs: str, shape: tuple[int, ...]) -> np.ndarray:
        used.add(theirs)
        if arrays[theirs].shape != shape:
            raise UsageError(f"{path}: {theirs} has shape {arrays[theirs].shape}, and {model} needs {shape}")
        with np.errstate(over="ignore"):  # What float32 can't hold is no weight either.
            finite = np.isfinite(arrays[theirs].astype(np.float32)).all()
        if not finite:
            raise UsageError(f"{path}: {theirs} has values that are not finite")
        return arrays[theirs]

    for ours, shape in shapes.items():
        theirs = known.theirs(ours) if known else ours
        if theirs not in arrays:
            raise UsageError(f"{path}: {theirs} is missing, which {model} needs for {ours}")
        array = take(theirs, known.their_shape(ours, shape) if known else shape)
        if known:
            array = _computed_alike(ours, known.to_ours(array, shape), known)
            bias = _bias_before(ours)
            if bias and bias not in shapes and known.theirs(bias) in arrays:
                # BN subtracts a mean of what the convolution has added to: it may as well subtract less.
                array = array - take(known.theirs(bias), shape)
        variables[ours] = np.ascontiguousarray(array, np.float32)
    unused = sorted(arrays.keys() - used)
    if unused:
        raise UsageError(f"{path}: {unused[0]} is no part of {model} ({len(unused)} such arrays)")
    return traverse_util.unflatten_dict(variables, sep="/")


def _bias_before(ours: str) -> str | None:
    """The bias of the convolution whose output has this running mean; None for other arrays."""
    if not ours.endswith("/mean"):
        return None
    return ours.replace("batch_stats/", "params/").replace("bn", "conv").replace("/mean", "/bias")


def _computed_alike(ours: str, array: np.ndarray, known: Format) -> np.ndarray:
    """What a format computes otherwise, as other values of our array: exact where running statistics are used."""
    if ours.endswith("/var") and known.epsilon != EPSILON:
        return array.astype(np.float64) + (known.epsilon - EPSILON)
    if ours == "params/stem/conv/kernel" and known.bgr:
        return array[:, :, ::-1].astype(np.float64) * (255 * np.array(known.preprocessing.std)[:, None])
    return array
