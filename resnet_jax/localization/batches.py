"""Batches of localization: crops and whole images with their boxes, for training and for evaluation.

Every pixel follows from (seed, epoch, image) and every batch from the step's number, so neither the number of workers
nor of hosts changes what is learnt. Shapes are static.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import numpy as np

from resnet_jax.data.crops import CenterCrop, Encoded, ScaleCrop, example_uniforms
from resnet_jax.data.decode import BrokenImage, decode, image_shape
from resnet_jax.data.order import Order
from resnet_jax.data.stream import Batches, EvaluationPlan, Plan, Rows, TrainingPlan, own_pages, patiently
from resnet_jax.detection.annotations import AnnotatedImage, Annotations, check_image_size
from resnet_jax.detection.batches import Resizing, evaluation_batches, room_for_boxes
from resnet_jax.detection.resize import flip_boxes
from resnet_jax.errors import UsageError
from resnet_jax.localization.crops import View, cut, frame_of, to_view, whole_frame

# From an annotation to its image, encoded or its pixels; raises OSError or BrokenImage where there is none.
Content = Callable[[AnnotatedImage], Encoded]

TRAINING_FIELDS = ("images", "labels", "boxes", "valid", "partial", "index", "epoch")
EVALUATION_FIELDS = ("images", "extent", "frame", "index", "real")


def read_content(image: AnnotatedImage) -> bytes:
    """An image's file, still encoded: of a large JPEG a crop needs to decode a part of the resolution alone."""
    with open(image.path, "rb") as file:
        return file.read()


def training_batches(
    annotations: Annotations,
    crop: ScaleCrop,
    seed: int,
    rows: Rows,
    first: int,
    end: int,
    *,
    least_visible: float,
    content: Content = read_content,
    flip: bool = True,
    workers: int = 0,
    processes: bool = False,
) -> Batches:
    """This process's part of the batches ``first`` to ``end`` - 1 of a training.

    Args:
      annotations: what is trained on, each image of one class (``data.of_one_class``).
      crop: the random crop, as in classification.
      seed: of the order, the crops and the flips.
      rows: the global batch, and which part of it is this process's.
      first, end: steps.
      least_visible: see ``Settings``.
      content: where images come from.
      flip: whether half of the crops, drawn anew in every epoch, are mirrored left to right.
      workers: how many read at a time; 0 reads when a batch is asked for.
      processes: whether they are processes; else threads.

    Returns:
      An iterator, to be closed, of dicts of n = batch / processes rows; G is ``room_for_boxes``.

      - ``images``: uint8 [n, size, size, 3], RGB.
      - ``labels``: int32 [n], the image's class.
      - ``boxes``: float32 [n, G, 4], (left, top, right, bottom): the parts within the crop, its pixels.
      - ``valid``: bool [n, G]: which of them are trained.
      - ``partial``: bool [n, G]: of which the crop holds too little for that.
      - ``index``: int32 [n], the image's place in ``annotations``.
      - ``epoch``: int32 [n], how often it came before.

    Raises:
      UsageError: also while iterating: an image that can't be read, or that is not of its annotation's size.
    """
    plan = TrainingPlan(Order(seed, len(annotations)), rows)
    reader = ViewReader(annotations, content, crop, plan, room_for_boxes(annotations), least_visible, seed, flip)
    return Batches(reader, first, end, workers, processes, fields=TRAINING_FIELDS)


