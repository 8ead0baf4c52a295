"""Data that is read as training goes: encoded examples -> crops -> batches of uint8, by Grain's workers.

Every pixel follows from (seed, epoch, example) and every batch from the step's number, so neither the number of
workers nor of hosts changes what is learnt, and there is no state to save.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import errno
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any, Protocol, TypeVar

from absl import flags
import grain
import numpy as np

from resnet_jax.data.crops import Views, example_uniforms
from resnet_jax.data.decode import BrokenImage
from resnet_jax.data.order import Order
from resnet_jax.errors import UsageError

Batch = dict[str, np.ndarray]
_Result = TypeVar("_Result")
FIELDS = ("images", "labels", "index", "epoch", "valid")
# Examples that a worker reads at a time: enough to make its own costs small, few enough to share a batch out.
_PIECE = 128
# So many unreadable images one after another are no accident, but a disk that is gone.
_IN_A_ROW = 100
# What a network file system may get over, and seconds to wait before each further try.
_PASSING, _PAUSES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN), (0.2, 2.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Rows:
    """This process's rows of each global batch, and how they are shared out to workers.

    Attributes:
      batch: examples of a global batch.
      process, processes: which part of it is ours, of how many equal ones.
    """

    batch: int
    process: int = 0
    processes: int = 1

    @property
    def own(self) -> slice:
        """Our rows of the global batch."""
        count = self.batch // self.processes
        return slice(self.process * count, (self.process + 1) * count)

    @property
    def pieces(self) -> int:
        """Into how many pieces of about the same size our rows are cut."""
        count = self.batch // self.processes
        return -(-count // _PIECE)

    def cut(self, values: np.ndarray, piece: int) -> np.ndarray:
        """Piece ``piece`` of our rows of the global ``values``."""
        return np.array_split(values[self.own], self.pieces)[piece]


class Plan(Protocol):
    """Which examples make up the pieces of batches."""

    rows: Rows

    def piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Index and epoch of each example of a piece, pieces counted from step 0; an index of -1 is padding."""


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Steps of training, in the order that follows from the seed."""

    order: Order
    rows: Rows

    def piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        step, piece = divmod(number, self.rows.pieces)
        batch = self.order.batch(step, self.rows.batch)
        return self.rows.cut(batch["index"], piece), self.rows.cut(batch["epoch"], piece)


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """The examples of ``index``, int32 [N], each once and in this order; the last batch is filled up with padding."""

    index: np.ndarray
    rows: Rows

    def piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        step, piece = divmod(number, self.rows.pieces)
        index = self.index[step * self.rows.batch : (step + 1) * self.rows.batch]
        index = np.pad(index, (0, self.rows.batch - len(index)), constant_values=-1)
        index = self.rows.cut(index, piece)
        return index, np.zeros_like(index)


class PieceReader(Protocol):
    """What Grain's workers call; it goes to them whole."""

    @property
    def rows(self) -> Rows:
        """How batches are cut into pieces."""

    def __call__(self, number: int) -> dict[str, Any]:
        """Piece ``number``, pieces counted from step 0: arrays, and ``broken`` as ``Reader`` gives it."""


def own_pages(*shape: int) -> np.ndarray:
    """Zeros, uint8, in pages that go back when it is let go of; malloc would keep the largest batch of each thread."""
    memory = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray(shape, np.uint8, memory)


