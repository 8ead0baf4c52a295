"""Pictures that people name on a command line: which files, and their pixels as people see them."""

from collections.abc import Sequence
import glob
import io
import os
import pathlib

import numpy as np
from PIL import Image, ImageOps

from resnet_jax.data.decode import EXTENSIONS, BrokenImage, decode
from resnet_jax.errors import UsageError

_ORIENTATION = 274  # The EXIF tag.


def find_images(arguments: Sequence[str]) -> list[str]:
    """The files that are meant by files, folders (with what lies below) and glob patterns, in order.

    Raises:
      UsageError: one of them means none.
    """
    found: list[str] = []
    for argument in arguments:
        path = os.path.expanduser(argument)
        if os.path.isdir(path):
            below = (str(file) for file in sorted(pathlib.Path(path).rglob("*")))
            matches = [file for file in below if file.lower().endswith(EXTENSIONS)]
        else:
            matched = sorted(glob.glob(path, recursive=True))
            matches = [path] if os.path.isfile(path) else [m for m in matched if m.lower().endswith(EXTENSIONS)]
        if not matches:
            raise UsageError(f"{argument}: no such image, or folder of images")
        found += matches
    return found


def read_upright(path: str) -> np.ndarray:
    """A file's pixels turned as EXIF says, uint8 [H, W, 3].

    Raises:
      UsageError: it can't be read.
    """
    try:
        content = pathlib.Path(path).read_bytes()
        pixels = decode(content)
        with Image.open(io.BytesIO(content)) as image:
            # Pillow turns TIFFs itself when it decodes them.
            turned = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    except (OSError, BrokenImage) as error:
        raise UsageError(f"{path}: not a readable image ({error})") from error
    if turned != 1:
        upright = Image.fromarray(pixels)
        upright.getexif()[_ORIENTATION] = turned
        pixels = np.asarray(ImageOps.exif_transpose(upright))
    return pixels
