"""ArrayRecord shards written by ``python -m resnet_jax.prepare``: a few large files instead of a million small ones.

A folder holds ``<split>-00000-of-00016.array_record``, whose records are msgpack maps of ``image`` (the file as it
was), ``label`` and ``name``, ``index.json`` (classes, splits, examples in each shard) and ``mean.npy``.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
import json
import os
import pathlib
import sys
import threading
from typing import NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
import msgpack
import numpy as np
import tqdm

from resnet_jax.data.crops import CenterCrop
from resnet_jax.data.decode import BrokenImage
from resnet_jax.data.sources import Dataset, Examples, Statistics
from resnet_jax.data.statistics import Sums
from resnet_jax.errors import UsageError
from resnet_jax.locks import lock

INDEX, MEAN = "index.json", "mean.npy"
_UNFINISHED = ".unfinished"  # What is needed to go on, until all shards are written.
_SAMPLE = 256  # Examples whose size says how many shards there are.


class _Task(NamedTuple):
    """A shard to write: its name, whose examples from ``start`` to before ``stop``, and the view its mean is of."""

    name: str
    part: Examples
    start: int
    stop: int
    view: CenterCrop | None


class Shards:
    """One split: ``Examples``."""

    def __init__(self, folder: pathlib.Path, files: dict[str, int]):
        """Takes the shards' names with their numbers of examples."""
        self._folder, self._files = folder, files
        for name in files:
            if not (folder / name).is_file():
                raise UsageError(f"data.dir={folder}: {name} is missing; prepare it again")
        try:
            self._source = ArrayRecordDataSource([str(folder / name) for name in files])
        except RuntimeError as error:
            bad = next((name for name in files if not _readable(folder / name)), "a shard")
            raise UsageError(f"data.dir={folder}: {bad} is damaged; prepare it again") from error
        found, wanted = len(self._source), sum(files.values())
        if found != wanted:
            raise UsageError(
                f"{folder}: its shards hold {found} examples where {INDEX} says {wanted}; prepare it again"
            )

    def __len__(self) -> int:
        return len(self._source)

    def _record(self, i: int) -> dict:
        try:
            return msgpack.unpackb(self._source[i])
        except (RuntimeError, ValueError, IndexError) as error:  # What its reader raises for damaged files.
            raise OSError(f"damaged record ({' '.join(str(error).split())[:100]})") from error

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        record = self._record(i)
        return record["image"], record["label"]

    def where(self, i: int) -> str:
        try:
            return f"{self._folder}: {self._record(i)['name']}"
        except OSError:
            return f"{self._folder}: example {i}"

    def fingerprint(self, stamps: bool) -> str:
        del stamps
        return f"{self._folder} {self._files}"


def _readable(shard: pathlib.Path) -> bool:
    try:
        return len(ArrayRecordDataSource(str(shard))) >= 0
    except RuntimeError:
        return False


