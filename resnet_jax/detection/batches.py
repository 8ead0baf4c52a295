"""Batches of a detector: images on canvases, and the boxes in them; for training and for evaluation.

Every pixel follows from (seed, epoch, image) and every batch from the step's number, so neither the number of workers
nor of hosts changes what is learnt. Shapes are static: one per canvas.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from resnet_jax.data.crops import example_uniforms
from resnet_jax.data.decode import BrokenImage, decode, resize, resize_antialiased
from resnet_jax.data.stream import Batches, Rows, own_pages, patiently
from resnet_jax.detection.annotations import AnnotatedImage, Annotations, check_image_size
from resnet_jax.detection.canvas_order import CanvasPlan, EvaluationCanvases, TrainingCanvases, group_by_canvas
from resnet_jax.detection.resize import MULTIPLE, Scaled, Size, canvas_sizes, flip_boxes, scale_boxes, scaled_size
from resnet_jax.errors import UsageError

# From an annotation to its image's pixels, uint8 [h, w, 3]; raises OSError or BrokenImage where there are none.
Pixels = Callable[[AnnotatedImage], np.ndarray]

TRAINING_FIELDS = ("images", "extent", "scale", "boxes", "labels", "valid", "crowd", "index", "epoch")
EVALUATION_FIELDS = (*TRAINING_FIELDS, "real")
_ROOM = 8  # To which the room for boxes is rounded up: data sets that differ a little share compiled steps.


@dataclasses.dataclass(frozen=True)
class Resizing:
    """How large the network sees images (see ``resize.py``).

    Attributes:
      shorter: the shorter side, pixels; of several one is drawn for each image and epoch in training, and evaluation
        takes the last.
      longer: at most so long is the longer side, pixels.
      canvases: (height, width) of the canvases, pixels; none: those that the largest ``shorter`` wants. An image's
        canvas holds it at every scale, so that several scales cost no further compilation.
    """

    shorter: tuple[int, ...] = (600,)
    longer: int = 1000
    canvases: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        if not self.shorter or min(*self.shorter, self.longer) < 1:
            raise UsageError(
                f"images of shorter sides {self.shorter}, longer ones up to {self.longer}: expected pixels, 1 or more"
            )
        if max(self.shorter) > self.longer:
            raise UsageError(
                f"detection.shorter={max(self.shorter)} is above detection.longer={self.longer}, which no side exceeds"
            )
        if not self.canvases:
            object.__setattr__(self, "canvases", canvas_sizes(max(self.shorter), self.longer))

    def view(self, image: AnnotatedImage, side: int) -> Scaled:
        """An image's size where what evaluation sees with a shorter side of ``shorter`` had one of ``side`` pixels."""
        return scaled_size(image.height, image.width, side, self.longer * side / self.shorter[-1])

    def canvas_of_view(self, canvas: Size, side: int) -> Size:
        """The canvas of views of that ``side`` whose images lie on ``canvas`` in evaluation."""
        height, width = (-(-(length * side / self.shorter[-1] + 1) // MULTIPLE) for length in canvas)  # 1: rounding's.
        return int(height) * MULTIPLE, int(width) * MULTIPLE

    @property
    def draws(self) -> int:
        """How many random numbers a scale takes."""
        return int(len(self.shorter) > 1)

    def largest(self, image: AnnotatedImage) -> Size:
        """The largest size that an image may get, pixels."""
        return scaled_size(image.height, image.width, max(self.shorter), self.longer).size

    def size(self, image: AnnotatedImage, uniforms: np.ndarray | None) -> Scaled:
        """An image's size at the scale that ``uniforms`` [draws] from [0, 1) say; None: as evaluation sees it."""
        place = -1 if uniforms is None or not self.draws else int(uniforms[0] * len(self.shorter))
        return scaled_size(image.height, image.width, self.shorter[place], self.longer)


def read_pixels(image: AnnotatedImage) -> np.ndarray:
    """Decodes an image's file; EXIF rotation is ignored, as annotations do."""
    with open(image.path, "rb") as file:
        return decode(file.read())


def room_for_boxes(annotations: Annotations) -> int:
    """The most boxes of an image, rounded up to a multiple of 8 and at least 8."""
    most = max((len(image.boxes) for image in annotations.images), default=0)
    return max(1, -(-most // _ROOM)) * _ROOM


def _room(annotations: Annotations, given: int | None) -> int:
    needed = max((len(image.boxes) for image in annotations.images), default=0)
    if given is not None and given < needed:
        raise ValueError(f"room for {given} box{'es' * (given != 1)}, but an image has {needed}")
    return room_for_boxes(annotations) if given is None else given


def training_batches(
    annotations: Annotations,
    resizing: Resizing,
    seed: int,
    rows: Rows,
    first: int,
    end: int,
    *,
    pixels: Pixels = read_pixels,
    flip: bool = True,
    room: int | None = None,
    workers: int = 0,
    processes: bool = False,
) -> Batches:
    """This process's part of the batches ``first`` to ``end`` - 1 of a training.

    Args:
      annotations: what is trained on; see ``annotations.for_training``.
      resizing: the images' sizes.
      seed: of the order, the flips and the scales.
      rows: the global batch, and which part of it is this process's.
      first, end: steps.
      pixels: where images come from: their files, or ``shapes.Drawn``.
      flip: whether half of the images, drawn anew in every epoch, are mirrored left to right.
      room: for how many boxes of an image there is room, G; None: ``room_for_boxes``.
      workers: how many read at a time; 0 reads when a batch is asked for.
      processes: whether they are processes; else threads.

    Returns:
      An iterator, to be closed, of dicts of n = batch / processes rows; all rows of a batch, also of other processes,
      have one canvas (H, W). Padding comes after what it pads, and is zero.

      - ``images``: uint8 [n, H, W, 3], RGB; the image in the upper left corner.
      - ``extent``: int32 [n, 2], (height, width) of the image within the canvas, pixels.
      - ``scale``: float32 [n, 2], canvas pixels per pixel of the image, down and across: its edges stay its edges.
      - ``boxes``: float32 [n, G, 4], (left, top, right, bottom), canvas pixels.
      - ``labels``: int32 [n, G].
      - ``valid``: bool [n, G], False for padding.
      - ``crowd``: bool [n, G], the annotation's.
      - ``index``: int32 [n], the image's place in ``annotations``.
      - ``epoch``: int32 [n], how often it came before.

    Raises:
      UsageError: also while iterating: an image that can't be read, or that is not of its annotation's size.
    """
    groups = group_by_canvas([resizing.largest(image) for image in annotations.images], resizing.canvases, rows.batch)
    plan = TrainingCanvases(seed, groups, rows)
    reader = BoxReader(annotations, pixels, resizing, plan, _room(annotations, room), seed, flip)
    return Batches(reader, first, end, workers, processes, fields=TRAINING_FIELDS)


def evaluation_batches(
    annotations: Annotations,
    resizing: Resizing,
    rows: Rows,
    *,
    pixels: Pixels = read_pixels,
    room: int | None = None,
    views: tuple[int, ...] = (),
    workers: int = 0,
    processes: bool = False,
) -> Batches:
    """This process's part of batches with every image of ``annotations`` once, neither mirrored nor of random scale.

    Images come sorted by canvas, not in the order of ``annotations``: ``index`` says which is which.

    Args and errors: as of ``training_batches``; and ``views``, shorter sides at which the images are wanted besides.

    Returns:
      The same, and ``real``, bool [n]: False for rows that only fill a canvas's last batch up. Those have an index of
      -1, no boxes, and are black all over their canvas. Of each view ``images_<side>`` and ``extent_<side>``.
    """
    sizes = [resizing.size(image, None).size for image in annotations.images]
    plan = EvaluationCanvases(group_by_canvas(sizes, resizing.canvases, rows.batch), rows)
    reader = BoxReader(annotations, pixels, resizing, plan, _room(annotations, room), views=views)
    fields = EVALUATION_FIELDS + tuple(f"{name}_{side}" for side in views for name in ("images", "extent"))
    return Batches(reader, 0, plan.batches, workers, processes, fields=fields)


@dataclasses.dataclass(frozen=True)
class BoxReader:
    """Reads pieces of batches; what Grain's workers call (``data.stream.PieceReader``).

    Attributes:
      annotations, pixels, resizing, room, flip: as of ``training_batches``.
      plan: which images are wanted.
      seed: as there; None draws nothing: evaluation.
      views: as of ``evaluation_batches``.
    """

    annotations: Annotations
    pixels: Pixels
    resizing: Resizing
    plan: CanvasPlan
    room: int
    seed: int | None = None
    flip: bool = False
    views: tuple[int, ...] = ()

    @property
    def rows(self) -> Rows:
        return self.plan.rows

    def __call__(self, number: int) -> dict[str, Any]:
        """Piece ``number`` of what ``training_batches`` and ``evaluation_batches`` describe."""
        canvas, index, epoch = self.plan.piece(number)
        count = len(index)
        piece: dict[str, Any] = {
            "images": own_pages(count, *canvas, 3),
            "extent": np.tile(np.array(canvas, np.int32), (count, 1)),
            "scale": np.ones((count, 2), np.float32),
            "boxes": np.zeros((count, self.room, 4), np.float32),
            "labels": np.zeros((count, self.room), np.int32),
            "valid": np.zeros((count, self.room), bool),
            "crowd": np.zeros((count, self.room), bool),
            "index": index,
            "epoch": epoch,
            "real": index >= 0,
            "broken": (),
        }
        for side in self.views:
            whole = self.resizing.canvas_of_view(canvas, side)
            piece[f"images_{side}"] = own_pages(count, *whole, 3)
            piece[f"extent_{side}"] = np.tile(np.array(whole, np.int32), (count, 1))
        for row in np.flatnonzero(piece["real"]):
            image, uniforms = self.annotations.images[index[row]], None
            if self.seed is not None:
                draws = 1 + self.resizing.draws
                uniforms = example_uniforms(self.seed, int(epoch[row]), int(index[row]), draws)
            size = self.resizing.size(image, None if uniforms is None else uniforms[1:])
            mirrored = self.flip and uniforms is not None and uniforms[0] < 0.5
            read = self._read(image)
            pixels, boxes = fit(read, image.boxes, size.size, mirrored)
            piece["images"][row, : size.height, : size.width] = pixels
            piece["extent"][row] = size.size
            piece["scale"][row] = size.height / image.height, size.width / image.width
            found = len(boxes)
            piece["boxes"][row, :found], piece["labels"][row, :found] = boxes, image.labels
            piece["valid"][row, :found], piece["crowd"][row, :found] = True, image.crowd
            for side in self.views:
                height, width = piece[f"extent_{side}"][row] = self.resizing.view(image, side).size
                piece[f"images_{side}"][row, :height, :width] = fit(read, image.boxes, (height, width))[0]
        return piece

    def _read(self, image: AnnotatedImage) -> np.ndarray:
        try:
            pixels = patiently(self.pixels, image)
        except (OSError, BrokenImage) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{image.path}: not a readable image ({reason})") from None
        check_image_size(image, *pixels.shape[:2])
        return pixels


def fit(pixels: np.ndarray, boxes: np.ndarray, size: Size, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image and its boxes.

    Bilinear, as the paper's; where the image shrinks antialiased, since photos of today would alias.

    Args:
      pixels: uint8 [h, w, 3].
      boxes: float32 [n, 4], pixels of the image.
      size: (height, width) to become, pixels.
      mirrored: whether left becomes right.

    Returns:
      uint8 [height, width, 3] and the boxes there, float32 [n, 4].
    """
    before = pixels.shape[:2]
    shrinks = size[0] < before[0] or size[1] < before[1]
    pixels = resize_antialiased(pixels, *size, "bilinear") if shrinks else resize(pixels, *size, "bilinear")
    boxes = scale_boxes(boxes, before, size)
    return (pixels[:, ::-1], flip_boxes(boxes, size[1])) if mirrored else (pixels, boxes)
