"""Boxes drawn into pictures: where they are, in which colour, and that they can be read."""

import os
import pathlib

import numpy as np
import pytest

from resnet_jax.detection.batches import read_pixels
from resnet_jax.detection.draw import class_colour, draw_boxes
from resnet_jax.detection.voc import read_voc

DATA = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere"))
GREY = np.full((480, 640, 3), 128, np.uint8)


def of_colour(pixels: np.ndarray, label: int) -> np.ndarray:
    return (pixels == class_colour(label)).all(-1)


def bounds(mask: np.ndarray) -> list[int]:
    y, x = np.nonzero(mask)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def test_the_line_runs_along_the_box_and_the_name_stands_above_it():
    before = GREY.copy()
    drawn = draw_boxes(GREY, np.array([[100, 200, 300, 400]]), np.array([1]), ("cat", "dog"))
    np.testing.assert_array_equal(GREY, before)
    assert drawn.dtype == np.uint8 and drawn.shape == GREY.shape
    ours = of_colour(drawn, 1)
    line = np.zeros_like(ours)
    line[200:400, 100:300] = True
    line[202:398, 102:298] = False
    np.testing.assert_array_equal(ours[200:], line[200:])
    changed = (drawn != GREY).any(-1)
    left, top, right, bottom = bounds(changed)
    assert (left, right, bottom) == (100, 300, 400) and 180 < top < 190
    name = drawn[top:200, 100 : bounds(changed[:200])[2]]
    assert changed[top:200, 100 : 100 + name.shape[1]].all()  # The name has its ground to the box's line.
    assert 0.05 < (name.sum(-1) < 100).mean() < 0.5  # Dark letters on it.


def test_scores_are_written_and_the_surest_lies_on_top():
    box, other = [100, 200, 300, 400], [100, 200, 300, 402]
    plain = draw_boxes(GREY, np.array([box]), np.array([0]), ("cat",))
    scored = draw_boxes(GREY, np.array([box]), np.array([0]), ("cat",), np.array([0.875]))
    assert bounds((scored != GREY).any(-1)[:200])[2] > bounds((plain != GREY).any(-1)[:200])[2]
    for scores, above in (((0.9, 0.5), 0), ((0.5, 0.9), 1)):
        drawn = draw_boxes(GREY, np.array([box, other]), np.array([0, 1]), ("cat", "dog"), np.array(scores))
        assert tuple(drawn[300, 100]) == class_colour(above)


def test_names_do_not_cover_one_another_and_stay_in_the_picture():
    boxes = np.array([[0, 0, 60, 40], [0, 0, 62, 44], [600, 3, 640, 100], [598, 440, 640, 480]], float)
    one_by_one = [draw_boxes(GREY, boxes[i : i + 1], np.array([i]), "abcd", np.ones(1)) for i in range(4)]
    assert all((drawn != GREY).any() for drawn in one_by_one)
    together = draw_boxes(GREY, boxes, np.arange(4), ["a long name"] * 4, np.ones(4))
    for label in range(4):  # Each name's ground, wider than any line, is to be seen.
        rows = of_colour(together, label).sum(1)
        assert (rows > 40).sum() >= 5


def test_odd_boxes_are_cut_off_or_left_out():
    boxes = np.array([[-50.0, 100, 50, 200], [700, 10, 800, 20], [np.nan, 0, 5, 5], [20.2, 300.4, 20.3, 300.4]])
    drawn = draw_boxes(GREY, boxes, np.arange(4), ("cut", "outside", "nowhere", "tiny"))
    assert bounds(of_colour(drawn, 0)[120:])[0] == 0 and bounds(of_colour(drawn, 0))[3] == 200
    assert not of_colour(drawn, 1).any() and not of_colour(drawn, 2).any()
    assert tuple(drawn[300, 20]) == class_colour(3)
    np.testing.assert_array_equal(draw_boxes(GREY, np.zeros((0, 4)), np.zeros(0, int), ()), GREY)
    tiny = np.zeros((3, 5, 3), np.uint8)
    assert draw_boxes(tiny, np.array([[0, 0, 5, 3]]), np.array([0]), ("x",)).shape == (3, 5, 3)


def test_lines_and_letters_grow_with_the_picture():
    heights, lines = [], []
    for side in (128, 480, 1200):
        picture = np.full((side, side, 3), 128, np.uint8)
        box = np.array([[0.25, 0.5, 0.75, 0.9]]) * side
        drawn = (draw_boxes(picture, box, np.array([0]), ("ship",)) != picture).any(-1)
        heights.append(round(box[0, 1]) - bounds(drawn)[1])
        lines.append(int(drawn[round(0.7 * side), : side // 2].sum()))
    assert 10 <= heights[0] < heights[1] < heights[2] and lines == [1, 2, 5]


def test_colours_differ_and_carry_black_letters():
    colours = np.array([class_colour(label) for label in range(80)], float)
    assert len(np.unique(colours, axis=0)) == 80
    assert (colours @ [0.299, 0.587, 0.114] >= 124).all()
    near = np.abs(colours[:20, None] - colours[None, :20]).max(-1) + 255 * np.eye(20)
    assert near.min() > 20


def test_shapes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"boxes \(2, 4\) and labels \(1,\)"):
        draw_boxes(GREY, np.zeros((2, 4)), np.zeros(1, int), ("a",))
    with pytest.raises(ValueError, match=r"scores \(2,\), but labels \(1,\)"):
        draw_boxes(GREY, np.zeros((1, 4)), np.zeros(1, int), ("a",), np.zeros(2))


@pytest.mark.skipif(not (DATA / "voc100").is_dir(), reason="RESNET_JAX_DATA does not name a folder with voc100")
def test_photos_change_at_their_boxes_alone():
    data = read_voc(str(DATA / "voc100"), "val")
    for image in data.images[:10]:
        pixels = read_pixels(image)
        drawn = draw_boxes(pixels, image.boxes, image.labels, data.classes)
        for box, label in zip(np.rint(image.boxes).astype(int), image.labels, strict=True):
            corners = drawn[[box[1], box[3] - 1], [box[2] - 1, box[0]]]
            assert len(image.labels) > 1 or (corners == class_colour(label)).all()
        assert (drawn != pixels).any(-1).mean() < 0.4
