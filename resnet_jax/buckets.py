"""Folders in buckets, gs://BUCKET/PATH, through etils.epath and gcsfs; and what they can't do, made up for.

Objects are written whole or not at all. They can't be appended to, nor a folder of them be renamed or locked: that two
runs don't write to the same one is left to the user.
"""

import importlib.util
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading

from etils import epath

from resnet_jax.errors import UsageError

Folder = pathlib.Path | epath.Path  # On this machine, or in a bucket.
_NAME = r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?"


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is one of a bucket, and not of this machine."""
    return os.fspath(path).startswith("gs://")


def open_folder(flag: str, value: str) -> epath.Path:
    """The folder that a flag (or whatever is named ``flag`` in messages) stands for; nothing is looked at yet.

    Raises:
      UsageError: it is neither of this machine nor gs://BUCKET/PATH, or gcsfs is missing.
    """
    if not in_bucket(value):
        if "://" in value:
            raise UsageError(f"{flag}={value}: only local folders and gs://BUCKET/PATH can be read and written")
        return epath.Path(value).expanduser()
    path = epath.Path(value)
    if not re.fullmatch(_NAME, value) or len(path.parts) < 4 or ".." in path.parts:  # "/", "gs", the bucket, a folder.
        raise UsageError(f"{flag}={value}: expected gs://BUCKET/PATH with a bucket's name and a folder's")
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError(f"{flag}={value}: gs:// needs gcsfs: pip install 'resnet_jax[gcs]'")
    _set_up()
    return path


def _set_up() -> None:
    """Settings of the libraries, before their first use; what is set in the environment stays."""
    import fsspec.config

    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow's own way, where it is installed, fails otherwise.
    # Asks for each bucket's kind first, through gRPC and with its own credentials; plain HTTP does for all kinds.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Others (tensorstore, processes of the same run) write too: what was listed once need not be so any more.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # Tracebacks; we say what comes of it.


def absolute(path: Folder) -> Folder:
    """The path, whatever the current folder; ``epath``'s own takes gs:// for a folder's name."""
    return path if in_bucket(path) else path.absolute()


def exists(path: Folder) -> bool:
    """Whether there is a file or folder.

    Raises:
      UsageError: the bucket can't be asked.
    """
    if not in_bucket(path):
        return path.exists()
    try:
        return path.exists()
    except Exception as error:  # gcsfs, aiohttp and google.auth each have their own.
        raise UsageError(f"{path}: can't be read ({reason(error)})") from error


def is_folder(path: Folder) -> bool:
    """Whether there is a folder.

    Raises:
      UsageError: the bucket can't be asked.
    """
    return exists(path) and path.is_dir()  # By itself gcsfs's answer is no where it can't ask.


def check_writable(flag: str, folder: epath.Path, name: str = ".writable") -> None:
    """Writes and removes an object ``name`` in a folder of a bucket: less would not tell whether that is allowed.

    Raises:
      UsageError: it can't be done.
    """
    try:
        (folder / name).write_bytes(b"")
        (folder / name).unlink()
    except Exception as error:
        raise UsageError(f"{flag}={folder}: can't be written ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """Why a bucket could not be read or written, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such bucket or object"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    last = last if len(last) <= 200 else last[:197] + "..."
    if getattr(error, "code", None) == 401 or type(error).__name__ in ("DefaultCredentialsError", "RefreshError"):
        return f"no valid credentials: {last}; gcloud auth application-default login makes some"
    if str(error).startswith("Forbidden"):
        return f"no permission: {last}"
    return last


def move(folder: Folder, target: Folder) -> None:
    """Renames a folder; in a bucket by copying its objects, which stay in both places should that be broken off."""
    if not in_bucket(folder):
        folder.rename(target)
        return
    for file in files_below(folder):
        file.copy(target / file.relative_to(folder))
    folder.rmtree()


def files_below(folder: epath.Path) -> list[epath.Path]:
    """All files in a folder and its folders."""
    found = []
    for path, _, names in folder.walk():
        # Of a bucket's folders epath gives the names without gs://.
        path = epath.Path(f"gs://{path}") if in_bucket(folder) and not in_bucket(path) else path
        found += [path / name for name in names if name]
    return sorted(found)


class GrowingFiles:
    """A local folder of files that grow, of which a folder of a bucket gets whole copies now and then.

    A thread of its own copies those that have grown, every ``seconds`` and when ``flush`` asks for it.
    """

    def __init__(self, target: epath.Path, seconds: float = 30):
        """Makes a temporary folder, ``folder``, whose files go to ``target``."""
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="resnet_jax-"))
        self._target, self._seconds = target, seconds
        self._sizes: dict[str, int] = {}  # Of the copies.
        self._told, self._closed, self._wake = False, False, threading.Event()
        self._thread = threading.Thread(target=self._copy_often, name="copies", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Has what is there copied soon; does not wait."""
        self._wake.set()

    def close(self) -> None:
        """Copies what has grown, and removes the temporary folder; it stays, and that is said, where that fails."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        if self._copy():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            print(f"warning: what is missing in {self._target} is in {self.folder}", file=sys.stderr, flush=True)

    def _copy_often(self) -> None:
        while not self._closed:
            self._wake.wait(self._seconds)
            self._wake.clear()
            if not self._closed:
                self._copy()

    def _copy(self) -> bool:
        try:
            for file in sorted(self.folder.iterdir()):
                if file.stat().st_size != self._sizes.get(file.name):
                    content = file.read_bytes()
                    (self._target / file.name).write_bytes(content)
                    self._sizes[file.name] = len(content)
        except Exception as error:  # Whatever it is, training need not end by it.
            if not self._told:
                print(f"warning: {self._target}: can't be written ({reason(error)}); training goes on, and what is"
                      " missing there is written once that is possible", file=sys.stderr, flush=True)  # fmt: skip
            self._told = True
            return False
        self._told = False
        return True
