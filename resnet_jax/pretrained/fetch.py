"""Weights by name: of the Hugging Face hub, or an address with its checksum; fetched once and kept."""

import pathlib
import re
import urllib.parse

from resnet_jax.buckets import Folder, in_bucket, open_folder
from resnet_jax.download import cache_folder, download
from resnet_jax.errors import UsageError

_HUB = "hf:"


def is_remote(source: str) -> bool:
    """Whether weights are named that are not on this machine."""
    return source.startswith((_HUB, "https://", "http://")) or in_bucket(source)


def fetch(source: str) -> Folder:
    """The file on this machine that a name stands for.

    Args:
      source: ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION`` of the Hugging Face hub, ``https://...#sha256=DIGITS``,
        or a path, also of a bucket, which is given back.

    Raises:
      UsageError: it can't be fetched, or is not what was asked for.
    """
    if source.startswith(_HUB):
        return _from_hub(source)
    if in_bucket(source):
        return open_folder("weights", source)
    return _from_url(source) if is_remote(source) else pathlib.Path(source).expanduser()


def _from_url(source: str) -> pathlib.Path:
    url, _, fragment = source.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        raise UsageError(f"{source}: an address needs its file's checksum: {url}#sha256=<64 hexadecimal digits>")
    try:
        name = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name or "weights"
        target = cache_folder() / "weights" / match[1].lower() / name
        download(url, target, "sha256", match[1])
    except (OSError, ValueError) as error:  # A malformed address is a ValueError.
        raise UsageError(f"{url}: could not be fetched ({error}); fetch it elsewhere and name the file") from error
    return target


def _from_hub(source: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(f"{source}: names of the hub need huggingface_hub: pip install 'resnet_jax[hub]'") from error
    huggingface_hub.logging.set_verbosity_error()  # Its retries are not a user's business; what comes of them is.
    name, _, revision = source.removeprefix(_HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"{source}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    weights = _hub_file(source, name, "model.safetensors", revision or None)
    if weights is None:
        raise UsageError(f"{source}: has no model.safetensors")
    # Of the same commit, which the cache's folder is named after; it goes beside the weights, where there is one.
    _hub_file(source, name, "config.json", weights.parent.name)
    return weights


def _hub_file(source: str, name: str, file: str, revision: str | None) -> pathlib.Path | None:
    """One file of a repository, or None where the repository has none of this name."""
    import huggingface_hub
    from huggingface_hub import errors

    where = {"repo_id": name, "filename": file, "revision": revision}
    try:
        # What is known to be missing would be asked for again and again without a network.
        if huggingface_hub.try_to_load_from_cache(**where) is huggingface_hub._CACHED_NO_EXIST:
            return None
        return pathlib.Path(huggingface_hub.hf_hub_download(**where))
    except errors.LocalEntryNotFoundError as error:  # Not fetched before.
        cause = error.__cause__ or "no network"
        raise UsageError(
            f"{source}: the hub can't be reached ({_first_line(cause)}), and {file} was not fetched before;"
            " fetch it elsewhere and name the file"
        ) from error
    except errors.RemoteEntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UsageError(f"{source}: no such repository or revision on the hub, or no right to see it") from error
    except Exception as error:  # Of the hub's library and of those under it, which change.
        raise UsageError(f"{source}: the hub does not give it ({_first_line(error)})") from error


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
