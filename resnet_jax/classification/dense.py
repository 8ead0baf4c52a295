"""A network applied fully convolutionally: what it says of every part of images of any shape (section 3.4).

Images of several shapes share a canvas, whose rest is padding. An image must not notice it (``models/padding.py``).
"""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.models.layers import storage_dtype
from resnet_jax.models.padding import inside, masked_padding


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
    with masked_padding(images.shape[1:3], shapes) as extents:
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
        counts = inside(logits.shape[1:3], extent - window + 1)[..., None]
        total = jnp.where(counts, jax.nn.softmax(logits.astype(storage_dtype(logits.dtype))), 0).sum((1, 2))
        return total / jnp.maximum(counts.sum((1, 2)), 1)

    return (scores(images) + scores(mirror(images, shapes))) / 2


def mirror(images: jax.Array, shapes: jax.Array) -> jax.Array:
    """Mirrors each image within its own width; it stays in the upper left of its canvas."""
    width = images.shape[2]
    source = (shapes[:, 1:] - 1 - jnp.arange(width)) % width
    return jnp.take_along_axis(images, source[:, None, :, None], axis=2)
