"""Which box each anchor or proposal shall learn, and which of them are trained on: matching and random sampling."""

import math

import jax
from jax import numpy as jnp

from resnet_jax.detection import boxes as box_ops

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -1


def match(
    ious: jax.Array,
    valid: jax.Array,
    high: float,
    low: float,
    best_for_each: bool,
    lowest: float = 0.0,
    candidates: jax.Array | None = None,
    ignored: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gives each anchor the box it overlaps most, and a role.

    Anchors of an RPN: ``high=.7, low=.3, best_for_each=True`` (Faster R-CNN, section 3.1.2). RoIs of the head:
    ``high=.5, low=.5, best_for_each=False`` with ``lowest=.1`` on VOC (Fast R-CNN, section 2.3) or 0 on COCO.

    Args:
      ious: [N, M], each anchor's IoU with each box.
      valid: bool [M], False for padding.
      high: an anchor of at least this IoU is foreground.
      low: one below it is background; between the two it is ignored.
      best_for_each: also makes foreground of the anchors whose IoU with some box no other exceeds (all of them, if
        several are equal). They keep the box that they overlap most themselves, which may be another, as in
        py-faster-rcnn and detectron2. Unlike in py-faster-rcnn, a box that no anchor touches makes none foreground.
      lowest: below this an anchor is ignored too.
      candidates: bool [N], False for anchors that take no part, neither in their role nor as a box's best: outside
        the image, or padding.
      ignored: bool [N], anchors that are no background whatever their IoU (``in_crowd``); foreground stays.

    Returns:
      Index of the box int32 [N] (the first of equals; 0 where there is none), role int32 [N]: 1 foreground,
      0 background, -1 ignored. Without boxes all candidates are background, or ignored if ``lowest`` is positive.
    """
    ious = jnp.where(valid[None, :], box_ops.at_least_float32(ious), 0)
    if candidates is not None:
        ious = jnp.where(candidates[:, None], ious, 0)
    best = ious.max(1, initial=0)
    box = ious.argmax(1).astype(jnp.int32) if ious.shape[1] else jnp.zeros(len(ious), jnp.int32)
    background = (best < low) & (best >= lowest)
    if ignored is not None:
        background &= ~ignored
    role = jnp.where(background, BACKGROUND, IGNORED)
    foreground = best >= high
    if best_for_each:
        foreground |= ((ious == ious.max(0, initial=0)) & (ious > 0)).any(1)
    # Without valid boxes an IoU of 0 is nobody's foreground, even at high = 0.
    role = jnp.where(foreground & (best > 0), FOREGROUND, role)
    if candidates is not None:
        role = jnp.where(candidates, role, IGNORED)
    return box, role.astype(jnp.int32)


def in_crowd(anchors: jax.Array, crowds: jax.Array, valid: jax.Array, threshold: float) -> jax.Array:
    """Which of [N, 4] lie in one of the crowd regions [M, 4] by at least ``threshold`` of their area: bool [N].

    Where the annotators stopped counting, a detection is no mistake. Detectron takes .7 (CROWD_FILTER_THRESH) and
    leaves such proposals out altogether; detectron2 and py-faster-rcnn train as if crowds were background.
    """
    shares = box_ops.intersection_over_area(anchors, crowds)
    return (valid & (shares >= threshold)).any(1)


def random_bits(key: jax.Array, identities: jax.Array) -> jax.Array:
    """31 random bits for each of the identities int32 [N], from (key, identity) alone: int32 [N]."""
    bits = jax.vmap(lambda identity: jax.random.bits(jax.random.fold_in(key, identity)))(identities)
    return (bits >> 1).astype(jnp.int32)


def sample(
    key: jax.Array,
    roles: jax.Array,
    count: int,
    positive_share: float,
    identities: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws what one image is trained on: foreground up to a share, the rest background, without replacement.

    Faster R-CNN: 256 anchors, of which at most half are foreground (section 3.1.3); Fast R-CNN: 128 RoIs, a quarter
    (section 2.3). Foreground that is missing is made up for by background, not the reverse.

    Args:
      key: a JAX key; the draw follows from it alone.
      roles: int [N] of ``match``.
      count: how many to draw.
      positive_share: at most floor(share * count) are foreground.
      identities: int32 [N], what the draw goes by in place of the position (``anchors.identities``).

    Returns:
      Indices int32 [count], foreground first, each at most once; bool [count], False (with index 0) where too few
      were to be had. Each of the same role is equally likely.
    """
    total = len(roles)
    if identities is None:
        identities = jnp.arange(total, dtype=jnp.int32)
    bits = random_bits(key, identities)

    def draw(role: int, limit: int) -> tuple[jax.Array, jax.Array]:
        """The ``limit`` of that role with the highest bits, and how many there are: int32 [count], scalar."""
        found, indices = jax.lax.top_k(jnp.where(roles == role, bits, -1), min(limit, total))
        return jnp.pad(indices, (0, count - len(indices))), (found >= 0).sum()

    limit = math.floor(positive_share * count + 1e-6)  # .29 * 100 is 28.999999999999996.
    positives, positive_count = draw(FOREGROUND, limit)
    negatives, negative_count = draw(BACKGROUND, count)
    slot = jnp.arange(count)
    chosen = slot < positive_count + negative_count
    shifted = negatives[jnp.clip(slot - positive_count, 0, count - 1)]
    indices = jnp.where(slot < positive_count, positives, shifted)
    return jnp.where(chosen, indices, 0).astype(jnp.int32), chosen
