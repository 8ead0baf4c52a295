"""Data sets by the name of their source, and the one interface to examples that lie encoded in files."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
from typing import Protocol, runtime_checkable

import ml_collections
import numpy as np

from resnet_jax import download
from resnet_jax.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images in memory: ``images`` uint8 [N, H, W, C], ``labels`` int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "Images":
        """The examples of ``index``."""
        return Images(self.images[index], self.labels[index])


@runtime_checkable
class Examples(Protocol):
    """Labelled images in files, read one at a time, by threads and processes alike (it is pickled for the latter)."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        """The ``i``-th image as it is encoded, and its label; an OSError where it can't be read."""

    def where(self, i: int) -> str:
        """What a person calls the ``i``-th example: its file, or its place in one."""

    def fingerprint(self, stamps: bool) -> str:
        """A string that differs for other data, by sizes and times of some files; ``stamps`` looks at all of them."""


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of another source's examples."""

    examples: Examples
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        return self.examples[int(self.index[i])]

    def where(self, i: int) -> str:
        return self.examples.where(int(self.index[i]))

    def fingerprint(self, stamps: bool) -> str:
        return f"{self.examples.fingerprint(stamps)}-{len(self)}"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is subtracted from images and what they are divided by, on the scale where white is 1.

    Attributes:
      image: mean image, float32 [H, W, 3], over centre crops.
      mean, std: of each channel over all pixels of those crops, float32 [3].
      view: which crops, where that is known.
    """

    image: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    view: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test set with the names of their classes, in the order of the labels.

    Attributes:
      train, test: both ``Images`` or both ``Examples``.
      classes: names.
      statistics: the training set's, where the source knows them.
    """

    train: Images | Examples
    test: Images | Examples
    classes: tuple[str, ...]
    statistics: Statistics | None = None


def subset(part: Images | Examples, index: np.ndarray) -> Images | Examples:
    """The examples of ``index``."""
    return part.subset(index) if isinstance(part, Images) else Subset(part, index)


def cache_folder(data: ml_collections.ConfigDict) -> pathlib.Path:
    """Where decoded and downloaded data is kept."""
    return pathlib.Path(data.cache_dir).expanduser() if data.cache_dir else download.cache_folder()


def worker_count(workers: int) -> int:
    """How many workers ``data.workers`` means: -1 is one for each core that this process may use."""
    if workers >= 0:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _digits(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import digits

    return digits.load()


def _cifar(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import cifar

    return cifar.load(data.name or "cifar10", data.dir, cache_folder(data))


def _image_folder(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import image_folder

    return image_folder.open_folder(data.dir, data.labels)


def _tfds(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import tfds

    return tfds.open_builder(data.name, data.dir, data.train_split, data.test_split)


def _array_record(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import array_record

    return array_record.open_prepared(data.dir)


def _ilsvrc(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import ilsvrc

    return ilsvrc.open_archives(data.dir)


# A new source is a row here, and a function from config.data to a Dataset.
SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Dataset]] = {
    "digits": _digits,
    "cifar": _cifar,
    "image_folder": _image_folder,
    "tfds": _tfds,
    "array_record": _array_record,
    "ilsvrc": _ilsvrc,
}


def open_dataset(data: ml_collections.ConfigDict) -> Dataset:
    """Finds the data set that ``config.data`` describes; what lies encoded in files stays there.

    Raises:
      UsageError: unknown source, or data that is missing, broken or not what the config says.
    """
    if data.source not in SOURCES:
        raise UsageError(f"data.source={data.source} is unknown{did_you_mean(data.source, SOURCES)}")
    if data.labels and not pathlib.Path(data.labels).is_file():
        raise UsageError(f"data.labels={data.labels}: no such file")
    return SOURCES[data.source](data)


def load_dataset(data: ml_collections.ConfigDict) -> Dataset:
    """The same with all images in memory.

    Raises:
      UsageError: as ``open_dataset``, and where they don't fit or have different sizes.
    """
    dataset = open_dataset(data)
    if isinstance(dataset.train, Images):
        return dataset
    from resnet_jax.data.resident import read_dataset

    if data.on_error == "skip":
        raise UsageError("data.on_error=skip goes with data.placement=stream")
    from resnet_jax.data.crops import Whole

    whole = Whole(data.image_size, data.interpolation) if data.image_size else None
    return read_dataset(dataset, whole, worker_count(data.workers), cache_folder(data))
