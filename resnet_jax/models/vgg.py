"""VGG-16, the paper's baseline (Simonyan and Zisserman, 2014, configuration D), fully convolutional."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.errors import UsageError
from resnet_jax.models.layers import BatchNorm, Conv, Head, MaxPool, check_stage


class VGGStage(nn.Module):
    """3x3 convolutions of one width, each followed by ReLU (and BN before it where asked), then 2x2 max-pooling."""

    convolutions: int
    features: int
    normalise: bool
    init_fan: str
    batch_norm: str
    batch_norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(1, self.convolutions + 1):
            x = Conv(self.features, 3, use_bias=True, init_fan=self.init_fan, dtype=self.dtype, name=f"conv{i}")(x)
            if self.normalise:
                x = BatchNorm(self.batch_norm, self.batch_norm_momentum, dtype=self.dtype, name=f"bn{i}")(x, train)
            x = nn.relu(x)
        return MaxPool(window=2, stride=2)(x)


class VGG(nn.Module):
    """Images [N, H, W, 3], 224 pixels and up -> logits [N, num_classes], averaged over positions.

    The fully connected layers are convolutions (``fc6`` 7x7, ``fc7`` and ``head`` 1x1). In training ``apply`` needs an
    rng named ``dropout``.

    Attributes: as in ``ResNet``, and ``normalise``: BN after every 3x3 convolution; ``dropout``: the share of fc6's and
    fc7's outputs dropped in training.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    normalise: bool = False
    dropout: float = 0.5
    init_fan: str = "fan_out"
    batch_norm: str = "global"
    batch_norm_momentum: float = 0.9
    dtype: Any = jnp.float32

    window = 7  # Positions that fc6 looks at, each way.

    def setup(self):
        norm = (self.normalise, self.init_fan, self.batch_norm, self.batch_norm_momentum, self.dtype)
        self.stages = [
            VGGStage(count, width, *norm, name=f"stage{i}")
            for i, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True), start=1)
        ]
        # Fully connected layers: each output reads its inputs once, so the fan is theirs whatever init_fan says.
        fully_connected = {"use_bias": True, "init_fan": "fan_in", "padding": 0, "dtype": self.dtype}
        self.fc6 = Conv(4096, self.window, **fully_connected)
        self.fc7 = Conv(4096, 1, **fully_connected)
        self.drop = nn.Dropout(self.dropout)
        self.head = Head(self.num_classes, self.dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits [N, num_classes] of normalised images [N, H, W, 3]."""
        return self.classify(self.features(images, train)[f"stage{len(self.blocks)}"], train)

    def features(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """The pooled output of every stage (``stage1``, ...), each [N, H', W', C']."""
        x, outputs = images.astype(self.dtype), {}
        for i, stage in enumerate(self.stages, start=1):
            x = outputs[f"stage{i}"] = stage(x, train)
        return outputs

    def stage(self, x: jax.Array, number: int, train: bool = False) -> jax.Array:
        """Applies stage ``number`` (from 1) alone."""
        check_stage(number, len(self.blocks))
        return self.stages[number - 1](x.astype(self.dtype), train)

    def classify(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The three fully connected layers at every position of [N, H, W, C], averaged to [N, num_classes]."""
        return self._fully_connected(x, train).mean((1, 2))

    def classify_densely(self, x: jax.Array, window: int) -> jax.Array:
        """The logits at every position, [N, H, W, C] -> [N, H - 6, W - 6, classes]; ``window`` is fc6's, 7."""
        assert window == self.window
        return self._fully_connected(x, train=False)

    def _fully_connected(self, x: jax.Array, train: bool) -> jax.Array:
        if min(x.shape[1:3]) < 7:
            raise UsageError(f"VGG needs images of 224 pixels and up: its last stage, {x.shape[1:3]}, is below 7x7")
        for layer in (self.fc6, self.fc7):
            x = self.drop(nn.relu(layer(x)), deterministic=not train)
        return self.head(x)
