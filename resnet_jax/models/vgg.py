"""VGG-16, the paper's baseline (Simonyan and Zisserman, 2014, configuration D), fully convolutional."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.errors import UsageError
from resnet_jax.models.layers import Conv, Head, MaxPool, check_stage
from resnet_jax.models.normalisation import normalisation


class VGGStage(nn.Module):
    """3x3 convolutions of one width, each followed by ReLU (and BN before it where asked), then 2x2 max-pooling.

    ``pool=False`` leaves the max-pooling out.
    """

    convolutions: int
    features: int
    normalise: bool
    init_fan: str
    batch_norm: str
    batch_norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, pool: bool = True) -> jax.Array:
        for i in range(1, self.convolutions + 1):
            x = Conv(self.features, 3, use_bias=True, init_fan=self.init_fan, dtype=self.dtype, name=f"conv{i}")(x)
            if self.normalise:
                x = normalisation(self.batch_norm, self.batch_norm_momentum, self.dtype, f"bn{i}")(x, train)
            x = nn.relu(x)
        return MaxPool(window=2, stride=2)(x) if pool else x


class VGG(nn.Module):
    """Images [N, H, W, 3], 224 pixels and up -> logits [N, num_classes], averaged over positions.

    The fully connected layers are convolutions (``fc6`` 7x7, ``fc7`` and ``head`` 1x1). In training ``apply`` needs an
    rng named ``dropout``.

    Attributes: as in ``ResNet``, and ``normalise``: BN after every 3x3 convolution; ``dropout``: the share of fc6's and
    fc7's outputs dropped in training; ``fc_width``: their number. There is no stem: ``freeze_at`` counts stages, and 2
    is conv1 and conv2, as in py-faster-rcnn.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    normalise: bool = False
    dropout: float = 0.5
    init_fan: str = "fan_out"
    batch_norm: str = "global"
    batch_norm_momentum: float = 0.9
    freeze_at: int = 0
    fc_width: int = 4096
    dtype: Any = jnp.float32

    window = 7  # Positions that fc6 looks at, each way.

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what images go through, in that order, up to the fully connected layers."""
        return tuple(f"stage{i}" for i in range(1, len(self.blocks) + 1))

    def setup(self):
        norm = (self.normalise, self.init_fan, self.batch_norm, self.batch_norm_momentum, self.dtype)
        self.stages = [
            VGGStage(count, width, *norm, name=f"stage{i}")
            for i, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True), start=1)
        ]
        # Fully connected layers: each output reads its inputs once, so the fan is theirs whatever init_fan says.
        fully_connected = {"use_bias": True, "init_fan": "fan_in", "padding": 0, "dtype": self.dtype}
        self.fc6 = Conv(self.fc_width, self.window, **fully_connected)
        self.fc7 = Conv(self.fc_width, 1, **fully_connected)
        self.drop = nn.Dropout(self.dropout)
        self.head = Head(self.num_classes, self.dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits [N, num_classes] of normalised images [N, H, W, 3]."""
        return self.classify(self.features(images, train)[f"stage{len(self.blocks)}"], train)

    def features(self, images: jax.Array, train: bool = False, last_pool: bool = True) -> dict[str, jax.Array]:
        """The pooled output of every stage (``stage1``, ...), each [N, H', W', C'].

        Without ``last_pool`` the last one is that of its convolutions, conv5_3, which a detector's regions share.
        """
        x, outputs = images.astype(self.dtype), {}
        for i, (name, stage) in enumerate(zip(self.parts, self.stages, strict=True)):
            frozen = i < self.freeze_at
            x = stage(x, train and not frozen, pool=last_pool or name != self.parts[-1])
            x = outputs[name] = jax.lax.stop_gradient(x) if frozen else x
        return outputs

    def stage(self, x: jax.Array, number: int, train: bool = False) -> jax.Array:
        """Applies stage ``number`` (from 1) alone."""
        check_stage(number, len(self.blocks))
        return self.stages[number - 1](x.astype(self.dtype), train)

    def classify(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The three fully connected layers at every position of [N, H, W, C], averaged to [N, num_classes]."""
        return self._logits(x, train).mean((1, 2))

    def classify_densely(self, x: jax.Array, window: int) -> jax.Array:
        """The logits at every position, [N, H, W, C] -> [N, H - 6, W - 6, classes]; ``window`` is fc6's, 7."""
        assert window == self.window
        return self._logits(x, train=False)

    def fully_connected(self, x: jax.Array, drop: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
        """fc6 and fc7 at every position: [N, H, W, C] -> [N, H - 6, W - 6, 4096].

        ``drop`` is the dropout of one layer's outputs; it also gets the layer's number, 6 or 7.
        """
        for number, layer in ((6, self.fc6), (7, self.fc7)):
            x = drop(nn.relu(layer(x)), number)
        return x

    def _logits(self, x: jax.Array, train: bool) -> jax.Array:
        if min(x.shape[1:3]) < self.window:
            raise UsageError(f"VGG needs images of 224 pixels and up: its last stage, {x.shape[1:3]}, is below 7x7")
        return self.head(self.fully_connected(x, lambda x, _: self.drop(x, deterministic=not train)))
