"""Where a task's batches come from: arrays that lie on the devices, or files that are read as training goes."""

from collections.abc import Callable, Iterator
import hashlib
from typing import Protocol

import jax
import ml_collections
import numpy as np

from resnet_jax import distributed
from resnet_jax.data.augment import pixel_statistics
from resnet_jax.data.cache import Budget, CachedViews
from resnet_jax.data.crops import CenterCrop, Crop, InceptionCrop, ScaleCrop, Views, Whole
from resnet_jax.data.order import Order, holdout_split
from resnet_jax.data.shapes import image_shapes
from resnet_jax.data.sources import (
    Dataset,
    Examples,
    Images,
    Statistics,
    cache_folder,
    load_dataset,
    open_dataset,
    subset,
    worker_count,
)
from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD, training_statistics
from resnet_jax.data.stream import Batches, EvaluationPlan, Reader, Rows, TrainingPlan
from resnet_jax.errors import UsageError

Batch = dict[str, np.ndarray]
_LARGEST = 10_000  # Shorter side that images are resized to at most, pixels.


class Feed(Protocol):
    """One split of a data set as batches.

    Attributes:
      examples: how many it has.
      image_shape: (H, W, C) of what the network sees.
      resident: arrays on the devices that every step reads: ``mean`` and ``std``, and the split's ``images`` and
        ``labels`` where they lie there.
      inputs: what of an evaluation batch goes to the devices.
      broken: what could not be read so far: where -> why.
    """

    examples: int
    image_shape: tuple[int, int, int]
    resident: dict[str, jax.Array]
    inputs: tuple[str, ...]
    broken: dict[str, str]

    def identity(self) -> str:
        """Tells test sets apart: strings that begin alike, before the colon, and end otherwise are of two."""

    def training(self, seed: int, batch: int, first: int, end: int) -> Iterator[Batch]:
        """This process's part of the batches ``first`` to ``end`` - 1: ``index`` and ``epoch``, int32 [n], and
        ``images``, uint8 [n, H, W, C], and ``labels`` where they are not resident.
        """  # fmt: skip

    def evaluation(self, batch: int, index: np.ndarray | None = None) -> Iterator[Batch]:
        """This process's part of batches with every example (of ``index``, int32 [n], where given) once: the same, and
        ``valid``, bool [n], which is False for what fills the last batch up and for what can't be read.
        """  # fmt: skip


class ResidentFeed:
    """A split whose images lie on the devices."""

    inputs = ("index",)

    def __init__(self, images: Images, statistics: dict[str, np.ndarray], mesh: jax.sharding.Mesh):
        self.examples, self.image_shape = len(images), images.images.shape[1:]
        arrays = {"images": images.images, "labels": images.labels} | statistics
        self.resident = distributed.replicate(mesh, arrays)
        self.broken: dict[str, str] = {}
        self._images, self._labels = images.images, images.labels

    def identity(self) -> str:
        return f"pixels {self.image_shape}:{hashlib.sha256(np.ascontiguousarray(self._images)).hexdigest()}"

    def training(self, seed: int, batch: int, first: int, end: int) -> Iterator[Batch]:
        order, own = Order(seed, self.examples), distributed.own_rows(batch)
        for step in range(first, end):
            yield {name: values[own] for name, values in order.batch(step, batch).items()}

    def evaluation(self, batch: int, index: np.ndarray | None = None) -> Iterator[Batch]:
        wanted = np.arange(self.examples, dtype=np.int32) if index is None else index
        own = distributed.own_rows(batch)
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            valid = np.arange(batch)[own] < len(part)
            part = np.pad(part, (0, batch - len(part)), mode="edge")[own]
            yield {"index": part, "labels": self._labels[part], "valid": valid}


