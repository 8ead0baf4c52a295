"""Areas, overlaps and the coding of boxes against plain NumPy, one box at a time."""

import math

import boxes_by_hand as by_hand
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import boxes

STDS = (0.1, 0.1, 0.2, 0.2)


def odd_boxes() -> np.ndarray:
    """Random boxes, and what may come with them: empty, inverted, a point, all zeros."""
    rng = np.random.default_rng(0)
    odd = [[5, 5, 5, 9], [9, 2, 3, 8], [7, 9, 12, 1], [4, 4, 4, 4], [0, 0, 0, 0], [9, 9, 2, 2]]
    return np.concatenate([by_hand.random_boxes(rng, 20, size=20), np.array(odd, np.float32)])


def test_overlaps_are_those_of_the_definition_and_0_for_what_has_no_area():
    some, others = odd_boxes(), odd_boxes()[::-1][:17]
    found = np.asarray(jax.jit(boxes.intersection_over_union)(some, others))
    np.testing.assert_allclose(found, by_hand.ious(some, others), rtol=1e-6, atol=0)
    assert np.all(found[20:] == 0) and found.max() <= 1
    shares = [[by_hand.shared_area(a, b) / (by_hand.area(a) or 1) for b in others] for a in some]
    np.testing.assert_allclose(boxes.intersection_over_area(some, others), shares, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(boxes.area(some), [by_hand.area(box) for box in some])


def test_overlaps_worked_by_hand():
    square = np.array([[0.0, 0, 2, 2]])
    others = np.array([[1.0, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 1, 1], [np.nan, 0, 1, 1]])
    np.testing.assert_allclose(boxes.intersection_over_union(square, others)[0], [1 / 7, 1, 0, 1 / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(boxes.intersection_over_area(square, others)[0], [1 / 4, 1, 0, 1 / 4, 0], rtol=1e-6)


def test_overlaps_with_nothing_have_no_entries():
    assert boxes.intersection_over_union(np.zeros((3, 4)), np.zeros((0, 4))).shape == (3, 0)


def test_gradient_of_overlaps_is_finite_where_there_is_none():
    def total(some):
        return boxes.intersection_over_union(some, jnp.asarray(odd_boxes())).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.asarray(odd_boxes()))).all()


def test_clipped_boxes_lie_in_the_image():
    some = np.array([[-5.0, 2, 30, 9], [3, -4, 8, 50], [25, 1, 40, 3], [-9, -9, -1, -1], [1, 2, 3, 4]])
    clipped = [[0, 2, 20, 9], [3, 0, 8, 10], [20, 1, 20, 3], [0, 0, 0, 0], [1, 2, 3, 4]]
    np.testing.assert_array_equal(boxes.clip(some, 10, 20), clipped)


def code_by_hand(box: np.ndarray, anchor: np.ndarray, stds: tuple[float, ...]) -> list[float]:
    width, height = float(box[2] - box[0]), float(box[3] - box[1])
    anchor_width, anchor_height = float(anchor[2] - anchor[0]), float(anchor[3] - anchor[1])
    if min(width, height, anchor_width, anchor_height) <= 0:
        return [0.0] * 4
    code = [
        (box[0] + width / 2 - anchor[0] - anchor_width / 2) / anchor_width,
        (box[1] + height / 2 - anchor[1] - anchor_height / 2) / anchor_height,
        math.log(width / anchor_width),
        math.log(height / anchor_height),
    ]
    return [value / std for value, std in zip(code, stds, strict=True)]


def test_codes_are_those_of_the_definition_and_0_for_padding():
    some, anchors = odd_boxes(), odd_boxes()[::-1]
    found = jax.jit(boxes.encode, static_argnums=2)(some, anchors, STDS)
    expected = [code_by_hand(*pair, STDS) for pair in zip(some, anchors, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_code_worked_by_hand():
    box, anchor = np.array([5.0, 10, 25, 30]), np.array([0.0, 0, 10, 20])
    code = np.array([1, 0.5, math.log(2), 0])
    np.testing.assert_allclose(boxes.encode(box, anchor), code, rtol=1e-6)
    np.testing.assert_allclose(boxes.encode(box, anchor, STDS), code / STDS, rtol=1e-6)


def test_decoding_inverts_encoding_to_a_thousandth_of_a_pixel():
    rng = np.random.default_rng(1)
    left_top = rng.uniform(0, 900, (2, 500, 2))
    some, anchors = np.concatenate([left_top, left_top + rng.uniform(8, 400, (2, 500, 2))], axis=-1)
    codes = boxes.encode(some.astype(np.float32), anchors.astype(np.float32), STDS)
    np.testing.assert_allclose(boxes.decode(codes, anchors.astype(np.float32), STDS), some, atol=1e-3)


def test_decoded_sides_are_at_most_1000_for_16():
    huge = np.array([[0.0, 0, 50, 100], [0, 0, math.log(1000 / 16), 0], [0, 0, -50, 0]])
    found = boxes.decode(huge, np.array([0.0, 0, 16, 32]))
    np.testing.assert_allclose(boxes.sides(found)[0], [1000, 1000, 0], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(boxes.sides(found)[1], [2000, 32, 32], rtol=1e-5)


def test_boxes_of_several_classes_decode_at_once():
    rng = np.random.default_rng(2)
    codes, anchors = rng.normal(size=(5, 3, 4)), np.array(by_hand.random_boxes(rng, 5))
    decode = jax.jit(boxes.decode)
    found = decode(codes, anchors[:, None])
    for number in range(3):
        np.testing.assert_allclose(found[:, number], decode(codes[:, number], anchors), rtol=1e-6)


@pytest.mark.parametrize("function", [boxes.encode, boxes.decode])
def test_gradients_of_the_coding_are_those_of_finite_differences(function):
    rng = np.random.default_rng(3)
    first = rng.normal(size=(6, 4)) if function is boxes.decode else by_hand.random_boxes(rng, 6).astype(np.float64)
    anchors = by_hand.random_boxes(rng, 6).astype(np.float64)
    weight = rng.normal(size=(6, 4))
    with jax.enable_x64(True):
        total = jax.jit(lambda x: (weight * function(x, anchors, STDS)).sum())
        np.testing.assert_allclose(jax.grad(total)(first), by_hand.numeric_gradient(total, first), rtol=1e-5, atol=1e-6)


def test_bfloat16_boxes_are_computed_in_float32():
    some = jnp.asarray(by_hand.random_boxes(np.random.default_rng(4), 5), jnp.bfloat16)
    for function in (boxes.intersection_over_union, boxes.encode, boxes.decode, boxes.area):
        arguments = (some,) if function is boxes.area else (some, some)
        assert jax.eval_shape(function, *arguments).dtype == jnp.float32
