"""The layers all networks are made of: convolution, pooling, classifier.

Arrays are NHWC. Padding is explicit everywhere: XLA's ``SAME`` pads strided windows on the right first,
which is neither Caffe's nor torch's padding.
"""

import math
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.distributed import platform
from resnet_jax.errors import UsageError
from resnet_jax.models.convolution import convolve
from resnet_jax.models.space_to_depth import conv_on_blocks


def resolve_dtype(name: str) -> jnp.dtype:
    """The compute dtype: ``auto`` is bfloat16 on TPU and GPU, float32 on CPU."""
    if name == "auto":
        return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)
    if name not in ("bfloat16", "float32", "float64"):
        raise UsageError(f"dtype {name!r} is unknown: auto, bfloat16, float32 or float64")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise UsageError("dtype float64 needs JAX_ENABLE_X64=1 (or jax.config.update('jax_enable_x64', True))")
    return jnp.dtype(name)


def storage_dtype(compute_dtype: Any) -> jnp.dtype:
    """Dtype of parameters, statistics and logits: float32, or float64 where the computation is."""
    return jnp.promote_types(compute_dtype, jnp.float32)


def he_normal(fan: str, gain: float = 2.0) -> nn.initializers.Initializer:
    """He et al.'s normal initialisation of a kernel [..., C_in, C_out]: variance gain / fan.

    ``fan`` is ``fan_out`` (fb.resnet.torch, torchvision) or ``fan_in`` (Caffe's filler).
    """
    if fan not in ("fan_out", "fan_in"):
        raise UsageError(f"init_fan {fan!r} is unknown: fan_out or fan_in")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        size = math.prod(shape)
        fan_size = size // shape[-1 if fan == "fan_in" else -2]
        # Drawn flat: XLA compiles the same draw of a four-dimensional array four times as long.
        return (math.sqrt(gain / fan_size) * jax.random.normal(key, (size,), dtype)).reshape(shape)

    return init


def check_stage(number: int, stages: int) -> None:
    """Raises a UsageError where a network has no stage of this number."""
    if not 1 <= number <= stages:
        raise UsageError(f"stage {number} is not one of 1 to {stages}")


class MaxPool(nn.Module):
    """Max-pooling of [N, H, W, C] with ``padding`` on every side.

    ``round_up`` lets the last window reach beyond the last pixel rather than leave it out (Caffe).
    """

    window: int
    stride: int
    padding: int = 0
    round_up: bool = False

    def output_size(self, size: Any) -> Any:
        """The side of the output by that of the input, pixels; of a number or an array of them."""
        beyond = self.stride - 1 if self.round_up else 0
        return (size + 2 * self.padding - self.window + beyond) // self.stride + 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pads = []
        for size in x.shape[1:3]:
            covered = (self.output_size(size) - 1) * self.stride + self.window
            pads.append((self.padding, max(self.padding, covered - size - self.padding)))
        return nn.max_pool(x, (self.window, self.window), (self.stride, self.stride), pads)


def average_pool(x: jax.Array, window: int) -> jax.Array:
    """Averages over each ``window`` x ``window`` positions: [N, H, W, C] -> [N, H - window + 1, W - window + 1, C]."""
    return nn.avg_pool(x, (window, window), (1, 1))


class Conv(nn.Module):
    """A square convolution [N, H, W, C_in] -> [N, H', W', C_out], padded by ``(size - 1) // 2`` unless told."""

    features: int
    size: int
    stride: int = 1
    padding: int | None = None
    use_bias: bool = False
    init_fan: str = "fan_out"
    init_gain: float = 2.0
    bias_init: float = 0.0
    on_blocks: bool = False  # Compute a 7x7/2 convolution on 2x2 blocks of pixels (``space_to_depth``).
    dtype: Any = jnp.float32

    @property
    def pad(self) -> int:
        """Zeros on every side."""
        return (self.size - 1) // 2 if self.padding is None else self.padding

    def output_size(self, size: Any) -> Any:
        """The side of the output by that of the input, pixels; of a number or an array of them."""
        return (size + 2 * self.pad - self.size) // self.stride + 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal(self.init_fan, self.init_gain), shape, storage_dtype(self.dtype))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = conv_on_blocks(x, kernel) if self.on_blocks else convolve(x, kernel, self.stride, self.pad)
        if self.use_bias:
            init = nn.initializers.constant(self.bias_init)
            y = y + self.param("bias", init, (self.features,), storage_dtype(self.dtype)).astype(self.dtype)
        return y


class Head(nn.Module):
    """The classifier [..., C] -> logits [..., classes], in float32 at least."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = storage_dtype(self.dtype)
        # The paper is silent on the classifier: variance 1 / fan-in, since no ReLU follows.
        init = he_normal("fan_in", gain=1.0)
        kernel = self.param("kernel", init, (x.shape[-1], self.num_classes), dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.num_classes,), dtype)
        # Accelerators would multiply float32 in fewer bits.
        return jnp.matmul(x.astype(dtype), kernel, precision="highest") + bias
