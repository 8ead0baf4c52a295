"""One checkpoint on disk: an array tree and a record, written whole, and known to be damaged where it is."""

import errno
from functools import cache
import json
import logging
import os
import re
import sys
from typing import Any
import warnings
import zlib

from etils import epath
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from resnet_jax import buckets
from resnet_jax.buckets import files_below, in_bucket
from resnet_jax.errors import UsageError
from resnet_jax.models.stacking import in_run
from resnet_jax.training.fingerprint import fingerprints, layouts, other_layout

# Orbax's names in a checkpoint's folder, and in the name of a folder that is not whole yet.
_METADATA, _STATE, _TREE, COMMITTED = "_CHECKPOINT_METADATA", "state", "_METADATA", "commit_success.txt"
_HALF_WRITTEN = ".orbax-checkpoint-tmp"
_CHECKSUMS = "checksums.json"  # Ours: sizes and checksums of the other files.


class Damaged(Exception):
    """A checkpoint is not what was saved; says which file or array, and why."""


def stored_steps(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending, damaged ones too; those half-written are none."""
    return sorted(int(entry.name) for entry in _entries(folder) if entry.name.isdecimal() and not half_written(entry))


def _entries(folder: epath.Path) -> list[epath.Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # Not is_dir: gcsfs says no to it where it can't ask the bucket.
        return []
    except Exception as error:
        if in_bucket(folder):
            raise UsageError(f"{folder}: can't be read ({buckets.reason(error)})") from error
        raise


def half_written(entry: epath.Path) -> bool:
    """Whether an entry of a folder of checkpoints is what a save left that did not come to its end."""
    # Buckets know no renaming: there a last file says that a folder is whole.
    return _HALF_WRITTEN in entry.name or (in_bucket(entry) and not (entry / COMMITTED).exists())


def save_async(folder: epath.Path, state: Any, record: dict[str, Any]) -> ocp.AsyncResponse:
    """Starts to write; returns once the state may be changed; ``result()`` of what it returns waits, and raises.

    Args:
      folder: the new checkpoint's.
      state: arrays.
      record: JSON values.
    """
    _hush()
    parts = {"record": json.dumps(record), "fingerprints": json.dumps(fingerprints(state))}
    context = ocp.Context()
    # Orbax measures it by the wall clock: a clock put forward would break off a save that goes well.
    context.asynchronous.timeout_secs = 10**9
    with context:
        return ocp.save_async(folder, state, custom_metadata=parts | {"checksum": _checksum(parts)})


def add_checksums(folder: epath.Path) -> None:
    """Notes the size of each file of a whole checkpoint and, but for buckets, its CRC-32.

    The fingerprints tell whether arrays are right. This tells first which file is not: of damaged files Orbax says
    little in one line, and much in others'.
    """
    found = {
        str(path.relative_to(folder)): [path.stat().length, None if in_bucket(path) else _crc(path)]
        for path in files_below(folder)
    }
    text = json.dumps(found)
    (folder / _CHECKSUMS).write_text(f"{zlib.crc32(text.encode()):08x} {text}")


def check_files(folder: epath.Path, contents: bool) -> None:
    """Looks whether the files are there that were written, as long as they were, and with the same ``contents``.

    Raises:
      Damaged: they are not.
    """
    try:
        checksum, text = (folder / _CHECKSUMS).read_text().split(" ", 1)
        expected = json.loads(text) if int(checksum, 16) == zlib.crc32(text.encode()) else {}
    except (OSError, ValueError):  # Killed before it was written, or damaged itself: the arrays say it.
        expected = {}
    for name, (size, crc) in expected.items():
        path = folder / name
        try:
            length = path.stat().length
            if length != size:
                raise Damaged(f"{name} has {length} bytes of {size}")
            if contents and crc is not None and _crc(path) != crc:
                raise Damaged(f"{name} has other bytes than were written")
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        except PermissionError as error:
            raise UsageError(f"{path}: can't be read ({error.strerror})") from error
        except OSError as error:
            if in_bucket(path):  # It can't be reached; what is in it may be whole.
                raise UsageError(f"{path}: can't be read ({buckets.reason(error)})") from error
            raise Damaged(f"{name}: {reason(error)}") from error


def _crc(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return crc


def read_record(folder: epath.Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The record of a checkpoint and the fingerprints of its arrays (None of one saved before there were any).

    Raises:
      Damaged: it can't be read, or files are missing that every checkpoint has.
    """
    if not _entries(folder):
        raise Damaged("no files in it")
    for path in (folder / _METADATA, folder / _STATE / _TREE):
        if not path.is_file():
            raise Damaged(f"{path.relative_to(folder)} is missing")
    try:
        parts = json.loads((folder / _METADATA).read_text())["custom_metadata"]
        if set(parts) == {"record"}:
            return json.loads(parts["record"]), None
        if set(parts) != {"record", "fingerprints", "checksum"} or parts["checksum"] != _checksum(parts):
            raise ValueError("not what was written")
        return json.loads(parts["record"]), json.loads(parts["fingerprints"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(folder, error, _METADATA) from error


def load(folder: epath.Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Loads a checkpoint and makes sure that it is what was saved.

    Args:
      folder: the checkpoint's.
      like: arrays of the same shapes, laid out as those loaded are to be; by default they are NumPy arrays, in
        dictionaries and lists.

    Returns:
      The arrays and the record.

    Raises:
      Damaged: it is not.
      UsageError: it is whole, and of another network or optimizer than ``like``; or it may not be read.
    """
    _hush()
    stacked = lambda names: in_run(part for name in names for part in name.split("/"))
    record, marks = read_record(folder)
    if like is not None and marks is not None and (other := other_layout(marks, layouts(like))):
        if not stacked(marks) and stacked(layouts(like)):
            raise UsageError(f"{folder}: of an older version, which stored every block by itself; set another --workdir"
                             " and --config.init.weights to this run's folder to start from its weights")  # fmt: skip
        raise UsageError(f"{folder}: of another network or optimizer than the config's ({other})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if like is None:
                like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), ocp.metadata(folder).metadata)
            else:
                like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            if marks is not None and (other := other_layout(layouts(like), marks)):
                raise ValueError(other)
            state = ocp.load(folder, like)
    except PermissionError as error:
        raise UsageError(f"{folder}: can't be read ({error.strerror})") from error
    except MemoryError:
        raise
    except Exception as error:  # Orbax, tensorstore and zstd each have their own for files that are not as they were.
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise _damaged(folder, error) from error
    if marks is not None:
        found = fingerprints(state)
        changed = [name for name, mark in marks.items() if found[name] != mark]
        if changed:
            more = f" and {len(changed) - 1} more arrays are" if len(changed) > 1 else " is"
            raise Damaged(f"{changed[0]}{more} not what was saved")
    return state, record


def reason(error: BaseException) -> str:
    """Why something could not be read or written, in a few words."""
    text, cause = f"{error}", error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
        if os.strerror(number) in text:  # C++ code has met it.
            return os.strerror(number)
    first = " ".join(text.split()) or type(error).__name__
    return first if len(first) <= 120 else first[:117] + "..."


@cache
def _hush() -> None:
    """Has Orbax's threads and event loops keep to themselves what we say in one line: each logs the same error."""

    def ours_to_say(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" in record.pathname + record.getMessage()

    def unraisable(told, hook=sys.unraisablehook) -> None:
        if str(told.exc_value) != "Event loop is closed":  # To tensorstore's late callbacks.
            hook(told)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not ours_to_say(record))
    sys.unraisablehook = unraisable


def _damaged(folder: epath.Path, error: Exception, file: str = "") -> Damaged:
    """What to say of an error: the file that it names below ``folder``, and the reason."""
    named = re.search(re.escape(str(folder)) + r"/([\w./-]*\w)", str(error))
    file = file or (named.group(1) if named else "")
    return Damaged(f"{file}: {reason(error)}" if file else reason(error))


def _checksum(parts: dict[str, Any]) -> int:
    return zlib.crc32(f"{parts['record']}\n{parts['fingerprints']}".encode())
