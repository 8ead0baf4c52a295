"""The per-class RPN on a classification network (appendix C).

Faster R-CNN's RPN asks of each anchor whether it is any object. Here each class asks for itself: "the cls layer has a
1000-d output, and each dimension is binary logistic regression for predicting being or not being an object class; the
reg layer has a 1000x4-d output consisting of box regressors for 1000 classes", with reference to several anchors at
each position. We read both as so many for each anchor, and the rest as Faster R-CNN has it: a 3x3 convolution before
the two sibling 1x1 ones. It stands on the last stage's features, at stride 32 for ImageNet's networks.

Of the 1000 classes only those that are asked for are computed: the true one in training, up to five in test.
"""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.detection.anchors import make_anchors
from resnet_jax.errors import UsageError
from resnet_jax.localization.settings import Settings
from resnet_jax.models.layers import storage_dtype
from resnet_jax.models.padding import inside, masked_padding
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import STEMS, ResNet


class PerClass(nn.Module):
    """A 1x1 convolution with outputs of its own for each class, in float32 at least.

    [n, h, w, C] and classes int [n, k] -> [n, k, h, w, features]; None for the classes: all, in order.
    """

    num_classes: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, classes: jax.Array | None) -> jax.Array:
        shape = (self.num_classes, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.01), shape, self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.num_classes, self.features), self.dtype)
        x = x.astype(self.dtype)
        # Accelerators would multiply float32 in fewer bits.
        if classes is None:
            return jnp.einsum("nhwc,kcf->nkhwf", x, kernel, precision="highest") + bias[None, :, None, None]
        own = jnp.einsum("nhwc,nkcf->nkhwf", x, kernel[classes], precision="highest")
        return own + bias[classes][:, :, None, None]


class PerClassRPN(nn.Module):
    """The layers behind the backbone, Faster R-CNN's but for the classes."""

    num_classes: int
    per_cell: int
    width: int
    dtype: Any

    def setup(self):
        wide, normal = storage_dtype(self.dtype), nn.initializers.normal(0.01)
        self.conv = nn.Conv(self.width, (3, 3), padding=1, dtype=self.dtype, param_dtype=wide, kernel_init=normal)
        self.scores = PerClass(self.num_classes, self.per_cell, wide)
        self.boxes = PerClass(self.num_classes, 4 * self.per_cell, wide)


class Localizer(nn.Module):
    """The network. Images are normalised [n, H, W, 3]; N is the number of anchors, h w A.

    Parameters lie in ``backbone`` (a classification network's own names, less ``head``) and ``rpn``.

    Attributes:
      backbone: whose last stage's features are looked at.
      num_classes: how many there are.
      anchor_sizes: see ``fields.py``.
      anchor_ratios: likewise.
      rpn_width: likewise.
    """

    backbone: ResNet
    num_classes: int
    anchor_sizes: tuple[float, ...]
    anchor_ratios: tuple[float, ...]
    rpn_width: int

    @property
    def stride(self) -> int:
        """Pixels per cell of the last features: 32 for ImageNet's networks."""
        _, stride, pool = STEMS[self.backbone.stem]
        return stride * (2 if pool else 1) * 2 ** (len(self.backbone.blocks) - 1)

    @property
    def anchors_per_cell(self) -> int:
        return len(self.anchor_sizes) * len(self.anchor_ratios)

    def setup(self):
        self.rpn = PerClassRPN(self.num_classes, self.anchors_per_cell, self.rpn_width, self.backbone.dtype)

    def __call__(self, images: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [n, k, N] and codes [n, k, N, 4] of classes int [n, k] in images that fill their canvas."""
        features, _ = self.features(images)
        return self.logits(features, classes), self.codes(features, classes)

    def features(
        self, images: jax.Array, extent: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """What the sibling outputs look at.

        Args:
          images: [n, H, W, 3].
          extent: (height, width) of each image in the upper left of its canvas, int [n, 2], whose rest then changes
            nothing; None: all of it.
          train: whether BN takes statistics of the batch.

        Returns:
          [n, h, w, rpn_width], and how many cells of them are the image's, (height, width), int32 [n, 2].
        """
        last = f"stage{len(self.backbone.blocks)}"
        if extent is None:
            features = self.backbone.features(images, train)[last]
            cells = jnp.tile(jnp.array(features.shape[1:3], jnp.int32), (len(images), 1))
        else:
            with masked_padding(images.shape[1:3], extent) as extents:
                features = self.backbone.features(images, train)[last]
            cells = extents[features.shape[1:3]].astype(jnp.int32)
            features = jnp.where(inside(features.shape[1:3], cells)[..., None], features, 0)
        return nn.relu(self.rpn.conv(features)), cells

    def logits(self, features: jax.Array, classes: jax.Array | None) -> jax.Array:
        """Of being an object of each class, at every anchor: [n, k, N]; classes int [n, k], None for all."""
        logits = self.rpn.scores(features, classes)
        return logits.reshape(*logits.shape[:2], -1)

    def codes(self, features: jax.Array, classes: jax.Array | None) -> jax.Array:
        """Where each class's object lies if there is one, in ``detection.boxes.encode``'s code: [n, k, N, 4]."""
        codes = self.rpn.boxes(features, classes)
        return codes.reshape(*codes.shape[:2], -1, 4)

    def anchors(self, height: int, width: int) -> jax.Array:
        """The anchors of a map of so many cells, each centred in its cell: float32 [height width A, 4], pixels.

        In the order of the outputs: row by row, cell by cell, and within a cell ratios vary fastest.
        """
        return make_anchors(height, width, self.stride, self.anchor_sizes, self.anchor_ratios)


def create_localizer(
    name: str,
    num_classes: int,
    settings: Settings,
    dtype: str = "auto",
    batch_norm: str = "global",
    freeze_at: int = 0,
    **backbone: Any,
) -> Localizer:
    """Builds a localizer by its backbone's name.

    Args:
      name: a residual network of ``models.registry``.
      num_classes: how many there are.
      settings: the anchors and the RPN's width.
      dtype: compute dtype, as of ``create_model``.
      batch_norm: as of ``ResNet``; the paper says only for detection that it is frozen (appendix A).
      freeze_at: as of ``ResNet``.
      **backbone: other attributes of ``ResNet``.

    Raises:
      UsageError: unknown name or value, or a network that is not residual.
    """
    network = create_model(name, dtype=dtype, batch_norm=batch_norm, **backbone)
    if not isinstance(network, ResNet):
        raise UsageError(f"model {name!r} cannot localize: a ResNet can")
    if freeze_at > len(network.parts):
        raise UsageError(f"model.freeze_at={freeze_at}: {name} has {len(network.parts)} parts")
    anchors = settings.anchor_sizes, settings.anchor_ratios
    return Localizer(network.clone(freeze_at=freeze_at), num_classes, *anchors, settings.rpn_width)


def initialise(model: Localizer, key: jax.Array) -> dict[str, Any]:
    """Fresh ``params`` and ``batch_stats``; they do not depend on the size of images."""
    images = jnp.zeros((1, model.stride, model.stride, 3), storage_dtype(model.backbone.dtype))
    return model.init(key, images, jnp.zeros((1, 1), jnp.int32))