def patiently(read: Callable[..., _Result], *arguments: Any) -> _Result:
    """What ``read`` gives, once a network file system got over an OSError that it may get over."""
    for pause in _PAUSES:
        try:
            return read(*arguments)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return read(*arguments)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads pieces of batches of examples of one shape; a ``PieceReader``.

    Attributes:
      views: the examples' pixels.
      plan: which examples are wanted.
      seed: of the crops.
      broken: what an unreadable image does: ``raise``; ``replace`` it by the next example that can be read, so that
        a training batch stays full; or ``mask`` it, so that it is not evaluated.
    """

    views: Views
    plan: Plan
    seed: int
    broken: str

    @property
    def rows(self) -> Rows:
        return self.plan.rows

    def __call__(self, number: int) -> dict[str, Any]:
        """Piece ``number``: ``images`` uint8 [n, *crop.shape], ``labels``, ``index`` and ``epoch`` int32 [n],
        ``valid`` bool [n], and ``broken``, where and why, of each example that could not be read.
        """  # fmt: skip
        index, epoch = self.plan.piece(number)
        index, examples, shape = index.copy(), self.views.examples, self.views.crop.shape
        images = own_pages(len(index), *shape)
        labels, valid, broken, in_a_row = np.zeros(len(index), np.int32), index >= 0, [], 0
        for row in np.flatnonzero(valid):
            while True:
                i = int(index[row])
                uniforms = example_uniforms(self.seed, int(epoch[row]), i, self.views.crop.draws)
                try:
                    images[row], labels[row] = patiently(self.views, i, uniforms)
                    in_a_row = 0
                    break
                except (OSError, BrokenImage) as error:
                    text = f"not a readable image ({getattr(error, 'strerror', None) or error})"
                    if self.broken == "raise":
                        hint = "data.on_error=skip leaves such images out"
                        raise UsageError(f"{examples.where(i)}: {text}; {hint}") from None
                    in_a_row += 1
                    if in_a_row == (_IN_A_ROW if self.broken == "mask" else min(len(examples), _IN_A_ROW)):
                        raise UsageError(f"{examples.where(i)}: {text}, nor are {in_a_row - 1} before it") from None
                    broken.append((examples.where(i), text))
                    if self.broken == "mask":
                        valid[row] = False
                        break
                    index[row] = (i + 1) % len(examples)
        return {
            "images": images, "labels": labels, "index": index, "epoch": epoch, "valid": valid, "broken": tuple(broken),
        }  # fmt: skip


def _begin_worker(worker: int, workers: int) -> None:
    """Leaves Ctrl-C and SIGTERM, which reach workers too, to the process that trains, and ends when that one does."""
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # It was killed: nobody is left to clean up after.

    threading.Thread(target=follow, daemon=True).start()


class Batches:
    """This process's part of the batches ``first`` to ``end`` - 1, as NumPy arrays.

    Iterating raises a UsageError for an image that can't be read, and for a worker that was killed.
    """

    def __init__(
        self,
        reader: PieceReader,
        first: int,
        end: int,
        workers: int,
        processes: bool,
        broken: dict[str, str] | None = None,
        fields: Collection[str] = FIELDS,
    ):
        """Starts to read.

        Args:
          reader: what reads.
          first: the first batch.
          end: the one after the last.
          workers: how many read at a time; 0 reads when a batch is asked for.
          processes: whether they are processes; else threads.
          broken: takes what could not be read: where -> why.
          fields: the arrays of a batch that are wanted.
        """
        self._fields = fields
        self.broken: dict[str, str] = {} if broken is None else broken
        self._pieces = reader.rows.pieces
        numbers = grain.MapDataset.range(first * self._pieces, end * self._pieces)
        dataset = numbers.map(reader)
        if not workers or processes:
            dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            if workers:
                if not flags.FLAGS.is_parsed():  # Grain asks for its flags, which a notebook or a test has not parsed.
                    flags.FLAGS.mark_as_parsed()
                # Batches that nobody took are cleaned up at the end; nobody needs to be told.
                os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
                options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
                dataset = dataset.mp_prefetch(options, _begin_worker)
        else:
            ahead = max(workers, self._pieces)  # Beyond the piece that is waited for.
            dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead))
        self._iterator = iter(dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            pieces = list(itertools.islice(self._iterator, self._pieces))
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UsageError(
                "a process that reads data was killed (out of memory?); fewer data.workers need less, and"
                " data.worker_type=thread needs no processes"
            ) from error
        if not pieces:
            raise StopIteration
        for piece in pieces:
            for where, reason in piece.pop("broken"):
                if where not in self.broken:
                    print(f"left out {where}: {reason}", file=sys.stderr, flush=True)
                    self.broken[where] = reason
        if len(pieces) == 1:
            return {name: pieces[0][name] for name in self._fields}
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self._fields}

    def close(self) -> None:
        """Stops the workers."""
        self._iterator.close()
