"""The layers all networks are made of: convolution, normalisation, pooling.

Arrays are NHWC. Padding is explicit everywhere: XLA's ``SAME`` pads strided windows on the right first,
which is neither Caffe's nor torch's padding.
"""

import math
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.distributed import BATCH_AXIS, platform
from resnet_jax.errors import UsageError

# Wu and He's choice for ImageNet's networks (Group Normalization, 2018, section 4.1).
CHANNEL_GROUPS = 32


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
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((self.pad, self.pad), (self.pad, self.pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
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


def count_groups(batch_norm: str, batch: int) -> int:
    """Into how many groups of consecutive examples a batch is split for its BatchNorm statistics.

    ``global`` is one group; ``per_device`` one per device of the mesh in force (``jax.set_mesh``);
    ``group:N`` is N examples a group, whichever device they lie on. ``group_norm``, which takes none of the batch, is
    one group too.
    """
    if batch_norm in ("global", "frozen") or is_group_norm(batch_norm):
        return 1
    if batch_norm == "per_device":
        groups = dict(jax.sharding.get_abstract_mesh().shape).get(BATCH_AXIS, 1)
        if batch % groups:
            raise UsageError(f"batch_norm=per_device: a batch of {batch} does not divide over {groups} devices")
        return groups
    name, _, size = batch_norm.partition(":")
    if name != "group" or not size.isdecimal() or int(size) < 1:
        raise UsageError(
            f"batch_norm {batch_norm!r} is unknown: global, per_device, group:N (as in group:32, examples), group_norm,"
            " group_norm:N (as in group_norm:32, groups of channels) or frozen"
        )
    if batch % int(size):
        raise UsageError(
            f"batch_norm={batch_norm}: a batch of {batch} does not divide into groups of {size};"
            " model.batch_norm=global always does"
        )
    return batch // int(size)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, statistics in float32 at least.

    In training each group of examples (``count_groups``) is normalised by its own mean and biased variance, of all
    positions or those ``counted``, bool [N, H, W]. The running ones are of the whole batch, merged from the groups'
    E[x] and E[x^2], the same on every device: running = momentum * running + (1 - momentum) * batch.
    """

    batch_norm: str = "global"
    momentum: float = 0.9  # torch writes this one as 0.1.
    epsilon: float = 1e-5
    scale_init: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, counted: jax.Array | None = None) -> jax.Array:
        channels, dtype = x.shape[-1:], storage_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.constant(self.scale_init), channels, dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), channels, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
        if not train or self.batch_norm == "frozen":  # Fine-tuning may leave the statistics as they came.
            y = (x - running_mean.value) * (scale * jax.lax.rsqrt(running_var.value + self.epsilon)) + bias
            return y.astype(self.dtype)

        groups = count_groups(self.batch_norm, x.shape[0])
        grouped = x.reshape(groups, x.shape[0] // groups, *x.shape[1:]).astype(dtype)
        axes = tuple(range(1, grouped.ndim - 1))
        own, positions, weights = grouped, math.prod(grouped.shape[1:-1]), None
        if counted is not None:
            counted = counted.reshape(*grouped.shape[:-1], 1)
            own = jnp.where(counted, grouped, 0)
            positions = counted.sum(axes, keepdims=True)
            weights, positions = positions.reshape(groups), jnp.maximum(positions, 1)
        mean = own.sum(axes, keepdims=True) / positions
        square = jnp.square(own).sum(axes, keepdims=True) / positions
        var = jnp.maximum(square - jnp.square(mean), 0)
        if not self.is_initializing():
            batch_mean, batch_square = (jnp.average(x, 0, weights).reshape(channels) for x in (mean, square))
            batch_var = jnp.maximum(batch_square - jnp.square(batch_mean), 0)
            for running, batch in ((running_mean, batch_mean), (running_var, batch_var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        y = (grouped - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
        return y.reshape(x.shape).astype(self.dtype)


class Bias(nn.Module):
    """What is left of BN that is folded into the convolution before it (``fold``): a ``bias`` for each channel."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if train:
            raise UsageError("batch_norm=folded is for inference: what is trained is the network that fold was given")
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], storage_dtype(self.dtype))
        return x + bias.astype(self.dtype)


def is_group_norm(batch_norm: str) -> bool:
    """Whether that names GroupNorm: ``group_norm`` or ``group_norm:N``."""
    name, colon, groups = batch_norm.partition(":")
    return name == "group_norm" and (not colon or (groups.isdecimal() and int(groups) > 0))


def count_channel_groups(batch_norm: str, channels: int) -> int:
    """Into how many groups of consecutive channels GroupNorm splits a layer.

    ``group_norm:N`` is N. ``group_norm`` is 32, or where that would leave less than two channels to a group, or
    does not divide, the next smaller number that does: 8 of the 16 channels that CIFAR nets begin with.

    Raises:
      UsageError: N does not divide the channels.
    """
    _, _, asked = batch_norm.partition(":")
    if not asked:
        return next(n for n in range(max(1, min(CHANNEL_GROUPS, channels // 2)), 0, -1) if channels % n == 0)
    if channels % int(asked):
        raise UsageError(
            f"batch_norm={batch_norm}: {channels} channels do not divide into {asked} groups;"
            " model.batch_norm=group_norm finds a number that does"
        )
    return int(asked)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, 2018): each example's groups of channels by their own mean and biased variance.

    The same in training and test, and whatever else is in the batch: what trains from scratch where few images fit.
    Statistics are taken in float32 at least. ``counted``, bool [N, H, W], says which positions have a part in them.
    """

    batch_norm: str = "group_norm"
    epsilon: float = 1e-5
    scale_init: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, counted: jax.Array | None = None) -> jax.Array:
        channels, dtype = x.shape[-1], storage_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.constant(self.scale_init), (channels,), dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), dtype)
        groups, wide = count_channel_groups(self.batch_norm, channels), x.astype(dtype)
        own, positions = wide, math.prod(x.shape[1:-1])
        if counted is not None:
            own = jnp.where(counted[..., None], wide, 0)
            positions = jnp.maximum(counted.sum(tuple(range(1, counted.ndim))), 1)[:, None]
        over = tuple(range(1, x.ndim - 1))

        def of_groups(sums: jax.Array) -> jax.Array:
            """Sums over positions [N, C] -> means over groups, for each channel [N, C]."""
            means = (sums / positions).reshape(len(x), groups, -1).mean(-1)
            return jnp.repeat(means, channels // groups, axis=-1)

        # In one pass, and over whole channels first: reductions over parts of a pixel are slow on CPUs.
        mean, square = of_groups(own.sum(over)), of_groups(jnp.square(own).sum(over))
        factor = scale * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)
        factor, shift = (array.reshape(len(x), *(1,) * len(over), channels) for array in (factor, bias - mean * factor))
        return (wide * factor + shift).astype(self.dtype)


def normalisation(batch_norm: str, momentum: float, dtype: Any, name: str, scale_init: float = 1.0) -> nn.Module:
    """The layer that ``batch_norm`` asks for, called with (x, train). Norms have parameters ``scale`` and ``bias``."""
    if batch_norm == "folded":
        return Bias(dtype, name=name)
    if is_group_norm(batch_norm):
        return GroupNorm(batch_norm, scale_init=scale_init, dtype=dtype, name=name)
    return BatchNorm(batch_norm, momentum, scale_init=scale_init, dtype=dtype, name=name)
