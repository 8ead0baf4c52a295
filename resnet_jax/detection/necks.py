"""What stands between backbone and regions: C4 and VGG's, the paper's, and feature pyramids (FPN)."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.detection import boxes as box_ops
from resnet_jax.detection.faster_rcnn import FasterRCNN, Levels, drop_for_each_image, pool_levels
from resnet_jax.models.layers import Conv, MaxPool, he_normal, storage_dtype
from resnet_jax.models.resnet import STEMS, ResNet

# The levels that regions are pooled from, P2 to P5, and the areas from which a region goes to the next coarser one:
# k = floor(4 + log2(sqrt(area) / 224)) (FPN, equation 1), without the rounding of a logarithm.
REGION_LEVELS = 4
LEVEL_AREAS = (112.0**2, 224.0**2, 448.0**2)


def stem_stride(network: ResNet) -> int:
    """Pixels per cell of a residual network's first stage."""
    _, stride, pool = STEMS[network.stem]
    return stride * (2 if pool else 1)


class C4(FasterRCNN):
    """On a residual network (section 4.3): all stages but the last are shared, and it looks at each region.

    The last stage, the paper's conv5, halves the 14x14 cells that a region is pooled to, as in detectron2's and
    torchvision's C4. The paper's other reading is 7x7 cells and a last stage of stride 1 (``ResNet.last_stride``).
    """

    @property
    def strides(self) -> tuple[int, ...]:
        return (stem_stride(self.backbone) * 2 ** (len(self.backbone.blocks) - 2),)

    def shared_maps(self, images: jax.Array, train: bool) -> Levels:
        shared = len(self.backbone.blocks) - 1
        return (self.backbone.features(images, train, stages=shared)[f"stage{shared}"],)

    def look(self, regions: jax.Array, count: int, train: bool, keys: jax.Array | None) -> jax.Array:
        last = len(self.backbone.blocks)
        x = self.backbone.stage(regions, last, train and self.backbone.freeze_at <= last)
        return x.mean((1, 2), dtype=storage_dtype(self.backbone.dtype))


class FullyConnected(FasterRCNN):
    """On VGG-16, the paper's baseline (Faster R-CNN, section 3): conv1_1 to conv5_3 are shared, stride 16.

    Regions are pooled to 7x7 in place of the last max-pooling; fc6 and fc7 look at them, with dropout in training.
    """

    @property
    def strides(self) -> tuple[int, ...]:
        return (2 ** (len(self.backbone.blocks) - 1),)

    def shared_maps(self, images: jax.Array, train: bool) -> Levels:
        return (self.backbone.features(images, train, last_pool=False)[self.backbone.parts[-1]],)

    def look(self, regions: jax.Array, count: int, train: bool, keys: jax.Array | None) -> jax.Array:
        def drop(x: jax.Array, number: int) -> jax.Array:
            return drop_for_each_image(x, self.backbone.dropout, keys, number) if train else x

        return self.backbone.fully_connected(regions, drop).reshape(len(regions), -1)


class TopDown(nn.Module):
    """FPN's lateral and top-down path: maps of stages, finest first -> as many of ``width`` channels (section 3).

    Each is a 1x1 convolution of its stage plus the next coarser one's sum, each cell of which is four; then a 3x3
    convolution. Named by the paper's levels, ``lateral2`` and ``output2`` on.
    """

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, stages: list[jax.Array]) -> Levels:
        # detectron2's initialisation: no ReLU follows.
        shared = {"use_bias": True, "init_fan": "fan_in", "init_gain": 1.0, "dtype": self.dtype}
        outputs, coarser = [], None
        for level, stage in reversed(list(enumerate(stages, start=2))):
            x = Conv(self.width, 1, name=f"lateral{level}", **shared)(stage)
            if coarser is not None:
                x += upsample(coarser, x.shape[1:3])
            outputs.append(Conv(self.width, 3, name=f"output{level}", **shared)(x))
            coarser = x
        return tuple(reversed(outputs))


def upsample(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Each cell of [n, h, w, C] twice in both directions, as far as a map of ``size`` cells goes: 2 h, or 2 h - 1."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]


class RegionLayers(nn.Module):
    """FPN's two fully connected layers with ReLU: regions [N, k, k, C] -> [N, width]."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        # As detectron2's: variance 1 / fan-in.
        shared = {
            "dtype": self.dtype,
            "param_dtype": storage_dtype(self.dtype),
            "kernel_init": he_normal("fan_in", gain=1.0),
        }
        for name in ("fc1", "fc2"):
            x = nn.relu(nn.Dense(self.width, name=name, **shared)(x))
        return x


def level_of(rois: jax.Array) -> jax.Array:
    """From which level a region [..., 4] is pooled: int32 [...], 0 for P2 to 3 for P5 (FPN, equation 1)."""
    return (box_ops.area(rois)[..., None] >= jnp.array(LEVEL_AREAS)).sum(-1, dtype=jnp.int32)


class FPN(FasterRCNN):
    """A feature pyramid on a residual network (Lin et al., 2017), in detectron2's layout: strides 4, 8, 16, 32, 64.

    P2 to P5 come of stage 1 to 4, P6 is every other cell of P5, for the RPN alone. Each level has anchors of one size.
    Parameters lie in ``fpn`` and ``box``.
    """

    width: int = 256
    region_width: int = 1024

    @property
    def strides(self) -> tuple[int, ...]:
        levels = len(self.backbone.blocks) + 1
        return tuple(stem_stride(self.backbone) * 2**level for level in range(levels))

    @property
    def sizes_of_levels(self) -> tuple[tuple[float, ...], ...]:
        return tuple((size,) for size in self.anchor_sizes)

    def setup(self):
        super().setup()
        self.fpn = TopDown(self.width, self.backbone.dtype)
        self.coarsest = MaxPool(window=1, stride=2)
        self.box = RegionLayers(self.region_width, self.backbone.dtype)

    def shared_maps(self, images: jax.Array, train: bool) -> Levels:
        stages = self.backbone.features(images, train)
        maps = self.fpn([stages[name] for name in self.backbone.parts[1:]])
        return (*maps, self.coarsest(maps[-1]))

    def pool_image(self, maps: Levels, map_extents: Levels, rois: jax.Array) -> jax.Array:
        levels = (x[:REGION_LEVELS] for x in (maps, map_extents, self.strides))
        maps, map_extents, strides = levels
        return pool_levels(maps, map_extents, rois, strides, self.roi, self.pooled, level_of(rois))

    def look(self, regions: jax.Array, count: int, train: bool, keys: jax.Array | None) -> jax.Array:
        return self.box(regions)
