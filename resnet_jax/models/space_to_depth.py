"""The 7x7/2 convolution of the stem as a 4x4 convolution on 2x2 blocks of pixels.

Three input channels leave most of a matrix unit idle; blocks have twelve. Used for ImageNet's stem since MLPerf's
ResNet-50 for TPUs.
"""

import jax
from jax import numpy as jnp


def to_blocks(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), 4 C]: each 2x2 block's pixels beside each other, zeros beyond."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    x = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], x.shape[3], 4 * channels)


def kernel_on_blocks(kernel: jax.Array) -> jax.Array:
    """A 7x7 kernel [7, 7, C_in, C_out] as that of blocks, [4, 4, 4 C_in, C_out]."""
    inside, outside = kernel.shape[2:]
    # With zeros before it the kernel begins where a block does.
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, inside, outside)
    return kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * inside, outside)


def conv_on_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x`` [N, H, W, C_in] with a kernel [7, 7, C_in, C_out], stride 2, three zeros on each side."""
    return jax.lax.conv_general_dilated(
        to_blocks(x),
        kernel_on_blocks(kernel),
        window_strides=(1, 1),
        padding=((2, 1), (2, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
