"""Files that are written whole or not at all."""

from collections.abc import Callable
import os
import pathlib
from typing import BinaryIO

from resnet_jax.errors import UsageError


def write_whole(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Has ``write`` write a file beside ``path``, which then takes its place.

    Raises:
      UsageError: it can't be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def check_folder(flag: str, value: str, folder: pathlib.Path) -> None:
    """Raises a UsageError, before any work is done, where nothing can be written into ``folder``."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not folder.is_dir() and (folder.exists() or not nearest.is_dir()):
        raise UsageError(f"{flag}={value}: {folder if folder.exists() else nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"{flag}={value}: can't be written (permission denied in {nearest})")
