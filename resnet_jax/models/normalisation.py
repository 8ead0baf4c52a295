"""Normalisation: BatchNorm over groups of examples, GroupNorm, and what is left of BN once it is folded."""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.distributed import count_devices
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import storage_dtype
from resnet_jax.models.products import mean_of_product, product, variance_of_product

# Wu and He's choice for ImageNet's networks (Group Normalization, 2018, section 4.1).
CHANNEL_GROUPS = 32


def count_groups(batch_norm: str, batch: int) -> int:
    """Into how many groups of consecutive examples a batch is split for its BatchNorm statistics.

    ``global`` is one group; ``per_device`` one per device of the mesh in force (``jax.set_mesh``);
    ``group:N`` is N examples a group, whichever device they lie on. ``group_norm``, which takes none of the batch, is
    one group too.
    """
    if batch_norm in ("global", "frozen") or is_group_norm(batch_norm):
        return 1
    if batch_norm == "per_device":
        groups = count_devices()
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

    Two things beside it are done with it in training, where fewer bytes are moved so. With a ``kernel`` [C_in, C], x
    [N, H, W, C_in] is what a 1x1 convolution is applied to first: the same as of x @ kernel, which is not made
    (``products``). With a ``pool``, a maximum over windows, ReLU and it follow.
    """

    batch_norm: str = "global"
    momentum: float = 0.9  # torch writes this one as 0.1.
    epsilon: float = 1e-5
    scale_init: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        counted: jax.Array | None = None,
        kernel: jax.Array | None = None,
        pool: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        channels, dtype = (x if kernel is None else kernel).shape[-1:], storage_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.constant(self.scale_init), channels, dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), channels, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
        follow = lambda y: y if pool is None else pool(nn.relu(y))
        if not train or self.batch_norm == "frozen":  # Fine-tuning may leave the statistics as they came.
            y = (x - running_mean.value) * (scale * jax.lax.rsqrt(running_var.value + self.epsilon)) + bias
            return follow(y.astype(self.dtype))

        # A maximum of what rises with x can be taken before: a quarter of the pixels is left to normalise, and to keep.
        # Not among padding, which must be zero where ReLU is.
        early = pool is not None and counted is None
        sign = jnp.where(scale < 0, -1, 1).astype(x.dtype) if early else 1
        x, scale = sign * x, sign * scale
        groups = count_groups(self.batch_norm, len(x))
        grouped = x.reshape(groups, -1, *x.shape[1:])
        # The kernel in the compute dtype, as the convolution has it that evaluation applies.
        rounded = None if kernel is None else kernel.astype(x.dtype).astype(dtype)
        mean, var, positions, input_mean = batch_moments(grouped, counted, rounded, dtype)
        if not self.is_initializing():
            total = positions.sum()
            square, weights = var + jnp.square(mean), positions / jnp.maximum(total, 1)
            batch_mean, batch_square = ((x * weights).sum(0).reshape(channels) for x in (sign * mean, square))
            batch_var = jnp.maximum(batch_square - jnp.square(batch_mean), 0)
            kept = jnp.where(total > 0, self.momentum, 1).astype(dtype)
            for running, batch in ((running_mean, batch_mean), (running_var, batch_var)):
                running.value = kept * running.value + (1 - kept) * batch
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        if kernel is not None:
            folded = (kernel * factor.reshape(groups, 1, -1)).astype(x.dtype)
            # By what was rounded, so that what comes out is centred.
            y = product(grouped, folded) + (bias - mean_of_product(input_mean, folded.astype(dtype)))
        else:
            pooled = pool(x) if early else x
            y = (pooled.reshape(groups, -1, *pooled.shape[1:]).astype(dtype) - mean) * factor + bias
        y = y.reshape(-1, *y.shape[2:]).astype(self.dtype)
        return nn.relu(y) if early else follow(y)


def batch_moments(
    x: jax.Array, counted: jax.Array | None, kernel: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Mean and biased variance of each channel over each group, in one pass over the data.

    Args:
      x: [G, N, ..., C].
      counted: which positions are taken, bool [G N, ...]; None: all.
      kernel: of a 1x1 convolution [C, F]: moments are of x @ kernel; None: of x.
      dtype: of the moments, float32 at least.

    Returns:
      Two arrays [G, 1, ..., 1, C], or F for C; how many positions each group has, of one channel of that shape; and
      with a kernel the mean of x itself.
    """
    axes = tuple(range(1, x.ndim - 1))
    positions = jnp.full((len(x), *[1] * (x.ndim - 1)), math.prod(x.shape[1:-1]), dtype)
    if counted is not None:
        counted = counted.reshape(*x.shape[:-1], 1)
        x, positions = jnp.where(counted, x, 0), counted.sum(axes, keepdims=True).astype(dtype)
    share = 1 / jnp.maximum(positions, 1)
    input_mean = x.sum(axes, keepdims=True, dtype=dtype) * share
    if kernel is not None:
        variance = variance_of_product(x, input_mean, kernel, share)
        return mean_of_product(input_mean, kernel), variance, positions, input_mean
    square = jnp.square(x.astype(dtype)).sum(axes, keepdims=True) * share
    return input_mean, jnp.maximum(square - jnp.square(input_mean), 0), positions, None


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
