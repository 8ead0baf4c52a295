"""ImageNet (ILSVRC 2012) as it is handed out: two tar files and a development kit; read without unpacking.

``ILSVRC2012_img_train.tar`` holds one tar file a class, ``ILSVRC2012_img_val.tar`` the validation images, whose labels
are in ``ILSVRC2012_devkit_t12.tar.gz`` or one of the lists that others made of it.
"""

from collections.abc import Iterable, Sequence
import csv
import io
import os
import pathlib
import re
import sys
import tarfile
import threading
import zlib

import numpy as np
import tqdm

from resnet_jax.data.sources import Dataset
from resnet_jax.errors import UsageError

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TRAIN, VALIDATION, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
# The same as one class (its WordNet id) a line, in the order of the images, and as Kaggle hands it out.
_SYNSETS = ("imagenet_2012_validation_synset_labels.txt", "ILSVRC2012_validation_synset_labels.txt")
_KAGGLE = "LOC_val_solution.csv"
# A tar file ends with two blocks of zeros, and more to fill a record up, bytes.
_LONGEST_END = 1024 + 10_240


class Members:
    """Images inside a tar file, read by their place in it: ``Examples``."""

    def __init__(self, path: pathlib.Path, members: Sequence[tuple[str, int, int, int]]):
        """Takes each member as (name, offset and length in bytes, label)."""
        self._file: int | None = None
        self._path = path
        self._names = [member[0] for member in members]
        self._places = np.array([member[1:3] for member in members], np.int64).reshape(-1, 2)
        self.labels = np.array([member[3] for member in members], np.int32)
        self._size = path.stat().st_size
        self._open = threading.Lock()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_open": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"_open": threading.Lock()})

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        with self._open:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY)
        offset, length = map(int, self._places[i])
        return os.pread(self._file, length, offset), int(self.labels[i])

    def __del__(self):
        if self._file is not None:
            os.close(self._file)

    def where(self, i: int) -> str:
        return f"{self._path}: {self._names[i]}"

    def fingerprint(self, stamps: bool) -> str:
        del stamps
        return f"{self._path} {self._size} {len(self)}"


def open_archives(folder: str) -> Dataset:
    """Lists the two tar files in ``folder``, which takes a minute or two for all of ImageNet; reads no image.

    Raises:
      UsageError: one of them or the labels are missing, or damaged.
    """
    if not folder:
        raise UsageError(f"data.source=ilsvrc needs data.dir, the folder with {TRAIN}, {VALIDATION} and {KIT}")
    root = pathlib.Path(folder).expanduser().resolve()
    for name in (TRAIN, VALIDATION):
        if not (root / name).is_file():
            raise UsageError(f"data.dir={folder}: no {name} in it")
    train, classes = [], []
    inner = _list_tar(root / TRAIN)
    for name, offset, length in tqdm.tqdm(inner, f"listing {TRAIN}", disable=not sys.stderr.isatty(), leave=False):
        classes.append(name.removesuffix(".tar"))
        train += [
            (f"{name}/{image}", *place, len(classes) - 1) for image, *place in _list_tar(root / TRAIN, offset, length)
        ]
    numbers = {wnid: i for i, wnid in enumerate(classes)}
    images = _list_tar(root / VALIDATION)
    labels = validation_labels((root,), [name for name, *_ in images])
    for (name, *_), wnid in zip(images, labels, strict=True):
        if wnid not in numbers:
            raise UsageError(f"{root / VALIDATION}: {name} is of class {wnid!r}, which {TRAIN} has not")
    test = [(*image, numbers[wnid]) for image, wnid in zip(images, labels, strict=True)]
    return Dataset(Members(root / TRAIN, train), Members(root / VALIDATION, test), tuple(classes))


class _Part(io.RawIOBase):
    """A part of a file as a file: a tar within a tar."""

    def __init__(self, file, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def _list_tar(path: pathlib.Path, start: int = 0, length: int | None = None) -> list[tuple[str, int, int]]:
    """(base name, offset in ``path``, length) of the files in a tar file or a part of one, sorted by name."""
    try:
        with path.open("rb") as file:
            whole = path.stat().st_size
            part = _Part(file, start, whole if length is None else length)
            with tarfile.open(fileobj=part, mode="r:") as tar:
                found = [
                    (os.path.basename(member.name), start + member.offset_data, member.size)
                    for member in tar
                    if member.isfile()
                ]
                # It takes whatever is no header for the end, which is a few blocks of zeros.
                part.seek(tar.offset)
                end = part.read(_LONGEST_END + 1)
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"{path}: a damaged archive ({error})") from error
    if not 512 <= len(end) <= _LONGEST_END or any(end) or any(place + size > whole for _, place, size in found):
        raise UsageError(f"{path}: cut short or damaged after {found[-1][0] if found else 'its beginning'}")
    if not found:
        raise UsageError(f"{path}: no files in it")
    return sorted(found)


