"""How large an image is when the network sees it, and the canvas on which it is padded.

The compiler wants few shapes. Images are scaled to a shorter side (paper, section 4.3: 600 pixels, the longer at most
1000) and laid in the upper left corner of the smallest canvas that holds them.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

Size = tuple[int, int]  # (height, width), pixels.
Array = TypeVar("Array")  # NumPy's or JAX's.

MULTIPLE = 32  # Pixels, of which all sides of canvases are: the last stage's stride.
# Widths per height of the landscape canvases: nearly square, then the two shapes that most photos have, 4:3 and 3:2.
RATIOS = (1.12, 4 / 3, 3 / 2)


class Scaled(NamedTuple):
    """An image's size on a network's input, pixels, and by what it was scaled before rounding to pixels."""

    height: int
    width: int
    scale: float

    @property
    def size(self) -> Size:
        return self.height, self.width


def scaled_size(height: int, width: int, shorter: int = 600, longer: int = 1000) -> Scaled:
    """The size when the shorter side becomes ``shorter``, or less where the longer would pass ``longer``.

    Args:
      height, width: of the image, pixels.
      shorter, longer: pixels: 600 and 1000 in the paper, 800 and 1333 in detectron2.
    """
    scale = min(shorter / min(height, width), longer / max(height, width))
    # Halves round up. Strips so long that nothing were left of their other side keep a pixel of it.
    return Scaled(max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)), scale)


def scale_boxes(boxes: Array, before: Size, after: Size) -> Array:
    """Boxes [..., 4] of an image resized from ``before`` to ``after``: its edges stay its edges.

    Either way: also from a network's input back to the image. NumPy or JAX arrays; float32 stays float32.
    """
    down, across = after[0] / before[0], after[1] / before[1]
    return boxes * np.array([across, down, across, down], np.float32)


def flip_boxes(boxes: Array, width: int | Array) -> Array:
    """Boxes [..., 4] of an image mirrored left to right.

    Args:
      boxes: NumPy or JAX arrays; float32 stays float32.
      width: the image's, pixels: one, or an array that goes with the boxes: [B, 1, 1] with [B, n, 4].
    """
    swapped = boxes[..., np.array([2, 1, 0, 3])]
    mirrored = swapped * np.array([-1, 1, -1, 1], np.float32) + width * np.array([1, 0, 1, 0], np.float32)
    return mirrored.astype(boxes.dtype)


def canvas_sizes(
    shorter: int = 600, longer: int = 1000, ratios: Sequence[float] = RATIOS, multiple: int = MULTIPLE
) -> tuple[Size, ...]:
    """Canvases for whatever ``scaled_size`` gives, landscape and portrait, sorted by area.

    Args:
      shorter, longer: as in ``scaled_size``.
      ratios: widths per height of canvases between the square and the longest; more canvases waste less and compile
        longer.
      multiple: of which all sides are, pixels.

    Returns:
      For 600 and 1000: 608 x 672, 800, 928, 1024, and the same upright.
    """

    def up(length: float) -> int:
        # Less what a computer may make of 4/3 too much.
        return int(-(-(length - 1e-6) // multiple)) * multiple

    shorter = min(shorter, longer)
    widths = {up(shorter * ratio) for ratio in ratios if shorter * ratio < longer} | {up(longer)}
    landscape = {(up(shorter), width) for width in widths if width >= up(shorter)}
    return tuple(sorted(landscape | {(width, height) for height, width in landscape}, key=lambda s: (s[0] * s[1], s)))


def canvas_of(size: Size, canvases: Sequence[Size]) -> int:
    """The place among ``canvases`` of the smallest that holds an image.

    Raises:
      ValueError: none does.
    """
    fitting = [i for i, (height, width) in enumerate(canvases) if size[0] <= height and size[1] <= width]
    if not fitting:
        raise ValueError(f"no canvas of {', '.join(map(str, canvases))} holds an image of {size}")
    return min(fitting, key=lambda i: canvases[i][0] * canvases[i][1])


def pad_image(pixels: np.ndarray, canvas: Size) -> np.ndarray:
    """An image, uint8 [h, w, 3], in the upper left corner of a canvas [H, W, 3] of zeros; boxes stay as they are."""
    height, width, channels = pixels.shape
    padded = np.zeros((*canvas, channels), pixels.dtype)
    padded[:height, :width] = pixels
    return padded


def wasted(sizes: Sequence[Size], canvases: Sequence[Size]) -> float:
    """Which part of the canvases' pixels is padding, over images of ``sizes`` (as scaled)."""
    used = sum(height * width for height, width in sizes)
    area = [height * width for height, width in canvases]
    return 1 - used / sum(area[canvas_of(size, canvases)] for size in sizes)
