"""From the RPN's outputs to proposals, and what of anchors and proposals is trained on: functions of one image.

Nothing here has a gradient: proposals count as given (Faster R-CNN's approximate joint training, section 3.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import numpy as jnp

from resnet_jax.detection import boxes as box_ops, matching
from resnet_jax.detection.anchors import identities, inside, make_pyramid_anchors
from resnet_jax.detection.nms import classwise_nms
from resnet_jax.detection.settings import Settings


class Truth(NamedTuple):
    """The annotated boxes of an image.

    Attributes:
      boxes: [G, 4], pixels.
      labels: int32 [G], classes from 0.
      valid: bool [G], False for padding.
      crowd: bool [G], regions of objects that nobody counted.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    crowd: jax.Array


class Proposals(NamedTuple):
    """Where the RPN sees objects, by falling objectness.

    Attributes:
      boxes: [P, 4], pixels, within the image.
      valid: bool [P], False for padding, which comes last.
      identities: int32 [P], those of the anchors they come from.
    """

    boxes: jax.Array
    valid: jax.Array
    identities: jax.Array


class AnchorSample(NamedTuple):
    """The anchors that an image trains, foreground first.

    Attributes:
      indices: int32 [S], among all anchors.
      sampled: bool [S], False for what only fills up.
      foreground: bool [S].
      targets: [S, 4], box codes.
    """

    indices: jax.Array
    sampled: jax.Array
    foreground: jax.Array
    targets: jax.Array


class RoISample(NamedTuple):
    """The regions that an image trains, foreground first.

    Attributes:
      boxes: [S, 4], pixels.
      sampled: bool [S], False for what only fills up.
      labels: int32 [S], 0 for background, else 1 + class.
      targets: [S, 4], box codes over their stds.
    """

    boxes: jax.Array
    sampled: jax.Array
    labels: jax.Array
    targets: jax.Array


class Grid(NamedTuple):
    """The anchors of a map, or one after the other of several.

    Attributes:
      anchors: [N, 4], pixels.
      identities: int32 [N].
      real: bool [N], whether an anchor's cell is the image's; else it is padding's.
    """

    anchors: jax.Array
    identities: jax.Array
    real: jax.Array


def make_grids(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    map_extents: Sequence[jax.Array],
) -> tuple[Grid, ...]:
    """The anchors of one image on each level, with identities that no other level has.

    Args:
      shapes: (height, width) of each level, cells.
      strides: see ``anchors.make_pyramid_anchors``.
      sizes: likewise, of each level as many.
      ratios: likewise.
      map_extents: (height, width) of the image on each level, cells, int [2].
    """
    levels = zip(shapes, make_pyramid_anchors(shapes, strides, sizes, ratios), map_extents, strict=True)
    per_cell, grids = len(sizes[0]) * len(ratios), []
    for level, ((height, width), anchors, extent) in enumerate(levels):
        row, column = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
        real = (row < extent[0]) & (column < extent[1])
        numbers = identities(height, width, per_cell, level)
        grids.append(Grid(anchors, numbers, jnp.repeat(real.reshape(-1), per_cell)))
    return tuple(grids)


def join(grids: Sequence[Grid]) -> Grid:
    """All levels' anchors as one."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *grids)


def propose(
    logits: Sequence[jax.Array],
    codes: Sequence[jax.Array],
    grids: Sequence[Grid],
    extent: jax.Array,
    before: int,
    after: int,
    settings: Settings,
) -> Proposals:
    """The proposals of one image (Faster R-CNN, section 3.3; of several levels as detectron2 makes them).

    Args:
      logits: [N], of the RPN, on each level.
      codes: [N, 4], likewise.
      grids: the anchors, likewise.
      extent: (height, width) of the image, pixels, int [2].
      before: of highest objectness, so many of each level are looked at. Boxes suppress those of their own level.
      after: so many of all levels are returned, P.
      settings: threshold of NMS, smallest side.
    """
    found = []
    for level, (level_logits, level_codes, grid) in enumerate(zip(logits, codes, grids, strict=True)):
        scores = jnp.where(grid.real, level_logits, -jnp.inf)
        scores, order = jax.lax.top_k(scores, min(before, len(scores)))
        boxes = box_ops.clip(box_ops.decode(level_codes[order], grid.anchors[order]), extent[0], extent[1])
        found.append((scores, boxes, grid.identities[order], jnp.full(len(scores), level)))
    scores, boxes, numbers, levels = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    shorter = jnp.minimum(*box_ops.sides(boxes))
    usable = (scores > -jnp.inf) & (shorter > 0) & (shorter >= settings.proposal_side)
    kept, valid = classwise_nms(boxes, scores, levels, usable, settings.proposal_nms, after)
    return Proposals(jnp.where(valid[:, None], boxes[kept], 0), valid, numbers[kept])


def sample_anchors(key: jax.Array, grid: Grid, truth: Truth, extent: jax.Array, settings: Settings) -> AnchorSample:
    """Draws the anchors that one image trains (Faster R-CNN, sections 3.1.2 and 3.1.3)."""
    anchors, countable = grid.anchors, truth.valid & ~truth.crowd
    border = settings.anchor_border if settings.anchor_border >= 0 else float("inf")
    box, role = matching.match(
        box_ops.intersection_over_union(anchors, truth.boxes),
        countable,
        settings.anchor_high,
        settings.anchor_low,
        best_for_each=True,
        candidates=grid.real & inside(anchors, extent[0], extent[1], border),
        ignored=matching.in_crowd(anchors, truth.boxes, truth.valid & truth.crowd, settings.crowd_share),
    )
    indices, sampled = matching.sample(
        key, role, settings.anchors_sampled, settings.anchors_foreground, grid.identities
    )
    foreground = sampled & (role[indices] == matching.FOREGROUND)
    targets = box_ops.encode(truth.boxes[box[indices]], anchors[indices])
    return AnchorSample(indices, sampled, foreground, targets)


def sample_rois(key: jax.Array, proposals: Proposals, truth: Truth, settings: Settings) -> RoISample:
    """Draws the regions that one image trains, annotated boxes among them (Fast R-CNN, section 2.3)."""
    countable = truth.valid & ~truth.crowd
    boxes = jnp.concatenate([proposals.boxes, truth.boxes.astype(proposals.boxes.dtype)])
    box, role = matching.match(
        box_ops.intersection_over_union(boxes, truth.boxes),
        countable,
        settings.roi_high,
        settings.roi_high,
        best_for_each=False,
        lowest=settings.roi_low,
        candidates=jnp.concatenate([proposals.valid, countable]),
        ignored=matching.in_crowd(boxes, truth.boxes, truth.valid & truth.crowd, settings.crowd_share),
    )
    # Annotated boxes get numbers that no anchor has.
    identities = jnp.concatenate([proposals.identities, -1 - jnp.arange(len(truth.boxes), dtype=jnp.int32)])
    indices, sampled = matching.sample(key, role, settings.rois_sampled, settings.rois_foreground, identities)
    foreground = sampled & (role[indices] == matching.FOREGROUND)
    chosen = jnp.where(sampled[:, None], boxes[indices], 0)
    labels = jnp.where(foreground, 1 + truth.labels[box[indices]], 0)
    targets = box_ops.encode(truth.boxes[box[indices]], chosen, settings.box_stds)
    return RoISample(chosen, sampled, labels, targets)
