"""A generated data set, the quick start: up to four drawn shapes on a textured ground, and the boxes around them.

Nothing is downloaded and nothing is stored: a picture follows from (seed, split, index) alone, the same on every
machine but for the rounding of colours.
"""

from collections.abc import Callable
import colorsys
import dataclasses

import cv2
import numpy as np

from resnet_jax.detection.annotations import AnnotatedImage, Annotations, annotated_image
from resnet_jax.errors import UsageError, did_you_mean

CLASSES = ("circle", "cross", "square", "star", "triangle")
SPLITS = ("train", "test")
SHORTER, LONGER = 128, 160  # Sides, pixels: the shorter is always the one, the longer at most the other.
_RADII = (14.0, 34.0)  # Pixels.
_VISIBLE = 0.75  # Of every shape at least this part is to be seen.
_ATTEMPTS = 20  # Places tried for a shape before the picture goes without it.
_DRAWS = 9  # Random numbers a shape takes: class, radius, place (2), rotation, colour (3), light.
_RIM = 1.6  # Pixels along a shape's edge that are drawn darker, so that shapes of one colour part where they overlap.


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape, and where it is drawn.

    Attributes:
      label: its place among ``CLASSES``.
      centre: (x, y), pixels.
      radius: of the circle around it, pixels.
      rotation: radians, clockwise as one sees it.
      colour: RGB, 0 to 255.
      light: radians, the direction in which it is brightest.
    """

    label: int
    centre: tuple[float, float]
    radius: float
    rotation: float
    colour: tuple[float, float, float]
    light: float

    def corners(self) -> np.ndarray:
        """The outline's corners, float64 [n, 2] as (x, y), pixels; of a circle none."""
        angle, distance = _outline(CLASSES[self.label])
        angle = angle + self.rotation
        return np.array(self.centre) + self.radius * np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)


class Drawn:
    """The pixels of generated pictures, uint8 [h, w, 3], by their annotations; for whoever else reads them from files.

    It can be asked for the images of any part of the annotations it came with.
    """

    def __init__(self, pixels: dict[str, np.ndarray]):
        self._pixels = pixels

    def __call__(self, image: AnnotatedImage) -> np.ndarray:
        return self._pixels[str(image.id)]


def shapes(count: int, seed: int, split: str, most: int = 4) -> tuple[Annotations, Drawn]:
    """Draws a split, in a few milliseconds and 60 KB of memory a picture.

    Args:
      count: how many pictures; the first ones are the same whatever it is.
      seed: of the whole data set.
      split: one of ``SPLITS``.
      most: shapes in a picture, of which there is at least one.

    Returns:
      ``(annotations, pixels)``: boxes are exactly around the pixels of each shape that are to be seen, so their
      coordinates are whole; images are ``train/0``, ``train/1``, ...

    Raises:
      UsageError: an unknown split, or no picture.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r} of shapes is unknown{did_you_mean(split, SPLITS)} ({', '.join(SPLITS)})")
    if count < 1:
        raise UsageError(f"{count} pictures of shapes: expected at least one")
    images, pixels = [], {}
    for index in range(count):
        id = f"{split}/{index}"
        picture, drawn, owner = draw_picture(seed, split, index, most)
        boxes = [_box(owner == i) for i in range(len(drawn))]
        height, width = owner.shape
        images.append(annotated_image(id, f"shapes/{id}", width, height, boxes, [shape.label for shape in drawn]))
        pixels[id] = picture
    return Annotations(CLASSES, tuple(range(1, len(CLASSES) + 1)), tuple(images)), Drawn(pixels)


def draw_picture(seed: int, split: str, index: int, most: int = 4) -> tuple[np.ndarray, list[Shape], np.ndarray]:
    """Draws one picture, of a number of shapes from 1 to ``most``, each as likely.

    Returns:
      Its pixels, uint8 [h, w, 3]; its shapes, the hindmost first; and which of them each pixel shows (its centre lies
      within the shape and in none before it), int32 [h, w], -1 the ground.
    """
    # Raw Philox bits are the same on every machine. Crops and orders read other counters (data/crops.py).
    bits = np.random.Philox(counter=[0, index, SPLITS.index(split), 8], key=[seed, 0])
    uniforms = lambda *shape: (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)).reshape(shape) * 2.0**-53
    first = uniforms(3)
    longer = SHORTER + 8 * int(first[0] * ((LONGER - SHORTER) // 8 + 1))
    height, width = (SHORTER, longer) if first[1] < 0.5 else (longer, SHORTER)
    pixels = _ground(height, width, uniforms)
    owner, drawn, areas = np.full((height, width), -1, np.int32), [], []
    for _ in range(1 + int(first[2] * most)):
        for numbers in uniforms(_ATTEMPTS, _DRAWS):
            shape = _shape(height, width, numbers)
            rows, columns, outside = _distances(shape)
            candidate = owner.copy()
            candidate[rows, columns][outside < 0] = len(drawn)
            seen = np.array([(candidate == i).sum() for i in range(len(drawn))])
            if (seen >= _VISIBLE * np.array(areas)).all():
                _paint(pixels[rows, columns], shape, outside)
                owner = candidate
                drawn.append(shape)
                areas.append(int((outside < 0).sum()))
                break
    return np.rint(pixels).clip(0, 255).astype(np.uint8), drawn, owner


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around the pixels of a mask [h, w]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shape(height: int, width: int, numbers: np.ndarray) -> Shape:
    """The shape that ``_DRAWS`` numbers from [0, 1) say, somewhere wholly within the picture."""
    kind, size, across, down, turn, hue, saturation, value, light = numbers.tolist()
    radius = _RADII[0] * (_RADII[1] / _RADII[0]) ** size
    x, y = (radius + 1 + u * (side - 2 * radius - 2) for u, side in ((across, width), (down, height)))
    colour = tuple(255 * part for part in colorsys.hsv_to_rgb(hue, 0.7 + 0.3 * saturation, 0.7 + 0.3 * value))
    return Shape(int(kind * len(CLASSES)), (x, y), radius, 2 * np.pi * turn, colour, 2 * np.pi * light)


def _outline(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Angle (radians) and distance (of a radius of 1) of an outline's corners, in order."""
    if name == "circle":
        return np.empty(0), np.empty(0)
    if name == "cross":  # Two bars, a third as wide as long.
        arm = np.arctan(1 / 3)
        angle = np.concatenate([quarter + np.array([-arm, arm, np.pi / 4]) for quarter in np.pi / 2 * np.arange(4)])
        return angle, np.tile([1.0, 1.0, np.sqrt(2) * np.sin(arm)], 4)
    if name == "star":
        return 2 * np.pi * np.arange(10) / 10, np.tile([1.0, 0.42], 5)
    corners = {"triangle": 3, "square": 4}[name]
    return 2 * np.pi * np.arange(corners) / corners, np.ones(corners)


