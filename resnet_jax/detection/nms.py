"""Non-maximum suppression and box voting: exact, compiled, of fixed output size.

Greedy suppression is a chain: whether a box stays depends on all that stayed before it. It is worked through in
blocks of boxes in the order of their scores. A block is first held against the boxes kept so far, then against
itself. Within it, "stays unless a better one that stays overlaps it" is iterated from "all stay" until nothing
changes. The first t boxes are right after t rounds, so that this ends, and ends at the greedy answer; it takes as
many rounds as the longest chain of boxes in which each decides on the next, which is a handful in practice. Memory is
O(N + block^2) beside the kept ones, every step is a dense operation on vectors, and blocks after the last box needed
are not looked at.

Of a batch (vmap) the image that takes longest decides for how long the loops run. Over several devices that makes
them wait for each other at every round, unless each has its images to itself (``jax.shard_map``).
"""

import jax
from jax import numpy as jnp

from resnet_jax.detection import boxes as box_ops

# Boxes looked at together. Smaller ones waste less work within a block, larger ones need fewer launches.
BLOCK = 256


def nms(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: float, keep: int, block: int = BLOCK
) -> tuple[jax.Array, jax.Array]:
    """Greedy non-maximum suppression, as py-faster-rcnn and torchvision define it (but for "+1" in the former).

    A box stays unless its IoU with a box of higher score that stays is above ``threshold``.

    Args:
      boxes: [N, 4]. Empty ones overlap nothing, and stay.
      scores: [N]; a box whose score is NaN counts as invalid.
      valid: bool [N], False for padding.
      threshold: of the IoU: .7 for proposals, .3 for detections of a class.
      keep: how many to return at most.
      block: how many boxes are looked at together, which changes no result.

    Returns:
      Indices int32 [keep] by falling score, the lower index first among equals; bool [keep], False (with index 0)
      after the last box that stays.
    """
    return _suppress(boxes, scores, None, valid, threshold, keep, block)


