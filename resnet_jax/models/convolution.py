"""Convolutions, and what brings XLA:CPU to compute their gradients fast."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from resnet_jax.distributed import platform

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


def convolve(x: jax.Array, kernel: jax.Array, stride: int, pad: int) -> jax.Array:
    """The convolution of [N, H, W, C_in] with [size, size, C_in, C_out], ``pad`` zeros on every side.

    On CPUs JAX differentiates it in reverse mode alone (``jax.grad``, not ``jax.jvp``): see ``from_stored``.
    """
    if platform() != "cpu":
        return _convolution(x, kernel, stride=stride, pad=pad)
    if kernel.shape[0] == 1 and not pad:
        # XLA:CPU takes up to twenty times as long for the gradient of such a kernel by a convolution.
        return from_stored(jnp.matmul, x[:, ::stride, ::stride], kernel[0, 0])
    return from_stored(partial(_convolution, stride=stride, pad=pad), x, kernel)


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, pad: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_stored(function: Bilinear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``function(x, kernel)``, bilinear; the gradients are computed from arrays that lie in memory.

    XLA:CPU would fuse what makes x and the output's gradient, as BN and ReLU, into the transpositions that the kernel's
    gradient needs, and so compute it element by element at long strides; this spares 8 to 21% of a step
    (``benchmarks/RESULTS.md``).
    """
    return function(x, kernel)


def _forward(function: Bilinear, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return function(x, kernel), (x, kernel)


def _backward(function: Bilinear, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[Any, Any]:
    x, kernel = saved
    gradient = _stored(gradient)
    of_x = jax.linear_transpose(lambda x: function(x, kernel), x)
    of_kernel = jax.linear_transpose(partial(function, _stored(x)), kernel)
    return *of_x(gradient), *of_kernel(gradient)


from_stored.defvjp(_forward, _backward)


_identity = jax.jit(lambda x: x + 0, inline=False)


def _stored(x: jax.Array) -> jax.Array:
    """``x``, which no fusion reaches into: XLA:CPU looks through ``optimization_barrier``, but not into such a call."""
    with set_xla_metadata(inlineable="false"):
        return _identity(x)