def _distances(shape: Shape) -> tuple[slice, slice, np.ndarray]:
    """How far the centres of the pixels near a shape lie outside its outline; inside it is negative.

    Returns:
      The rows and columns [r, c] around the shape, and the distances there, float64 [r, c], pixels.
    """
    (x, y), reach = shape.centre, shape.radius + 1
    rows = slice(max(0, int(np.floor(y - reach))), int(np.ceil(y + reach)))
    columns = slice(max(0, int(np.floor(x - reach))), int(np.ceil(x + reach)))
    down, across = np.mgrid[rows, columns] + 0.5
    corners = shape.corners()
    if not len(corners):
        return rows, columns, np.hypot(across - x, down - y) - shape.radius
    distance, inside = np.full(down.shape, np.inf), np.zeros(down.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = x1 - x0, y1 - y0
        along = (((across - x0) * dx + (down - y0) * dy) / (dx * dx + dy * dy)).clip(0, 1)
        distance = np.minimum(distance, np.hypot(across - x0 - along * dx, down - y0 - along * dy))
        # A ray to the right leaves what it is inside of once more often than it enters.
        crosses = (down < y0) != (down < y1)
        inside ^= crosses & (across < x0 + (down - y0) * dx / (dy or 1))
    return rows, columns, np.where(inside, -distance, distance)


def _paint(pixels: np.ndarray, shape: Shape, outside: np.ndarray) -> None:
    """Lays a shape over ``pixels``, float64 [r, c, 3]: lit from one side, with a darker rim, smooth at the edge."""
    rows, columns = outside.shape
    down, across = np.mgrid[:rows, :columns] / np.array([rows, columns]).reshape(2, 1, 1) - 0.5
    light = 1 + 0.4 * (across * np.cos(shape.light) + down * np.sin(shape.light))
    light = light * (1 - 0.45 * (outside + _RIM + 0.5).clip(0, 1))
    cover = (0.5 - outside).clip(0, 1)[..., None]
    pixels += cover * (light[..., None] * np.array(shape.colour) - pixels)


def _ground(height: int, width: int, uniforms: Callable[..., np.ndarray]) -> np.ndarray:
    """A textured ground of two dull colours, float64 [height, width, 3]: clouds, often with stripes or checks."""
    down, across = np.mgrid[:height, :width].astype(np.float64)
    texture = np.zeros((height, width))
    for cells, weight in ((3, 0.5), (7, 0.3), (20, 0.2)):
        texture += weight * cv2.resize(uniforms(cells, cells), (width, height), interpolation=cv2.INTER_CUBIC)
    kind, turn, period, strength = uniforms(4)
    period, strength, turn = 6 + 18 * period, 0.1 + 0.25 * strength, np.pi * turn
    one = np.sin(2 * np.pi / period * (across * np.cos(turn) + down * np.sin(turn)))
    other = np.sin(2 * np.pi / period * (down * np.cos(turn) - across * np.sin(turn)))
    if kind < 0.35:
        texture += strength * one
    elif kind < 0.6:
        texture += strength * np.tanh(4 * one * other)
    colours = []
    for hue, saturation, value in uniforms(2, 3):
        colours.append(np.array(colorsys.hsv_to_rgb(hue, 0.35 * saturation, 0.25 + 0.6 * value)) * 255)
    texture = texture.clip(0, 1)[..., None]
    grain = 16 * (uniforms(height, width, 1) - 0.5)
    return colours[0] * (1 - texture) + colours[1] * texture + grain
