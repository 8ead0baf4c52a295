"""Files that are written whole or not at all, on this machine or in a bucket."""

from collections.abc import Callable, Mapping
import errno
import io
import json
import os
import pathlib
from typing import Any, BinaryIO

from resnet_jax import buckets
from resnet_jax.errors import UsageError


def write_whole(path: buckets.Folder, write: Callable[[BinaryIO], object]) -> None:
    """Has ``write`` write a file beside ``path``, which then takes its place; objects of a bucket are whole anyway.

    Raises:
      UsageError: it can't be written.
    """
    if buckets.in_bucket(path):
        content = io.BytesIO()
        write(content)
        try:
            path.write_bytes(content.getvalue())
        except Exception as error:  # gcsfs, aiohttp and google.auth each have their own.
            raise UsageError(f"{path}: can't be written ({buckets.reason(error)})") from error
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: buckets.Folder, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of one.

    Raises:
      UsageError: it can't be written.
    """
    content = (json.dumps(value, indent=2) + "\n").encode()
    write_whole(path, lambda file: file.write(content))


def write_files(folder: buckets.Folder, files: Mapping[str, bytes]) -> None:
    """Writes files, by their names below ``folder``, and makes the folders.

    Raises:
      UsageError: they can't be written.
    """
    for name, content in files.items():
        make_folder((folder / name).parent)
        write_whole(folder / name, lambda file, content=content: file.write(content))


def make_folder(folder: buckets.Folder, name: str = "") -> None:
    """Makes a folder where it is not there; buckets need none.

    Args:
      folder: where.
      name: what messages call it.

    Raises:
      UsageError: it can't be made.
    """
    if buckets.in_bucket(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name or folder}: can't be written ({error.strerror or error})") from error


def check_folder(flag: str, value: str, folder: pathlib.Path) -> None:
    """Raises a UsageError, before any work is done, where nothing can be written into ``folder``."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not folder.is_dir() and (folder.exists() or not nearest.is_dir()):
        raise UsageError(f"{flag}={value}: {folder if folder.exists() else nearest} is a file, not a folder")
    if why := refusal(nearest):
        raise UsageError(f"{flag}={value}: can't be written ({why})")


def refusal(folder: buckets.Folder) -> str:
    """Why nothing can be written into a folder of this machine; empty where it can."""
    if os.access(folder, os.W_OK):
        return ""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{os.strerror(errno.EROFS).lower()}: {folder}"
    return f"permission denied in {folder}"
