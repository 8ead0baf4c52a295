"""Encoded images (JPEG, PNG and whatever Pillow reads) to pixels, RGB uint8; and the resizing of pixels."""

import io
import math
import warnings

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
import simplejpeg

cv2.setNumThreads(0)  # Readers run in parallel; threads of OpenCV's own would only get in their way.
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # What OpenCV can't read is given to Pillow, whose errors are reported.
Image.MAX_IMAGE_PIXELS = 500_000_000  # Beyond twice this Pillow refuses a file as an attack.
# Of large images, odd metadata and transparency.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}
_ANTIALIASED = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_LARGE = 4_000_000  # Resized images of more pixels than this are long strips: only the crop is computed.
_STRIP, _NEAR = 10_000, 256  # Resized pixels that may be computed in vain, and source pixels to look at then.
_MARGIN = 3  # Pixels beside a sampling point that an interpolation may look at.


class BrokenImage(ValueError):
    """Bytes that are no readable image."""


def decode(content: bytes, scale: int = 1) -> np.ndarray:
    """Decodes an image to RGB uint8 [H, W, 3], as Pillow's ``convert("RGB")`` does, but faster.

    Grey, palette and CMYK images are converted, 16-bit ones scaled, transparency is dropped, of an animation the first
    picture is taken, EXIF rotation is ignored (as torchvision's ImageFolder does; Pillow honours it in TIFFs).

    Args:
      content: the file's bytes.
      scale: 2, 4 or 8 decode a JPEG at that part of its size (a reduced DCT, much cheaper). See ``jpeg_scale``.

    Raises:
      BrokenImage: what is wrong with the bytes.
    """
    try:
        pixels = None
        if content[:3] == _JPEG:
            pixels = _decode_jpeg(content, scale)
        elif _plain_png(content):
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        return _decode_with_pillow(content, scale) if pixels is None else pixels
    except UnidentifiedImageError as error:  # Its text has an address in memory.
        raise BrokenImage("of no known format") from error
    except (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError, cv2.error) as error:
        raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from error


def jpeg_shape(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that can be decoded at a reduced scale, from its header; None for all else."""
    if content[:3] != _JPEG:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return None if colours in ("CMYK", "YCCK") else (height, width)


def image_shape(content: bytes) -> tuple[int, int]:
    """(height, width) of what ``decode`` gives, from the header alone.

    Raises:
      BrokenImage: there is no header.
    """
    shape = jpeg_shape(content)
    if shape:
        return shape
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage("of no known format") from error


def jpeg_scale(side: int, needed: int) -> int:
    """The largest reduction whose ``side`` still has ``needed`` pixels: 8, 4, 2 or 1.

    Decoding saves time at powers of two alone; the scales between them would only blur.
    """
    return next((scale for scale in (8, 4, 2) if side >= scale * needed), 1)


def _decode_jpeg(content: bytes, scale: int) -> np.ndarray | None:
    """The image, or None where Pillow should try."""
    shape = jpeg_shape(content)
    if shape is None:
        return None
    # The decoder takes the smallest of its sizes that is at least so large.
    height, width = (-(-side // scale) for side in shape) if scale > 1 else (0, 0)
    try:
        return simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width)
    except ValueError:  # It is stricter than others, about stray bytes between the segments.
        return None


def _plain_png(content: bytes) -> bool:
    """Whether it is a PNG of 8-bit grey or RGB and no animation, which OpenCV decodes exactly as Pillow."""
    # Signature, and the chunk IHDR: width, height, depth, colour type, ...
    plain = content[:8] == _PNG and content[24:25] == b"\x08" and content[25:26] in (b"\x00", b"\x02")
    return plain and content.find(b"acTL", 0, content.find(b"IDAT")) < 0


def _decode_with_pillow(content: bytes, scale: int) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        if scale > 1:  # Of a JPEG whose header promised it.
            image.draft("RGB", (max(1, image.width // scale), max(1, image.height // scale)))
        if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would cut off at 255.
            levels = np.asarray(image, np.float32) / 257
            return np.repeat(np.rint(levels).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def resized_shape(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """(height, width) when the shorter side becomes ``shorter_side`` and the other keeps the ratio, rounded down."""
    if height <= width:
        return shorter_side, max(shorter_side, shorter_side * width // height)
    return max(shorter_side, shorter_side * height // width), shorter_side


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Plain (not antialiased) resizing of uint8 [H, W, 3], as Caffe's and OpenCV's."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=INTERPOLATIONS[interpolation])


def resize_and_crop(
    pixels: np.ndarray,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: str,
    extent: tuple[float, float] | None = None,
) -> np.ndarray:
    """Resizes (plainly) and cuts out a square.

    Only the pixels around the crop are resized: the sampling points stay where they are to a thousandth of a pixel
    (a hundredth in strips of many thousand pixels).

    Args:
      pixels: the image, uint8 [H, W, 3].
      resized: its new height and width, pixels.
      corner: top and left of the square in the resized image, pixels.
      size: the square's side, pixels.
      interpolation: one of ``INTERPOLATIONS``.
      extent: height and width of the image in its own pixels, where the last ones are not whole (an odd image decoded
        at half its size).
    """
    height, width = extent or pixels.shape[:2]
    rows, down, top = _window(pixels.shape[0], resized[0] / height, corner[0], size)
    columns, across, left = _window(pixels.shape[1], resized[1] / width, corner[1], size)
    method = INTERPOLATIONS[interpolation]
    part = cv2.resize(pixels[rows, columns], None, fx=across, fy=down, interpolation=method)
    return part[top : top + size, left : left + size]


def _window(length: int, factor: float, start: int, size: int) -> tuple[slice, float, int]:
    """The part of one axis that a crop of the image resized by ``factor`` needs.

    Returns:
      The part, the factor, and where the crop starts in the resized part.
    """
    # It may begin where a source pixel's edge falls on a resized pixel's: at 0, and here and there beyond.
    edges = np.arange(max(0, int(start / factor) - _MARGIN) + 1) * factor
    apart = np.abs(edges - np.rint(edges))
    first = int(np.flatnonzero(apart < min(1e-3 * factor, 0.4))[-1])
    if start - first * factor > _STRIP:  # Too much to resize for a small square: the best there is nearby.
        first = max(0, len(edges) - _NEAR) + int(np.argmin(apart[-_NEAR:]))
    last = min(length, math.ceil((start + size) / factor) + _MARGIN)
    return slice(first, last), factor, start - round(first * factor)


def resize_antialiased(
    pixels: np.ndarray, height: int, width: int, interpolation: str, crop: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Antialiased resizing of uint8 [H, W, 3] by Pillow, on which published test errors rest.

    Args:
      pixels: the image.
      height, width: of the resized image, pixels.
      interpolation: one of ``INTERPOLATIONS``.
      crop: (top, left, size), to give only this square of the resized image.
    """
    source_height, source_width = pixels.shape[:2]
    image, method = Image.fromarray(pixels), _ANTIALIASED[interpolation]
    if crop is None:
        return np.asarray(image.resize((width, height), method))
    top, left, size = crop
    if height * width < _LARGE:
        # Pillow rounds and clips between its two passes, whose order depends on what is asked for: all is computed.
        return np.asarray(image.resize((width, height), method))[top : top + size, left : left + size]
    across, down = source_width / width, source_height / height
    right, bottom = min(source_width, (left + size) * across), min(source_height, (top + size) * down)
    return np.asarray(image.resize((size, size), method, box=(left * across, top * down, right, bottom)))
