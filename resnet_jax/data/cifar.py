"""CIFAR-10 and CIFAR-100 from their official binary archives (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import dataclasses
import gzip
import io
import pathlib
import tarfile
import zlib

import numpy as np

from resnet_jax.data.sources import Dataset, Images
from resnet_jax.download import download
from resnet_jax.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Archive:
    """One official archive: its address, published MD5, and the files in it."""

    url: str
    md5: str
    train: tuple[str, ...]
    test: str
    classes: str
    label_bytes: int  # The last of them is the label; CIFAR-100 has the coarse one first.


_HOME = "https://www.cs.toronto.edu/~kriz"
ARCHIVES = {
    "cifar10": Archive(
        f"{_HOME}/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Archive(
        f"{_HOME}/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        label_bytes=2,
    ),
}
_PIXELS = 3 * 32 * 32


def load(name: str, location: str, cache: pathlib.Path) -> Dataset:
    """Reads ``cifar10`` or ``cifar100``: uint8 [N, 32, 32, 3].

    Args:
      name: which of the two.
      location: the ``.tar.gz``, or a folder with the archive or its ``.bin`` files; empty downloads the archive.
      cache: folder for the download.

    Raises:
      UsageError: unknown name, nothing there, a damaged archive, files that are not whole records, unknown labels.
    """
    if name not in ARCHIVES:
        raise UsageError(f"data.name={name} is unknown to data.source=cifar{did_you_mean(name, ARCHIVES)}")
    archive = ARCHIVES[name]
    path = pathlib.Path(location).expanduser() if location else _download(archive, cache)
    files = _read_files(archive, path)
    classes = tuple(files[archive.classes].decode().split())
    train = [_decode(archive, files[file], f"{path}: {file}", len(classes)) for file in archive.train]
    train = Images(np.concatenate([part.images for part in train]), np.concatenate([part.labels for part in train]))
    return Dataset(train, _decode(archive, files[archive.test], f"{path}: {archive.test}", len(classes)), classes)


def _read_files(archive: Archive, path: pathlib.Path) -> dict[str, bytes]:
    """The archive's files by name, from the folder or .tar.gz at ``path``."""
    wanted = {*archive.train, archive.test, archive.classes}
    packed = path / archive.url.rsplit("/", 1)[-1]
    if path.is_dir() and packed.is_file():
        path = packed
    if path.is_dir():
        found = {file.name: file for file in sorted(path.rglob("*")) if file.name in wanted}
        files = {name: file.read_bytes() for name, file in found.items()}
    elif path.is_file():
        try:
            # Read to the end, so that the checksum there is looked at.
            content = path.read_bytes()
            if content[:2] == b"\x1f\x8b":
                content = gzip.decompress(content)
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                members = {pathlib.PurePath(member.name).name: member for member in tar if member.isfile()}
                files = {name: tar.extractfile(members[name]).read() for name in wanted & set(members)}
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UsageError(f"data.dir={path}: a damaged archive ({error})") from error
    else:
        raise UsageError(f"data.dir={path}: no such folder or archive")
    missing = sorted(wanted - set(files))
    if missing:
        name = archive.url.rsplit("/", 1)[-1]
        raise UsageError(f"data.dir={path}: {missing[0]} is missing; it should hold the files of {name}"
                         " (a folder of PNGs is data.source=image_folder)")  # fmt: skip
    return files


def _decode(archive: Archive, content: bytes, where: str, classes: int) -> Images:
    record = archive.label_bytes + _PIXELS
    if not content or len(content) % record:
        raise UsageError(f"{where}: {len(content)} bytes are not whole records of {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, archive.label_bytes - 1].astype(np.int32)
    if labels.max() >= classes:
        raise UsageError(f"{where}: label {labels.max()} where there are {classes} classes")
    # Stored channel by channel.
    planes = records[:, archive.label_bytes :].reshape(-1, 3, 32, 32)
    return Images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)


def _download(archive: Archive, cache: pathlib.Path) -> pathlib.Path:
    """Fetches the archive into ``cache`` once, and checks it."""
    target = cache / archive.url.rsplit("/", 1)[-1]
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"data.cache_dir={cache}: can't be written ({error.strerror}); set another") from error
    try:
        download(archive.url, target, "md5", archive.md5)
    except OSError as error:
        raise UsageError(f"data.dir is empty and {archive.url} could not be fetched ({error});"
                         " fetch it elsewhere and set --config.data.dir=ARCHIVE") from error  # fmt: skip
    return target