class StreamFeed:
    """A split that is read from its files."""

    inputs = ("images", "labels")

    def __init__(self, views: Views, evaluated: Crop, resident: dict[str, jax.Array], data: ml_collections.ConfigDict):
        """Takes what training (or, of a test split, evaluation) sees of the examples, and what evaluation sees."""
        self.examples = len(views.examples)
        self.image_shape = views.crop.shape
        self.resident = resident
        self.broken: dict[str, str] = {}
        self._views, self._evaluated, self._data = views, evaluated, data

    def _reader(self, views: Views, plan: TrainingPlan | EvaluationPlan, seed: int, broken: str) -> Reader:
        return Reader(views, plan, seed, "raise" if self._data.on_error == "raise" else broken)

    def _batches(self, reader: Reader, first: int, end: int, *fields: str) -> Batches:
        workers, processes = worker_count(self._data.workers), self._data.worker_type == "process"
        return Batches(reader, first, end, workers, processes, self.broken, fields)

    def training(self, seed: int, batch: int, first: int, end: int) -> Iterator[Batch]:
        rows = Rows(batch, jax.process_index(), jax.process_count())
        reader = self._reader(self._views, TrainingPlan(Order(seed, self.examples), rows), seed, "replace")
        return self._batches(reader, first, end, "images", "labels", "index", "epoch")

    def evaluation(self, batch: int, index: np.ndarray | None = None, crop: Crop | None = None) -> Iterator[Batch]:
        """See ``Feed``; of another ``crop`` than evaluation's where given."""
        crop = crop or self._evaluated
        views = self._views if crop == self._views.crop else Views(self._views.examples, crop)
        index = np.arange(self.examples, dtype=np.int32) if index is None else index
        rows = Rows(batch, jax.process_index(), jax.process_count())
        reader = self._reader(views, EvaluationPlan(index, rows), 0, "mask")
        return self._batches(reader, 0, -(-len(index) // batch), "images", "labels", "index", "valid")

    def identity(self) -> str:
        names = (self.where(i).replace("\\", "/").split("/")[-2:] for i in range(self.examples))
        return f"files:{hashlib.sha256(repr(list(names)).encode()).hexdigest()}"

    def where(self, i: int) -> str:
        """The file of an example."""
        return self._views.examples.where(int(i))

    def shapes(self) -> np.ndarray:
        """(height, width) of every example in its own pixels, int32 [N, 2]; zeros where it can't be read.

        Raises:
          UsageError: one can't be read, and ``data.on_error`` is ``raise``.
        """
        broken = None if self._data.on_error == "raise" else self.broken
        return image_shapes(self._views.examples, worker_count(self._data.workers), broken)


def streams(data: ml_collections.ConfigDict) -> bool:
    """Whether images are read as training goes, by the config's section ``data``, instead of lying on the devices."""
    return data.placement == "stream" or (data.placement == "auto" and data.crop != "whole")


def make_feeds(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    dtype: np.dtype,
    given: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> tuple[dict[str, Feed], tuple[str, ...]]:
    """The feeds of ``train``, ``test`` and, where asked for, ``holdout``, and the names of the classes.

    Args:
      config: the whole config.
      mesh: the devices.
      dtype: of the mean and deviation.
      given: mean ([C] or [H, W, C]) and deviation [C] to use instead of what the config says, where not None.

    Returns:
      ``({split: Feed}, classes)``.

    Raises:
      UsageError: data that is missing, broken or not what the config says.
    """
    data = config.data
    stream = streams(data)
    if not stream and data.crop != "whole":
        raise UsageError(f"data.crop={data.crop} goes with data.placement=stream")
    if not stream:
        dataset = load_dataset(data)
        splits = _split(dataset, data.holdout)
        _check_memory(splits)
        train = splits["train"].images
        if train.shape[-1] != 3 and (data.color_noise or "imagenet" in (data.mean, data.std)):
            raise UsageError("data.color_noise and data.mean=imagenet are for RGB images; these have"
                             f" {train.shape[-1]} channel")  # fmt: skip
        own = lambda: _statistics(data, pixel_statistics(train, data.mean, data.std), train.shape[1:])
        statistics = _arrays(_first_known(given, own), dtype)
        return {name: ResidentFeed(part, statistics, mesh) for name, part in splits.items()}, dataset.classes
    if not data.image_size:
        raise UsageError("data.image_size must be set where images are read as training goes")
    dataset = open_dataset(data)
    if isinstance(dataset.train, Images):
        raise UsageError(f"data.source={data.source} lies in memory; it goes with data.crop=whole and"
                         " data.placement=device")  # fmt: skip
    train_crop, eval_crop = _crops(config)
    splits = _split(dataset, data.holdout)

    def own_statistics() -> tuple[np.ndarray, np.ndarray]:
        known = None if data.holdout else dataset.statistics  # Held-out images are no part of what is learnt.
        found = _stream_statistics(data, splits["train"], eval_crop, known)
        return _statistics(data, found, (data.image_size, data.image_size, 3))

    resident = distributed.replicate(mesh, _arrays(_first_known(given, own_statistics), dtype))
    crops = {name: train_crop if name == "train" else eval_crop for name in splits}
    views = _views(data, splits, crops)
    return {name: StreamFeed(views[name], eval_crop, resident, data) for name in splits}, dataset.classes


def _split(dataset: Dataset, held_out: int) -> dict[str, Images | Examples]:
    train, test = dataset.train, dataset.test
    if not held_out:
        return {"train": train, "test": test}
    if held_out >= len(train):
        raise UsageError(f"data.holdout={held_out} leaves nothing of {len(train)} training images")
    kept, validation = holdout_split(len(train), held_out)
    return {"train": subset(train, kept), "holdout": subset(train, validation), "test": test}


def _check_memory(splits: dict[str, Images]) -> None:
    needed = sum(part.images.nbytes for part in splits.values())
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # CPUs don't say.
    if memory and needed > 0.8 * memory:
        raise UsageError(
            f"the images take {needed / 2**30:.1f} GiB, and a device has {memory / 2**30:.1f} GiB of memory;"
            " a smaller data.image_size takes less, and data.placement=stream none of it"
        )


def _crops(config: ml_collections.ConfigDict) -> tuple[Crop, Crop]:
    """What training sees of an image, and what evaluation sees."""
    data, size = config.data, config.data.image_size
    if data.crop == "whole":
        return Whole(size, data.interpolation), Whole(size, config.eval.interpolation)
    if config.eval.resize < size:
        raise UsageError(f"eval.resize={config.eval.resize} is less than data.image_size={size}")
    center = CenterCrop(size, config.eval.resize, config.eval.interpolation)
    if data.crop == "inception":
        return InceptionCrop(size, data.smallest_area, (3 / 4, 4 / 3), data.interpolation, data.reduced_dct), center
    if len(data.scales) != 2 or not size <= data.scales[0] <= data.scales[1] <= _LARGEST:
        raise UsageError(
            f"data.scales={tuple(data.scales)}: expected the least and the largest shorter side, from"
            f" data.image_size={size} to {_LARGEST}"
        )
    return ScaleCrop(size, *data.scales, data.interpolation, data.reduced_dct), center


def _views(data: ml_collections.ConfigDict, splits: dict[str, Examples], crops: dict[str, Crop]) -> dict[str, Views]:
    if data.cache == "none":
        return {name: Views(part, crops[name]) for name, part in splits.items()}
    if data.worker_type == "process":
        raise UsageError("data.cache=memory goes with data.worker_type=thread, which share one memory")
    budget = Budget(data.cache_gb)
    views = {}
    for name, part in splits.items():
        views[name] = CachedViews(part, crops[name], budget)
        print(f"keeping {name} images in memory: {views[name].description}", flush=True)
    return views


def _stream_statistics(
    data: ml_collections.ConfigDict, train: Examples, view: CenterCrop | Whole, known: Statistics | None
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) as ``data.mean`` and ``data.std`` ask; both are of what evaluation would see."""
    wants_mean = data.mean in ("pixel", "channel") and not data.mean_image
    if wants_mean or data.std == "channel":
        fits = known is not None and known.view == repr(view)
        found = known if fits else training_statistics(
            train, view, worker_count(data.workers), cache_folder(data), skip_broken=data.on_error == "skip"
        )  # fmt: skip
        means = {"pixel": found.image, "channel": found.mean}
        return means.get(data.mean, np.zeros(3)), found.std if data.std == "channel" else np.ones(3)
    return np.zeros(3), np.ones(3)


def _first_known(
    given: tuple[np.ndarray | None, np.ndarray | None], own: Callable[[], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """What is given, and for the rest what ``own`` computes."""
    if all(value is not None for value in given):
        return given
    return tuple(mine if value is None else value for value, mine in zip(given, own(), strict=True))


def _arrays(statistics: tuple[np.ndarray, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, dtype) for name, value in zip(("mean", "std"), statistics, strict=True)}


def _statistics(
    data: ml_collections.ConfigDict, found: tuple[np.ndarray, np.ndarray], shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation: what was found in the data, or what the config gives."""
    mean, std = found
    if data.mean_image:
        mean = _read_mean(data.mean_image, shape)
    elif data.mean == "imagenet":
        mean = np.array(IMAGENET_MEAN)
    if data.std == "imagenet":
        std = np.array(IMAGENET_STD)
    return mean, std


def _read_mean(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        mean = np.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"data.mean_image={path}: not a readable .npy file ({error})") from error
    if mean.shape not in (shape, shape[-1:]) or not 0 <= mean.min() <= mean.max() <= 1:
        raise UsageError(
            f"data.mean_image={path}: expected {shape} or {shape[-1:]} numbers from 0 to 1; it has {mean.shape} from"
            f" {mean.min():.3g} to {mean.max():.3g}"
        )
    return mean
