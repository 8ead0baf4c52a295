"""The residual network: one module told its stages, block, shortcut, stem and stride placement."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.errors import UsageError
from resnet_jax.models.blocks import SHORTCUTS, Block
from resnet_jax.models.layers import Conv, Head, MaxPool, average_pool, check_stage, storage_dtype
from resnet_jax.models.normalisation import BatchNorm, normalisation
from resnet_jax.models.stacking import SHORTEST_RUN, run_name

# Stem: (size, stride, whether a 3x3/2 max-pool follows); the paper's Table 1 and section 4.2.
STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False)}


class Stem(nn.Module):
    """The first convolution with BN and ReLU, and for ImageNet the max-pool that opens the paper's conv2_x.

    Images [N, H, W, C] -> [N, H, W, features], for ImageNet a quarter of the height and width.
    """

    kind: str
    features: int
    pool_padding: str
    space_to_depth: bool
    init_fan: str
    batch_norm: str
    batch_norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        size, stride, pool = STEMS[self.kind]
        settings = {"init_fan": self.init_fan, "on_blocks": self.space_to_depth, "dtype": self.dtype}
        x = Conv(self.features, size, stride, **settings, name="conv")(x)
        norm = normalisation(self.batch_norm, self.batch_norm_momentum, self.dtype, "bn")
        if not pool:
            return nn.relu(norm(x, train))
        both = self.pool_padding == "both"
        pool = MaxPool(window=3, stride=2, padding=1 if both else 0, round_up=not both)
        return norm(x, train, pool=pool) if isinstance(norm, BatchNorm) else pool(nn.relu(norm(x, train)))


def keep_linear(primitive: Any, *unused: Any, **parameters: Any) -> bool:
    """Whether a loop keeps an operation's result for its backward pass: those of convolutions, products and sums.

    What it keeps is written for every block. The rest (normalising, ReLU) is computed again where it is read, in the
    same fusion: XLA:TPU estimates a third of the cycles and half of the memory (``benchmarks/RESULTS.md``).
    """
    del unused, parameters
    return primitive.name in ("conv_general_dilated", "dot_general", "reduce_sum")


class Stage(nn.Module):
    """Blocks of one width; only the first one changes the shape: [N, H, W, C] -> [N, H', W', features].

    The others are alike, and may be stored together (``stacking``) and scanned.
    """

    blocks: int
    stride: int
    block: dict[str, Any]
    stacked: bool
    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def layer(number: int, name: str, scanned: bool = False) -> Block:
            kind = Block
            if self.remat or scanned:
                policy = None if self.remat else keep_linear
                # A loop keeps forward and backward pass apart by itself.
                kind = nn.remat(Block, static_argnums=2, prevent_cse=not scanned, policy=policy)
            return kind(stride=self.stride if number == 1 else 1, name=name, **self.block)

        x, rest = layer(1, "block1")(x, train), self.blocks - 1
        if not self.stacked or rest < SHORTEST_RUN:
            for number in range(2, self.blocks + 1):
                x = layer(number, f"block{number}")(x, train)
            return x
        run = nn.scan(
            lambda block, x: (block(x, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=rest,
            unroll=1 if self.scan else rest,
        )
        return run(layer(2, run_name(2, self.blocks), self.scan), x)[0]


class ResNet(nn.Module):
    """A residual or plain network, images [N, H, W, C] of any size -> logits [N, num_classes], float32 at least.

    Parameters lie in ``params``, running statistics in ``batch_stats``; names are ``stem``, ``stage1`` ..., ``head``.
    The paper's conv2_x to conv5_x are ``stage1`` to ``stage4``.

    Attributes:
      blocks: blocks in each stage (Table 1).
      widths: output channels of each stage.
      bottleneck: three-layer blocks (50 layers and more) instead of two-layer ones.
      shortcut: ``A``, ``B``, ``C`` (section 3.3), ``none`` for plain nets, ``gated`` for Highway nets.
      shortcut_zeros: where option A puts its zero channels, ``end`` or ``both``.
      stride_in: ``first`` (v1) or ``middle`` (v1.5): which convolution of a bottleneck has the stride.
      stem: ``imagenet`` (7x7/2, max-pool) or ``cifar`` (3x3).
      stem_width: channels of the stem.
      pool_padding: of the stem's max-pool: ``both`` is a pixel on every side (fb.resnet.torch, torchvision), ``end``
        what lacks at the end (the authors' Caffe).
      zero_init_last: start each block's last BN scale at zero, so that blocks begin as identities.
      gate_bias: initial bias of the gates; negative, so that gated blocks begin near the identity.
      init_fan: He's fan, ``fan_out`` or ``fan_in``.
      batch_norm: over which examples statistics are taken: ``global``, ``per_device`` or ``group:N``; ``frozen`` uses
        the running ones in training too and leaves them as they are; ``group_norm`` or ``group_norm:N`` is GroupNorm
        (``normalisation.count_channel_groups``), under BN's names and without running statistics.
      freeze_at: how many of the leading ``parts`` training leaves as they are, statistics too: 0 none, 1 the stem, 2
        the stem and stage 1, ... (as detectron2 counts).
      space_to_depth: compute the ImageNet stem's convolution on 2x2 blocks of pixels, the same weights and output.
      stacked: store runs of identical blocks together where they are long (``stacking``).
      scan: run what is stored together as a loop, which compiles in a time that does not grow with depth; a loop is
        slow where convolutions are library calls that loops hinder, as on CPUs (jax issue 12868). It keeps no more for
        the backward pass than ``keep_linear`` says.
      remat: keep no more of a block than its input for the backward pass, and compute the rest again.
      last_stride: of the last stage: 2, or 1 where a detector pools regions to the 7x7 that it would leave.
      batch_norm_momentum: how much of the running statistics a step keeps.
      dtype: compute dtype.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    bottleneck: bool = False
    shortcut: str = "B"
    shortcut_zeros: str = "end"
    stride_in: str = "first"
    stem: str = "imagenet"
    stem_width: int = 64
    pool_padding: str = "both"
    zero_init_last: bool = False
    gate_bias: float = -2.0
    init_fan: str = "fan_out"
    batch_norm: str = "global"
    batch_norm_momentum: float = 0.9
    freeze_at: int = 0
    last_stride: int = 2
    space_to_depth: bool = False
    stacked: bool = False
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what images go through, in that order, up to the classifier."""
        return ("stem", *(f"stage{i}" for i in range(1, len(self.blocks) + 1)))

    def setup(self):
        choices = {"shortcut": SHORTCUTS, "shortcut_zeros": ("end", "both"), "stride_in": ("first", "middle"),
                   "stem": tuple(STEMS), "pool_padding": ("both", "end")}  # fmt: skip
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise UsageError(f"{field} {getattr(self, field)!r} is unknown: {', '.join(known)}")
        if self.space_to_depth and self.stem != "imagenet":
            raise UsageError(f"space_to_depth is for the 7x7 stem alone; this network's is {self.stem!r}")
        shared = {name: getattr(self, name) for name in ("init_fan", "batch_norm", "batch_norm_momentum", "dtype")}
        settings = ("bottleneck", "shortcut", "shortcut_zeros", "stride_in", "zero_init_last", "gate_bias")
        block = shared | {name: getattr(self, name) for name in settings}
        self.stem_layers = Stem(
            self.stem, self.stem_width, self.pool_padding, self.space_to_depth, **shared, name="stem"
        )
        strides = [1, *[2] * (len(self.blocks) - 1)]
        if len(strides) > 1:
            strides[-1] = self.last_stride
        self.stages = [
            Stage(count, stride, block | {"features": width}, self.stacked, self.scan, self.remat, name=f"stage{i}")
            for i, (count, stride, width) in enumerate(zip(self.blocks, strides, self.widths, strict=True), start=1)
        ]
        self.head = Head(self.num_classes, self.dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits [N, num_classes] of normalised images [N, H, W, C]."""
        return self.classify(self.features(images, train)[f"stage{len(self.blocks)}"])

    def features(self, images: jax.Array, train: bool = False, stages: int | None = None) -> dict[str, jax.Array]:
        """The outputs of ``stem`` and of every stage (``stage1``, ...), or the first ``stages``: [N, H', W', C']."""
        x, outputs = images.astype(self.dtype), {}
        layers = (self.stem_layers, *self.stages[:stages])
        for i, (name, part) in enumerate(zip(self.parts[: len(layers)], layers, strict=True)):
            frozen = i < self.freeze_at
            x = part(x, train and not frozen)
            x = outputs[name] = jax.lax.stop_gradient(x) if frozen else x
        return outputs

    def stage(self, x: jax.Array, number: int, train: bool = False) -> jax.Array:
        """Applies stage ``number`` (from 1) alone: ``model.apply(variables, x, 4, method="stage")`` is conv5_x."""
        check_stage(number, len(self.blocks))
        return self.stages[number - 1](x.astype(self.dtype), train)

    def classify(self, x: jax.Array) -> jax.Array:
        """Global average pooling and the classifier: the last stage's [N, H, W, C] -> logits [N, num_classes]."""
        return self.head(x.mean((1, 2), dtype=storage_dtype(self.dtype)))

    def classify_densely(self, x: jax.Array, window: int) -> jax.Array:
        """The classifier on averages over each ``window`` x ``window`` positions: [N, H, W, C] -> [N, H', W', classes].

        What a network that was trained on maps of that size says of every part of a larger one (section 3.4).
        """
        return self.head(average_pool(x.astype(storage_dtype(self.dtype)), window))
