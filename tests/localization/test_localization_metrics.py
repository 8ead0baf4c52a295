"""The localization error, worked out by hand."""

import numpy as np

from resnet_jax.detection.average_precision import overlaps
from resnet_jax.localization.metrics import localization_errors, right_guesses

TRUTH = np.array([[0, 0, 10, 10]], np.float32)
HALF, LESS = (0, 0, 10, 5), (0, 0, 10, 4.99)  # IoU .5, which is enough, and less.


def test_overlaps_are_those_of_the_definition():
    boxes = [(0, 0, 10, 10), (5, 5, 15, 15), (20, 0, 30, 10), (5, 5, 5, 5), (8, 8, 2, 2)]
    np.testing.assert_allclose(overlaps(np.array(boxes), TRUTH[0]), [1, 25 / 175, 0, 0, 0])


def test_a_guess_is_right_by_its_class_and_any_box_of_it():
    labels = np.array([3, 1, 2])
    truths = [TRUTH, np.array([[100, 0, 110, 10], [0, 0, 10, 10]], np.float32), np.zeros((0, 4), np.float32)]
    classes = np.array([[3, 3, 4], [1, 0, 1], [2, 2, 2]])
    boxes = np.array([[HALF, LESS, (0, 0, 10, 10)], [LESS, (0, 0, 10, 10), (100, 0, 110, 9)], [(0, 0, 10, 10)] * 3])
    right = right_guesses(classes, boxes, labels, truths)
    np.testing.assert_array_equal(right, [[True, False, False], [False, False, True], [False, False, False]])


def test_errors_count_images_of_which_no_guess_is_right():
    right = np.zeros((4, 6), bool)
    right[0, 0] = right[1, 4] = True
    right[2, 5] = True  # A sixth guess is none.
    expected = {"top1_localization_error": 75.0, "top5_localization_error": 50.0}
    assert localization_errors(right) == expected
    assert localization_errors(right[:, :1]) == {"top1_localization_error": 75.0, "top5_localization_error": 75.0}
