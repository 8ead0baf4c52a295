"""The localization error: how often no guess has the right class and its box."""

from collections.abc import Sequence

import numpy as np

from resnet_jax.detection.average_precision import overlaps

_IOU = 0.5  # From which a box is right (ILSVRC).


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
