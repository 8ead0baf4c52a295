"""From the head's outputs to detections: functions of one image."""

from typing import NamedTuple

import jax
from jax import numpy as jnp

from resnet_jax.detection import boxes as box_ops
from resnet_jax.detection.nms import classwise_nms, vote
from resnet_jax.detection.settings import Settings


class Predictions(NamedTuple):
    """What the head says of regions.

    Attributes:
      boxes: [R, classes, 4], pixels, within the image.
      scores: [R, classes], softmax with background, which is left out.
    """

    boxes: jax.Array
    scores: jax.Array


class Detections(NamedTuple):
    """The objects found in an image, by falling score.

    Attributes:
      boxes: [D, 4], pixels.
      scores: [D].
      labels: int32 [D], classes from 0.
      valid: bool [D], False (and all else 0) after the last one.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array


def predict(
    logits: jax.Array, codes: jax.Array, rois: jax.Array, valid: jax.Array, extent: jax.Array, settings: Settings
) -> Predictions:
    """Decodes the head's outputs.

    Args:
      logits: [R, 1 + classes].
      codes: [R, classes, 4].
      rois: [R, 4], pixels.
      valid: bool [R]; the others' scores become 0.
      extent: (height, width) of the image, pixels, int [2].
      settings: the codes' stds.
    """
    scores = jax.nn.softmax(box_ops.at_least_float32(logits))[:, 1:]
    boxes = box_ops.decode(codes, rois[:, None], settings.box_stds)
    return Predictions(box_ops.clip(boxes, extent[0], extent[1]), jnp.where(valid[:, None], scores, 0))


def best_boxes(predictions: Predictions) -> jax.Array:
    """Where each region came to lie: the box [R, 4] of its best class, to be pooled again (appendix B).

    The paper does not say of which class; pooling every class's box would cost as many times more.
    """
    best = predictions.scores.argmax(1)
    return jnp.take_along_axis(predictions.boxes, best[:, None, None], axis=1)[:, 0]


def detect(predictions: Predictions, settings: Settings) -> Detections:
    """Score threshold, class-wise NMS and, with ``refine``, voting, of all classes of all regions."""
    regions, classes = predictions.scores.shape
    boxes, scores = predictions.boxes.reshape(-1, 4), predictions.scores.reshape(-1)
    labels = jnp.tile(jnp.arange(classes, dtype=jnp.int32), regions)
    # Positive: a threshold of 0 lets no region through that only fills up.
    candidates = (scores > 0) & (scores >= settings.score_threshold)
    kept, valid = classwise_nms(boxes, scores, labels, candidates, settings.detection_nms, settings.detections)
    found = boxes[kept]
    if settings.refine:
        found = vote(found, labels[kept], boxes, scores, labels, candidates, settings.voting_iou)
    return Detections(
        jnp.where(valid[:, None], found, 0),
        jnp.where(valid, scores[kept], 0),
        jnp.where(valid, labels[kept], 0),
        valid,
    )
