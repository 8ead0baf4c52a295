"""Checkpoints: written beside the training and atomically; the latest ones and the best one stay; damage is found."""

from collections.abc import Callable
import concurrent.futures
import contextlib
from functools import partial
import pathlib
import sys
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from resnet_jax import distributed, peers
from resnet_jax.buckets import absolute, in_bucket, move
from resnet_jax.errors import UsageError
from resnet_jax.models.stacking import per_block
from resnet_jax.training import stored
from resnet_jax.training.state import TrainState

FOLDER = "checkpoints"
DAMAGED = "damaged"  # Beside it: damaged checkpoints that were in a run's way.


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_ALONE = 20.0  # Seconds after which a save that failed in one process has not failed in all of them.


class SaveFailed(Exception):
    """The last state could not be saved."""


def latest_step(workdir: pathlib.Path | epath.Path) -> int | None:
    """The step of the newest checkpoint in a work directory, or None; touches nothing.

    It passes over those whose record or files can be seen to be damaged, if any other is there; what is in the files is
    checked when they are loaded, and it is an error then if all are damaged.
    """
    folder = epath.Path(workdir) / FOLDER
    steps = stored.stored_steps(folder)
    for step in reversed(steps):
        try:
            stored.check_files(folder / str(step), contents=False)
            stored.read_record(folder / str(step))
            return step
        except stored.Damaged:
            continue
    return max(steps, default=None)