def classwise_nms(
    boxes: jax.Array,
    scores: jax.Array,
    classes: jax.Array,
    valid: jax.Array,
    threshold: float,
    keep: int,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """``nms`` of each class by itself, the best ``keep`` of all classes together.

    Boxes of different classes never suppress each other; that is compared, not arranged for by moving the classes
    apart as torchvision's batched_nms does, which rounds the boxes.

    Args:
      boxes: [N, 4].
      scores: [N].
      classes: int [N].
      valid: bool [N].
      threshold: see ``nms``.
      keep: likewise.
      block: likewise.
    """
    return _suppress(boxes, scores, classes, valid, threshold, keep, block)


def _suppress(boxes, scores, classes, valid, threshold, keep, block):
    count = len(boxes)
    if not count or not keep:
        return jnp.zeros(keep, jnp.int32), jnp.zeros(keep, bool)
    block = min(block, count)
    # Indices have no gradient, and loops of unknown length no reverse mode: nothing of them shall be traced.
    boxes, scores = jax.lax.stop_gradient((boxes, box_ops.at_least_float32(scores)))
    valid = valid & ~jnp.isnan(scores)
    positions = jnp.arange(count, dtype=jnp.int32)
    order = jax.lax.sort((~valid, -scores, positions), num_keys=3)[2]
    valid_count = valid.sum(dtype=jnp.int32)

    def in_blocks(x):
        """``x`` in the order of scores, [blocks, block, ...]; the last block is filled up."""
        padded = jnp.pad(x[order], [(0, -count % block)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, block, *x.shape[1:])

    sorted_boxes = in_blocks(box_ops.at_least_float32(boxes))
    sorted_classes = None if classes is None else in_blocks(classes)
    # Kept boxes lie in blocks too, so that only the blocks that hold some are looked at.
    kept_size = keep + -keep % block
    zero = box_ops.zero_of(boxes, scores, valid, *(() if classes is None else (classes,)))
    kept = {"rank": zero, "boxes": jnp.full(4, zero, sorted_boxes.dtype)}
    if classes is not None:
        kept["classes"] = zero.astype(classes.dtype)
    kept = {name: jnp.broadcast_to(x, (kept_size, *x.shape)) for name, x in kept.items()}
    earlier = jnp.triu(jnp.ones((block, block), bool), 1)  # [i, j]: i comes before j.

    def overlaps(some, some_classes, others, other_classes):
        """Which of [M, 4] are too much like which of [B, 4]: bool [M, B]."""
        close = box_ops.intersection_over_union(some, others) > threshold
        return close if classes is None else close & (some_classes[:, None] == other_classes[None, :])

    def look_at_block(state):
        number, kept_count, kept = state
        candidates = sorted_boxes[number]
        candidate_classes = None if classes is None else sorted_classes[number]
        rank = number * block + jnp.arange(block, dtype=jnp.int32)

        def against_kept(part, alive):
            start = part * block
            some = {name: jax.lax.dynamic_slice_in_dim(x, start, block) for name, x in kept.items()}
            close = overlaps(some["boxes"], some.get("classes"), candidates, candidate_classes)
            filled = start + jnp.arange(block) < kept_count
            return alive & ~(close & filled[:, None]).any(0)

        parts = (kept_count + block - 1) // block
        alive = jax.lax.fori_loop(0, parts, against_kept, rank < valid_count + zero)

        close = overlaps(candidates, candidate_classes, candidates, candidate_classes) & earlier

        def settle(state):
            stays, _ = state
            settled = alive & ~(close & stays[:, None]).any(0)
            return settled, (settled != stays).any()

        stays, _ = jax.lax.while_loop(lambda state: state[1], settle, (alive, alive.any()))

        slot = jnp.where(stays, kept_count + jnp.cumsum(stays) - 1, kept_size)
        new = {"rank": rank, "boxes": candidates, "classes": candidate_classes}
        kept = {name: x.at[slot].set(new[name], mode="drop") for name, x in kept.items()}
        return number + 1, kept_count + stays.sum(dtype=jnp.int32), kept

    def more(state):
        number, kept_count, _ = state
        return (number * block < valid_count) & (kept_count < keep)

    start = (zero, zero, kept)
    _, kept_count, kept = jax.lax.while_loop(more, look_at_block, start)
    stays = jnp.arange(keep) < kept_count
    return jnp.where(stays, order[kept["rank"][:keep]], 0), stays


def vote(
    kept: jax.Array,
    kept_classes: jax.Array,
    boxes: jax.Array,
    scores: jax.Array,
    classes: jax.Array,
    valid: jax.Array,
    threshold: float = 0.5,
) -> jax.Array:
    """Box voting: each kept box becomes the mean, weighted by score, of all that overlap it (appendix B).

    The boxes that suppression removed know something of where the object ends (Gidaris and Komodakis, 2015). Scores
    stay as they are.

    Args:
      kept: [K, 4], what ``classwise_nms`` kept.
      kept_classes: int [K].
      boxes: [N, 4], all boxes before suppression, the kept ones among them.
      scores: [N], none negative.
      classes: int [N].
      valid: bool [N].
      threshold: the least IoU with which a box of the same class has a vote.

    Returns:
      [K, 4]; a box without voters, as padding has none, stays as it is.
    """
    kept, boxes, scores = (box_ops.at_least_float32(x) for x in (kept, boxes, scores))
    voters = (box_ops.intersection_over_union(kept, boxes) >= threshold) & valid
    voters &= kept_classes[:, None] == classes[None, :]
    weights = jnp.where(voters, scores, 0)
    total = weights.sum(1, keepdims=True)
    # Of invalid boxes not even a NaN may count.
    boxes = jnp.where(valid[:, None], boxes, 0)
    mean = jnp.matmul(weights, boxes, precision="highest") / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, mean, kept)
