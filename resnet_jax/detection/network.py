"""Faster R-CNN on a residual network, "C4": the paper's detector (section 4.3, appendix A)."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.detection import anchors as anchor_ops
from resnet_jax.detection.per_image import for_each_image
from resnet_jax.detection.roi import roi_align, roi_pool
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import storage_dtype
from resnet_jax.models.padding import inside, masked_padding
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import STEMS, ResNet

POOLINGS = {"pool": roi_pool, "align": roi_align}


class RegionProposals(nn.Module):
    """The RPN: what each anchor says of being an object, and where (Faster R-CNN, section 3.1).

    Features [n, h, w, C], 0 beyond the images -> logits [n, h w A] and box codes [n, h w A, 4], float32 at least, in
    the order of ``anchors.make_anchors``.
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
    """The sibling outputs on features [n, R, C]: logits [n, R, 1 + classes], box codes [n, R, classes, 4]."""

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

    Parameters lie in ``backbone`` (a classification network's own names, less ``head``), ``rpn`` and ``head``.

    Padding changes nothing, except that BN that is not frozen takes its statistics over it.

    Attributes:
      backbone: all stages but the last are shared by all regions, the last one looks at each (the paper's conv5).
      num_classes: without background.
      anchor_sizes: roots of the anchors' areas, pixels; the paper adds 64 for COCO.
      anchor_ratios: their heights over widths.
      rpn_width: channels of the RPN's 3x3 convolution.
      roi: ``pool``, RoI pooling as in the paper, or ``align``, RoIAlign.
      pooled: cells per side that a region is pooled to, of which the last stage's stride leaves half: 14 as in
        detectron2's and torchvision's C4. The other reading of the paper, 7 with stride 1, is not built.
      global_context: the whole image's pooled features stand beside each region's (appendix B).
    """

    backbone: ResNet
    num_classes: int
    anchor_sizes: tuple[float, ...] = (128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_width: int = 512
    roi: str = "align"
    pooled: int = 14
    global_context: bool = False

    @property
    def stride(self) -> int:
        """Pixels per cell of the shared features: 16 for ImageNet's networks."""
        _, stride, pool = STEMS[self.backbone.stem]
        return stride * (2 if pool else 1) * 2 ** (len(self.backbone.blocks) - 2)

    @property
    def anchors_per_cell(self) -> int:
        return len(self.anchor_sizes) * len(self.anchor_ratios)

    def setup(self):
        if self.roi not in POOLINGS:
            raise UsageError(f"roi {self.roi!r} is unknown: {', '.join(POOLINGS)}")
        self.rpn = RegionProposals(self.anchors_per_cell, self.rpn_width, self.backbone.dtype)
        self.head = RegionHead(self.num_classes, self.backbone.dtype)

    def __call__(self, images: jax.Array, extent: jax.Array, rois: jax.Array, train: bool = False):
        """All outputs at given regions [n, R, 4]: those of ``propose`` and of ``classify``. For initialisation."""
        features, map_extent = self.features(images, extent, train)
        return self.propose(features), self.classify(features, map_extent, rois, extent, train)

    def features(self, images: jax.Array, extent: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """The shared features of [n, H, W, 3] and int [n, 2]: [n, h, w, C], 0 beyond the images; int32 [n, 2]."""
        shared = len(self.backbone.blocks) - 1
        with masked_padding(images.shape[1:3], extent) as extents:
            features = self.backbone.features(images, train, stages=shared)[f"stage{shared}"]
        cells = features.shape[1:3]
        return jnp.where(inside(cells, extents[cells])[..., None], features, 0), extents[cells].astype(jnp.int32)

    def anchors(self, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """The anchors of a map of that many cells: float32 [h w A, 4], pixels; ``anchors.identities`` int32 [h w A]."""
        anchors = anchor_ops.make_anchors(height, width, self.stride, self.anchor_sizes, self.anchor_ratios)
        return anchors, anchor_ops.identities(height, width, self.anchors_per_cell)

    def propose(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The RPN's logits [n, h w A] and codes [n, h w A, 4] at each anchor."""
        return self.rpn(features)

    def classify(
        self, features: jax.Array, map_extent: jax.Array, rois: jax.Array, extent: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits [n, R, 1 + classes], background first, and each class's box codes [n, R, classes, 4].

        Args:
          features: [n, h, w, C].
          map_extent: cells of them that are the image's, int [n, 2].
          rois: [n, R, 4], pixels.
          extent: int [n, 2], of the images, pixels.
          train: whether BN that is not frozen takes its statistics of the regions.
        """
        if self.global_context:
            whole = jnp.concatenate([jnp.zeros_like(extent), extent[:, ::-1]], axis=1)
            rois = jnp.concatenate([rois, whole[:, None].astype(rois.dtype)], axis=1)
        pooling = POOLINGS[self.roi]

        def pool(features: jax.Array, rois: jax.Array, map_extent: jax.Array) -> jax.Array:
            return pooling(features, rois, self.pooled, 1 / self.stride, extent=map_extent)

        pooled = for_each_image(pool)(features, rois, map_extent)
        last = len(self.backbone.blocks)
        x = self.backbone.stage(pooled.reshape(-1, *pooled.shape[2:]), last, train and self.backbone.freeze_at <= last)
        x = x.mean((1, 2), dtype=storage_dtype(self.backbone.dtype)).reshape(*rois.shape[:2], -1)
        if self.global_context:
            x = jnp.concatenate([x[:, :-1], jnp.broadcast_to(x[:, -1:], x[:, :-1].shape)], axis=-1)
        return self.head(x)


def create_detector(
    name: str,
    num_classes: int,
    dtype: str = "auto",
    batch_norm: str = "frozen",
    freeze_at: int = 2,
    backbone: dict[str, Any] | None = None,
    **settings: Any,
) -> FasterRCNN:
    """Builds a Faster R-CNN by its backbone's name.

    Args:
      name: a residual network of ``models.registry``.
      num_classes: without background.
      dtype: compute dtype, as of ``create_model``.
      batch_norm: ``frozen`` in the paper (appendix A), statistics, scales and biases; else as of ``ResNet``.
      freeze_at: as of ``ResNet``: 2, stem and stage 1, as in py-faster-rcnn and detectron2; 0 from scratch.
      backbone: other attributes of ``ResNet``.
      **settings: other attributes of ``FasterRCNN``.

    Raises:
      UsageError: unknown name or value, or a network that is not residual.
    """
    network = create_model(name, dtype=dtype, batch_norm=batch_norm, **(backbone or {}))
    if not isinstance(network, ResNet):
        raise UsageError(f"model {name!r} cannot be a detector's backbone: a ResNet can")
    if not 0 <= freeze_at <= len(network.blocks) + 1:
        raise UsageError(f"freeze_at={freeze_at}: {name} has a stem and {len(network.blocks)} stages")
    return FasterRCNN(network.clone(freeze_at=freeze_at), num_classes, **settings)


def initialise(model: FasterRCNN, key: jax.Array) -> dict[str, Any]:
    """Fresh ``params`` and ``batch_stats``; they do not depend on the size of images."""
    images = jnp.zeros((1, 2 * model.stride, 2 * model.stride, 3), storage_dtype(model.backbone.dtype))
    extent = jnp.full((1, 2), 2 * model.stride, jnp.int32)
    return model.init(key, images, extent, jnp.array([[[0.0, 0, model.stride, model.stride]]]))


def trained(model: FasterRCNN, params: Any) -> Any:
    """Which parameters training changes: a tree of bools like ``params``.

    Not those of stages below ``freeze_at``, nor, with frozen BN, BN's scales and biases: its layers are fixed linear
    activations (appendix A).
    """
    parts = ["stem", *(f"stage{i}" for i in range(1, len(model.backbone.blocks) + 1))]
    frozen = set(parts[: model.backbone.freeze_at])

    def is_trained(path: tuple, _: Any) -> bool:
        names = [part.key for part in path]
        if names[0] != "backbone":
            return True
        fixed_bn = model.backbone.batch_norm == "frozen" and names[-2].rstrip("0123456789").endswith("bn")
        return names[1] not in frozen and not fixed_bn

    return jax.tree.map_with_path(is_trained, params)
