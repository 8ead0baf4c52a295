"""Checkpoints: Orbax, asynchronous and atomic; the latest ones and the best one stay."""

import json
import pathlib
from typing import Any
import warnings

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from resnet_jax.errors import UsageError
from resnet_jax.training.state import TrainState

FOLDER = "checkpoints"


def latest_step(workdir: pathlib.Path) -> int | None:
    """The step of the newest checkpoint in a work directory, or None; touches nothing."""
    folder = workdir / FOLDER
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    return max(steps, default=None)


class _LatestAndBest(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the newest checkpoints and the best one; which is best may be known only after it was saved."""

    def __init__(self, keep: int):
        self.keep, self.best_step = keep, None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        newest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in newest or info.step == self.best_step for info in checkpoints]


class Checkpoints:
    """The checkpoints of one work directory, each a TrainState with a small record of JSON."""

    def __init__(self, workdir: pathlib.Path, keep: int, write: bool = True):
        """Opens the folder ``checkpoints`` of a work directory.

        Args:
          workdir: where it is, or will be.
          keep: how many of the latest stay.
          write: whether this process may save, and so clean up what was left half-written.
        """
        self._policy = _LatestAndBest(keep)
        self._checkpointer = ocp.training.Checkpointer(
            workdir / FOLDER,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=self._policy,
            cleanup_tmp_directories=write,
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        newest = self._checkpointer.latest
        return newest.step if newest else None

    def save(self, state: TrainState, step: int, record: dict[str, Any], best_step: int | None) -> None:
        """Starts to save, and returns once the state may be changed.

        Args:
          state: what to save.
          step: its step.
          record: JSON values that go with it.
          best_step: the step of the best checkpoint, which stays; None before the first evaluation.
        """
        self._policy.best_step = best_step
        self._checkpointer.save_async(step, state, custom_metadata={"record": json.dumps(record)})

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Loads the checkpoint of ``step`` with the shapes and shardings of ``like``; also its record."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            state = self._checkpointer.load(step, abstract)
            record = self._checkpointer.metadata(step).custom_metadata["record"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(
                f"{self._checkpointer.directory}/{step}: damaged, or no checkpoint of this run; without it the same"
                " command goes on from the one before"
            ) from error
        return state, json.loads(record)

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._checkpointer.close()


def load_run_weights(run: str) -> dict[str, Any]:
    """The weights of a run of ours, from its latest checkpoint: what it evaluates, on the host.

    Args:
      run: its work directory.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` of NumPy arrays.

    Raises:
      UsageError: there is no such folder, or no checkpoint in it.
    """
    workdir = pathlib.Path(run).expanduser().absolute()
    if not workdir.exists():
        raise UsageError(f"{run}: no such file or folder")
    step = latest_step(workdir)
    if step is None:
        raise UsageError(f"{run}: no checkpoint in it (expected the work directory of a run)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax would rather be told where to put the arrays.
        with ocp.training.Checkpointer(workdir / FOLDER) as checkpointer:
            state = checkpointer.load(step)
    weights = state["average"] or {name: state[name] for name in ("params", "batch_stats")}
    return jax.tree.map(np.asarray, weights)
