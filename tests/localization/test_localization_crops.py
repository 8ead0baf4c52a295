"""Where boxes go when an image is cut, and back."""

import numpy as np
import pytest
from tiny_localizer import bounds, rectangle

from resnet_jax.data.crops import CenterCrop, ScaleCrop
from resnet_jax.localization.crops import cut, frame_of, to_image, to_view, whole_frame


@pytest.mark.parametrize("seed", range(20))
def test_a_rectangle_is_where_its_box_is_said_to_be(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(100, 200, 2).tolist()
    left, top = random.integers(5, 50, 2).tolist()
    image, pixels = rectangle(0, height, width, (left, top, left + 40, top + 30))
    uniforms = random.uniform(size=3)
    for view in (ScaleCrop(96, 100, 180), CenterCrop(96, 110)):
        frame = frame_of(view, height, width, uniforms)
        box = to_view(image.boxes, frame)
        np.testing.assert_allclose(to_image(box, frame), image.boxes, atol=1e-3)
        parts, _, _ = cut(box, 96, 0.2)
        if (parts[0, 2:] - parts[0, :2] > 1).all():
            np.testing.assert_allclose(bounds(view(pixels, uniforms)), parts[0], atol=1.01)


def test_views_and_back_are_inverse_for_arrays_of_any_rank():
    random = np.random.default_rng(0)
    boxes = random.uniform(0, 500, (4, 5, 3, 4)).astype(np.float32)
    frames = np.concatenate([random.uniform(0.3, 2, (4, 5, 2)), random.uniform(-9, 90, (4, 5, 2))], -1).astype(
        np.float32
    )
    there = to_view(boxes, frames)
    across, down, left, top = frames[1, 2]
    x0, y0, x1, y1 = boxes[1, 2, 0]
    expected = (x0 * across - left, y0 * down - top, x1 * across - left, y1 * down - top)
    np.testing.assert_allclose(there[1, 2, 0], expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(to_image(there, frames), boxes, rtol=1e-4, atol=1e-3)


def test_a_whole_image_has_its_edges_at_the_view_s_edges():
    frame = whole_frame(100, 200, (50, 99))
    np.testing.assert_allclose(to_view(np.array([[0, 0, 200, 100.0]]), frame), [[0, 0, 99, 50]])


def test_a_box_is_trained_by_how_much_of_it_is_seen():
    boxes = np.array(
        [(10, 10, 50, 50), (-30, 0, 10, 40), (-33, 0, 7, 40), (96, 0, 99, 9), (-9.6, 0, 0.4, 50)], np.float32
    )
    parts, valid, partial = cut(boxes, 96, 0.2)
    np.testing.assert_array_equal(valid, [True, True, False, False, False])  # All; a quarter; 7 of 40.
    np.testing.assert_array_equal(partial, [False, False, True, False, True])  # Beside it; less than a pixel wide.
    np.testing.assert_array_equal(parts[:3], [(10, 10, 50, 50), (0, 0, 10, 40), (0, 0, 7, 40)])
    assert cut(np.zeros((0, 4), np.float32), 96, 0.2)[1].shape == (0,)
