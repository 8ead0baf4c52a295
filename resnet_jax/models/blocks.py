"""Residual blocks and their shortcuts (paper, section 3.2 and figures 2 and 5)."""

import math
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.distributed import count_devices, platform
from resnet_jax.models.layers import Conv
from resnet_jax.models.normalisation import BatchNorm, count_groups, normalisation

# How a block's two branches meet: the paper's options A, B and C, none (plain nets), or a gate (Highway nets).
SHORTCUTS = ("A", "B", "C", "none", "gated")

# From how many positions for each input channel the moments of a 1x1 convolution's input are cheaper than its output.
POSITIONS_PER_CHANNEL = 8


def pad_shortcut(x: jax.Array, features: int, stride: int, zeros: str) -> jax.Array:
    """Option A: every ``stride``-th pixel of [N, H, W, C], with zero channels up to ``features``; no parameters.

    ``zeros`` is ``end`` (fb.resnet.torch) or ``both`` (akamaster's CIFAR nets): where the new channels go.
    """
    x = x[:, ::stride, ::stride]
    new = features - x.shape[-1]
    before = {"end": 0, "both": new // 2}[zeros]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, new - before)))


def normalised(conv: Conv, norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """``norm(conv(x), train)``; trained BN takes its statistics from the convolution's input where that is cheaper."""
    widens = conv.size == conv.stride == 1 and x.shape[-1] < conv.features
    trained = train and isinstance(norm, BatchNorm) and norm.batch_norm != "frozen" and not norm.is_initializing()
    if not (widens and trained):
        return norm(conv(x), train)
    groups, devices = count_groups(norm.batch_norm, len(x)), count_devices()
    # What is computed of a group's moments has the size of a kernel and not of an image; and XLA:TPU makes copies of
    # several groups on one device that cost more than is gained.
    positions = math.prod(x.shape[:-1]) // groups
    if positions < POSITIONS_PER_CHANNEL * x.shape[-1] or (platform() == "tpu" and groups > devices):
        return norm(conv(x), train)
    return norm(x, train, kernel=conv.get_variable("params", "kernel")[0, 0])


class Block(nn.Module):
    """One residual block, [N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), features].

    ``bottleneck`` chooses between two 3x3 convolutions (figure 5, left) and 1x1, 3x3, 1x1 (right, a
    quarter of the width inside). BN follows every convolution, ReLU comes after the addition.
    """

    features: int
    stride: int = 1
    bottleneck: bool = False
    shortcut: str = "B"
    shortcut_zeros: str = "end"
    stride_in: str = "first"
    zero_init_last: bool = False
    gate_bias: float = -2.0
    init_fan: str = "fan_out"
    batch_norm: str = "global"
    batch_norm_momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        convolutions = self._convolutions()
        for i, (features, size, stride) in enumerate(convolutions, start=1):
            last = i == len(convolutions)
            conv = Conv(features, size, stride, init_fan=self.init_fan, dtype=self.dtype, name=f"conv{i}")
            norm = self._norm(f"bn{i}", scale_init=0.0 if last and self.zero_init_last else 1.0)
            y = normalised(conv, norm, y, train)
            if not last:
                y = nn.relu(y)
        if self.shortcut == "none":
            return nn.relu(y)
        if self.shortcut == "gated":
            gate = Conv(
                self.features, 1, self.stride, use_bias=True, bias_init=self.gate_bias, init_fan=self.init_fan,
                dtype=self.dtype, name="gate",
            )(x)  # fmt: skip
            transform = nn.sigmoid(gate)
            return nn.relu(transform * y + (1 - transform) * self._shortcut(x, train))
        return nn.relu(y + self._shortcut(x, train))

    def _convolutions(self) -> list[tuple[int, int, int]]:
        """(features, size, stride) of each convolution of the residual branch."""
        if not self.bottleneck:
            return [(self.features, 3, self.stride), (self.features, 3, 1)]
        # v1 (the paper, Caffe, Keras) strides in the first 1x1; v1.5 (torchvision, timm) in the 3x3.
        first, middle = (self.stride, 1) if self.stride_in == "first" else (1, self.stride)
        width = self.features // 4
        return [(width, 1, first), (width, 3, middle), (self.features, 1, 1)]

    def _norm(self, name: str, scale_init: float = 1.0) -> nn.Module:
        return normalisation(self.batch_norm, self.batch_norm_momentum, self.dtype, name, scale_init)

    def _shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        same_shape = self.stride == 1 and x.shape[-1] == self.features
        if same_shape and self.shortcut != "C":
            return x
        if self.shortcut in ("A", "gated"):
            return pad_shortcut(x, self.features, self.stride, self.shortcut_zeros)
        y = Conv(self.features, 1, self.stride, init_fan=self.init_fan, dtype=self.dtype, name="shortcut_conv")(x)
        return self._norm("shortcut_bn")(y, train)
