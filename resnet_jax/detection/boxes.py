"""Boxes as pure functions on arrays: areas, overlaps, and the coding in which a network predicts them.

A box is (left, top, right, bottom) in pixels of continuous coordinates: pixel i covers i to i + 1, and a width is
right - left. VOC's files and py-faster-rcnn name the first and last pixel instead, so that their widths are
right - left + 1; who reads such files adds one to right and bottom. Everything is computed in float32 or wider.
"""

from collections.abc import Sequence
import math

import jax
from jax import numpy as jnp

# A predicted box is at most this many times as wide and high as its anchor: what makes 1000 pixels of 16. Caffe2's
# Detectron (BBOX_XFORM_CLIP) and detectron2 (_DEFAULT_SCALE_CLAMP) limit it so that exp() stays finite early on.
MAX_LOG_SCALE = math.log(1000 / 16)


def at_least_float32(x: jax.Array) -> jax.Array:
    """``x`` as float32, or as float64 if it is that."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zero_of(*arrays: jax.Array) -> jax.Array:
    """An int32 0 that counts as computed from ``arrays``: what a loop over them starts from.

    In shard_map a loop's state must vary over the devices from the start, if it comes to do so by what is read.
    """
    return sum(x[:0].astype(jnp.int32).sum(dtype=jnp.int32) for x in map(jnp.asarray, arrays))


def sides(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Widths and heights [...] of boxes [..., 4]; an inverted box has negative ones."""
    boxes = at_least_float32(boxes)
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def area(boxes: jax.Array) -> jax.Array:
    """Areas [...] of boxes [..., 4], in square pixels; 0 for an empty or inverted one."""
    width, height = sides(boxes)
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def clip(boxes: jax.Array, height: jax.Array | float, width: jax.Array | float) -> jax.Array:
    """The parts of boxes [..., 4] within an image of that size; what lies outside becomes empty, at the border."""
    boxes = at_least_float32(boxes)
    limits = jnp.stack([jnp.asarray(side, boxes.dtype) for side in (width, height, width, height)], axis=-1)
    return jnp.clip(boxes, 0, limits)


def intersection(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """The area that each of [..., N, 4] shares with each of [..., M, 4]: [..., N, M]."""
    boxes, others = at_least_float32(boxes)[..., :, None, :], at_least_float32(others)[..., None, :, :]
    width = jnp.minimum(boxes[..., 2], others[..., 2]) - jnp.maximum(boxes[..., 0], others[..., 0])
    height = jnp.minimum(boxes[..., 3], others[..., 3]) - jnp.maximum(boxes[..., 1], others[..., 1])
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 where there is no part: also where a box is empty, inverted or NaN."""
    some = part > 0
    return jnp.where(some, part / jnp.where(some, whole, 1), 0)


def intersection_over_union(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """IoU of each of [..., N, 4] with each of [..., M, 4]: [..., N, M] in [0, 1].

    0, never NaN, for what is empty, inverted or NaN.
    """
    shared = intersection(boxes, others)
    return _share(shared, area(boxes)[..., :, None] + area(others)[..., None, :] - shared)


def intersection_over_area(boxes: jax.Array, regions: jax.Array) -> jax.Array:
    """How much of each of [..., N, 4] lies in each of the regions [..., M, 4]: [..., N, M] in [0, 1].

    COCO's measure for crowds, which are larger than any one box in them.
    """
    return _share(intersection(boxes, regions), area(boxes)[..., :, None])


def encode(boxes: jax.Array, anchors: jax.Array, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """What a network shall predict at ``anchors`` to say ``boxes``: R-CNN's (dx, dy, log dw, log dh), over their stds.

    Args:
      boxes: [..., 4].
      anchors: [..., 4], anchors or proposals, of a shape that broadcasts with ``boxes``.
      stds: what the four are divided by, (.1, .1, .2, .2) in Fast R-CNN's heads.

    Returns:
      [..., 4]: the shift of the centre in anchor widths and heights, and the logarithms of the quotients of the
      sides (R-CNN, appendix C). 0 where either box is empty, as padding is, so that nothing infinite meets a mask.
    """
    boxes, anchors = at_least_float32(boxes), at_least_float32(anchors)
    width, height = sides(boxes)
    anchor_width, anchor_height = sides(anchors)
    usable = (width > 0) & (height > 0) & (anchor_width > 0) & (anchor_height > 0)
    width, height, anchor_width, anchor_height = (
        jnp.where(usable, side, 1) for side in (width, height, anchor_width, anchor_height)
    )
    # Twice the distance between the centres; halves would be one rounding more.
    across = boxes[..., 0] + boxes[..., 2] - anchors[..., 0] - anchors[..., 2]
    down = boxes[..., 1] + boxes[..., 3] - anchors[..., 1] - anchors[..., 3]
    codes = (
        across / 2 / anchor_width,
        down / 2 / anchor_height,
        jnp.log(width / anchor_width),
        jnp.log(height / anchor_height),
    )
    return jnp.where(usable[..., None], jnp.stack(codes, axis=-1) / jnp.asarray(stds, boxes.dtype), 0)


def decode(codes: jax.Array, anchors: jax.Array, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """The boxes [..., 4] that ``codes`` [..., 4] at ``anchors`` [..., 4] mean: the inverse of ``encode``.

    The shapes broadcast: codes of several classes [R, classes, 4] take anchors [R, 1, 4]. Sides are limited to
    1000 / 16 times the anchor's (MAX_LOG_SCALE), where the gradient to the code ends too. Boxes are not clipped.
    """
    anchors = at_least_float32(anchors)
    codes = at_least_float32(codes) * jnp.asarray(stds, anchors.dtype)
    anchor_width, anchor_height = sides(anchors)
    center_x = anchors[..., 0] + anchor_width / 2 + codes[..., 0] * anchor_width
    center_y = anchors[..., 1] + anchor_height / 2 + codes[..., 1] * anchor_height
    half_width = anchor_width * jnp.exp(jnp.minimum(codes[..., 2], MAX_LOG_SCALE)) / 2
    half_height = anchor_height * jnp.exp(jnp.minimum(codes[..., 3], MAX_LOG_SCALE)) / 2
    corners = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
    return jnp.stack(corners, axis=-1)