class Checkpoints:
    """The checkpoints of one work directory, each a TrainState with a small record of JSON.

    Every process of a run has one and calls the same methods in the same order.
    """

    def __init__(
        self,
        workdir: pathlib.Path | epath.Path,
        keep: int,
        write: bool = True,
        tell: Callable[[str], None] = _to_stderr,
    ):
        """Opens the folder ``checkpoints`` of a work directory.

        Args:
          workdir: where it is, or will be.
          keep: how many of the latest stay.
          write: whether this process may save, and so clean up what was left half-written.
          tell: takes lines for the person who watches.
        """
        self._folder, self._keep, self._write, self._tell = epath.Path(workdir) / FOLDER, keep, write, tell
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._failure: SaveFailed | None = None  # Of the last save.
        self._best: int | None = None  # The best step that is on disk.
        if write:
            self._clean()
        self._steps = _as_leader(stored.stored_steps(self._folder) if distributed.leads() else [])

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, once what is being saved is saved; None where there is none."""
        self._settle()
        return max(self._steps, default=None)

    def save(self, state: TrainState, step: int, record: dict[str, Any], best_step: int | None) -> None:
        """Starts to save, and returns once the state may be changed; a failure is told of at the next call.

        Args:
          state: what to save.
          step: its step.
          record: JSON values that go with it.
          best_step: the step of the best checkpoint, which stays; None before the first evaluation.
        """
        self._settle()
        self._clean()
        try:
            response = stored.save_async(self._folder / str(step), state, record)
            done = self._thread.submit(self._finish, response, step, best_step)
        except Exception as error:  # Whatever a file system does: what is trained is not lost by it.
            done = concurrent.futures.Future()
            done.set_exception(error)
        self._saving = step, done

    def restore(self, like: TrainState) -> tuple[TrainState, int, dict[str, Any]] | None:
        """Loads the newest checkpoint that is whole; a damaged newer one is told of, and moved away where we may write.

        Args:
          like: a state of the same shapes, with the shardings of what is loaded.

        Returns:
          The state, its step and its record; None where nothing was saved yet.

        Raises:
          UsageError: all are damaged, or they are another network's.
        """
        self._settle()
        damage = {}
        for step in reversed(self._steps):
            # In two rounds: where all processes load together, none may be missing.
            whole = partial(stored.check_files, self._folder / str(step), contents=True)
            loaded = partial(stored.load, self._folder / str(step), like)
            _, why = _attempt(whole) if distributed.leads() else (None, "")
            found, why = (None, why) if _any_process(bool(why)) else _attempt(loaded)
            if _any_process(found is None):
                damage[step] = why or "another process could not read it"
                continue
            for damaged, why in damage.items():
                self._pass_over(damaged, why, step)
            state, record = found
            self._best = record.get("best_step")
            return state, step, record
        if damage:
            raise _all_damaged(self._folder, damage)
        return None

    def wait(self) -> None:
        """Waits until what was saved last is on disk.

        Raises:
          SaveFailed: it could not be saved.
        """
        self._settle(last=True)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits and lets go of the folder."""
        # Not _settle: a process that leaves alone would wait for the others.
        if self._saving is not None:
            step, done = self._saving
            self._saving = None
            if error := done.exception():
                self._tell(f"warning: step {step} could not be saved: {stored.reason(error)}")
        if self._write:
            self._clean()
        self._thread.shutdown()

    def _finish(self, response: ocp.AsyncResponse, step: int, best_step: int | None) -> None:
        """Waits for a save in the background, and removes what need not stay then."""
        response.result()
        if distributed.leads():
            with contextlib.suppress(Exception):  # Whatever a file system or bucket does: the checkpoint is whole.
                stored.add_checksums(self._folder / str(step))
        self._steps = sorted({*self._steps, step})
        if best_step in self._steps:  # Else its save failed: the best one before it stays.
            self._best = best_step
        stay = {self._best, *self._steps[-self._keep :]}
        go, self._steps = [s for s in self._steps if s not in stay], [s for s in self._steps if s in stay]
        if distributed.leads():
            for old in go:
                _remove(self._folder / str(old))

    def _settle(self, last: bool = False) -> None:
        """Waits for the save under way; a failed one leaves nothing behind, and is told of if it was not the last."""
        if self._saving is None:
            return
        step, done = self._saving
        self._saving, self._failure = None, None
        error = self._outcome(step, done)
        if not _any_process(error is not None):
            return
        for _ in range(6):  # Parts of it that go on for a moment make their folders anew.
            self._clean()
            time.sleep(0.05)
        self._steps = [s for s in self._steps if s != step]
        newest = f"the newest checkpoint is step {self._steps[-1]}" if self._steps else "there is no checkpoint yet"
        why = stored.reason(error) if error else "another process failed to"
        self._failure = SaveFailed(f"step {step} could not be saved: {why}; {newest}")
        if not last:
            self._tell(f"warning: step {step} could not be saved: {why}; training goes on, {newest}")

    def _outcome(self, step: int, done: concurrent.futures.Future) -> BaseException | None:
        """Waits for a save, and says why it failed if it did.

        Ends all processes where it failed in some of them alone: the others would wait for those for ever, and no later
        save could bring them together again.
        """
        others, since = peers.peers(), None
        if others is None:
            return done.exception()
        while True:
            try:
                error = done.exception(timeout=1)
                if error is not None:
                    others.tell(f"save {step} failed", stored.reason(error))
                return error
            except TimeoutError:
                why = others.told(f"save {step} failed")
                since = since or (why and time.monotonic())
                if why and time.monotonic() - since > _ALONE:
                    others.fail(1, f"step {step} could not be saved by every process: {why}")

    def _pass_over(self, step: int, why: str, instead: int) -> None:
        """Tells of a damaged checkpoint; one that would be in the way of saving its step again is moved aside."""
        self._steps = [s for s in self._steps if s != step]
        moved = ""
        if self._write and distributed.leads():
            aside = self._folder.parent / DAMAGED
            names = (aside / f"{step}{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 1000))))
            try:
                if not in_bucket(aside):
                    aside.mkdir(exist_ok=True)
                target = next(path for path in names if not path.exists())
                move(self._folder / str(step), target)
                moved = f"; moved to {target}"
            except Exception as error:  # A disk that damages may also be full. In its place nothing could be saved.
                raise UsageError(f"{self._folder}/{step} is damaged ({why}) and can't be moved to {aside}"
                                 f" ({stored.reason(error)}); move or remove it") from error  # fmt: skip
        self._tell(f"warning: {self._folder}/{step} is damaged ({why}){moved}; taking {instead}, the one before")

    def _clean(self) -> None:
        """Removes what is half-written; what resists is left to the next save or start."""
        if distributed.leads():
            with contextlib.suppress(OSError if not in_bucket(self._folder) else Exception):
                for entry in self._folder.iterdir() if self._folder.is_dir() else ():
                    if stored.half_written(entry):
                        _remove(entry)


def _remove(folder: epath.Path) -> None:
    """Removes a folder; what resists is left to the next save or start."""
    with contextlib.suppress(OSError if not in_bucket(folder) else Exception):
        if in_bucket(folder):  # Its objects go one by one: what is left of it should that be broken off is not whole.
            (folder / stored.COMMITTED).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """What reading a checkpoint gives, or None and how it is damaged."""
    try:
        return read(), ""
    except stored.Damaged as error:
        return None, str(error)


def _any_process(flag: bool) -> bool:
    """Whether it is so in any process; waits for all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def _as_leader(steps: list[int]) -> list[int]:
    """The leading process's steps: the others may see a shared folder a little later."""
    if jax.process_count() == 1:
        return steps
    count = distributed.from_leader(len(steps))
    padded = np.resize(np.asarray(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]


def _all_damaged(folder: epath.Path, damage: dict[int, str]) -> UsageError:
    step, why = next(iter(damage.items()))
    them = f"{step}: {why}" + (f"; {len(damage) - 1} more" if len(damage) > 1 else "")
    return UsageError(f"{folder}: no checkpoint in it is whole ({them}); bring back a copy, or move the folder away to"
                      " train from the start")  # fmt: skip


def load_run_weights(run: str) -> dict[str, Any]:
    """The weights of a run of ours, from its newest checkpoint that is whole: what it evaluates, on the host.

    Args:
      run: its work directory.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` of NumPy arrays, each block's under its own name.

    Raises:
      UsageError: there is no such folder, no checkpoint in it, or none that is whole.
    """
    workdir = epath.Path(run).expanduser()
    if not workdir.exists():
        raise UsageError(f"{run}: no such file or folder")
    folder, damage = absolute(workdir) / FOLDER, {}
    for step in reversed(stored.stored_steps(folder)):
        try:
            stored.check_files(folder / str(step), contents=True)
            state, _ = stored.load(folder / str(step))
        except stored.Damaged as error:
            damage[step] = str(error)
            continue
        for damaged, why in damage.items():
            _to_stderr(f"warning: {folder}/{damaged} is damaged ({why}); taking {step}, the one before")
        return per_block(state["average"] or {name: state[name] for name in ("params", "batch_stats")})
    if damage:
        raise _all_damaged(folder, damage)
    raise UsageError(f"{run}: no checkpoint in it (expected the work directory of a run)")
