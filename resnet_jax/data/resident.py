"""Small data: every image decoded once and kept as arrays, with a copy on disk for the next start."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import hashlib
import os
import pathlib
import sys
import zipfile

from absl import logging
import numpy as np
import tqdm

from resnet_jax.data.crops import Whole
from resnet_jax.data.decode import BrokenImage, decode
from resnet_jax.data.sources import Dataset, Examples, Images
from resnet_jax.errors import UsageError


def read_dataset(dataset: Dataset, whole: Whole | None, workers: int, cache: pathlib.Path) -> Dataset:
    """Reads encoded examples, or their copy in the cache when no file was added, removed or changed.

    Args:
      dataset: of ``Examples``.
      whole: how images are resized; None wants them all of one size as they are.
      workers: threads that read.
      cache: folder for the copy.

    Returns:
      The data set with RGB images, uint8 [N, H, W, 3].

    Raises:
      UsageError: a file that is no image, sizes that differ, more images than fit in memory.
    """
    parts = (dataset.train, dataset.test)
    key = repr((whole, *(part.fingerprint(stamps=True) for part in parts)))
    path = cache / f"images-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(path) as stored:
            arrays = [Images(stored[f"{part}_images"], stored[f"{part}_labels"]) for part in ("train", "test")]
        print(f"read {sum(map(len, arrays))} images from the cache {path}", flush=True)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # No copy, or a damaged one.
        arrays = [_read(part, whole, max(1, workers)) for part in parts]
        _store(path, arrays)
    if arrays[0].images.shape[1:] != arrays[1].images.shape[1:]:
        sizes = ["x".join(map(str, part.images.shape[1:3])) for part in arrays]
        raise UsageError(f"training images are {sizes[0]} pixels, test images {sizes[1]}; set data.image_size")
    return Dataset(*arrays, dataset.classes)


def _read(examples: Examples, whole: Whole | None, workers: int) -> Images:
    """Decodes all examples in parallel (the decoders let go of the interpreter while they do)."""

    def pixels(i: int) -> tuple[np.ndarray, int]:
        try:
            content, label = examples[i]
            return (whole(content, np.empty(0)) if whole else decode(content)), label
        except (OSError, BrokenImage) as error:
            raise UsageError(f"{examples.where(i)}: not a readable image ({error})") from error

    first, _ = pixels(0)
    needed, free = len(examples) * first.nbytes, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.9 * free:
        raise UsageError(f"{len(examples)} images of {first.nbytes:,} bytes take {needed / 2**30:.1f} GiB of memory, of"
                         f" which {free / 2**30:.1f} are free; a smaller data.image_size takes less, and"
                         " data.placement=stream reads them as they are needed")  # fmt: skip
    images, labels = np.empty((len(examples), *first.shape), np.uint8), np.empty(len(examples), np.int32)

    def read(i: int) -> None:
        image, labels[i] = pixels(i)
        if image.shape != first.shape:
            sizes = ["x".join(map(str, array.shape[1::-1])) for array in (image, first)]
            raise UsageError(
                f"{examples.where(i)} has {sizes[0]} pixels, {examples.where(0)} {sizes[1]}; set data.image_size"
            )
        images[i] = image

    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(read, range(len(examples)))
        bar = tqdm.tqdm(done, "reading images", len(examples), disable=not sys.stderr.isatty(), leave=False)
        try:
            for _ in bar:
                pass
        except BaseException:  # Ctrl-C too: thousands of files may be waiting.
            pool.shutdown(cancel_futures=True)
            raise
    return Images(images, labels)


def _store(path: pathlib.Path, parts: list[Images]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            arrays = {}
            for name, part in zip(("train", "test"), parts, strict=True):
                arrays |= {f"{name}_images": part.images, f"{name}_labels": part.labels}
            np.savez(file, **arrays)
        partial.rename(path)
    except OSError as error:  # The cache saves time; doing without it is no mistake.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        logging.warning("could not write the cache %s (%s); the files will be read again next time", path, error)
