"""Proposals of one level and of several, against loops."""

import functools
import itertools

import boxes_by_hand as by_hand
import jax
import numpy as np
import pytest

from resnet_jax.detection import anchors, proposals
from resnet_jax.detection.settings import make_settings

SHAPES, STRIDES = [(12, 16), (6, 8), (3, 4)], [8, 16, 32]
# Of one size, so that levels have boxes that overlap each other's.
SIZES, RATIOS = [[32], [32], [32]], (0.5, 1.0, 2.0)
EXTENT = np.array([83, 120], np.int32)
OWN = [np.array([11, 15]), np.array([6, 8]), np.array([3, 4])]


def decode_by_hand(code: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    (left, top, right, bottom), (dx, dy, dw, dh) = anchor.astype(np.float64), code.astype(np.float64)
    width, height = right - left, bottom - top
    x, y = (left + right) / 2 + dx * width, (top + bottom) / 2 + dy * height
    half_width, half_height = width * np.exp(dw) / 2, height * np.exp(dh) / 2
    box = np.array([x - half_width, y - half_height, x + half_width, y + half_height])
    return box.clip(0, [EXTENT[1], EXTENT[0]] * 2)


@pytest.mark.parametrize("levels", [[0], [0, 1, 2]])
def test_proposals_are_the_best_of_all_levels_after_each_level_s_own_suppression(levels):
    random = np.random.default_rng(2)
    shapes, strides, sizes, own = ([x[level] for level in levels] for x in (SHAPES, STRIDES, SIZES, OWN))
    counts = [3 * height * width for height, width in shapes]
    logits = [random.normal(size=count).astype(np.float32) for count in counts]
    codes = [random.normal(0, 0.3, (count, 4)).astype(np.float32) for count in counts]
    settings = make_settings(proposal_nms=0.4, proposal_side=6.0)
    before, after = 25, 30

    @jax.jit
    def run(logits, codes):
        grids = proposals.make_grids(shapes, strides, sizes, RATIOS, own)
        return proposals.propose(logits, codes, grids, EXTENT, before, after, settings), proposals.join(grids)

    found, grid = run(logits, codes)

    kept, first = [], 0
    for level, (shape, stride, size, extent) in enumerate(zip(shapes, strides, sizes, own, strict=True)):
        all_anchors = np.asarray(anchors.make_anchors(*shape, stride, size, RATIOS))
        row, column, _ = np.unravel_index(np.arange(counts[level]), (*shape, 3))
        real = (row < extent[0]) & (column < extent[1])
        np.testing.assert_array_equal(grid.real[first : first + counts[level]], real)
        np.testing.assert_array_equal(grid.anchors[first : first + counts[level]], all_anchors)
        best = sorted(np.flatnonzero(real), key=lambda i: -logits[level][i])[:before]
        boxes = {i: decode_by_hand(codes[level][i], all_anchors[i]) for i in best}
        stay = []
        for i in best:
            width, height = boxes[i][2:] - boxes[i][:2]
            if min(width, height) >= 6 and all(by_hand.iou(boxes[i], boxes[j]) <= 0.4 for j in stay):
                stay.append(i)
        assert len(stay) < len(best)  # Something was suppressed or too small.
        kept += [(float(logits[level][i]), boxes[i], int(grid.identities[first + i])) for i in stay]
        first += counts[level]
    kept = sorted(kept, key=lambda proposal: -proposal[0])[:after]
    if len(levels) > 1:
        assert max(by_hand.iou(box, other) for (_, box, _), (_, other, _) in itertools.combinations(kept, 2)) > 0.4
    assert len(kept) == (after if len(levels) > 1 else len(stay))
    assert np.asarray(found.valid).tolist() == [place < len(kept) for place in range(after)]
    for place, (_, box, identity) in enumerate(kept):
        np.testing.assert_allclose(found.boxes[place], box, atol=1e-3)
        assert found.identities[place] == identity
    assert (np.asarray(found.boxes)[len(kept) :] == 0).all()


def test_anchors_of_all_levels_have_numbers_of_their_own_which_a_larger_canvas_leaves_as_they_are():
    make = functools.partial(proposals.make_grids, strides=STRIDES, sizes=SIZES, ratios=RATIOS, map_extents=OWN)
    larger_shapes = [(height + 5, width + 9) for height, width in SHAPES]
    small, large = jax.jit(lambda: (make(SHAPES), make(larger_shapes)))()
    numbers = np.asarray(proposals.join(large).identities)
    assert len(set(numbers.tolist())) == len(numbers)
    for grid, larger, (height, width) in zip(small, large, SHAPES, strict=True):
        same = np.asarray(larger.identities).reshape(height + 5, width + 9, 3)[:height, :width]
        np.testing.assert_array_equal(np.asarray(grid.identities).reshape(height, width, 3), same)
        assert grid.real.sum() == larger.real.sum()