def validation_labels(folders: Iterable[pathlib.Path], names: Sequence[str]) -> list[str]:
    """The class (WordNet id, as ``n01440764``) of validation images by their names.

    Args:
      folders: where the development kit is looked for, packed or not, or a list made of it: one class a line, or
        Kaggle's ``LOC_val_solution.csv``.
      names: as ``ILSVRC2012_val_00000001.JPEG``.

    Raises:
      UsageError: no labels found, or they don't cover the images.
    """
    places = [place for folder in folders for place in (folder, folder / "ILSVRC2012_devkit_t12/data", folder / "data")]
    by_number = _find_labels(places)
    if by_number is None:
        raise UsageError(f"{places[0]}: the validation images' labels are missing; put {KIT} there (or {_SYNSETS[0]},"
                         f" or {_KAGGLE})")  # fmt: skip
    labels = []
    for name in names:
        match = VALIDATION_NAME.fullmatch(name)
        number = int(match[1]) if match else 0
        if number not in by_number:
            raise UsageError(f"{places[0]}: the labels have none for {name}")
        labels.append(by_number[number])
    return labels


def _find_labels(places: Sequence[pathlib.Path]) -> dict[int, str] | None:
    """Image number (from 1) -> WordNet id, from the first of the known files there is."""
    readers = {_TRUTH: _read_unpacked_kit, KIT: _read_kit, **dict.fromkeys(_SYNSETS, _read_list), _KAGGLE: _read_kaggle}
    for place in places:
        for name, read in readers.items():
            if (place / name).is_file():
                try:
                    return read(place / name)
                except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
                    reason = " ".join(str(error).split())[:100]
                    raise UsageError(f"{place / name}: damaged, or not ILSVRC 2012's ({reason})") from error
    return None


def _read_list(path: pathlib.Path) -> dict[int, str]:
    return dict(enumerate(path.read_text().split(), start=1))


def _read_kaggle(path: pathlib.Path) -> dict[int, str]:
    with path.open(newline="") as file:
        rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    return {int(image.rsplit("_", 1)[-1]): wnid for image, wnid in rows.items()}


def _read_kit(path: pathlib.Path) -> dict[int, str]:
    with tarfile.open(path) as tar:
        members = {os.path.basename(member.name): member for member in tar if member.isfile()}
        return _join_kit(*(tar.extractfile(members[name]).read() for name in (_TRUTH, _META)))


def _read_unpacked_kit(path: pathlib.Path) -> dict[int, str]:
    return _join_kit(path.read_bytes(), path.with_name(_META).read_bytes())


def class_numbers(kit: pathlib.Path) -> dict[str, int]:
    """The challenge's number (1 to 1000) of each class, by WordNet id, which its test server wants.

    Args:
      kit: the development kit, packed or a folder with it or its data.

    Raises:
      UsageError: it is not there, or damaged.
    """
    try:
        if kit.is_file():
            with tarfile.open(kit) as tar:
                members = [member for member in tar if os.path.basename(member.name) == _META]
                meta = tar.extractfile(members[0]).read()
        else:
            meta = next(kit.rglob(_META)).read_bytes()
        return {wnid: number for number, wnid in _wordnet_ids(meta).items() if number <= 1000}
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise UsageError(f"{kit}: no development kit of ILSVRC 2012 ({KIT}), or damaged") from error


def _join_kit(truth: bytes, meta: bytes) -> dict[int, str]:
    """The classes of the images, from their numbers in the kit and its table of those numbers."""
    wnids = _wordnet_ids(meta)
    return {number: wnids[int(line)] for number, line in enumerate(truth.decode().split(), start=1)}


def _wordnet_ids(meta: bytes) -> dict[int, str]:
    """The kit's table: its number of a class -> WordNet id."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    except (MatReadError, NotImplementedError, zlib.error) as error:  # The second is scipy's word for newer formats.
        raise ValueError(f"{_META}: {error}") from error
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
