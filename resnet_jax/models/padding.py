"""Images that fill a part of their canvas: networks that do not notice the rest."""

from collections.abc import Iterator
import contextlib
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.models.layers import Conv, GroupNorm, MaxPool

Size = tuple[int, int]  # (height, width), pixels or cells.


def inside(canvas: Size, extents: jax.Array) -> jax.Array:
    """Which positions of a canvas (H, W) are the image's: bool [N, H, W]; extents (height, width) are int [N, 2]."""
    rows, columns = (jnp.arange(size) < extents[:, axis, None] for axis, size in enumerate(canvas))
    return rows[:, :, None] & columns[:, None, :]


@contextlib.contextmanager
def masked_padding(canvas: Size, extents: jax.Array) -> Iterator[dict[Size, jax.Array]]:
    """Networks applied within it see each image as if the layers had padded the image itself.

    What lies beyond an image's borders is set to zero before every convolution and pooling, and GroupNorm does not
    count it; models know nothing of it. Statistics that BatchNorm takes of a batch would count padding: normalise with
    running ones.

    Args:
      canvas: of the images, pixels.
      extents: (height, width) of each image, in the canvas's upper left, int [N, 2].

    Yields:
      By the size of every map that occurred in the network: which part of it is the images', int [N, 2].
      What a map holds beyond that has no meaning.
    """
    by_size = {canvas: extents}

    def mask(layer: Any, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, (Conv, GroupNorm, MaxPool)):
            return layer(*arguments, **keywords)
        x, *others = arguments
        extent = by_size[x.shape[1:3]]
        own = inside(x.shape[1:3], extent)
        if isinstance(module, GroupNorm):
            return layer(x, *others, counted=own, **keywords)
        y = layer(jnp.where(own[..., None], x, 0), *others, **keywords)
        by_size[y.shape[1:3]] = module.output_size(extent)
        return y

    with nn.intercept_methods(mask):
        yield by_size
