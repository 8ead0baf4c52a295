"""The mean image of data that does not fit in memory (the paper subtracts it), computed once and kept."""

from concurrent.futures import ThreadPoolExecutor
import hashlib
import os
import pathlib
import sys
from typing import Any
import zipfile

import numpy as np
import tqdm

from resnet_jax.data.crops import CenterCrop, Whole
from resnet_jax.data.decode import BrokenImage
from resnet_jax.data.sources import Examples, Statistics
from resnet_jax.errors import UsageError

# What most public weights were trained with: means and deviations over ImageNet's training images.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_PART = 64  # Examples that a thread sums up at a time.


class Sums:
    """Exact sums over uint8 images [H, W, 3] of one size."""

    def __init__(self):
        self.count = 0
        self.image: Any = np.uint64(0)  # uint64 [H, W, 3] after the first.
        self.squares: Any = np.zeros(3, np.uint64)

    def add(self, image: np.ndarray) -> None:
        """Takes one image in."""
        if not self.count:
            self.image = np.zeros(image.shape, np.uint64)
        self.count += 1
        np.add(self.image, image, out=self.image)
        flat = image.reshape(-1, 3)
        self.squares += np.einsum("ij,ij->j", flat, flat, dtype=np.uint64, casting="unsafe")

    def merge(self, other: "Sums") -> None:
        """Takes in what another has summed up."""
        self.count += other.count
        self.image = self.image + other.image
        self.squares = self.squares + other.squares

    def statistics(self) -> Statistics:
        """Mean image and each channel's mean and deviation, on the scale where white is 1."""
        image = self.image / (255 * self.count)
        mean = image.mean((0, 1))
        square = self.squares / (255**2 * self.count * image.shape[0] * image.shape[1])
        deviation = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return Statistics(*(array.astype(np.float32) for array in (image, mean, deviation)))

    def save(self, path: pathlib.Path, written: int, skipped: list[str]) -> None:
        """Writes the sums of one shard with its number of examples and what was left out."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, count=self.count, image=self.image, squares=self.squares, written=written,
                     skipped=np.array(skipped, np.str_))  # fmt: skip
        os.replace(partial, path)

    @classmethod
    def load(cls, path: pathlib.Path) -> tuple["Sums", int, list[str]]:
        """Reads what ``save`` wrote: sums, examples, what was left out."""
        sums = cls()
        with np.load(path) as stored:
            sums.count, sums.image, sums.squares = int(stored["count"]), stored["image"], stored["squares"]
            return sums, int(stored["written"]), stored["skipped"].tolist()


def training_statistics(
    examples: Examples, view: CenterCrop | Whole, workers: int, cache: pathlib.Path, skip_broken: bool
) -> Statistics:
    """The statistics of ``view`` of every example, from the cache where they are known.

    Args:
      examples: the training set.
      view: what is looked at of each image.
      workers: threads.
      cache: folder where the result is kept.
      skip_broken: leave out what can't be read instead of stopping there.

    Raises:
      UsageError: a broken image.
    """
    key = repr((view, skip_broken, examples.fingerprint(stamps=False)))
    path = cache / f"mean-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(path) as stored:
            return Statistics(stored["image"], stored["mean"], stored["std"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # Not computed yet, or a damaged copy.
    print(f"computing the mean of {len(examples)} training images, once; it is kept in {path}", flush=True)

    def part(start: int) -> Sums:
        sums = Sums()
        for i in range(start, min(start + _PART, len(examples))):
            try:
                sums.add(view(examples[i][0], None))
            except (OSError, BrokenImage) as error:
                if not skip_broken:
                    raise UsageError(f"{examples.where(i)}: not a readable image ({error});"
                                     " data.on_error=skip leaves such images out") from error  # fmt: skip
        return sums

    sums, starts = Sums(), range(0, len(examples), _PART)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        parts = pool.map(part, starts)
        try:
            for done in tqdm.tqdm(parts, "mean image", len(starts), disable=not sys.stderr.isatty(), leave=False):
                sums.merge(done)
        except BaseException:  # Ctrl-C too: many parts may be waiting.
            pool.shutdown(cancel_futures=True)
            raise
    if sums.count < len(examples):
        print(f"{len(examples) - sums.count} images can't be read and were left out of the mean", flush=True)
    if not sums.count:
        raise UsageError("none of the training images can be read")
    statistics = sums.statistics()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, image=statistics.image, mean=statistics.mean, std=statistics.std)
        os.replace(partial, path)
    except OSError as error:
        print(f"could not keep the mean image in {path} ({error}); it will be computed again", flush=True)
    return statistics