def open_prepared(folder: str) -> Dataset:
    """Opens a folder that ``prepare`` wrote.

    Raises:
      UsageError: it is none, or not finished.
    """
    if not folder:
        raise UsageError("data.source=array_record needs data.dir, a folder that python -m resnet_jax.prepare wrote")
    root = pathlib.Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UsageError(f"data.dir={folder}: no such folder")
    if (root / _UNFINISHED).is_dir() and not (root / INDEX).is_file():
        raise UsageError(f"data.dir={folder}: not finished; the same python -m resnet_jax.prepare goes on")
    try:
        index = json.loads((root / INDEX).read_text())
        parts = [Shards(root, index["splits"][split]) for split in ("train", "test")]
        statistics = None
        if index["mean"]:
            image = np.load(root / MEAN)
            mean, std = (np.array(index[name], np.float32) for name in ("mean", "std"))
            statistics = Statistics(image, mean, std, index["plan"]["mean"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"data.dir={folder}: no folder that python -m resnet_jax.prepare wrote ({error})") from error
    return Dataset(*parts, tuple(index["classes"]), statistics)


def write(
    dataset: Dataset,
    folder: pathlib.Path,
    workers: int,
    shard_megabytes: int = 256,
    mean: CenterCrop | None = None,
    skip_broken: bool = False,
) -> dict:
    """Writes a data set of ``Examples`` as shards; goes on where an earlier call was cut off.

    Args:
      dataset: the examples.
      folder: where to.
      workers: shards that are written at a time.
      shard_megabytes: about how large a shard is, MB.
      mean: the view of each training image that the mean image is of; None computes no mean (and decodes nothing).
      skip_broken: leave out what can't be read instead of stopping there.

    Returns:
      The index.

    Raises:
      UsageError: a broken image, or the folder holds something else.
    """
    for split, part in (("training", dataset.train), ("test", dataset.test)):
        if not len(part):
            raise UsageError(f"the {split} set has no images")
    unfinished = folder / _UNFINISHED
    tasks = [
        _Task(name, part, start, stop, mean if split == "train" else None)
        for split, part in (("train", dataset.train), ("test", dataset.test))
        for name, start, stop in _shards(split, part, shard_megabytes)
    ]
    plan = {
        "source": [part.fingerprint(stamps=False) for part in (dataset.train, dataset.test)],
        "shards": [task.name for task in tasks],
        "mean": repr(mean),
    }
    if _claim(folder, plan):
        return json.loads((folder / INDEX).read_text())
    try:
        with lock(unfinished / "lock", f"--output={folder}: another process is writing there"):
            _write_shards(tasks, folder, workers, skip_broken)
            return _finish(dataset, folder, plan)
    except OSError as error:
        raise UsageError(f"--output={folder}: can't be written ({error.strerror or error})") from error


def _write_shards(tasks: list[_Task], folder: pathlib.Path, workers: int, skip_broken: bool) -> None:
    """Writes the shards that are not there yet, several at a time."""
    stop = threading.Event()

    def one(task: _Task) -> None:
        try:
            _write_shard(task, folder, skip_broken, stop, bar.update)
        except BaseException:
            stop.set()
            raise

    total, shown = sum(task.stop - task.start for task in tasks), sys.stderr.isatty()
    with (
        tqdm.tqdm(total=total, desc=f"writing {len(tasks)} shards", unit=" images", disable=not shown) as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        futures = [pool.submit(one, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C too.
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(
    task: _Task, folder: pathlib.Path, skip_broken: bool, stop: threading.Event, advance: Callable[[int], None]
) -> None:
    """Writes one shard unless it is there; breaks off, with nothing written, when told to stop."""
    done = folder / _UNFINISHED / f"{task.name}.npz"
    if done.is_file():
        advance(task.stop - task.start)
        return
    sums, skipped = Sums(), []
    partial = folder / f".{task.name}.partial"
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")  # Random access; images don't compress.
    for i in range(task.start, task.stop):
        if stop.is_set():
            return
        where = task.part.where(i)
        try:
            content, label = task.part[i]
            pixels = task.view(content, np.empty(0)) if task.view else None
        except (OSError, BrokenImage) as error:
            if not skip_broken:
                raise UsageError(
                    f"{where}: not a readable image ({error}); --on_error=skip leaves such files out"
                ) from error
            skipped.append(where)
        else:
            if pixels is not None:
                sums.add(pixels)
            name = "/".join(where.split("/")[-2:])  # Its class and its own.
            writer.write(msgpack.packb({"image": content, "label": label, "name": name}))
        advance(1)
    writer.close()
    os.replace(partial, folder / task.name)
    sums.save(done, written=task.stop - task.start - len(skipped), skipped=skipped)


def _shards(split: str, part: Examples, megabytes: int) -> Iterator[tuple[str, int, int]]:
    """Name, first example and end of each shard; the same for the same data."""
    sample = range(0, len(part), max(1, len(part) // _SAMPLE))
    sizes = []
    for i in sample:
        try:
            sizes.append(len(part[i][0]))
        except OSError:  # Told when its turn comes.
            sizes.append(0)
    count = min(len(part), max(1, round(len(part) * float(np.mean(sizes)) / (megabytes * 1e6))))
    for shard in range(count):
        start, stop = (len(part) * i // count for i in (shard, shard + 1))
        yield f"{split}-{shard:05}-of-{count:05}.array_record", start, stop


def _claim(folder: pathlib.Path, plan: dict) -> bool:
    """Makes the folder ready for a plan; whether it is finished already."""
    known = folder / _UNFINISHED / "plan.json"
    try:
        if (folder / INDEX).is_file():
            _check_plan(folder, json.loads((folder / INDEX).read_text()).get("plan") or {}, plan)
            return True
        if known.is_file():
            _check_plan(folder, json.loads(known.read_text()), plan)
            return False
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--output={folder} is not empty")
        known.parent.mkdir(parents=True)
        known.write_text(json.dumps(plan))
    except OSError as error:
        raise UsageError(f"--output={folder}: can't be written ({error.strerror})") from error
    return False


def _check_plan(folder: pathlib.Path, before: dict, now: dict) -> None:
    """Raises a UsageError where a folder was written, or begun, by another plan."""
    for name, meaning in (("source", "other data"), ("shards", "another --shard_mb"), ("mean", "another mean image")):
        if before.get(name) != now[name]:
            raise UsageError(f"--output={folder} holds {meaning} already; choose another folder")


def _finish(dataset: Dataset, folder: pathlib.Path, plan: dict) -> dict:
    """Writes the mean and the index, which make the folder whole."""
    unfinished, splits, sums, skipped = folder / _UNFINISHED, {"train": {}, "test": {}}, Sums(), []
    for name in plan["shards"]:
        part, written, left_out = Sums.load(unfinished / f"{name}.npz")
        splits[name.split("-")[0]][name] = written
        sums.merge(part)
        skipped += left_out
    index = {"classes": list(dataset.classes), "splits": splits, "skipped": skipped, "mean": None, "std": None}
    if sums.count:
        statistics = sums.statistics()
        np.save(folder / MEAN, statistics.image)
        index |= {"mean": statistics.mean.tolist(), "std": statistics.std.tolist()}
    partial = unfinished / INDEX
    partial.write_text(json.dumps(index | {"plan": plan}, indent=1) + "\n")
    os.replace(partial, folder / INDEX)
    for path in unfinished.iterdir():
        path.unlink()
    unfinished.rmdir()
    return index
