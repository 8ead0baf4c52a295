"""A folder of images, ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), read once and kept as arrays."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import hashlib
import os
import pathlib
import sys
import zipfile

from absl import logging
import numpy as np
from PIL import Image
import tqdm

from resnet_jax.data.sources import Dataset, Images
from resnet_jax.errors import UsageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# A list of files with their labels, as (path, label, bytes, time of change in ns).
Listing = list[tuple[str, int, int, int]]


def load(folder: str, labels: str, size: int, workers: int, cache: pathlib.Path) -> Dataset:
    """Reads the folder, or its copy in the cache when no file was added, removed or changed.

    Args:
      folder: holds ``train`` and ``test`` or ``val``, each with one folder per class.
      labels: text file with one class a line, in the order of their numbers; empty: all classes, sorted.
      size: images are resized to squares of this side, in pixels; 0 wants them all of one size as they are.
      workers: threads that read; 0 for one per core.
      cache: folder for the copy.

    Returns:
      RGB images, uint8 [N, H, W, 3].

    Raises:
      UsageError: a folder or class that is missing or empty, a file that is no image, sizes that differ.
    """
    if not folder:
        raise UsageError("data.source=image_folder needs data.dir, a folder with train/<class>/* and test/<class>/*")
    root = pathlib.Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UsageError(f"data.dir={folder}: no such folder")
    test_name = "test" if (root / "test").is_dir() else "val"
    for part in ("train", test_name):
        if not (root / part).is_dir():
            wanted = "train" if part == "train" else "test or val"
            raise UsageError(f"data.dir={folder}: no folder {wanted} in it (expected {wanted}/<class>/*)")
    classes = _classes(root / "train", labels)
    for name in _classes(root / test_name, ""):
        if not (root / "train" / name).is_dir():
            raise UsageError(f"{root / test_name / name}: {name!r} is no class of the training set")
    listings = [_list(root / part, classes) for part in ("train", test_name)]
    path = cache / f"image_folder-{_fingerprint(listings, size)}.npz"
    try:
        with np.load(path) as stored:
            parts = [Images(stored[f"{part}_images"], stored[f"{part}_labels"]) for part in ("train", "test")]
        print(f"read {sum(map(len, parts))} images from the cache {path}", flush=True)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # No copy, or a damaged one.
        parts = [_read(listing, size, workers) for listing in listings]
        _store(path, parts)
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        sizes = ["x".join(map(str, part.images.shape[1:3])) for part in parts]
        raise UsageError(f"data.dir={folder}: training images are {sizes[0]} pixels, test images {sizes[1]};"
                         " set data.image_size")  # fmt: skip
    return Dataset(*parts, classes)


def _classes(folder: pathlib.Path, labels: str) -> tuple[str, ...]:
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise UsageError(f"{folder}: no class folders in it (expected {folder.name}/<class>/*)")
    if not labels:
        return tuple(found)
    try:
        lines = pathlib.Path(labels).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.labels={labels}: not a readable text file ({error})") from error
    named = [line.strip() for line in lines if line.strip()]
    if not named:
        raise UsageError(f"data.labels={labels}: no class in it (expected one a line)")
    for i, name in enumerate(named):
        if name in named[:i]:
            raise UsageError(f"data.labels={labels}: class {name!r} is listed twice")
        if name not in found:
            raise UsageError(f"data.labels={labels}: class {name!r} has no folder in {folder}")
    return tuple(named)


def _list(folder: pathlib.Path, classes: tuple[str, ...]) -> Listing:
    """The image files of every class, sorted."""
    listing: Listing = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise UsageError(f"{folder / name}: no such folder, though {name!r} is a class of the training set")
        entries = [entry for entry in os.scandir(folder / name) if entry.name.lower().endswith(EXTENSIONS)]
        if not entries:
            raise UsageError(f"{folder / name}: no images in it ({', '.join(EXTENSIONS)})")
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                status = entry.stat()
            except OSError as error:
                raise UsageError(f"{entry.path}: not readable ({error.strerror})") from error
            listing.append((entry.path, label, status.st_size, status.st_mtime_ns))
    return listing


def _fingerprint(listings: list[Listing], size: int) -> str:
    return hashlib.sha256(repr((size, listings)).encode()).hexdigest()[:16]


def _read(listing: Listing, size: int, workers: int) -> Images:
    """Decodes all files in parallel (Pillow lets go of the interpreter while it does)."""
    first = _decode(listing[0][0], size)
    needed, free = len(listing) * first.nbytes, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.9 * free:
        raise UsageError(f"{len(listing)} images of {first.nbytes:,} bytes take {needed / 2**30:.1f} GiB of memory, of"
                         f" which {free / 2**30:.1f} are free; a smaller data.image_size takes less")  # fmt: skip
    images = np.empty((len(listing), *first.shape), np.uint8)

    def read(i: int) -> None:
        image = _decode(listing[i][0], size)
        if image.shape != first.shape:
            sizes = ["x".join(map(str, array.shape[1::-1])) for array in (image, first)]
            raise UsageError(f"{listing[i][0]} has {sizes[0]} pixels, {listing[0][0]} {sizes[1]}; set data.image_size")
        images[i] = image

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = pool.map(read, range(len(listing)))
        folder = pathlib.Path(listing[0][0]).parents[1]
        bar = tqdm.tqdm(done, f"reading {folder}", len(listing), disable=not sys.stderr.isatty(), leave=False)
        try:
            for _ in bar:
                pass
        except BaseException:  # Ctrl-C too: thousands of files may be waiting.
            pool.shutdown(cancel_futures=True)
            raise
    return Images(images, np.array([entry[1] for entry in listing], np.int32))


def _decode(path: str, size: int) -> np.ndarray:
    """One file as RGB uint8 [H, W, 3]; resized to a square where ``size`` is given."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow's conversion would cut it off at 255.
                image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
            image = image.convert("RGB")
            if size and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not a readable image ({error})") from error


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
