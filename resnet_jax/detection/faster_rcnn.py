"""Faster R-CNN: what a detector is, whatever stands between its backbone and its regions (``necks`` has those)."""

from collections.abc import Sequence
import contextlib
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.detection import roi_tiles
from resnet_jax.detection.per_image import for_each_image
from resnet_jax.detection.proposals import Grid, make_grids
from resnet_jax.detection.roi import roi_align, roi_pool
from resnet_jax.models.layers import storage_dtype
from resnet_jax.models.padding import inside, masked_padding
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

POOLINGS = {"pool": roi_pool, "align": roi_align}

# One array of a batch, or of one image, for each level of a pyramid, finest first; C4 and VGG have one level.
Levels = tuple[jax.Array, ...]


class RegionProposals(nn.Module):
    """The RPN: what each anchor says of being an object, and where (Faster R-CNN, section 3.1).

    Features [n, h, w, C], 0 beyond the images -> logits [n, h w A] and box codes [n, h w A, 4], float32 at least, in
    the order of ``anchors.make_anchors``. All levels share one (FPN, section 4.1).
    """

    per_cell: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = storage_dtype(self.dtype)
        normal = {"kernel_init": nn.initializers.normal(0.01), "param_dtype": wide}
        x = nn.relu(nn.Conv(self.width, (3, 3), padding=1, dtype=self.dtype, name="conv", **normal)(features))
        # In bfloat16 most logits would be equal to some other, and proposals are taken by their order.
        logits = nn.Conv(self.per_cell, (1, 1), dtype=wide, name="objectness", **normal)(x)
        codes = nn.Conv(4 * self.per_cell, (1, 1), dtype=wide, name="boxes", **normal)(x)
        count = len(features)
        return logits.reshape(count, -1), codes.reshape(count, -1, 4)


class RegionHead(nn.Module):
    """The sibling outputs on features [n, R, D]: logits [n, R, 1 + classes], box codes [n, R, classes, 4].

    Of the logits background is the first.
    """

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = storage_dtype(self.dtype)
        # Accelerators would multiply float32 in fewer bits.
        shared = {"dtype": wide, "param_dtype": wide, "precision": "highest"}
        logits = nn.Dense(1 + self.num_classes, kernel_init=nn.initializers.normal(0.01), name="classes", **shared)(x)
        codes = nn.Dense(4 * self.num_classes, kernel_init=nn.initializers.normal(0.001), name="boxes", **shared)(x)
        return logits, codes.reshape(*codes.shape[:-1], self.num_classes, 4)


