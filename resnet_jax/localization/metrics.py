"""The localization error: how often no guess has the right class and its box."""

from collections.abc import Sequence

import numpy as np

_IOU = 0.5  # From which a box is right (ILSVRC).


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes [..., 4] with as many others [..., 4]: float64 [...]; 0 where either is empty or inverted."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    shared = sides.clip(0).prod(-1)
    areas = [(some[..., 2:] - some[..., :2]).clip(0).prod(-1) for some in (boxes, others)]
    return np.where(shared > 0, shared / np.where(shared > 0, sum(areas) - shared, 1), 0)


def right_guesses(
    classes: np.ndarray, boxes: np.ndarray, labels: np.ndarray, truths: Sequence[np.ndarray]
) -> np.ndarray:
    """Which guesses are right: the image's class, and an IoU of at least .5 with any of its boxes (ILSVRC).

    Args:
      classes: int [N, k], of each image's guesses.
      boxes: [N, k, 4], likewise.
      labels: int [N], of the images.
      truths: of each image, [g, 4]: the boxes of its class; without any, no guess is right.

    Returns:
      bool [N, k].
    """
    counts = [len(truth) for truth in truths]
    owner = np.repeat(np.arange(len(labels)), counts)
    truth = np.concatenate([np.zeros((0, 4)), *truths])
    close = overlaps(boxes[owner], truth[:, None]) >= _IOU
    found = np.zeros(classes.shape, bool)
    np.logical_or.at(found, owner, close)
    return found & (classes == labels[:, None])


def localization_errors(right: np.ndarray) -> dict[str, float]:
    """``top1_localization_error`` and ``top5_localization_error``, %: of guesses in order, bool [N, k] (k up to 5)."""
    return {f"top{k}_localization_error": 100 * float(1 - right[:, :k].any(1).mean()) for k in (1, 5)}
