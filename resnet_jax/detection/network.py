"""A detector by its backbone's name and the config's section ``detection``; its fresh weights; which are trained."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from resnet_jax.detection.faster_rcnn import POOLINGS, FasterRCNN
from resnet_jax.detection.necks import C4, FPN, FullyConnected
from resnet_jax.detection.settings import Settings
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import storage_dtype
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

LOOKED_AT = 7  # Cells per side that layers on regions see where ``detection.pooled`` is 0.


def create_detector(
    name: str,
    num_classes: int,
    settings: Settings,
    dtype: str = "auto",
    batch_norm: str = "frozen",
    freeze_at: int = 2,
    **backbone: Any,
) -> FasterRCNN:
    """Builds a Faster R-CNN by its backbone's name.

    Args:
      name: a network of ``models.registry``.
      num_classes: without background.
      settings: of ``settings.make_settings``: ``neck``, ``roi``, ``pooled``, ``anchor_sizes``, ``anchor_ratios``,
        ``rpn_width`` and ``context`` are read.
      dtype: compute dtype, as of ``create_model``.
      batch_norm: ``frozen`` in the paper (appendix A), statistics, scales and biases; else as of ``ResNet``.
      freeze_at: how many of the network's leading parts stay as they are: 2 in py-faster-rcnn and detectron2, a
        ResNet's stem and stage 1, VGG's conv1 and conv2; 0 from scratch.
      **backbone: other attributes of ``ResNet`` or ``VGG``.

    Raises:
      UsageError: unknown name or value, or what does not go together.
    """
    network = create_model(name, dtype=dtype, batch_norm=batch_norm, **backbone)
    return attach(network.clone(freeze_at=freeze_at), num_classes, settings, name)


def attach(network: ResNet | VGG, num_classes: int, settings: Settings, name: str) -> FasterRCNN:
    """The detector that the settings put on a network; ``name`` is what messages call it. See ``create_detector``."""
    if settings.roi not in POOLINGS:
        raise UsageError(f"detection.roi={settings.roi} is unknown: {', '.join(POOLINGS)}")
    if not 0 <= network.freeze_at <= len(network.parts):
        raise UsageError(
            f"model.freeze_at={network.freeze_at}: {name} has {len(network.parts)} parts, {', '.join(network.parts)}"
        )
    kind = _kind(network, settings, name)
    stride = settings.last_stride if kind is C4 else 1
    pooled = settings.pooled or LOOKED_AT * stride
    if kind is FullyConnected and pooled != VGG.window:
        raise UsageError(f"detection.pooled={pooled}: the fc6 of model.name={name} looks at {VGG.window}; 0 is that")
    if kind is C4:
        network = network.clone(last_stride=stride)
    detector = kind(
        backbone=network,
        num_classes=num_classes,
        anchor_sizes=tuple(settings.anchor_sizes),
        anchor_ratios=tuple(settings.anchor_ratios),
        rpn_width=settings.rpn_width,
        roi=settings.roi,
        pooled=pooled,
        context=settings.context,
    )
    sizes, levels = detector.anchor_sizes, len(detector.strides)
    if kind is FPN and len(sizes) != levels:
        raise UsageError(
            f"detection.anchor_sizes={sizes}: detection.neck=fpn takes one for each of {levels} levels, as in"
            " (32, 64, 128, 256, 512)"
        )
    return detector


def _kind(network: ResNet | VGG, settings: Settings, name: str) -> type[FasterRCNN]:
    if settings.neck == "c4":
        if isinstance(network, ResNet) and len(network.blocks) < 2:
            raise UsageError(f"detection.neck=c4: model.name={name} has one stage; all but the last are shared")
        return C4 if isinstance(network, ResNet) else FullyConnected
    if settings.neck != "fpn":
        raise UsageError(f"detection.neck={settings.neck} is unknown: c4, fpn")
    if not isinstance(network, ResNet) or network.stem != "imagenet" or len(network.blocks) != 4:
        raise UsageError(f"detection.neck=fpn goes with ImageNet's residual networks, not with model.name={name}")
    return FPN


def initialise(model: FasterRCNN, key: jax.Array) -> dict[str, Any]:
    """Fresh ``params`` and ``batch_stats``; they do not depend on the size of images."""
    side = model.strides[-1]
    images = jnp.zeros((1, side, side, 3), storage_dtype(model.backbone.dtype))
    return model.init(key, images, jnp.full((1, 2), side, jnp.int32), jnp.array([[[0.0, 0, side, side]]]))


def trained(model: nn.Module, params: Any) -> Any:
    """Which parameters training changes: a tree of bools like ``params``, those of a network on a ``backbone``.

    Not those of the backbone's leading ``freeze_at`` parts, nor, with frozen BN, BN's scales and biases: its layers
    are fixed linear activations (appendix A).
    """
    frozen = set(model.backbone.parts[: model.backbone.freeze_at])

    def is_trained(path: tuple, _: Any) -> bool:
        names = [part.key for part in path]
        if names[0] != "backbone":
            return True
        fixed_bn = model.backbone.batch_norm == "frozen" and names[-2].rstrip("0123456789").endswith("bn")
        return names[1] not in frozen and not fixed_bn

    return jax.tree.map_with_path(is_trained, params)
