"""One process at a time in a folder."""

from collections.abc import Iterator
import contextlib
import fcntl

from absl import logging

from resnet_jax.buckets import Folder, in_bucket
from resnet_jax.errors import UsageError


@contextlib.contextmanager
def lock(file: Folder, otherwise: str) -> Iterator[None]:
    """Holds a lock, which is let go of when the process ends, however it ends.

    Args:
      file: what is locked; made where it is not there. Buckets have no locks: there it is left to the user.
      otherwise: what to say where another process holds it.

    Raises:
      UsageError: another process does.
    """
    if in_bucket(file):
        yield
        return
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(otherwise) from error
        except OSError as error:
            logging.warning("%s: this file system has no locks (%s); start nothing else there", file, error.strerror)
        yield
