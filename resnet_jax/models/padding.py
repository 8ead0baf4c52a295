"""Images that fill a part of their canvas: networks that do not notice the rest."""

from collections.abc import Iterator
import contextlib
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.models.layers import Conv, MaxPool
from resnet_jax.models.normalisation import BatchNorm, GroupNorm

Size = tuple[int, int]  # (height, width), pixels or cells.


def inside(canvas: Size, extents: jax.Array) -> jax.Array:
    """Which positions of a canvas (H, W) are the image's: bool [N, H, W]; extents (height, width) are int [N, 2]."""
    rows, columns = (jnp.arange(size) < extents[:, axis, None] for axis, size in enumerate(canvas))
    return rows[:, :, None] & columns[:, None, :]


class Extents:
    """Which part of each map is the images': ``extents[height, width]`` is int [N, 2] for a map of that size.

    It remembers layers and not arrays: those of a scanned or rematerialised block do not live outside it.
    """

    def __init__(self, canvas: Size, extents: jax.Array):
        self._images = extents
        self._layers: dict[Size, tuple[Conv | MaxPool, ...]] = {canvas: ()}

    def __getitem__(self, size: Size) -> jax.Array:
        extents = self._images
        for layer in self._layers[size]:
            extents = layer.output_size(extents)
        return extents

    def add(self, layer: Conv | MaxPool, size: Size, output: Size) -> None:
        """Notes that the layer makes a map of size ``output`` of one of ``size``; one that keeps it adds nothing."""
        self._layers.setdefault(output, (*self._layers[size], layer))


@contextlib.contextmanager
def masked_padding(canvas: Size, extents: jax.Array) -> Iterator[Extents]:
    """Networks applied within it see each image as if the layers had padded the image itself.

    What lies beyond an image's borders is set to zero before every convolution and pooling, and neither BatchNorm, in
    training, nor GroupNorm counts it; models know nothing of it.

    Args:
      canvas: of the images, pixels.
      extents: (height, width) of each image, in the canvas's upper left, int [N, 2]; zeros where a row holds none.

    Yields:
      By the size of every map that occurred in the network: which part of it is the images', int [N, 2].
      What a map holds beyond that has no meaning.
    """
    by_size = Extents(canvas, extents)

    def mask(layer: Any, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, (BatchNorm, Conv, GroupNorm, MaxPool)):
            return layer(*arguments, **keywords)
        x, *others = arguments
        size = x.shape[1:3]
        own = inside(size, by_size[size])
        if isinstance(module, (BatchNorm, GroupNorm)):
            return layer(x, *others, counted=own, **keywords)
        y = layer(jnp.where(own[..., None], x, 0), *others, **keywords)
        by_size.add(module, size, y.shape[1:3])
        return y

    with nn.intercept_methods(mask):
        yield by_size
