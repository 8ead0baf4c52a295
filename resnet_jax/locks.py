"""One process at a time in a folder."""

from collections.abc import Iterator
import contextlib
import fcntl
import pathlib

from absl import logging

from resnet_jax.errors import UsageError


@contextlib.contextmanager
def lock(file: pathlib.Path, otherwise: str) -> Iterator[None]:
    """Holds a lock, which is let go of when the process ends, however it ends.

    Args:
      file: what is locked; made where it is not there.
      otherwise: what to say where another process holds it.

    Raises:
      UsageError: another process does.
    """
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(otherwise) from error
        except OSError as error:
            logging.warning("%s: this file system has no locks (%s); start nothing else there", file, error.strerror)
        yield
