"""What the device does to uint8 pixels inside the jitted step: mean, crop, flip. Seeded per example."""

import jax
from jax import numpy as jnp
import numpy as np


def example_keys(seed: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """One random key per example [N], from (seed, epoch, example index) alone."""
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(seed, e), i))(epoch, index)


def pixel_statistics(images: np.ndarray, mean: str, std: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of uint8 images [N, H, W, C], on the scale where white is 1, float32.

    The mean is an image [H, W, C] for ``pixel``, [C] for ``channel`` and zeros [C] for ``none``;
    the standard deviation is [C], of all pixels of a channel, or ones.
    """
    channels = images.shape[-1]
    total = images.sum(0, dtype=np.float64) / (255 * len(images))  # The mean image.
    square = np.zeros(channels)
    part = max(1, (1 << 22) // images[0].size)  # 64-bit copies of all pixels would take gigabytes.
    for start in range(0, len(images), part):
        square += np.square(images[start : start + part] / 255.0).sum((0, 1, 2))
    per_channel = total.mean((0, 1))
    variance = square / (images.size / channels) - per_channel**2
    chosen = {"pixel": total, "channel": per_channel, "none": np.zeros(channels)}[mean]
    deviation = {"channel": np.sqrt(np.maximum(variance, 1e-12)), "none": np.ones(channels)}[std]
    return chosen.astype(np.float32), deviation.astype(np.float32)


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """uint8 [N, H, W, C] -> (images / 255 - mean) / std in the dtype of ``mean``."""
    return (images.astype(mean.dtype) / 255 - mean) / std


def random_crop(keys: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """A random crop of [N, H, W, C] from each image after padding it with ``pad`` zeros on every side."""
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def crop(key, image):
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(image, (top, left, 0), (height, width, channels))

    return jax.vmap(crop)(keys, padded)


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each of [N, H, W, C] left to right with probability a half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def augment(keys: jax.Array, images: jax.Array, pad: int, flip: bool) -> jax.Array:
    """The paper's CIFAR augmentation (section 4.2) of normalised images: zero-padded random crop and mirror."""
    crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if pad:
        images = random_crop(crop_keys, images, pad)
    if flip:
        images = random_flip(flip_keys, images)
    return images
