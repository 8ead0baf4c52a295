"""Anchors against what public codes print and test, and against loops."""

import math

import jax
import numpy as np
import pytest

from resnet_jax.detection import anchors

# The nine that the authors' MATLAB code makes (the comment at the head of py-faster-rcnn's generate_anchors.py):
# first and last pixel, counted from one, of the cell of 16 x 16 pixels at the origin; sizes vary fastest.
PUBLISHED = [
    [-83, -39, 100, 56],
    [-175, -87, 192, 104],
    [-359, -183, 376, 200],
    [-55, -55, 72, 72],
    [-119, -119, 136, 136],
    [-247, -247, 264, 264],
    [-35, -79, 52, 96],
    [-79, -167, 96, 184],
    [-167, -343, 184, 360],
]


def test_the_papers_nine_anchors_are_the_published_ones():
    found = anchors.make_anchors(1, 1, 16, (128, 256, 512), (0.5, 1, 2), rounded_at=16)
    by_ratio = np.asarray(found).reshape(3, 3, 4).swapaxes(0, 1).reshape(9, 4)
    np.testing.assert_array_equal(by_ratio + np.array([1, 1, 0, 0]), PUBLISHED)


def test_anchors_are_those_of_detectron2s_test():
    corner = [
        [-32, -8, 32, 8],
        [-16, -16, 16, 16],
        [-8, -32, 8, 32],
        [-64, -16, 64, 16],
        [-32, -32, 32, 32],
        [-16, -64, 16, 64],
    ]
    expected = np.array([corner, np.add(corner, [4, 0, 4, 0])]).reshape(12, 4)  # Two cells, side by side.
    np.testing.assert_allclose(anchors.make_anchors(1, 2, 4, (32, 64), (0.25, 1, 4), offset=0), expected)
    np.testing.assert_allclose(anchors.make_anchors(1, 2, 4, (32, 64), (0.25, 1, 4)), expected + 2)


def test_anchors_lie_row_by_row_and_have_the_areas_and_shapes_asked_for():
    height, width, sizes, ratios = 3, 5, (64, 128, 256, 512), (0.5, 1.0, 2.0)
    found = np.asarray(jax.jit(lambda: anchors.make_anchors(height, width, 16, sizes, ratios))())
    assert found.shape == (height * width * 12, 4) and found.dtype == np.float32
    number = 0
    for row in range(height):
        for column in range(width):
            for size in sizes:
                for ratio in ratios:
                    left, top, right, bottom = found[number]
                    assert math.isclose((right - left) * (bottom - top), size**2, rel_tol=1e-5)
                    assert math.isclose((bottom - top) / (right - left), ratio, rel_tol=1e-5)
                    np.testing.assert_allclose(
                        [left + right, top + bottom], [32 * column + 16, 32 * row + 16], atol=1e-3
                    )
                    number += 1


def test_levels_of_a_pyramid_have_anchors_of_their_own():
    levels = anchors.make_pyramid_anchors([(4, 6), (2, 3)], [4, 8], [[32], [64]], (0.5, 1, 2))
    assert [len(level) for level in levels] == [72, 18]
    np.testing.assert_array_equal(levels[1], anchors.make_anchors(2, 3, 8, [64], (0.5, 1, 2)))
    with pytest.raises(ValueError):
        anchors.make_pyramid_anchors([(4, 6)], [4, 8], [[32], [64]], (1,))


def test_identities_differ_and_do_not_depend_on_the_size_of_the_map():
    small, large = anchors.identities(3, 4, 9), anchors.identities(5, 7, 9).reshape(5, 7, 9)
    np.testing.assert_array_equal(small.reshape(3, 4, 9), large[:3, :4])
    all_levels = np.concatenate([anchors.identities(5, 7, 9, level) for level in range(3)])
    assert len(set(all_levels.tolist())) == 3 * 5 * 7 * 9 and all_levels.min() >= 0
    for wrong in ((5000, 4, 9, 0), (4, 4, 30, 4)):
        with pytest.raises(ValueError):
            anchors.identities(*wrong)


def test_inside_counts_the_border():
    boxes = np.array([[0.0, 0, 20, 10], [-1, 0, 20, 10], [0, 0, 20, 11], [0, 0, 20.5, 10], [0, -2, 3, 4]])
    np.testing.assert_array_equal(anchors.inside(boxes, 10, 20), [True, False, False, False, False])
    np.testing.assert_array_equal(anchors.inside(boxes, 10, 20, border=1), [True, True, True, True, False])
