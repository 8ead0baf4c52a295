"""Encoded images to pixels, and pixels to crops: JPEG, PNG, WebP, BMP, GIF -> RGB uint8."""

import io

import cv2
import numpy as np
from PIL import Image
import simplejpeg

# Workers are processes; threads of OpenCV's own would only get in each other's way.
cv2.setNumThreads(0)
# The largest picture that is decoded, in pixels; Pillow would warn at half of it.
Image.MAX_IMAGE_PIXELS = 500_000_000
_JPEG = b"\xff\xd8\xff"
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "area": Image.Resampling.BOX}


class BrokenImage(ValueError):
    """Bytes that are no readable image."""


def decode(content: bytes, shorter_side: int = 0) -> np.ndarray:
    """Decodes an image to RGB uint8 [H, W, 3].

    Grey, palette and CMYK images are converted, 16-bit ones scaled, transparency is dropped, of an animation the first
    picture is taken, EXIF rotation is ignored (as torchvision's ImageFolder does).

    Args:
      content: the file's bytes.
      shorter_side: where given, a JPEG may be decoded at a reduced DCT scale whose shorter side is at least this, in
        pixels; 0 decodes at full size.

    Raises:
      BrokenImage: what is wrong with the bytes.
    """
    try:
        if content[:3] == _JPEG:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours not in ("CMYK", "YCCK"):
                # Only whole factors of two save time; others would only blur.
                least = [max(shorter_side, 1)] * 2 if 0 < 2 * shorter_side <= min(height, width) else (0, 0)
                return simplejpeg.decode_jpeg(content, "RGB", min_height=least[0], min_width=least[1])
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would cut them off at 255.
                pixels = np.asarray(image, np.float32) / 257
                image = Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(str(error) or type(error).__name__) from error


def resized_shape(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """(height, width) when the shorter side becomes ``shorter_side`` and the other keeps the ratio, cut off."""
    if height <= width:
        return shorter_side, max(shorter_side, int(shorter_side * width / height))
    return max(shorter_side, int(shorter_side * height / width)), shorter_side


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Plain (not antialiased) resizing of uint8 [H, W, 3], as Caffe's and OpenCV's."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=INTERPOLATIONS[interpolation])


def resize_antialiased(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Antialiased resizing of uint8 [H, W, 3] by Pillow, on which published test errors rest."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), _PILLOW[interpolation]))


def center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle ``size`` x ``size`` of uint8 [H, W, 3]; odd rests are split as torchvision does."""
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]
