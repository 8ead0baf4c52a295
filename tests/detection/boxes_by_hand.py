"""Boxes in plain NumPy, written from the definitions, and gradients by finite differences."""

from collections.abc import Callable

import numpy as np


def random_boxes(rng: np.random.Generator, count: int, size: int = 200, objects: int = 0) -> np.ndarray:
    """Boxes [count, 4] with whole coordinates, so that areas are exact in float32; around ``objects`` if given."""
    if objects:
        center = rng.uniform(0, size, (objects, 2))
        side = rng.uniform(size / 20, size / 3, (objects, 2))
        which = rng.integers(objects, size=count)
        center = center[which] + side[which] * rng.normal(0, 0.1, (count, 2))
        side = side[which] * np.exp(rng.normal(0, 0.1, (count, 2)))
        corners = np.concatenate([center - side / 2, center + side / 2], axis=1)
        return np.round(corners).astype(np.float32)
    corners = np.sort(rng.integers(0, size + 1, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


def area(box: np.ndarray) -> float:
    left, top, right, bottom = (float(x) for x in box)
    return max(right - left, 0.0) * max(bottom - top, 0.0)


def shared_area(box: np.ndarray, other: np.ndarray) -> float:
    width = min(float(box[2]), float(other[2])) - max(float(box[0]), float(other[0]))
    height = min(float(box[3]), float(other[3])) - max(float(box[1]), float(other[1]))
    return max(width, 0.0) * max(height, 0.0)


def iou(box: np.ndarray, other: np.ndarray) -> float:
    if area(box) == 0 or area(other) == 0:
        return 0.0
    shared = shared_area(box, other)
    return shared / (area(box) + area(other) - shared)


def ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.array([[iou(box, other) for other in others] for box in boxes]).reshape(len(boxes), len(others))


def numeric_gradient(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a scalar function by central differences, number by number; ``x`` is float64."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (float(function(up)) - float(function(down))) / (2 * step)
    return gradient
