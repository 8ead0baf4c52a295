"""Sizes, flips and canvases of a detector's images."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection.coco import read_split
from resnet_jax.detection.resize import (
    canvas_of,
    canvas_sizes,
    flip_boxes,
    pad_image,
    scale_boxes,
    scaled_size,
    wasted,
)
from resnet_jax.detection.voc import read_voc

DATA = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere"))


@pytest.mark.parametrize(
    ("height", "width", "shorter", "longer", "expected"),
    [
        (375, 500, 600, 1000, (600, 800)),
        (500, 375, 600, 1000, (800, 600)),
        (333, 500, 600, 1000, (600, 901)),
        (300, 500, 600, 1000, (600, 1000)),
        (281, 500, 600, 1000, (562, 1000)),  # The longer side decides.
        (480, 640, 800, 1333, (800, 1067)),
        (426, 640, 800, 1333, (800, 1202)),
        (360, 640, 800, 1333, (750, 1333)),
        (1200, 1200, 600, 1000, (600, 600)),
        (1, 5000, 600, 1000, (1, 1000)),
    ],
)
def test_sizes_worked_by_hand(height, width, shorter, longer, expected):
    scaled = scaled_size(height, width, shorter, longer)
    assert scaled.size == (scaled.height, scaled.width) == expected
    assert scaled.scale == pytest.approx(min(shorter / min(height, width), longer / max(height, width)))


def test_every_size_keeps_the_rule_and_fits_its_canvas():
    rng = np.random.default_rng(0)
    for shorter, longer in ((600, 1000), (800, 1333), (128, 128), (320, 512), (100, 333)):
        canvases = canvas_sizes(shorter, longer)
        assert all(side % 32 == 0 for canvas in canvases for side in canvas)
        assert len(canvases) <= 8
        assert {(width, height) for height, width in canvases} == set(canvases)
        for height, width in rng.integers(1, 3000, (500, 2)).tolist():
            scaled = scaled_size(height, width, shorter, longer)
            assert max(scaled.size) <= longer and min(scaled.size) <= shorter
            assert max(scaled.size) == longer or min(scaled.size) == shorter
            canvas = canvases[canvas_of(scaled.size, canvases)]
            assert scaled.height <= canvas[0] and scaled.width <= canvas[1]


def test_the_papers_canvases():
    assert canvas_sizes() == (
        (608, 672), (672, 608), (608, 800), (800, 608), (608, 928), (928, 608), (608, 1024), (1024, 608),
    )  # fmt: skip


def test_the_smallest_canvas_is_taken_and_none_too_small():
    canvases = ((64, 128), (64, 64), (128, 64))
    assert [canvas_of(size, canvases) for size in ((64, 64), (1, 65), (65, 1))] == [1, 0, 2]
    with pytest.raises(ValueError, match=r"holds an image of \(65, 65\)"):
        canvas_of((65, 65), canvases)


def test_boxes_follow_the_image_there_and_back():
    boxes = np.float32([[0, 0, 500, 375], [10, 20, 30, 40]])
    scaled = scale_boxes(boxes, (375, 500), (600, 801))
    np.testing.assert_allclose(scaled, [[0, 0, 801, 600], [16.02, 32, 48.06, 64]], rtol=1e-6)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scale_boxes(scaled, (600, 801), (375, 500)), boxes, rtol=1e-6)


def test_flipped_boxes_hold_the_flipped_pixels():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 31))
    corner = rng.integers(0, 15, (9, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 5, (9, 2))], 1).astype(np.float32)
    flipped = flip_boxes(boxes, 31)
    assert flipped.dtype == np.float32
    for before, after in zip(boxes.astype(int), flipped.astype(int), strict=True):
        left, top, right, bottom = before
        cut = pixels[top:bottom, left:right]
        left, top, right, bottom = after
        np.testing.assert_array_equal(pixels[:, ::-1][top:bottom, left:right], cut[:, ::-1])
    np.testing.assert_array_equal(flip_boxes(flipped, 31), boxes)


def test_a_batch_on_a_device_is_flipped_by_its_own_widths():
    boxes = np.float32(np.random.default_rng(0).uniform(0, 30, (2, 5, 4)))
    widths = np.array([31, 44])
    flipped = jax.jit(flip_boxes)(jnp.asarray(boxes), jnp.asarray(widths)[:, None, None])
    assert flipped.dtype == jnp.float32
    np.testing.assert_array_equal(flipped, np.stack([flip_boxes(boxes[i], int(widths[i])) for i in range(2)]))
    assert jax.jit(lambda b: scale_boxes(b, (10, 10), (20, 30)))(boxes).dtype == jnp.float32


def test_padding_leaves_the_image_where_it_is():
    pixels = np.random.default_rng(0).integers(1, 256, (20, 30, 3), np.uint8)
    padded = pad_image(pixels, (32, 64))
    assert padded.shape == (32, 64, 3) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:20, :30], pixels)
    assert padded.sum() == pixels.sum()


def test_waste_by_hand():
    assert wasted([(32, 32), (32, 64)], [(64, 64)]) == pytest.approx(1 - 1.5 / 4)
    assert wasted([(32, 32), (32, 64)], [(64, 64), (32, 64), (32, 32)]) == 0


@pytest.mark.skipif(not (DATA / "voc100").is_dir(), reason="RESNET_JAX_DATA does not name a folder with voc100")
@pytest.mark.skipif(not (DATA / "coco64").is_dir(), reason="RESNET_JAX_DATA does not name a folder with coco64")
def test_little_is_wasted_on_photos():
    voc, coco = read_voc(str(DATA / "voc100"), "val"), read_split(str(DATA / "coco64"), "val2017")
    for data, sides, most in (
        (voc, (600, 1000), 0.045), (coco, (600, 1000), 0.053), (voc, (800, 1333), 0.034), (coco, (800, 1333), 0.038),
    ):  # fmt: skip
        sizes = [scaled_size(image.height, image.width, *sides).size for image in data.images]
        assert wasted(sizes, canvas_sizes(*sides)) < most
        assert wasted(sizes, [(-(-sides[1] // 32) * 32,) * 2]) > 0.4  # A single canvas.