class FasterRCNN(nn.Module):
    """The detector. Images are normalised [n, H, W, 3], each in the upper left of its canvas; ``extent`` is their size.

    ``features`` makes the maps that all regions share, ``propose`` is the RPN on them, ``pool`` brings regions to one
    size, ``region_features`` makes a vector of each, ``head`` (a ``RegionHead``) says what those are. Parameters lie
    in ``backbone`` (a classification network's own names, less ``head``), ``rpn``, ``head``, and what a neck adds.

    Padding changes nothing: BN that is not frozen counts the images alone.

    A neck says which maps there are (``strides``, ``shared_maps``), which anchors they have (``sizes_of_levels``) and
    what is done with pooled regions (``look``).

    Attributes:
      backbone: the classification network.
      num_classes: without background.
      anchor_sizes: roots of the anchors' areas, pixels; the paper adds 64 for COCO.
      anchor_ratios: their heights over widths.
      rpn_width: channels of the RPN's 3x3 convolution.
      roi: ``pool``, RoI pooling as in the paper, or ``align``, RoIAlign.
      pooled: cells per side that a region is pooled to.
      context: the whole image's features stand beside each region's (appendix B).
    """

    backbone: ResNet | VGG
    num_classes: int
    anchor_sizes: tuple[float, ...]
    anchor_ratios: tuple[float, ...]
    rpn_width: int
    roi: str
    pooled: int
    context: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map."""
        raise NotImplementedError  # A neck's part: this class alone is no detector.

    @property
    def sizes_of_levels(self) -> tuple[tuple[float, ...], ...]:
        """The anchors' sizes on each map, of each as many."""
        return (self.anchor_sizes,)

    def shared_maps(self, images: jax.Array, train: bool) -> Levels:
        """The maps of [n, H, W, 3], within ``masked_padding``; what they hold beyond the images has no meaning."""
        raise NotImplementedError  # A neck's part: this class alone is no detector.

    def look(self, regions: jax.Array, count: int, train: bool, keys: jax.Array | None) -> jax.Array:
        """Regions [count R, pooled, pooled, C], image by image -> their vectors [count R, D]; see region_features."""
        raise NotImplementedError  # A neck's part: this class alone is no detector.

    def setup(self):
        per_cell = len(self.sizes_of_levels[0]) * len(self.anchor_ratios)
        self.rpn = RegionProposals(per_cell, self.rpn_width, self.backbone.dtype)
        self.head = RegionHead(self.num_classes, self.backbone.dtype)

    def __call__(self, images: jax.Array, extent: jax.Array, rois: jax.Array):
        """All outputs at given regions [n, R, 4]: those of ``propose`` and of ``classify``. For initialisation."""
        maps, map_extents = self.features(images, extent)
        return self.propose(maps), self.classify(maps, map_extents, rois, extent)

    def features(self, images: jax.Array, extent: jax.Array, train: bool = False) -> tuple[Levels, Levels]:
        """The shared features of [n, H, W, 3] and int [n, 2]: [n, h, w, C], 0 beyond the images; int32 [n, 2]."""
        with masked_padding(images.shape[1:3], extent) as extents:
            maps = self.shared_maps(images, train)
        own = tuple(extents[features.shape[1:3]].astype(jnp.int32) for features in maps)
        masks = [inside(features.shape[1:3], extent)[..., None] for features, extent in zip(maps, own, strict=True)]
        return tuple(jnp.where(mask, x, 0) for mask, x in zip(masks, maps, strict=True)), own

    def grids(self, shapes: Sequence[tuple[int, int]], map_extents: Levels) -> tuple[Grid, ...]:
        """One image's anchors on each level: maps of those (h, w), of which int [2] cells each are the image's."""
        return make_grids(shapes, self.strides, self.sizes_of_levels, self.anchor_ratios, map_extents)

    def propose(self, maps: Levels) -> tuple[Levels, Levels]:
        """The RPN's logits [n, h w A] and codes [n, h w A, 4] at each level's anchors."""
        logits, codes = zip(*map(self.rpn, maps), strict=True)
        return logits, codes

    def pool(self, maps: Levels, map_extents: Levels, rois: jax.Array, extent: jax.Array) -> jax.Array:
        """Regions at one size: [n, R, pooled, pooled, C], and one more, the whole image, where there is ``context``.

        Args:
          maps: [n, h, w, C].
          map_extents: cells of them that are the images', int [n, 2].
          rois: [n, R, 4], pixels.
          extent: int [n, 2], of the images, pixels.
        """
        if self.context:
            whole = jnp.concatenate([jnp.zeros_like(extent), extent[:, ::-1]], axis=1)
            rois = jnp.concatenate([rois, whole[:, None].astype(rois.dtype)], axis=1)
        return for_each_image(self.pool_image)(maps, map_extents, rois)

    def pool_image(self, maps: Levels, map_extents: Levels, rois: jax.Array) -> jax.Array:
        """One image's regions [R, 4] -> [R, pooled, pooled, C]; maps are [h, w, C]."""
        (features,), (own,), (stride,) = maps, map_extents, self.strides
        return POOLINGS[self.roi](features, rois, self.pooled, 1 / stride, extent=own)

    def region_features(
        self,
        pooled: jax.Array,
        train: bool = False,
        keys: jax.Array | None = None,
        counted: jax.Array | None = None,
    ) -> jax.Array:
        """What ``head`` looks at: pooled regions -> [n, R, D], or with ``context`` [n, R, 2 D].

        Args:
          pooled: of ``pool``.
          train: whether BN that is not frozen takes its statistics of the regions, and outputs are dropped.
          keys: JAX keys [n], of which follows what is dropped of each image's; without dropout none are needed.
          counted: regions that have a part in such statistics, bool [n, R]; None: all.
        """
        count, regions, *size = pooled.shape[:-1]
        with contextlib.ExitStack() as stack:
            if counted is not None:
                counted = jnp.pad(counted, ((0, 0), (0, regions - counted.shape[1])), constant_values=True)
                own = jnp.where(counted.reshape(-1, 1), jnp.array(size), 0)
                stack.enter_context(masked_padding(tuple(size), own))
            x = self.look(pooled.reshape(-1, *pooled.shape[2:]), count, train, keys).reshape(count, regions, -1)
        if not self.context:
            return x
        return jnp.concatenate([x[:, :-1], jnp.broadcast_to(x[:, -1:], x[:, :-1].shape)], axis=-1)

    def classify(
        self,
        maps: Levels,
        map_extents: Levels,
        rois: jax.Array,
        extent: jax.Array,
        train: bool = False,
        keys: jax.Array | None = None,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits [n, R, 1 + classes] and box codes [n, R, classes, 4] of regions: ``pool`` to ``head``."""
        return self.head(self.region_features(self.pool(maps, map_extents, rois, extent), train, keys, counted))


def drop_for_each_image(x: jax.Array, rate: float, keys: jax.Array, number: int) -> jax.Array:
    """Dropout of [n R, ...], image by image, each by its key [n] and the layer's number alone; what stays is scaled."""
    shape = (len(x) // len(keys), *x.shape[1:])

    def kept(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shape)

    return jnp.where(for_each_image(kept)(keys).reshape(x.shape), x / (1 - rate), 0)


def pool_levels(
    maps: Sequence[jax.Array],
    map_extents: Sequence[jax.Array],
    rois: jax.Array,
    strides: Sequence[int],
    roi: str,
    pooled: int,
    level: jax.Array,
) -> jax.Array:
    """One image's regions [R, 4], each pooled from its own ``level``, int [R]: [R, pooled, pooled, C].

    RoIAlign by tiles reads that level only. Else every region is pooled from every level and the right one chosen:
    shapes are fixed, and as each level has a quarter of the next finer one's cells, that costs a third more than the
    finest alone. Regions of other levels are empty there, so that RoI pooling, which goes on for as long as its
    largest bin, does not wait for them.
    """
    scales = [1 / stride for stride in strides]
    if roi == "align" and roi_tiles.suits():
        return roi_tiles.align(maps, map_extents, rois, level, (pooled, pooled), scales)
    found = 0
    for number, (features, own, scale) in enumerate(zip(maps, map_extents, scales, strict=True)):
        here = level == number
        own_rois = jnp.where(here[:, None], rois, 0)
        regions = POOLINGS[roi](features, own_rois, pooled, scale, extent=own)
        found = jnp.where(here[:, None, None, None], regions, found)
    return found
