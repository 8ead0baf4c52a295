"""The training loop: knows a task and not which one."""

from collections.abc import Callable
import contextlib
import dataclasses
from functools import partial
import pathlib
import time
from typing import Any

import jax
import ml_collections

from resnet_jax import distributed, peers
from resnet_jax.config import flatten
from resnet_jax.errors import UsageError
from resnet_jax.training.checkpoints import Checkpoints, SaveFailed
from resnet_jax.training.dispatch import Dispatch
from resnet_jax.training.evaluate import evaluate, polling
from resnet_jax.training.metrics import Console, MetricsWriter
from resnet_jax.training.prefetch import Prefetch
from resnet_jax.training.record import Diverged, Record
from resnet_jax.training.results import describe, other_settings, summarize, write_results
from resnet_jax.training.signals import Stopped, StopSignal
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation, Task
from resnet_jax.training.workdir import CENTER, read_json, results_folder

EXIT_DIVERGED = EXIT_NOT_SAVED = 1


def _next_multiple(step: int, every: int, end: int) -> int:
    return min(end, (step // every + 1) * every) if every else end


class Training:
    """One run of a task in a work directory: resumes, trains, evaluates, saves, reports."""

    def __init__(
        self,
        task: Task,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        mesh: jax.sharding.Mesh,
        steps_per_dispatch: int | None = None,
        write: bool = True,
        stop: StopSignal | None = None,
    ):
        """Opens the run.

        Args:
          task: what is trained.
          config: the whole config.
          workdir: an existing folder.
          mesh: the devices, in force (``jax.set_mesh``).
          steps_per_dispatch: steps that the devices run without hearing from Python; see ``Dispatch``.
          write: false where the run is only evaluated.
          stop: tells when to stop, in force already; made here where not given.
        """
        self._task, self._config, self._workdir, self._mesh = task, config, workdir, mesh
        self._console = Console(task.total_steps, quiet=not distributed.leads())
        self._checkpoints = Checkpoints(workdir, config.checkpoint.keep, write, self._console.line)
        self._dispatch = Dispatch(task, config, mesh, self._console, steps_per_dispatch, workdir)
        self._window = self._dispatch.window
        self._saved_at = time.monotonic()
        self._stop = stop
        self._rate = 0.0  # Steps a second in the last window,
        self._wait = 0.0  # and the share of the time that they waited for data, %.
        self._last: Evaluation | None = None  # Of the validation split; at the end, the final state's.

    def run(self) -> int:
        """Trains to the end, or until asked to stop; the same call goes on from there.

        Returns:
          The process's exit status.
        """
        state, step, record = self._resume()
        if self._finished(step, record.stopped):
            return 0
        self._writer = MetricsWriter(
            self._workdir if distributed.leads() else None, step, self._config.log.tensorboard, record.evaluated == step
        )
        self._console.start(step)
        self._started = time.monotonic() - record.seconds
        try:
            with self._signals() as stop:
                return self._train(state, step, record, stop)
        except Diverged as error:
            latest = self._checkpoints.latest
            where = f"the last good checkpoint is {self._workdir}/checkpoints/{latest}"
            self._console.line(f"stopped: diverged at {error}; {where if latest else 'no checkpoint was saved yet'}")
            return EXIT_DIVERGED
        except SaveFailed as error:
            self._console.line(f"error: {error}")
            return EXIT_NOT_SAVED
        except jax.errors.JaxRuntimeError as error:
            advice = self._dispatch.what_fits(error)
            if advice is None:
                raise
            raise UsageError(f"out of memory: {advice}") from error
        finally:
            self._dispatch.profile.close()
            self._console.close()
            self._writer.close()
            self._checkpoints.close()

    def evaluate_only(
        self, change: Callable[[TrainState, Callable[[], None]], TrainState] | None = None, name: str | None = None
    ) -> int:
        """Evaluates the latest checkpoint, or the initial weights where ``init.weights`` names some.

        Args:
          change: what is done with the state first; it gets ``poll``, as of ``Task.evaluate``.
          name: of the folder below ``eval`` that the changed one's results go to.
        """
        state, step, record = self._resume()
        self._checkpoints.close()
        protocol = self._config.eval.protocol
        with self._signals() as stop:
            try:
                state = change(state, polling(stop, step)) if change else state
                evaluation = evaluate(self._task, self._config, state, "test", step, stop, protocol)
            except Stopped:
                self._console.line("stopped while evaluating; nothing was written")
                return stop.exit_status
        before = read_json(self._workdir / "summary.json")
        summary = before if before and before.get("step") == step else summarize(self._task, step, record)
        other, names = other_settings(flatten(self._config), read_json(self._workdir / "config.json") or {})
        self._report(summary | other, evaluation, protocol, name or "", *names)
        return 0

    def _signals(self) -> contextlib.AbstractContextManager[StopSignal]:
        return contextlib.nullcontext(self._stop) if self._stop else StopSignal()

    def _resume(self) -> tuple[TrainState, int, Record]:
        state = self._task.initial_state()
        found = self._checkpoints.restore(state)
        if found is None:
            return state, 0, Record()
        state, step, record = found
        return state, step, Record(**record)

    def _finished(self, step: int, stopped: bool) -> bool:
        summary = read_json(self._workdir / "summary.json")
        ended = step >= self._task.total_steps or stopped
        if distributed.from_leader(ended and bool(summary) and summary.get("step") == step):
            if distributed.leads():
                self._console.line(f"{self._workdir} is finished: step {step}, {describe(summary)}")
            return True
        if step:
            self._console.line(f"resuming from step {step}")
        return False

    def _train(self, state: TrainState, step: int, record: Record, stop: StopSignal) -> int:
        config, end = self._config, self._task.total_steps
        if not step:
            self._console.line(
                f"training {self._task.name} ({self._task.parameters:,} parameters) for {end} steps of"
                f" {self._task.examples_per_step} images on {self._mesh.size} {jax.devices()[0].device_kind}"
            )
        batches = self._task.batches(step)
        if self._task.streams:
            batches = Prefetch(batches, partial(distributed.shard_batch, self._mesh), config.data.prefetch)
        try:
            improved = False
            if self._evaluation_due(step) and step != record.evaluated:  # Stopped between a step and its evaluation.
                state, improved = self._evaluate(state, step, record, stop)
            while step < end and not record.stopped:
                if improved or self._checkpoint_due(step):
                    self._save(state, step, record)
                logged = _next_multiple(step, config.log.every, end)
                events = (config.eval.every, config.checkpoint.every)
                until = min(logged, *(_next_multiple(step, every, end) for every in events))
                state, step = self._dispatch.advance(state, step, until, batches, stop)
                improved = False
                if step in (logged, end):
                    self._log(step, record)
                stop.poll()
                if self._evaluation_due(step):
                    self._take_in(step, record)
                    state, improved = self._evaluate(state, step, record, stop)
            self._save(state, step, record)
            evaluation = self._last if self._task.validation == "test" else None
            evaluation = evaluation or evaluate(self._task, config, state, "test", step, stop)
        except (Stopped, UsageError) as reason:
            if isinstance(reason, UsageError) and peers.peers():
                raise  # This process's own: the others would not save with it.
            # An evaluation broken off is made up for when the run goes on: its step is not in the record.
            step = int(state.step)
            if step:
                self._save(state, step, record)
                self._checkpoints.wait()
            if isinstance(reason, UsageError) and not stop.asked():
                # Of the data: what is trained so far is none the worse.
                self._console.line(f"saved at step {step}" if step else "nothing was trained yet")
                raise
            self._console.line(f"stopped by {stop.reason} and saved at step {step}; the same command resumes")
            return stop.exit_status
        finally:
            if self._task.streams:
                batches.close()
        self._checkpoints.wait()
        record.seconds = time.monotonic() - self._started
        self._report(summarize(self._task, step, record), evaluation, CENTER)
        if config.eval.protocol != CENTER:
            return self._evaluate_besides(state, step, record, stop)
        return 0

    def _evaluate_besides(self, state: TrainState, step: int, record: Record, stop: StopSignal) -> int:
        """Evaluates by ``eval.protocol`` what has been trained, evaluated and saved."""
        protocol = self._config.eval.protocol
        try:
            evaluation = evaluate(self._task, self._config, state, "test", step, stop, protocol)
        except Stopped:
            self._console.line(f"stopped in {protocol}; the run is whole, and --mode=eval evaluates it again")
            return stop.exit_status
        self._report(summarize(self._task, step, record), evaluation, protocol)
        return 0

    def _take_in(self, step: int, record: Record) -> None:
        """Waits for the steps up to ``step`` and takes in their metrics; raises ``Diverged``."""
        per_step, seconds, timed, waited = self._window.take()
        for number, metrics in enumerate(per_step, start=step - len(per_step) + 1):
            epoch = (number - 1) * self._task.examples_per_step // self._task.examples_per_epoch
            record.take_in(number, epoch, metrics)
        record.timed_seconds += seconds
        record.timed_steps += timed
        record.waited_seconds += waited
        record.broken |= self._task.broken
        record.seconds = time.monotonic() - self._started
        if timed:
            self._rate, self._wait = timed / seconds, 100 * waited / seconds

    def _log(self, step: int, record: Record) -> None:
        """Writes the averages since the last log, and shows them."""
        self._take_in(step, record)
        rate = self._rate
        values = record.take_window() | {
            "epoch": step * self._task.examples_per_step / self._task.examples_per_epoch,
            "images_per_second": rate * self._task.examples_per_step,
            "seconds_per_step": 1 / rate if rate else 0.0,
            "seconds": record.seconds,
        }
        if self._task.streams:
            values |= {"data_wait_percent": self._wait, "broken_images": len(record.broken)}
        self._writer.write(step, values)
        self._console.progress(step, values["epoch"], values)

    def _evaluation_due(self, step: int) -> bool:
        every = self._config.eval.every
        return step > 0 and (step == self._task.total_steps or (bool(every) and step % every == 0))

    def _evaluate(self, state: TrainState, step: int, record: Record, stop: StopSignal) -> tuple[TrainState, bool]:
        """Evaluates the validation split; returns the state after it, and whether it is the best so far."""
        self._window.pause()
        evaluation = self._last = evaluate(self._task, self._config, state, self._task.validation, step, stop)
        figure, sign = evaluation.metrics.get(self._task.objective), self._task.sign
        self._writer.write(step, {f"{self._task.validation}_{name}": v for name, v in evaluation.metrics.items()})
        self._console.line(f"step {step}  {self._task.validation}: {describe(evaluation.metrics)}")
        record.evaluated = step
        if figure is None:  # Nothing to judge by: a test set whose answers are kept secret.
            return state, False
        improved = record.best is None or sign * figure < sign * record.best
        record.stale = 0 if improved else record.stale + 1
        if improved:
            record.best, record.best_step = figure, step
        elif record.stale == self._config.eval.patience:
            record.stopped = True
            self._console.line(f"stopping early: {record.stale} evaluations no better than {record.best:.2f}%")
        return self._task.after_evaluation(state, sign * figure), improved

    def _checkpoint_due(self, step: int) -> bool:
        every, minutes = self._config.checkpoint.every, self._config.checkpoint.minutes
        if not step:
            return False
        if every and step % every == 0:
            return True
        return bool(minutes) and bool(distributed.from_leader(time.monotonic() - self._saved_at > 60 * minutes))

    def _save(self, state: TrainState, step: int, record: Record) -> None:
        """Saves ``step`` unless it is saved already."""
        if step == self._checkpoints.latest:
            return
        self._take_in(step, record)  # Only finite states are saved.
        self._window.pause()
        self._checkpoints.save(state, step, dataclasses.asdict(record), record.best_step)
        self._writer.flush()  # A run that goes on from there finds its records up to there.
        self._saved_at = time.monotonic()

    def _report(self, summary: dict[str, Any], evaluation: Evaluation, protocol: str, *names: str) -> None:
        """Writes ``predictions.npz`` and ``summary.json``, and says where they are."""
        if not distributed.leads():
            return
        folder = results_folder(self._workdir, *names, protocol)
        write_results(folder, summary | {"protocol": protocol}, evaluation)
        what = "test" if folder == self._workdir else f"test, {folder.name}"
        self._console.line(f"{what}: {describe(evaluation.metrics)}; wrote {folder}/summary.json")
