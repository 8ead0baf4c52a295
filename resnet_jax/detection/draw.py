"""Boxes, drawn into a picture with their classes' names and scores."""

from collections.abc import Iterator, Sequence
import colorsys
import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = (5**0.5 - 1) / 2  # Of a turn: however many hues are taken so, they keep apart.
_LEAST_SIDE = 384  # Pixels, of pictures that are not to be enlarged.
_GAP = 8  # Pixels between the pictures of a sheet.
_BRIGHT = 125  # Luminance, of 255.
_Rectangle = tuple[int, int, int, int]  # (left, top, right, bottom), pixels.


def class_colour(label: int) -> tuple[int, int, int]:
    """A class's colour, RGB: far from those of its neighbours, and bright enough for black letters on it."""
    value, saturation = ((1.0, 0.75), (0.8, 1.0), (1.0, 0.45))[label // 12 % 3]
    colour = 255 * np.array(colorsys.hsv_to_rgb((0.02 + label * _GOLDEN) % 1, saturation, value))
    luminance = colour @ (0.299, 0.587, 0.114)
    colour += (255 - colour) * max(0.0, (_BRIGHT - luminance) / (255 - luminance))
    red, green, blue = np.rint(colour).astype(int).tolist()
    return red, green, blue


def draw_boxes(
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Draws boxes, each in its class's colour and named; lines and letters grow with the picture.

    A name stands above its box, or where there is no room beside other names: below, or within. The surest are drawn
    last and named first.

    Args:
      pixels: uint8 [H, W, 3], RGB; left as it is.
      boxes: [n, 4], (left, top, right, bottom), pixels; what lies outside the picture is cut off.
      labels: int [n], places among ``classes``.
      classes: names.
      scores: [n], from 0 to 1, written behind the names; None: none is.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: shapes that don't go together.
    """
    boxes, labels = np.asarray(boxes), np.asarray(labels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or boxes.shape != (len(labels), 4):
        raise ValueError(f"pixels {pixels.dtype} {pixels.shape}, boxes {boxes.shape} and labels {labels.shape}")
    if scores is not None and np.shape(scores) != labels.shape:
        raise ValueError(f"scores {np.shape(scores)}, but labels {labels.shape}")
    height, width = pixels.shape[:2]
    canvas = Image.fromarray(pixels).copy()
    draw = ImageDraw.Draw(canvas)
    # Of a shorter side of 128 pixels: 1 and letters of 10; of 480: 2 and 12; of 800: 4 and 20.
    line, letters = max(1, round(min(height, width) / 220)), max(10, round(min(height, width) / 40))
    order = range(len(labels)) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    drawn = [(int(i), _within(boxes[i], height, width)) for i in order]
    drawn = [(i, box) for i, box in drawn if box is not None]
    for i, box in reversed(drawn):
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=class_colour(int(labels[i])), width=line)
    font, taken = _font(letters), []
    for i, box in drawn:
        name = str(classes[int(labels[i])]) + ("" if scores is None else f" {float(scores[i]):.2f}")
        left, _, right, _ = font.getbbox(name)
        margin = max(1, letters // 6)
        # Of one height whatever the letters, so that names in a row look so.
        wide, tall = int(right - left) + 2 * margin, int(sum(font.getmetrics())) + margin
        places = [_moved_within(place, height, width) for place in _places(box, wide, tall)]
        place = next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])
        taken.append(place)
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=class_colour(int(labels[i])))
        middle = (place[1] + place[3]) / 2
        draw.text((place[0] + margin - left, middle), name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(canvas)


def draw_large(
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """``draw_boxes`` in a small picture enlarged by a whole number: else names hide what they name."""
    times = math.ceil(_LEAST_SIDE / min(pixels.shape[:2]))
    return draw_boxes(pixels.repeat(times, axis=0).repeat(times, axis=1), boxes * times, labels, classes, scores)


def contact_sheet(drawn: Sequence[np.ndarray], columns: int, width: int = 400) -> np.ndarray:
    """Pictures side by side, each scaled to ``width`` pixels; rows as high as the tallest. uint8 [H, W, 3]."""
    scaled = []
    for pixels in drawn:
        height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
        scaled.append(np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)))
    tallest = max(len(one) for one in scaled)
    rows = math.ceil(len(scaled) / columns)
    sheet = np.full((rows * (tallest + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for i, one in enumerate(scaled):
        top, left = i // columns * (tallest + _GAP), i % columns * (width + _GAP)
        sheet[top : top + len(one), left : left + width] = one
    return sheet


@functools.lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, so that pictures look alike everywhere."""
    return ImageFont.load_default(size)


def _within(box: np.ndarray, height: int, width: int) -> _Rectangle | None:
    """A box in whole pixels, cut off at the picture's edges and a pixel large at least; None where nothing is left."""
    left, top, right, bottom = box.tolist()
    if not (left < width and top < height and right > 0 and bottom > 0):  # Nor where it is not finite.
        return None
    left, top = (min(max(0, round(low)), side - 1) for low, side in ((left, width), (top, height)))
    right, bottom = min(max(left + 1, round(right)), width), min(max(top + 1, round(bottom)), height)
    return left, top, right, bottom


def _places(box: _Rectangle, wide: int, tall: int) -> Iterator[_Rectangle]:
    """Where a name may stand, the best first."""
    left, top, right, bottom = box
    for x, y in ((left, top - tall), (left, bottom), (right - wide, top - tall), (left, top), (left, bottom - tall)):
        yield x, y, x + wide, y + tall


def _moved_within(place: _Rectangle, height: int, width: int) -> _Rectangle:
    """The same, moved so that it is in the picture; where it is larger, its beginning."""
    left, top, right, bottom = place
    across = max(min(0, width - right), -left)
    down = max(min(0, height - bottom), -top)
    return left + across, top + down, right + across, bottom + down


def _overlap(one: _Rectangle, other: _Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
