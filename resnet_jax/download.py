"""Files from elsewhere, whole and checked, fetched once."""

import hashlib
import http.client
import os
import pathlib
import shutil
import urllib.request

from tqdm import tqdm

from resnet_jax.errors import UsageError


def cache_folder() -> pathlib.Path:
    """Where downloaded things are kept unless somewhere else is said."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "resnet_jax"


def download(url: str, target: pathlib.Path, algorithm: str, expected: str) -> None:
    """Fetches a file unless it is there; a file at ``target`` is a whole one that had the checksum.

    Args:
      url: where it is.
      target: where it goes; its folder is made.
      algorithm: of the checksum, as ``sha256``.
      expected: the checksum in hexadecimal digits.

    Raises:
      UsageError: it has another checksum.
      OSError: it could not be fetched or written.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url} to {target}", flush=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=30) as response, partial.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            # A bar on a terminal only.
            with tqdm.wrapattr(response, "read", total=size, disable=None, leave=False) as source:
                shutil.copyfileobj(source, file, 1 << 20)
        if size and partial.stat().st_size != size:
            raise OSError(f"{partial.stat().st_size} bytes of {size} came")
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != expected.lower():
            raise UsageError(f"{url}: {algorithm.upper()} {found} is not the expected {expected}")
        os.replace(partial, target)
    except http.client.HTTPException as error:
        raise OSError(f"a broken answer: {error!r}") from error
    finally:
        partial.unlink(missing_ok=True)
