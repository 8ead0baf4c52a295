"""A network with its weights and preprocessing as one StableHLO program, for whoever has JAX and not this package."""

import pathlib

import jax
from jax import export, numpy as jnp

from resnet_jax.errors import UsageError
from resnet_jax.models.fold import fold
from resnet_jax.models.registry import create_model, default_input
from resnet_jax.output import write_whole
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def input_size(model: str, weights: Pretrained) -> int:
    """Side of the images that the program takes, pixels."""
    return weights.preprocessing.image_size if weights.preprocessing else default_input(model)[0]


def save_program(path: pathlib.Path, model: str, weights: Pretrained) -> None:
    """Writes ``images uint8 [N, S, S, C] -> logits float32 [N, classes]``, N being any number; whole or not at all.

    Args:
      path: the file; ``jax.export.deserialize(path.read_bytes()).call(images)`` runs it.
      model: our name of the network.
      weights: with their preprocessing, which becomes a part of the program.

    Raises:
      UsageError: the preprocessing is not known, or the file can't be written.
    """
    if weights.preprocessing is None:
        raise UsageError(f"{path}: the weights say nothing of their preprocessing, which is a part of the program")
    preprocessing: Preprocessing = weights.preprocessing
    network = create_model(model, weights.num_classes, "float32", **weights.settings)
    module, variables = fold(network, weights.variables)

    def logits(images: jax.Array) -> jax.Array:
        return module.apply(variables, preprocessing.normalise(images))

    size, channels = input_size(model, weights), len(preprocessing.mean)
    shape = export.symbolic_shape(f"n, {size}, {size}, {channels}")
    exported = export.export(jax.jit(logits), platforms=_PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    write_whole(path, lambda file: file.write(exported.serialize()))
