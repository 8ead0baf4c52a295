"""What the device does to uint8 pixels inside the jitted step: mean, crop, flip. Seeded per example."""

import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.distributed import platform


def example_keys(seed: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """One random key per example [N], from (seed, epoch, example index) alone."""
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(seed, e), i))(epoch, index)


def pixel_statistics(images: np.ndarray, mean: str, std: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of uint8 images [N, H, W, C], on the scale where white is 1, float32.

    The mean is an image [H, W, C] for ``pixel``, [C] for ``channel``, else zeros [C]; the standard deviation is [C],
    of all pixels of a channel for ``channel``, else ones.
    """
    channels = images.shape[-1]
    total = images.sum(0, dtype=np.float64) / (255 * len(images))  # The mean image.
    square = np.zeros(channels)
    part = max(1, (1 << 22) // images[0].size)  # 64-bit copies of all pixels would take gigabytes.
    for start in range(0, len(images), part):
        square += np.square(images[start : start + part] / 255.0).sum((0, 1, 2))
    per_channel = total.mean((0, 1))
    variance = square / (images.size / channels) - per_channel**2
    chosen = {"pixel": total, "channel": per_channel}.get(mean, np.zeros(channels))
    deviation = np.sqrt(np.maximum(variance, 1e-12)) if std == "channel" else np.ones(channels)
    return chosen.astype(np.float32), deviation.astype(np.float32)


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """uint8 [N, H, W, C] -> (images / 255 - mean) / std in the dtype of ``mean``."""
    return (images.astype(mean.dtype) / 255 - mean) / std


# Principal components of ImageNet's colours in [0, 1] (Krizhevsky et al., 2012; figures of fb.resnet.torch): the
# deviation along each, and the directions as columns, of which the first is grey.
COLOR_DEVIATIONS = (0.2175, 0.0188, 0.0045)
COLOR_DIRECTIONS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def color_noise(keys: jax.Array, strength: float, dtype: jnp.dtype) -> jax.Array:
    """The colour that is added to each image whole, [N, 1, 1, 3], on the scale where white is 1.

    The paper's "standard color augmentation": along each principal component a normal draw of deviation ``strength``
    (0.1) times the component's own.
    """
    alpha = strength * jax.vmap(lambda key: jax.random.normal(key, (3,), dtype))(keys)
    scaled = alpha * jnp.asarray(COLOR_DEVIATIONS, dtype)
    # Written out: a matrix product would be rounded to bfloat16 on TPUs.
    colors = (scaled[:, None, :] * jnp.asarray(COLOR_DIRECTIONS, dtype)).sum(-1)
    return colors[:, None, None, :]


def random_crop(keys: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """A random crop of [N, H, W, C] from each image after padding it with ``pad`` zeros on every side."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * pad + 1))(keys)
    # XLA:TPU takes slices that start in many places one by one, in a loop.
    crop = chosen_windows if platform() == "tpu" else sliced_windows
    return crop(padded, corners, images.shape[1:3])


def sliced_windows(images: jax.Array, corners: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The window of ``size`` (height, width) at each image's corner: [N, H, W, C], int [N, 2] -> [N, *size, C]."""
    cut = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), (*size, image.shape[-1]))
    return jax.vmap(cut)(images, corners)


def chosen_windows(images: jax.Array, corners: jax.Array, size: tuple[int, int]) -> jax.Array:
    """As ``sliced_windows``, by choosing among the windows at all corners: more work, but all images at once."""
    for axis, length in enumerate(size, start=1):
        starts = range(images.shape[axis] - length + 1)
        windows = [jax.lax.slice_in_dim(images, start, start + length, axis=axis) for start in starts]
        which = jnp.broadcast_to(corners[:, axis - 1, None, None, None], windows[0].shape)
        images = jax.lax.select_n(which, *windows) if len(windows) > 1 else windows[0]
    return images


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each of [N, H, W, C] left to right with probability a half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def augment(
    keys: jax.Array, images: jax.Array, pad: int, flip: bool, noise: float = 0.0, std: jax.Array | float = 1.0
) -> jax.Array:
    """What training does to normalised images [N, H, W, C] at random: zero-padded crop, mirror (section 4.2), colour.

    Args:
      keys: one per example.
      images: normalised.
      pad: zeros on each side before the crop, pixels.
      flip: whether half of them are mirrored.
      noise: strength of the colour noise (of RGB images alone); 0: none.
      std: what the images were divided by.
    """
    crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if pad:
        images = random_crop(crop_keys, images, pad)
    if flip:
        images = random_flip(flip_keys, images)
    if noise:
        colour_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
        images = images + color_noise(colour_keys, noise, images.dtype) / std
    return images
