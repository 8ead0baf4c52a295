"""Anchors: the reference boxes at every cell of a feature map, of several sizes and shapes (Faster R-CNN, 3.1.1).

Where a cell's anchors are centred differs between public codes. py-faster-rcnn centres them half a stride into the
cell (pixel 16 i + 8 at stride 16), detectron2's default configuration and torchvision at its corner (16 i). The
centre of the receptive field is pixel 16 i + 1/2 where every convolution is padded evenly, as ours are, and half
a stride in where none is; a regressor learns either. We take py-faster-rcnn's: the code of the paper's time, and
the cell as RoI pooling sees it (cell i of stride s covers s i to s (i + 1)). ``offset=0`` gives the other.
"""

from collections.abc import Sequence

import jax
from jax import numpy as jnp
import numpy as np

# The largest side of a feature map, in cells, for which ``identities`` are distinct.
MAX_CELLS = 4096


def base_anchors(sizes: Sequence[float], ratios: Sequence[float], rounded_at: float = 0) -> np.ndarray:
    """The anchors of one cell, centred on (0, 0): float64 [len(sizes) * len(ratios), 4], ratios varying fastest.

    Args:
      sizes: roots of the areas, pixels: 128, 256, 512 in the paper, and 64 for COCO.
      ratios: heights over widths: 1/2, 1, 2.
      rounded_at: 0: areas are exact, as in detectron2 and torchvision. Else the size at which width and height are
        rounded to whole pixels before they are scaled: py-faster-rcnn's are made at 16 (23 x 12, 16 x 16, 11 x 22),
        so its anchor of size 128 and ratio 1/2 is 184 x 96 rather than 181.0 x 90.5.
    """
    anchors = []
    for size in sizes:
        for ratio in ratios:
            if rounded_at:
                width = np.round(rounded_at / np.sqrt(ratio))
                width, height = width * size / rounded_at, np.round(width * ratio) * size / rounded_at
            else:
                width, height = size / np.sqrt(ratio), size * np.sqrt(ratio)
            anchors.append((-width / 2, -height / 2, width / 2, height / 2))
    return np.array(anchors)


def make_anchors(
    height: int,
    width: int,
    stride: float,
    sizes: Sequence[float],
    ratios: Sequence[float],
    offset: float = 0.5,
    rounded_at: float = 0,
) -> jax.Array:
    """All anchors of a feature map of ``height`` x ``width`` cells: float32 [height * width * A, 4], pixels.

    Args:
      height: of the feature map, cells.
      width: likewise.
      stride: pixels from one cell to the next: 16 for conv4.
      sizes: see ``base_anchors``; A is len(sizes) * len(ratios).
      ratios: likewise.
      offset: where in its cell an anchor is centred, 0 (left, top) to 1, in both directions.
      rounded_at: see ``base_anchors``.

    Returns:
      Row by row, cell by cell, and within a cell in the order of ``base_anchors``: as predictions
      [height, width, A] lie in memory. Anchors may reach beyond the image (``inside`` says which do).
    """
    shapes = base_anchors(sizes, ratios, rounded_at)
    center_y = stride * (jnp.arange(height, dtype=jnp.float32) + offset)
    center_x = stride * (jnp.arange(width, dtype=jnp.float32) + offset)
    center_y, center_x = jnp.meshgrid(center_y, center_x, indexing="ij")
    centers = jnp.stack([center_x, center_y, center_x, center_y], axis=-1)
    return (centers[:, :, None] + jnp.asarray(shapes, jnp.float32)).reshape(-1, 4)


def make_pyramid_anchors(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    offset: float = 0.5,
) -> list[jax.Array]:
    """The anchors of each level of a feature pyramid: a list of float32 [height * width * A, 4] (FPN, section 4.1).

    Args:
      shapes: (height, width) of each level, cells.
      strides: of each level, pixels: 4, 8, 16, 32, 64.
      sizes: those of each level: [32], [64], [128], [256], [512].
      ratios: of all levels.
      offset: see ``make_anchors``.
    """
    levels = zip(shapes, strides, sizes, strict=True)
    return [make_anchors(*shape, stride, size, ratios, offset) for shape, stride, size in levels]


def identities(height: int, width: int, per_cell: int, level: int = 0) -> jax.Array:
    """A number for each anchor that does not depend on how large the map is: int32 [height * width * per_cell].

    Random choices that are made by it (``matching.sample``) stay the same when an image is padded.

    Raises:
      ValueError: the map is larger than 4096 cells, or the numbers would not fit.
    """
    if max(height, width) > MAX_CELLS or (level + 1) * MAX_CELLS**2 * per_cell > 2**31:
        raise ValueError(f"{height} x {width} cells of {per_cell} anchors on level {level} are too many to number")
    row, column, anchor = jnp.meshgrid(jnp.arange(height), jnp.arange(width), jnp.arange(per_cell), indexing="ij")
    cell = (level * MAX_CELLS + row) * MAX_CELLS + column
    return (cell * per_cell + anchor).astype(jnp.int32).reshape(-1)


def inside(anchors: jax.Array, height: jax.Array | float, width: jax.Array | float, border: float = 0.0) -> jax.Array:
    """Which of [..., 4] lie within an image of that size, or reach at most ``border`` pixels beyond it: bool [...].

    Faster R-CNN trains on these alone (section 3.3); detectron2 on all anchors.
    """
    left, top, right, bottom = jnp.moveaxis(anchors, -1, 0)
    return (left >= -border) & (top >= -border) & (right <= width + border) & (bottom <= height + border)
