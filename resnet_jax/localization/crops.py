"""Views of an image and the boxes in them: into a view, and back.

A view is a part of the image, resized. Its frame is (across, down, left, top), float32 [4]: a point (x, y) of the image
is at (across x - left, down y - top) of the view, pixels of continuous coordinates both.
"""

import numpy as np

from resnet_jax.data.crops import CenterCrop, ScaleCrop
from resnet_jax.data.decode import resized_shape

View = ScaleCrop | CenterCrop
_LEAST_SIDE = 1.0  # Pixels: a thinner part of a box says nothing of what it is of.


def frame_of(view: View, height: int, width: int, uniforms: np.ndarray) -> np.ndarray:
    """The frame of what ``view(image, uniforms)`` gives of an image of that size, pixels."""
    if isinstance(view, ScaleCrop):
        resized = resized_shape(height, width, view.shorter_side(uniforms))
        top, left = view.corner(*resized, uniforms)
    else:
        resized = resized_shape(height, width, view.shorter_side)
        top, left = (round((side - view.size) / 2) for side in resized)
    return np.array([resized[1] / width, resized[0] / height, left, top], np.float32)


def whole_frame(height: int, width: int, resized: tuple[int, int]) -> np.ndarray:
    """The frame of a whole image, resized to (height, width)."""
    return np.array([resized[1] / width, resized[0] / height, 0, 0], np.float32)


def to_view(boxes, frame):
    """Boxes [..., n, 4] of the image in a view of frame [..., 4]; NumPy's or JAX's."""
    frame = frame[..., None, :]
    return boxes * frame[..., np.array([0, 1, 0, 1])] - frame[..., np.array([2, 3, 2, 3])]


def to_image(boxes, frame):
    """The inverse of ``to_view``."""
    frame = frame[..., None, :]
    return (boxes + frame[..., np.array([2, 3, 2, 3])]) / frame[..., np.array([0, 1, 0, 1])]


def cut(boxes: np.ndarray, size: int, least_visible: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a square view holds of boxes.

    Args:
      boxes: float32 [n, 4], of the view; each larger than nothing.
      size: the view's side, pixels.
      least_visible: see ``Settings``.

    Returns:
      The boxes' parts within the view, float32 [n, 4]; which of them are trained as objects, bool [n]; and of which
      the view holds something, but too little, bool [n].
    """
    parts = boxes.clip(0, size)
    sides, before = parts[:, 2:] - parts[:, :2], boxes[:, 2:] - boxes[:, :2]
    there = (sides > 0).all(1)
    whole = there & (sides >= _LEAST_SIDE).all(1) & (sides.prod(1) >= least_visible * before.prod(1))
    return parts, whole, there & ~whole
