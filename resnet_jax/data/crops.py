"""From an image's bytes to the pixels a network sees: the paper's scale augmentation and its alternatives.

Random crops take their numbers from ``example_uniforms``, so they follow from seed, epoch and example alone.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

from resnet_jax.data import decode
from resnet_jax.data.sources import Examples

# An encoded image, or its pixels where it was decoded before: uint8 [H, W, 3].
Encoded = bytes | np.ndarray


class Crop(Protocol):
    """A function from an image to pixels of a fixed shape.

    Attributes:
      shape: of the pixels, (size, size, 3) but for test protocols that want more than a square.
      draws: how many random numbers a call takes.
      reducible_from: JPEGs whose shorter side is less, in pixels, are decoded at full size whatever is drawn.
    """

    shape: tuple[int, ...]
    draws: int
    reducible_from: float

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        """The pixels, uint8; ``uniforms`` [draws] are from [0, 1)."""


_NONE = np.empty(0)


class Views:
    """A crop of each example."""

    def __init__(self, examples: Examples, crop: Crop):
        self.examples, self.crop = examples, crop

    def __call__(self, i: int, uniforms: np.ndarray) -> tuple[np.ndarray, int]:
        """The crop of example ``i`` that the numbers say, uint8, and its label.

        Raises:
          OSError: it can't be read.
          BrokenImage: it can't be decoded.
        """
        content, label = self.examples[i]
        return self.crop(content, uniforms), label


def example_uniforms(seed: int, epoch: int, index: int, count: int) -> np.ndarray:
    """``count`` numbers from [0, 1), float64, of one example in one epoch.

    They are raw Philox bits, whose values are fixed by the generator's definition: the same on every machine and with
    every version of NumPy. The order of the examples (``order.epoch_order``) reads other counters of the same key.
    """
    if not count:
        return _NONE
    bits = np.random.Philox(counter=[0, index, 1, 0], key=[seed, epoch]).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def _pixels(image: Encoded, scale: int = 1) -> np.ndarray:
    return decode.decode(image, scale) if isinstance(image, bytes) else image


class _Square:
    """What gives a square of ``size`` pixels."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size, 3


@dataclasses.dataclass(frozen=True)
class ScaleCrop(_Square):
    """The paper's (section 3.4): the shorter side drawn from whole pixels, then a crop drawn from all there are.

    Attributes:
      size: side of the crop, pixels.
      smallest, largest: limits of the shorter side, pixels, both included.
      interpolation: one of ``decode.INTERPOLATIONS``, not antialiased.
      reduced_dct: decode JPEGs at a reduced DCT scale where even that is larger than the crop needs.
    """

    size: int = 224
    smallest: int = 256
    largest: int = 480
    interpolation: str = "bilinear"
    reduced_dct: bool = True
    draws: int = 3

    @property
    def reducible_from(self) -> float:
        return 2 * self.smallest if self.reduced_dct else math.inf

    def shorter_side(self, uniforms: np.ndarray) -> int:
        """The drawn shorter side, pixels."""
        return self.smallest + int(uniforms[0] * (self.largest - self.smallest + 1))

    def corner(self, height: int, width: int, uniforms: np.ndarray) -> tuple[int, int]:
        """The drawn (top, left) in the resized image, pixels."""
        return int(uniforms[1] * (height - self.size + 1)), int(uniforms[2] * (width - self.size + 1))

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        shorter = self.shorter_side(uniforms)
        shape = decode.jpeg_shape(image) if self.reduced_dct and isinstance(image, bytes) else None
        scale = decode.jpeg_scale(min(shape), shorter) if shape else 1
        pixels = _pixels(image, scale)
        height, width = shape or pixels.shape[:2]
        resized = decode.resized_shape(height, width, shorter)
        corner, extent = self.corner(*resized, uniforms), (height / scale, width / scale)
        return decode.resize_and_crop(pixels, resized, corner, self.size, self.interpolation, extent)


