"""One run in its work directory: where it stands, and what it tells, saves and evaluates."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from functools import partial
import pathlib
import time
from typing import Any

import jax
import ml_collections

from resnet_jax import distributed
from resnet_jax.config import flatten
from resnet_jax.training.checkpoints import Checkpoints, SaveFailed
from resnet_jax.training.evaluate import evaluate, polling
from resnet_jax.training.metrics import Console, MetricsWriter
from resnet_jax.training.prefetch import Prefetch
from resnet_jax.training.record import Diverged, Record, Taken
from resnet_jax.training.results import describe, other_settings, summarize, write_results
from resnet_jax.training.signals import Stopped, StopSignal
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation, Task
from resnet_jax.training.workdir import CENTER, read_json, results_folder

EXIT_DIVERGED = EXIT_NOT_SAVED = 1


class Run:
    """One run of a task in a work directory; the loop trains it.

    Attributes:
      task, config, workdir: what is trained, how and where.
      console: tells people.
      step: how many steps it has made.
      state: after them; None once the run has ended or was evaluated.
      batches: those that follow.
      improved: whether the last evaluation, which no checkpoint follows yet, was the best so far.
      status: the exit status that the run has ended with; None while it goes on.
    """

    def __init__(
        self,
        task: Task,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        mesh: jax.sharding.Mesh,
        write: bool = True,
        name: str = "",
    ):
        """Opens the run.

        Args:
          task: what is trained.
          config: the whole config.
          workdir: an existing folder.
          mesh: the devices, in force (``jax.set_mesh``).
          write: false where the run is only evaluated.
          name: what its lines begin with, where several are trained at once.
        """
        self.task, self.config, self.workdir, self._mesh = task, config, workdir, mesh
        self.console = Console(task.total_steps, quiet=not distributed.leads(), name=name)
        self._checkpoints = Checkpoints(workdir, config.checkpoint.keep, write, self.console.line)
        self.batches: Iterator[Any] = iter(())
        self.improved, self.status = False, None
        self._writer: MetricsWriter | None = None
        self._saved_at = self._started = time.monotonic()
        self._rate = 0.0  # Steps a second of those that were taken in last,
        self._wait = 0.0  # and the share of the time that they waited for data, %.
        self._last: Evaluation | None = None  # Of the validation split; at the end, the final state's.
        self.state, self.step, self._record = self._resume()

    def _resume(self) -> tuple[TrainState, int, Record]:
        state = self.task.initial_state()
        found = self._checkpoints.restore(state)
        if found is None:
            return state, 0, Record()
        state, step, record = found
        return state, step, Record(**record)

    def begin(self) -> bool:
        """Gets ready for the steps to come; false where there are none, and all is done."""
        summary = read_json(self.workdir / "summary.json")
        if distributed.from_leader(self.trained and bool(summary) and summary.get("step") == self.step):
            if distributed.leads():
                self.console.line(f"{self.workdir} is finished: step {self.step}, {describe(summary)}")
            self.status, self.state = 0, None
            return False
        if self.step:
            self.console.line(f"resuming from step {self.step}")
        record, tensorboard = self._record, self.config.log.tensorboard
        folder = self.workdir if distributed.leads() else None
        self._writer = MetricsWriter(folder, self.step, tensorboard, record.evaluated == self.step)
        self._started = time.monotonic() - record.seconds
        self.batches = self.task.batches(self.step)
        if self.task.streams:
            self.batches = Prefetch(
                self.batches, partial(distributed.shard_batch, self._mesh), self.config.data.prefetch
            )
        return True

    def close(self) -> None:
        """Ends what goes on beside the run, and closes its files."""
        with contextlib.ExitStack() as ends:
            ends.callback(self._checkpoints.close)
            if self._writer:
                ends.callback(self._writer.close)
            ends.callback(self.console.close)
            ends.callback(self._close_batches)

    def _close_batches(self) -> None:
        if isinstance(self.batches, Prefetch):
            self.batches.close()

    @contextlib.contextmanager
    def own_end(self) -> Iterator[None]:
        """Around what may end this run, and no other that is trained with it: ``status`` is set then."""
        try:
            yield
        except Diverged as error:
            latest = self._checkpoints.latest
            where = f"the last good checkpoint is {self.workdir}/checkpoints/{latest}"
            self.console.line(f"stopped: diverged at {error}; {where if latest else 'no checkpoint was saved yet'}")
            self.status = EXIT_DIVERGED
        except SaveFailed as error:
            self.console.line(f"error: {error}")
            self.status = EXIT_NOT_SAVED
        finally:
            if self.status is not None:
                self.state = None  # Its memory is the others'.

    @property
    def trained(self) -> bool:
        """Whether it has all its steps, or needs no more."""
        return self.step >= self.task.total_steps or self._record.stopped

    @property
    def evaluation_due(self) -> bool:
        """Whether the state is to be evaluated, and is not yet."""
        every, step = self.config.eval.every, self.step
        at = step > 0 and (step == self.task.total_steps or (bool(every) and step % every == 0))
        return at and step != self._record.evaluated

    def checkpoint_due(self) -> bool:
        """Whether the state is to be saved; all processes ask at once, for it may be the time that says so."""
        every, minutes = self.config.checkpoint.every, self.config.checkpoint.minutes
        if not self.step:
            return False
        if self.improved or (every and self.step % every == 0):
            return True
        return bool(minutes) and bool(distributed.from_leader(time.monotonic() - self._saved_at > 60 * minutes))

    def take_in(self, last: int, taken: Taken) -> None:
        """Takes in the metrics of the steps up to ``last``; raises ``Diverged``."""
        record, per_step = self._record, taken.metrics
        for number, metrics in enumerate(per_step, start=last - len(per_step) + 1):
            epoch = (number - 1) * self.task.examples_per_step // self.task.examples_per_epoch
            record.take_in(number, epoch, metrics)
        record.timed_seconds += taken.seconds
        record.timed_steps += taken.timed
        record.waited_seconds += taken.waited
        record.broken |= self.task.broken
        record.seconds = time.monotonic() - self._started
        if taken.timed and taken.seconds:
            self._rate, self._wait = taken.timed / taken.seconds, 100 * taken.waited / taken.seconds

    def log(self, step: int) -> None:
        """Writes the averages of the metrics taken in since the last log, and shows them."""
        rate = self._rate
        values = self._record.take_window() | {
            "epoch": step * self.task.examples_per_step / self.task.examples_per_epoch,
            "images_per_second": rate * self.task.examples_per_step,
            "seconds_per_step": 1 / rate if rate else 0.0,
            "seconds": self._record.seconds,
        }
        if self.task.streams:
            values |= {"data_wait_percent": self._wait, "broken_images": len(self._record.broken)}
        self._writer.write(step, values)
        self.console.progress(step, values["epoch"], values)

    def evaluate(self, stop: StopSignal) -> None:
        """Evaluates the validation split, and lets the rules that watch it act."""
        record, validation = self._record, self.task.validation
        evaluation = self._last = evaluate(self.task, self.config, self.state, validation, self.step, stop)
        figure, sign = evaluation.metrics.get(self.task.objective), self.task.sign
        self._writer.write(self.step, {f"{validation}_{name}": v for name, v in evaluation.metrics.items()})
        self.console.line(f"step {self.step}  {validation}: {describe(evaluation.metrics)}")
        record.evaluated = self.step
        if figure is None:  # Nothing to judge by: a test set whose answers are kept secret.
            return
        self.improved = record.best is None or sign * figure < sign * record.best
        record.stale = 0 if self.improved else record.stale + 1
        if self.improved:
            record.best, record.best_step = figure, self.step
        elif record.stale == self.config.eval.patience:
            record.stopped = True
            self.console.line(f"stopping early: {record.stale} evaluations no better than {record.best:.2f}%")
        self.state = self.task.after_evaluation(self.state, sign * figure)

    def save(self) -> None:
        """Begins to save the state, whose metrics have been taken in, unless that is done or there is nothing yet."""
        self.improved = False
        if not self.step or self.step == self._checkpoints.latest:
            return
        self._checkpoints.save(self.state, self.step, dataclasses.asdict(self._record), self._record.best_step)
        self._writer.flush()  # A run that goes on from there finds its records up to there.
        self._saved_at = time.monotonic()

    def saved(self) -> str:
        """Waits until the state is saved; what there is to say of it."""
        self._checkpoints.wait()
        return f"saved at step {self.step}" if self.step else "nothing was trained yet"

    def finish(self, stop: StopSignal) -> None:
        """Saves, evaluates and reports what has been trained, which ends the run; raises ``Stopped``."""
        self._close_batches()
        self.save()
        evaluation = self._last if self.task.validation == "test" else None
        evaluation = evaluation or evaluate(self.task, self.config, self.state, "test", self.step, stop)
        self._checkpoints.wait()
        self._record.seconds = time.monotonic() - self._started
        self._report(summarize(self.task, self.step, self._record), evaluation, CENTER)
        self.status, protocol = 0, self.config.eval.protocol
        if protocol == CENTER:
            return
        try:
            evaluation = evaluate(self.task, self.config, self.state, "test", self.step, stop, protocol)
        except Stopped:
            self.console.line(f"stopped in {protocol}; the run is whole, and --mode=eval evaluates it again")
            self.status = stop.exit_status
        else:
            self._report(summarize(self.task, self.step, self._record), evaluation, protocol)

    def evaluate_only(
        self,
        stop: StopSignal,
        change: Callable[[TrainState, Callable[[], None]], TrainState] | None = None,
        name: str | None = None,
    ) -> int:
        """Evaluates the latest checkpoint, or the initial weights where ``init.weights`` names some.

        Args:
          stop: tells when to break off.
          change: what is done with the state first; it gets ``poll``, as of ``Task.evaluate``.
          name: of the folder below ``eval`` that the changed one's results go to.

        Returns:
          The process's exit status.
        """
        self._checkpoints.close()
        protocol, state = self.config.eval.protocol, self.state
        self.state = None  # Who changes it may let go of it.
        try:
            state = change(state, polling(stop, self.step)) if change else state
            evaluation = evaluate(self.task, self.config, state, "test", self.step, stop, protocol)
        except Stopped:
            self.console.line("stopped while evaluating; nothing was written")
            return stop.exit_status
        before = read_json(self.workdir / "summary.json")
        summary = before if before and before.get("step") == self.step else None
        summary = summary or summarize(self.task, self.step, self._record)
        other, names = other_settings(flatten(self.config), read_json(self.workdir / "config.json") or {})
        self._report(summary | other, evaluation, protocol, name or "", *names)
        return 0

    def _report(self, summary: dict[str, Any], evaluation: Evaluation, protocol: str, *names: str) -> None:
        """Writes ``predictions.npz`` and ``summary.json``, and says where they are."""
        if not distributed.leads():
            return
        folder = results_folder(self.workdir, *names, protocol)
        write_results(folder, summary | {"protocol": protocol}, evaluation)
        what = "test" if folder == self.workdir else f"test, {folder.name}"
        self.console.line(f"{what}: {describe(evaluation.metrics)}; wrote {folder}/summary.json")
