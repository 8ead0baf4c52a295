"""Random crops of photos for training: the paper's scale augmentation, and the Inception-style crop."""

import dataclasses
import math

import numpy as np

from resnet_jax.data import decode


@dataclasses.dataclass(frozen=True)
class ScaleCrop:
    """The paper's (section 3.4): shorter side uniform on [smallest, largest] whole pixels, then a random crop.

    Attributes:
      size: side of the crop, pixels.
      smallest, largest: limits of the shorter side, pixels, both included.
      interpolation: ``bilinear``, ``bicubic`` or ``area``, not antialiased.
      reduced_dct: decode large JPEGs at a reduced DCT scale.
    """

    size: int = 224
    smallest: int = 256
    largest: int = 480
    interpolation: str = "bilinear"
    reduced_dct: bool = True

    def __call__(self, content: bytes, random: np.random.Generator) -> np.ndarray:
        """Encoded bytes -> uint8 [size, size, 3]."""
        shorter = int(random.integers(self.smallest, self.largest + 1))
        where = random.random(2)  # Drawn before the size is known, so that it changes no other draw.
        pixels = decode.decode(content, shorter if self.reduced_dct else 0)
        height, width = decode.resized_shape(*pixels.shape[:2], shorter)
        top, left = (int(u * (side - self.size + 1)) for u, side in zip(where, (height, width), strict=True))
        resized = decode.resize(pixels, height, width, self.interpolation)
        return resized[top : top + self.size, left : left + self.size]


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
    """The crop that reproductions use (Szegedy et al., 2014): random area and aspect ratio, resized to a square.

    Attributes:
      size: side of the result, pixels.
      area: limits of the crop's share of the image, uniform.
      ratio: limits of width over height, uniform in the logarithm.
      interpolation: ``bilinear``, ``bicubic`` or ``area``, not antialiased.
      reduced_dct: decode large JPEGs at a reduced DCT scale.
    """

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    reduced_dct: bool = True

    def __call__(self, content: bytes, random: np.random.Generator) -> np.ndarray:
        """Encoded bytes -> uint8 [size, size, 3]."""
        pixels = decode.decode(content)
        top, left, height, width = self.box(*pixels.shape[:2], random)
        crop = pixels[top : top + height, left : left + width]
        return decode.resize(crop, self.size, self.size, self.interpolation)

    def box(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop; after ten misfits the largest of an allowed ratio in the middle."""
        for _ in range(10):
            area = height * width * random.uniform(*self.area)
            ratio = math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Evaluation's single view: shorter side resized (antialiased, from full resolution), the middle cut out.

    Attributes:
      size: side of the crop, pixels.
      shorter_side: of the resized image, pixels.
      interpolation: ``bilinear``, ``bicubic`` or ``area``.
    """

    size: int = 224
    shorter_side: int = 256
    interpolation: str = "bilinear"

    def __call__(self, content: bytes, random: np.random.Generator | None = None) -> np.ndarray:
        """Encoded bytes -> uint8 [size, size, 3]."""
        del random
        pixels = decode.decode(content)
        height, width = decode.resized_shape(*pixels.shape[:2], self.shorter_side)
        return decode.center_crop(decode.resize_antialiased(pixels, height, width, self.interpolation), self.size)


def example_random(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one example in one epoch, from these three alone."""
    return np.random.Generator(np.random.Philox(key=[(seed << 32) | epoch, index]))
