"""Generated pictures of one shape each: localization's quick start (``detection.shapes`` draws up to four)."""

import itertools

import numpy as np

from resnet_jax.detection.annotations import Annotations, annotated_image
from resnet_jax.detection.shapes import CLASSES, SPLITS, Drawn, draw_picture
from resnet_jax.errors import UsageError, did_you_mean


def one_shape(count: int, seed: int, split: str) -> tuple[Annotations, Drawn]:
    """The first pictures of ``detection.shapes`` that show a single shape, a quarter of all; 15 milliseconds each.

    Args:
      count: how many; the first ones are the same whatever it is.
      seed: of the whole data set.
      split: one of ``detection.shapes.SPLITS``.

    Returns:
      ``(annotations, pixels)``, as of ``detection.shapes.shapes``; each image keeps its number there.

    Raises:
      UsageError: an unknown split, or no picture.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r} of shapes is unknown{did_you_mean(split, SPLITS)} ({', '.join(SPLITS)})")
    if count < 1:
        raise UsageError(f"{count} pictures of a shape: expected at least one")
    images, pixels = [], {}
    for index in itertools.count():
        if len(images) == count:
            break
        picture, drawn, owner = draw_picture(seed, split, index)
        if len(drawn) != 1:
            continue
        id = f"{split}/{index}"
        rows, columns = np.flatnonzero((owner == 0).any(1)), np.flatnonzero((owner == 0).any(0))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        height, width = owner.shape
        images.append(annotated_image(id, f"shapes/{id}", width, height, [box], [drawn[0].label]))
        pixels[id] = picture
    return Annotations(CLASSES, tuple(range(1, len(CLASSES) + 1)), tuple(images)), Drawn(pixels)