def centre_batches(
    annotations: Annotations,
    crop: CenterCrop,
    rows: Rows,
    *,
    content: Content = read_content,
    workers: int = 0,
    processes: bool = False,
) -> Batches:
    """This process's part of batches with the middle of every image of ``annotations``, each once and in order.

    Args and errors: as of ``training_batches``.

    Returns:
      An iterator, to be closed, of dicts.

      - ``images``: uint8 [n, size, size, 3].
      - ``extent``: int32 [n, 2], (height, width), here all of the view.
      - ``frame``: float32 [n, 4], of the view (see ``crops``).
      - ``index``: int32 [n], the image's place in ``annotations``, -1 for what fills the last batch up.
      - ``real``: bool [n], False there.
    """
    plan = EvaluationPlan(np.arange(len(annotations), dtype=np.int32), rows)
    reader = ViewReader(annotations, content, crop, plan, room_for_boxes(annotations))
    end = -(-len(annotations) // rows.batch)
    return Batches(reader, 0, end, workers, processes, fields=EVALUATION_FIELDS)


def whole_batches(
    annotations: Annotations,
    resizing: Resizing,
    rows: Rows,
    *,
    content: Content = read_content,
    workers: int = 0,
    processes: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """The same with every image whole, its shorter side resized, in the upper left of a canvas; sorted by canvas.

    Args:
      annotations, rows, content, workers, processes: as of ``centre_batches``.
      resizing: the images' size.
    """
    pixels = functools.partial(_pixels, content)
    batches = evaluation_batches(
        annotations,
        resizing,
        rows,
        pixels=pixels,
        room=room_for_boxes(annotations),
        workers=workers,
        processes=processes,
    )
    try:
        for batch in batches:
            frames = np.tile(np.array([1, 1, 0, 0], np.float32), (len(batch["index"]), 1))
            for row in np.flatnonzero(batch["real"]):
                image = annotations.images[batch["index"][row]]
                frames[row] = whole_frame(image.height, image.width, tuple(batch["extent"][row]))
            yield {name: frames if name == "frame" else batch[name] for name in EVALUATION_FIELDS}
    finally:
        batches.close()


def _pixels(content: Content, image: AnnotatedImage) -> np.ndarray:
    found = content(image)
    return decode(found) if isinstance(found, bytes) else found


@dataclasses.dataclass(frozen=True)
class ViewReader:
    """Reads pieces of batches; what Grain's workers call (``data.stream.PieceReader``).

    Attributes:
      annotations, content, least_visible, flip: as of ``training_batches``.
      view: what is seen of an image.
      plan: which images are wanted.
      room: for how many boxes of an image there is room.
      seed: as there; None draws nothing: evaluation.
    """

    annotations: Annotations
    content: Content
    view: View
    plan: Plan
    room: int
    least_visible: float = 0.0
    seed: int | None = None
    flip: bool = False

    @property
    def rows(self) -> Rows:
        return self.plan.rows

    def __call__(self, number: int) -> dict[str, Any]:
        """Piece ``number`` of what ``training_batches`` and ``centre_batches`` describe."""
        index, epoch = self.plan.piece(number)
        count, size = len(index), self.view.size
        piece: dict[str, Any] = {
            "images": own_pages(count, *self.view.shape),
            "extent": np.full((count, 2), size, np.int32),
            "frame": np.tile(np.array([1, 1, 0, 0], np.float32), (count, 1)),
            "labels": np.zeros(count, np.int32),
            "boxes": np.zeros((count, self.room, 4), np.float32),
            "valid": np.zeros((count, self.room), bool),
            "partial": np.zeros((count, self.room), bool),
            "index": index,
            "epoch": epoch,
            "real": index >= 0,
            "broken": (),
        }
        for row in np.flatnonzero(piece["real"]):
            image, uniforms = self.annotations.images[index[row]], np.empty(0)
            if self.seed is not None:
                uniforms = example_uniforms(self.seed, int(epoch[row]), int(index[row]), 1 + self.view.draws)
            pixels, drawn = self._look(image, uniforms[1:]), len(image.boxes)
            frame = frame_of(self.view, image.height, image.width, uniforms[1:])
            boxes, valid, partial = cut(to_view(image.boxes, frame), size, self.least_visible)
            if self.flip and len(uniforms) and uniforms[0] < 0.5:
                pixels, boxes = pixels[:, ::-1], flip_boxes(boxes, size)
            piece["images"][row], piece["frame"][row], piece["labels"][row] = pixels, frame, image.labels[0]
            piece["boxes"][row, :drawn], piece["valid"][row, :drawn] = boxes, valid
            piece["partial"][row, :drawn] = partial
        return piece

    def _look(self, image: AnnotatedImage, uniforms: np.ndarray) -> np.ndarray:
        try:
            content = patiently(self.content, image)
            shape = image_shape(content) if isinstance(content, bytes) else content.shape[:2]
            check_image_size(image, *shape)
            return self.view(content, uniforms)
        except (OSError, BrokenImage) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{image.path}: not a readable image ({reason})") from None
