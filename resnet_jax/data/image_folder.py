"""A folder of images, ``train/<class>/**`` and ``test/<class>/**`` (or ``val``), as torchvision's ImageFolder has it.

ImageNet's validation set may also lie flat in ``val``, as its archive unpacks, with its labels beside it
(``ilsvrc.py``).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import hashlib
import os
import pathlib

import numpy as np

from resnet_jax.data import ilsvrc
from resnet_jax.data.decode import EXTENSIONS
from resnet_jax.data.sources import Dataset
from resnet_jax.errors import UsageError

_SAMPLE = 256  # Files whose size and time stand for those of all.


class Files:
    """Image files with their labels: ``Examples``. Millions of names are kept as one string of bytes."""

    def __init__(self, root: pathlib.Path, names: list[bytes], labels: list[int]):
        """Takes the files' paths below ``root``."""
        self._root = os.fsencode(root)
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> bytes:
        """The ``i``-th file."""
        return os.path.join(self._root, self._names[self._ends[i] : self._ends[i + 1]])

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        with open(self.path(i), "rb", buffering=0) as file:
            return file.read(), int(self.labels[i])

    def where(self, i: int) -> str:
        return os.fsdecode(self.path(i))

    def fingerprint(self, stamps: bool) -> str:
        digest = hashlib.sha256(self._root + self._names + self._ends.tobytes() + self.labels.tobytes())
        for i in range(0, len(self), 1 if stamps else max(1, len(self) // _SAMPLE)):
            try:
                status = os.stat(self.path(i))
                digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns))
            except OSError as error:
                if stamps:
                    raise UsageError(f"{self.where(i)}: not readable ({error.strerror})") from error
        return digest.hexdigest()


def open_folder(folder: str, labels: str) -> Dataset:
    """Lists the folder; reads no image.

    Args:
      folder: holds ``train`` and ``test`` or ``val``, each with one folder per class; images may lie deeper in those.
      labels: text file with one class a line, in the order of their numbers; empty: all classes, sorted.

    Raises:
      UsageError: a folder or class that is missing or empty.
    """
    if not folder:
        raise UsageError("data.source=image_folder needs data.dir, a folder with train/<class>/* and val/<class>/* (or"
                         " test/<class>/*)")  # fmt: skip
    root = pathlib.Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UsageError(f"data.dir={folder}: no such folder")
    # Of ImageNet's test set there are images but no labels, and so no class folders.
    labelled = (root / "test").is_dir() and (not (root / "val").is_dir() or _subfolders(root / "test"))
    test_name = "test" if labelled else "val"
    for part in ("train", test_name):
        if not (root / part).is_dir():
            wanted = "train" if part == "train" else "test or val"
            raise UsageError(f"data.dir={folder}: no folder {wanted} in it (expected {wanted}/<class>/*)")
    classes = _classes(root / "train", labels)
    train = _list(root / "train", classes)
    flat = _flat_validation(root, root / test_name, classes)
    if flat and set(classes) & set(_subfolders(root / test_name)):
        raise UsageError(
            f"{root / test_name}: images both in it ({flat.where(0)}) and in class folders; which are meant?"
        )
    return Dataset(train, flat or _list(root / test_name, _known(root / test_name, root / "train", classes)), classes)


def _classes(folder: pathlib.Path, labels: str) -> tuple[str, ...]:
    found = _subfolders(folder)
    if not found:
        raise UsageError(f"{folder}: no class folders in it (expected {folder.name}/<class>/*)")
    if not labels:
        return found
    named = read_class_names(labels)
    for name in named:
        if name not in found:
            raise UsageError(f"data.labels={labels}: class {name!r} has no folder in {folder}")
    return named


def read_class_names(labels: str) -> tuple[str, ...]:
    """The classes that the file ``data.labels`` lists, one a line.

    Raises:
      UsageError: it can't be read, is empty, or lists one twice.
    """
    try:
        lines = pathlib.Path(labels).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.labels={labels}: not a readable text file ({error})") from error
    named = tuple(line.strip() for line in lines if line.strip())
    if not named:
        raise UsageError(f"data.labels={labels}: no class in it (expected one a line)")
    for i, name in enumerate(named):
        if name in named[:i]:
            raise UsageError(f"data.labels={labels}: class {name!r} is listed twice")
    return named


def _subfolders(folder: pathlib.Path) -> tuple[str, ...]:
    return tuple(
        sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    )


def _known(folder: pathlib.Path, train: pathlib.Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """``classes``, once every folder of the test set is known to be a class of the training set."""
    found = _subfolders(folder)
    if not found:
        raise UsageError(f"{folder}: no class folders in it (expected {folder.name}/<class>/*, or ImageNet's own"
                         " ILSVRC2012_val_00000001.JPEG, ...)")  # fmt: skip
    for name in found:
        if not (train / name).is_dir():
            raise UsageError(f"{folder / name}: {name!r} is no class of the training set")
    for name in classes:
        if name not in found:
            raise UsageError(f"{folder / name}: no such folder, though {name!r} is a class of the training set")
    return classes


def _list(folder: pathlib.Path, classes: tuple[str, ...]) -> Files:
    """The image files of every class, sorted; classes are listed in parallel, which network file systems reward."""

    def one(name: str) -> list[bytes]:
        names = sorted(_walk(os.fsencode(folder / name), os.fsencode(name)))
        if not names:
            raise UsageError(f"{folder / name}: no images in it ({', '.join(EXTENSIONS)})")
        return names

    with ThreadPoolExecutor(16) as pool:
        listed = list(pool.map(one, classes))
    labels = [label for label, names in enumerate(listed) for _ in names]
    return Files(folder, [name for names in listed for name in names], labels)


def _walk(folder: bytes, below: bytes) -> Iterator[bytes]:
    """Paths of the image files in a folder and its subfolders, ``below`` before them."""
    extensions = tuple(extension.encode() for extension in EXTENSIONS)
    try:
        entries = list(os.scandir(folder))
    except OSError as error:  # Links that go round in circles too.
        raise UsageError(f"{os.fsdecode(folder)}: not readable ({error.strerror})") from error
    for entry in entries:
        if entry.name.startswith(b"."):
            continue
        path = os.path.join(below, entry.name)
        if entry.is_dir():
            yield from _walk(entry.path, path)
        elif entry.name.lower().endswith(extensions):
            yield path


def _flat_validation(root: pathlib.Path, folder: pathlib.Path, classes: tuple[str, ...]) -> Files | None:
    """ImageNet's validation images where they lie in ``folder`` itself; None where there are none."""
    names = sorted(
        entry.name for entry in os.scandir(folder) if ilsvrc.VALIDATION_NAME.fullmatch(entry.name) and entry.is_file()
    )
    if not names:
        return None
    # Kaggle's table of them lies three folders above its Data/CLS-LOC.
    labels = ilsvrc.validation_labels((root, folder, *root.parents[:3]), names)
    number = {name: i for i, name in enumerate(classes)}
    for name, wnid in zip(names, labels, strict=True):
        if wnid not in number:
            raise UsageError(f"{folder / name}: {wnid!r} is no class of the training set")
    return Files(folder, [os.fsencode(name) for name in names], [number[wnid] for wnid in labels])
