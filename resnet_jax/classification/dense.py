"""A network applied fully convolutionally: what it says of every part of images of any shape (section 3.4).

Images of several shapes share a canvas, whose rest is padding. An image must not notice it: what lies beyond its
borders is set to zero before every convolution and pooling, as if the layer had padded the image itself.
"""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.models.layers import Conv, MaxPool, storage_dtype


def features_of_parts(
    model: nn.Module, variables: Any, images: jax.Array, shapes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last stage's output for images that fill a part of their canvas each.

    Args:
      model: the network.
      variables: its weights.
      images: normalised [N, H, W, C], the image in the upper left.
      shapes: (height, width) of the images, int [N, 2].

    Returns:
      The features [N, H', W', C'] and the part of them that is the image's, int [N, 2]; what is beyond has no meaning.
    """
    extents = {images.shape[1:3]: shapes}  # Of the image on a canvas of each size that occurs in the network.

    def mask_padding(layer: Any, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, (Conv, MaxPool)):
            return layer(*arguments, **keywords)
        (x,) = arguments
        extent = extents[x.shape[1:3]]
        y = layer(jnp.where(_inside(x.shape[1:3], extent)[..., None], x, 0), **keywords)
        extents[y.shape[1:3]] = module.output_size(extent)
        return y

    with nn.intercept_methods(mask_padding):
        features = model.apply(variables, images, method="features")[f"stage{len(model.blocks)}"]
    return features, extents[features.shape[1:3]]


def dense_scores(model: nn.Module, variables: Any, images: jax.Array, shapes: jax.Array, window: int) -> jax.Array:
    """Softmax scores at every position of the last map, averaged over positions and over the mirrored images.

    Args:
      model: the network.
      variables: its weights.
      images: normalised [N, H, W, C], each in the upper left of its canvas.
      shapes: (height, width) of the images, int [N, 2]; zeros where a row holds none.
      window: side of the last map at the image size that the network was trained with; averages are over as much.

    Returns:
      float32 [N, classes].
    """

    def scores(images: jax.Array) -> jax.Array:
        features, extent = features_of_parts(model, variables, images, shapes)
        logits = model.apply(variables, features, window, method="classify_densely")
        inside = _inside(logits.shape[1:3], extent - window + 1)[..., None]
        total = jnp.where(inside, jax.nn.softmax(logits.astype(storage_dtype(logits.dtype))), 0).sum((1, 2))
        return total / jnp.maximum(inside.sum((1, 2)), 1)

    return (scores(images) + scores(mirror(images, shapes))) / 2


def mirror(images: jax.Array, shapes: jax.Array) -> jax.Array:
    """Mirrors each image within its own width; it stays in the upper left of its canvas."""
    width = images.shape[2]
    source = (shapes[:, 1:] - 1 - jnp.arange(width)) % width
    return jnp.take_along_axis(images, source[:, None, :, None], axis=2)


def _inside(canvas: tuple[int, int], extents: jax.Array) -> jax.Array:
    """Which positions of a canvas (H, W) are the image's: bool [N, H, W]; extents are int [N, 2]."""
    rows, columns = (jnp.arange(size) < extents[:, axis, None] for axis, size in enumerate(canvas))
    return rows[:, :, None] & columns[:, None, :]
