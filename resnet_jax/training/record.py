"""What a run remembers of itself beside its arrays: running averages, times, the best evaluation."""

from collections.abc import Hashable
import dataclasses
import itertools
import queue
import time
from typing import Any

import jax
import numpy as np

from resnet_jax.training.prefetch import Prefetch

_POLL = 0.002  # Seconds between two looks at whether the device is still busy.


class Diverged(Exception):
    """The loss, the gradient or the weights are no longer finite."""

    def __init__(self, step: int, metrics: dict[str, float]):
        shown = (f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in _FINITE)
        super().__init__(f"step {step}: {', '.join(shown)}")
        self.step = step


# The metrics that every step has and that tell whether training goes on.
_FINITE = ("loss", "gradient_norm", "weight_norm")


@dataclasses.dataclass
class Record:
    """Saved as JSON with every checkpoint.

    Attributes:
      epoch: the epoch of the last step taken in.
      epoch_sums: sum of each metric over the steps of it; ``steps`` is their number.
      window_sums: the same over the steps since the last log line.
      learning_rate: the last step's.
      evaluated: step of the last evaluation, -1 before the first.
      best: lowest objective so far, %, and best_step its step.
      seconds: time of the whole run.
      timed_seconds, timed_steps: time in training steps alone, without those that compile, and their number.
      waited_seconds: how much of that time the devices had nothing to do for want of data.
      stale: evaluations since the best one; stopped: whether they were too many.
      broken: examples that could not be read and were left out: where -> why.
    """

    epoch: int = 0
    epoch_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    window_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.0
    evaluated: int = -1
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    timed_seconds: float = 0.0
    timed_steps: int = 0
    waited_seconds: float = 0.0
    stale: int = 0
    stopped: bool = False
    broken: dict[str, str] = dataclasses.field(default_factory=dict)

    def take_in(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of one step (counted from 1) that began in ``epoch``."""
        if not all(np.isfinite(metrics[name]) for name in _FINITE):
            raise Diverged(step, metrics)
        if epoch != self.epoch:
            self.epoch, self.epoch_sums = epoch, {}
        self.learning_rate = metrics["learning_rate"]
        for sums in (self.epoch_sums, self.window_sums):
            for name, value in (metrics | {"steps": 1}).items():
                sums[name] = sums.get(name, 0) + value

    def epoch_average(self, name: str) -> float | None:
        """The running average of a metric over the last epoch, or None where it has none."""
        return self.epoch_sums[name] / self.epoch_sums["steps"] if name in self.epoch_sums else None

    def take_window(self) -> dict[str, float]:
        """Averages of the metrics since the last call, ``train_`` before their names, and the learning rate."""
        sums, self.window_sums = self.window_sums, {}
        steps = sums.pop("steps")
        means = {f"train_{name}": value / steps for name, value in sums.items() if name != "learning_rate"}
        return means | {"learning_rate": self.learning_rate}

    @property
    def steps_per_second(self) -> float | None:
        """Speed of the training steps alone."""
        return self.timed_steps / self.timed_seconds if self.timed_seconds else None

    @property
    def data_wait_percent(self) -> float | None:
        """Share of the training steps' time that they waited for data, %."""
        return 100 * self.waited_seconds / self.timed_seconds if self.timed_seconds else None


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a window has of some steps of one run.

    Attributes:
      metrics: of each step.
      seconds: that training took since the last steps were taken, without compilation and pauses.
      timed: how many steps these seconds are of: those of ``metrics`` that did not compile.
      waited: how many of these seconds data was waited for.
    """

    metrics: list[dict[str, float]]
    seconds: float
    timed: int
    waited: float


class Window:
    """Metrics of the steps since the last log, still on the device: fetched once a window, so that nothing waits.

    It times the steps too: all but the first dispatch of each kind (length, shapes of its batch), which compiles.
    """

    def __init__(self):
        self._pending: list[dict[str, jax.Array]] = []  # Of each dispatch,
        self._lengths: list[tuple[int, int]] = []  # its steps, and how many of them are timed.
        self._compiled: set[Hashable] = set()
        self._clock: float | None = None  # Runs while training steps do.
        self._seconds, self._waited = 0.0, 0.0

    def wait_for(self, batches: Prefetch) -> Any:
        """The next batch; the time that the devices have nothing to do meanwhile counts as waiting for data."""
        idle_since = None
        while True:
            if idle_since is None and (not self._pending or self._pending[-1]["loss"].is_ready()):
                idle_since = time.monotonic()
            try:
                batch = batches.get(timeout=_POLL if idle_since is None else None)
            except queue.Empty:
                continue
            if idle_since is not None and self._clock is not None:
                self._waited += time.monotonic() - idle_since
            return batch

    def wait_for_all_but(self, dispatches: int) -> None:
        """Waits until at most so many dispatches are not done."""
        if len(self._pending) > dispatches:
            jax.block_until_ready(self._pending[-1 - dispatches])

    def start(self, kind: Hashable) -> None:
        """Called just before a dispatch of a kind."""
        if kind not in self._compiled:
            self.pause()
        elif self._clock is None:
            self._clock = time.monotonic()

    def add(self, metrics: dict[str, jax.Array], steps: int, kind: Hashable) -> None:
        """Takes the metrics of one dispatch of so many steps: scalars or [steps] each, of several runs [runs, ...]."""
        self._pending.append(metrics)
        self._lengths.append((steps, steps if kind in self._compiled else 0))
        if kind not in self._compiled:
            jax.block_until_ready(metrics)
            self._compiled.add(kind)
            self._clock = time.monotonic()

    def take(self, steps: int | None = None, runs: int = 1) -> list[Taken]:
        """Waits for the first ``steps`` steps (whole dispatches; None: all), and gives them away: ``Taken`` a run."""
        total = list(itertools.accumulate((count for count, _ in self._lengths), initial=0))
        dispatches = len(self._lengths) if steps is None else total.index(steps)
        timed = sum(clocked for _, clocked in self._lengths[:dispatches])
        fetched = jax.device_get(self._pending[:dispatches])
        del self._pending[:dispatches], self._lengths[:dispatches]
        if self._clock is not None:
            now = time.monotonic()
            self._seconds, self._clock = self._seconds + now - self._clock, now
        per_run: list[list[dict[str, float]]] = [[] for _ in range(runs)]
        for metrics in fetched:
            arrays = {name: np.reshape(value, (runs, -1)) for name, value in metrics.items()}
            for run, found in enumerate(per_run):
                length = arrays["loss"].shape[1]
                found += [{name: float(array[run, i]) for name, array in arrays.items()} for i in range(length)]
        taken = [Taken(found, self._seconds, timed, self._waited) for found in per_run]
        self._seconds, self._waited = 0.0, 0.0
        return taken

    def pause(self) -> None:
        """Stops the clock for what is not training, once the device has done what it was given."""
        if self._clock is not None:
            jax.block_until_ready(self._pending)
            self._seconds += time.monotonic() - self._clock
            self._clock = None
