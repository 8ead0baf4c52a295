"""Data sets small enough to be held as arrays, by the name of their source."""

from collections.abc import Callable
import dataclasses
import os
import pathlib

import ml_collections
import numpy as np

from resnet_jax.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images: ``images`` uint8 [N, H, W, C], ``labels`` int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: np.ndarray) -> "Images":
        return Images(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test set with the names of their classes, in the order of the labels."""

    train: Images
    test: Images
    classes: tuple[str, ...]


def cache_folder(data: ml_collections.ConfigDict) -> pathlib.Path:
    """Where decoded and downloaded data is kept."""
    if data.cache_dir:
        return pathlib.Path(data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "resnet_jax"


def _digits(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import digits

    return digits.load()


def _cifar(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import cifar

    return cifar.load(data.name or "cifar10", data.dir, cache_folder(data))


def _image_folder(data: ml_collections.ConfigDict) -> Dataset:
    from resnet_jax.data import image_folder

    return image_folder.load(
        data.dir, labels=data.labels, size=data.image_size, workers=data.workers, cache=cache_folder(data)
    )


# A new source is a row here, and a function from config.data to a Dataset.
SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Dataset]] = {
    "digits": _digits,
    "cifar": _cifar,
    "image_folder": _image_folder,
}


def load_dataset(data: ml_collections.ConfigDict) -> Dataset:
    """Reads the data set that ``config.data`` describes.

    Raises:
      UsageError: unknown source, or data that is missing, broken or not what the config says.
    """
    if data.source not in SOURCES:
        raise UsageError(f"data.source={data.source} is unknown{did_you_mean(data.source, SOURCES)}")
    if data.labels and not pathlib.Path(data.labels).is_file():
        raise UsageError(f"data.labels={data.labels}: no such file")
    return SOURCES[data.source](data)