@dataclasses.dataclass(frozen=True)
class InceptionCrop(_Square):
    """The crop that reproductions use (Szegedy et al., 2014): random area and aspect ratio, resized to a square.

    Attributes:
      size: side of the result, pixels.
      smallest_area: least share of the image's area; the largest is all of it.
      ratio: limits of width over height, uniform in the logarithm.
      interpolation: one of ``decode.INTERPOLATIONS``, not antialiased.
      reduced_dct: decode JPEGs at a reduced DCT scale where the smallest crop has enough pixels even so.
    """

    size: int = 224
    smallest_area: float = 0.08
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    reduced_dct: bool = True
    attempts: int = 10

    @property
    def draws(self) -> int:
        """Four an attempt: area, ratio, top, left."""
        return 4 * self.attempts

    @property
    def reducible_from(self) -> float:
        return 2 * self.size if self.reduced_dct else math.inf

    def box(self, height: int, width: int, uniforms: np.ndarray) -> tuple[int, int, int, int]:
        """The crop (top, left, height, width) in an image, pixels.

        After as many misfits as there are attempts it is the largest in the middle that has an allowed ratio, as
        torchvision's ``RandomResizedCrop`` has it.
        """
        low, high = (math.log(limit) for limit in self.ratio)
        for u in uniforms.reshape(self.attempts, 4):
            area = height * width * (self.smallest_area + (1 - self.smallest_area) * u[0])
            ratio = math.exp(low + (high - low) * u[1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        shape = decode.jpeg_shape(image) if self.reduced_dct and isinstance(image, bytes) else None
        if shape is None:
            pixels, scale = _pixels(image), 1
            box = self.box(*pixels.shape[:2], uniforms)
        else:
            box = self.box(*shape, uniforms)
            scale = decode.jpeg_scale(min(box[2:]), self.size)
            pixels = _pixels(image, scale)
        top, left, height, width = box
        rows, columns = (
            slice(round(start / scale), round((start + length) / scale))
            for start, length in ((top, height), (left, width))
        )
        return decode.resize(pixels[rows, columns], self.size, self.size, self.interpolation)


@dataclasses.dataclass(frozen=True)
class CenterCrop(_Square):
    """Evaluation's single view: the shorter side resized, antialiased and from full resolution, the middle cut out.

    Attributes:
      size: side of the crop, pixels.
      shorter_side: of the resized image, pixels.
      interpolation: one of ``decode.INTERPOLATIONS``.
    """

    size: int = 224
    shorter_side: int = 256
    interpolation: str = "bilinear"
    draws: int = 0
    reducible_from: float = math.inf

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        del uniforms
        pixels = _pixels(image)
        height, width = decode.resized_shape(*pixels.shape[:2], self.shorter_side)
        # Odd rests are split as torchvision splits them.
        top, left = (round((side - self.size) / 2) for side in (height, width))
        return decode.resize_antialiased(pixels, height, width, self.interpolation, (top, left, self.size))


@dataclasses.dataclass(frozen=True)
class Whole(_Square):
    """The whole image, resized (antialiased) to a square whatever its shape; a square of that size is left alone.

    Attributes:
      size: side of the result, pixels.
      interpolation: one of ``decode.INTERPOLATIONS``.
    """

    size: int
    interpolation: str = "bilinear"
    draws: int = 0
    reducible_from: float = math.inf

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        del uniforms
        pixels = _pixels(image)
        if pixels.shape[:2] == (self.size, self.size):
            return pixels
        return decode.resize_antialiased(pixels, self.size, self.size, self.interpolation)


@dataclasses.dataclass(frozen=True)
class FiveCrop:
    """Half of the 10-crop test: the shorter side resized as for ``CenterCrop``, then the middle and the four corners.

    The other half are their mirror images, which the device makes.

    Attributes: as of ``CenterCrop``.
    """

    size: int = 224
    shorter_side: int = 256
    interpolation: str = "bilinear"
    draws: int = 0
    reducible_from: float = math.inf

    @property
    def shape(self) -> tuple[int, ...]:
        return 5, self.size, self.size, 3

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        del uniforms
        pixels = _pixels(image)
        height, width = decode.resized_shape(*pixels.shape[:2], self.shorter_side)
        resized = decode.resize_antialiased(pixels, height, width, self.interpolation)
        bottom, right = height - self.size, width - self.size
        corners = ((round(bottom / 2), round(right / 2)), (0, 0), (0, right), (bottom, 0), (bottom, right))
        return np.stack([resized[top : top + self.size, left : left + self.size] for top, left in corners])


@dataclasses.dataclass(frozen=True)
class Fit:
    """The whole image, its shorter side resized and its aspect ratio kept, in the upper left of a canvas of zeros.

    Attributes:
      shorter_side: of the resized image, pixels.
      canvas: (height, width) of the result, pixels; at least the resized image's.
      interpolation: one of ``decode.INTERPOLATIONS``, antialiased.
    """

    shorter_side: int
    canvas: tuple[int, int]
    interpolation: str = "bilinear"
    draws: int = 0
    reducible_from: float = math.inf

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.canvas, 3

    def __call__(self, image: Encoded, uniforms: np.ndarray) -> np.ndarray:
        del uniforms
        pixels = _pixels(image)
        height, width = decode.resized_shape(*pixels.shape[:2], self.shorter_side)
        canvas = np.zeros(self.shape, np.uint8)
        canvas[:height, :width] = decode.resize_antialiased(pixels, height, width, self.interpolation)
        return canvas
