"""The form in which every detection data set is given, and what is found in its images.

Boxes are (left, top, right, bottom) in pixels of continuous coordinates: pixel i covers i to i+1, a box over a whole
image is (0, 0, width, height).
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import sys

import numpy as np

from resnet_jax.errors import UsageError

ON_ERROR = ("raise", "skip")
_ROUNDING = 0.1  # Pixels by which coordinates rounded to a decimal or two may leave the image; they are cut back.
_LEAST_SIDE = 0.01  # Pixels; below it float32 coordinates and the logarithms of box targets mean nothing.


@dataclasses.dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image, still in its file, and the n boxes drawn in it, in the file's order.

    Attributes:
      id: VOC's name or COCO's number.
      path: the image file.
      width, height: pixels, as the annotation has them (``check_image_size`` compares them with the image's).
      boxes: float32 [n, 4], within the image.
      labels: int32 [n], the places of the boxes' classes among ``Annotations.classes``.
      difficult: bool [n], VOC's flag: evaluation counts such boxes neither as right nor as wrong.
      crowd: bool [n], COCO's flag: the box is around many objects, and evaluation ignores what is found in it.
      area: float64 [n], pixels: COCO's own (of the object's mask), by which it tells small from large; else the box's.
    """

    id: str | int
    path: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    area: np.ndarray

    def select(self, keep: np.ndarray) -> "AnnotatedImage":
        """The same image with some of its boxes: ``keep`` is bool [n] or indices."""
        fields = ("boxes", "labels", "difficult", "crowd", "area")
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in fields})


@dataclasses.dataclass(frozen=True)
class Annotations:
    """A data set's annotated images.

    Attributes:
      classes: names, in the order of the labels.
      category_ids: the classes' numbers in COCO's files; 1, 2, ... where the data set has none.
      images: all of them, with or without boxes.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[AnnotatedImage, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image.

    Attributes:
      boxes: float32 [n, 4].
      labels: int32 [n].
      scores: float32 [n], the higher the surer.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def annotated_image(
    id: str | int,
    path: str,
    width: int,
    height: int,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    difficult: Sequence[bool] | None = None,
    crowd: Sequence[bool] | None = None,
    area: Sequence[float | None] | None = None,
) -> AnnotatedImage:
    """Makes the arrays of an ``AnnotatedImage`` from lists; cuts boxes at the image's edge.

    No flags are False; no areas, or None among them, are the boxes' own.
    """
    exact = np.asarray(boxes, np.float64).reshape(-1, 4)
    exact = np.clip(exact, 0, [width, height, width, height])
    own = (exact[:, 2] - exact[:, 0]) * (exact[:, 3] - exact[:, 1])
    if area is not None:
        own = np.array([mine if given is None else given for mine, given in zip(own, area, strict=True)], np.float64)
    count = len(exact)
    return AnnotatedImage(
        id,
        path,
        width,
        height,
        exact.astype(np.float32),
        np.asarray(labels, np.int32).reshape(count),
        np.zeros(count, bool) if difficult is None else np.asarray(difficult, bool).reshape(count),
        np.zeros(count, bool) if crowd is None else np.asarray(crowd, bool).reshape(count),
        own.reshape(count),
    )


def box_fault(box: Sequence[float], width: int, height: int) -> str:
    """What is wrong with a box (left, top, right, bottom) in an image of that size; empty where nothing is."""
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        return "is not finite"
    if right - left < _LEAST_SIDE or bottom - top < _LEAST_SIDE:
        return "is inverted or empty"
    if left < -_ROUNDING or top < -_ROUNDING or right > width + _ROUNDING or bottom > height + _ROUNDING:
        return f"lies outside the image, which is {width} x {height} as its annotation says"
    return ""


def report_fault(where: str, fault: str, on_error: str) -> None:
    """Ends at a box that can't be used, or says on stderr that it is left out.

    Args:
      where: file and line or number of the annotation.
      fault: what is wrong.
      on_error: ``raise`` or ``skip``.

    Raises:
      UsageError: ``on_error`` is ``raise``.
    """
    if on_error not in ON_ERROR:
        raise UsageError(f"data.on_error={on_error} is unknown (raise or skip)")
    if on_error == "raise":
        raise UsageError(f"{where}: {fault}; data.on_error=skip leaves such boxes out")
    print(f"left out {where}: {fault}", file=sys.stderr, flush=True)


def check_image_size(image: AnnotatedImage, height: int, width: int) -> None:
    """Compares the annotation with the image itself, as ``data.decode.image_shape`` gives it.

    Raises:
      UsageError: another size: its boxes would be elsewhere.
    """
    if (image.height, image.width) == (height, width):
        return
    turned = (image.height, image.width) == (width, height)
    hint = " (turned? EXIF rotation is ignored: rotate the pixels themselves)" if turned else ""
    raise UsageError(
        f"{image.path}: the image is {width} x {height}, but its annotation ({image.id}) says"
        f" {image.width} x {image.height}{hint}"
    )


def check_ids(images: Iterable[AnnotatedImage], where: str) -> None:
    """Raises a UsageError where two images have one id."""
    seen = set()
    for image in images:
        if image.id in seen:
            raise UsageError(f"{where}: image {image.id} is listed twice")
        seen.add(image.id)


def join(parts: Sequence[Annotations], where: str) -> Annotations:
    """The union of data sets with the same classes.

    Raises:
      UsageError: they have other classes, or share an image; ``where`` says which sets.
    """
    for part in parts:
        if (part.classes, part.category_ids) != (parts[0].classes, parts[0].category_ids):
            raise UsageError(f"{where}: the sets have different classes")
    images = tuple(image for part in parts for image in part.images)
    check_ids(images, where)
    return Annotations(parts[0].classes, parts[0].category_ids, images)


def for_training(annotations: Annotations, difficult: bool = False, without_boxes: bool = False) -> Annotations:
    """What is trained on. Boxes around crowds stay: what lies in them is no background (``detection.crowd_share``).

    Args:
      annotations: a training set.
      difficult: whether boxes flagged so are trained on; Faster R-CNN's authors leave them out.
      without_boxes: whether images are kept in which no object is (left); they are background alone.

    Raises:
      UsageError: nothing is left.
    """
    images = []
    for image in annotations.images:
        keep = np.ones_like(image.difficult) if difficult else ~image.difficult
        if without_boxes or (keep & ~image.crowd).any():
            images.append(image if keep.all() else image.select(keep))
    if all(image.crowd.all() for image in images):
        raise UsageError(
            "no box to train on in the training set (crowds, and difficult boxes unless asked for, are not)"
        )
    return dataclasses.replace(annotations, images=tuple(images))


def check_detections(annotations: Annotations, detections: Sequence[Detections]) -> None:
    """Raises a ValueError where ``detections`` are not one per image, with labels of its classes."""
    if len(detections) != len(annotations):
        raise ValueError(f"detections of {len(detections)} images, but {len(annotations)} are annotated")
    for image, found in zip(annotations.images, detections, strict=True):
        shapes = found.boxes.shape, found.labels.shape, found.scores.shape
        count = len(found)
        if shapes != ((count, 4), (count,), (count,)):
            raise ValueError(f"image {image.id}: boxes, labels and scores have shapes {shapes}")
        if count and not (found.labels.min() >= 0 and found.labels.max() < len(annotations.classes)):
            raise ValueError(f"image {image.id}: labels outside 0..{len(annotations.classes) - 1}")
