"""BatchNorm of a widening 1x1 convolution without its output: statistics of y = x W follow from those of x.

E[y] = E[x] W and Cov[y] = W^T Cov[x] W. Normalising is then a matter of scaling W, and y as it was before, the widest
array of a bottleneck, is neither written and read again in the forward pass nor kept for the backward one.
"""

import jax
from jax import numpy as jnp

from resnet_jax.distributed import platform
from resnet_jax.models.convolution import from_stored


@jax.custom_vjp
def second_moment(x: jax.Array) -> jax.Array:
    """Sums of x x^T over each group: [G, N, H, W, C] -> [G, C, C], float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Accelerators would multiply float32 in fewer bits; of bfloat16 it costs nothing.
    return jnp.einsum("gnhwi,gnhwj->gij", x, x, precision="highest", preferred_element_type=wide)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return second_moment(x), x


def _backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # One product, where differentiating would make two.
    return (product(x, gradient + gradient.mT),)


second_moment.defvjp(_forward, _backward)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution with a kernel for each group: [G, N, H, W, C], [G, C, F] -> [G, N, H, W, F], of x's dtype."""
    kernel = kernel.astype(x.dtype)
    if len(x) > 1:
        return jnp.einsum("gnhwi,gij->gnhwj", x, kernel)
    # XLA fuses more of what is beside a plain convolution.
    return from_stored(jnp.matmul, x, kernel[0]) if platform() == "cpu" else jnp.matmul(x, kernel[0])


def mean_of_product(mean: jax.Array, kernel: jax.Array) -> jax.Array:
    """Means [G, 1, 1, 1, C] of x -> those of x @ kernel, [G, 1, 1, 1, F]; kernel [C, F] or one for each group."""
    return jnp.matmul(mean[:, 0, 0], kernel, precision="highest")[:, None, None]


def variance_of_product(x: jax.Array, mean: jax.Array, kernel: jax.Array, share: jax.Array) -> jax.Array:
    """The biased variance of each channel of x @ kernel over each group, from the moments of x.

    Args:
      x: [G, N, H, W, C], zero at positions that don't count.
      mean: of x over those that do, [G, 1, 1, 1, C], float32 at least.
      kernel: [C, F], of the mean's dtype.
      share: 1 / the number of positions that count, [G, 1, 1, 1, 1].

    Returns:
      [G, 1, 1, 1, F], of the mean's dtype.
    """
    mean = mean[:, 0, 0]  # [G, 1, C]
    covariance = second_moment(x) * share[:, 0, 0] - mean.mT * mean
    # Accelerators would multiply float32 in fewer bits.
    variance = (kernel * jnp.matmul(covariance, kernel, precision="highest")).sum(1, keepdims=True)
    return jnp.maximum(variance, 0)[:, None, None]
