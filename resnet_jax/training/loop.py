"""The training loop: knows a task and not which one."""

from collections.abc import Sequence
import contextlib

import jax

from resnet_jax import peers
from resnet_jax.errors import UsageError
from resnet_jax.training.dispatch import Dispatch
from resnet_jax.training.run import Run
from resnet_jax.training.signals import Stopped, StopSignal


def _next_multiple(step: int, every: int, end: int) -> int:
    return min(end, (step // every + 1) * every) if every else end


class Training:
    """Trains runs to their end: one, or several at once that differ in the seed alone.

    Several share each step's program. Those that are behind, as after a stop between two saves, catch up first; one
    that ends before the others, as by diverging, is trained no more. How many share a program shows in rounding alone.

    A log line is written once the devices have their next steps, so that they never wait for it.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        mesh: jax.sharding.Mesh,
        steps_per_dispatch: int | None = None,
        whole_runs: bool = False,
    ):
        """Chooses how the devices are given their steps.

        Args:
          runs: those to be trained.
          mesh: the devices, in force (``jax.set_mesh``).
          steps_per_dispatch: steps that the devices run without hearing from Python; see ``Dispatch``.
          whole_runs: whether each device works on whole runs instead of a share of each batch; needed for several.
        """
        self._runs, self._mesh = runs, mesh
        self._dispatch = Dispatch(runs[0], mesh, steps_per_dispatch, whole_runs)
        self._group: list[Run] = []  # Those that made the steps which are not taken in yet,
        self._taken = 0  # the last one that is,
        self._due: int | None = None  # and the one whose log line is to be written.

    def run(self, stop: StopSignal) -> int:
        """Trains until the end, or until asked to stop; the same call goes on from there.

        Returns:
          The exit status: of a stop, if runs were stopped that can go on; else of the first run that has one other
          than 0.
        """
        with contextlib.ExitStack() as ends:
            for run in self._runs:
                ends.callback(run.close)
            ends.callback(self._dispatch.profile.close)
            try:
                self._begin()
                try:
                    self._train(stop)
                except (Stopped, UsageError) as reason:
                    return self._leave(reason, stop)
            except jax.errors.JaxRuntimeError as error:
                advice = self._dispatch.what_fits(error)
                if advice is None:
                    raise
                raise UsageError(f"out of memory: {advice}") from error
        return self._status()

    def _status(self) -> int:
        return next((run.status for run in self._runs if run.status), 0)

    def _going(self) -> list[Run]:
        return [run for run in self._runs if run.status is None]

    def _begin(self) -> None:
        going = [run for run in self._runs if run.begin()]
        if going and not min(run.step for run in going):
            first = going[0]
            what = first.task.name if len(going) == 1 else f"{len(going)} runs of {first.task.name} at once"
            first.console.line(
                f"training {what} ({first.task.parameters:,} parameters) for {first.task.total_steps} steps of"
                f" {first.task.examples_per_step} images on {self._mesh.size} {jax.devices()[0].device_kind}"
            )

    def _train(self, stop: StopSignal) -> None:
        self._look_at(self._going(), stop)  # What was stopped between a step and its evaluation.
        while going := self._going():
            step = min(run.step for run in going)
            self._gather([run for run in going if run.step == step])
            self._save([run for run in self._group if run.checkpoint_due()])
            if self._going() != going:
                continue
            config, end = going[0].config, going[0].task.total_steps
            logged = _next_multiple(step, config.log.every, end)
            events = (_next_multiple(step, every, end) for every in (config.eval.every, config.checkpoint.every))
            ahead = (run.step for run in going if run.step > step)
            self._dispatch.advance(self._group, min(logged, *events, *ahead), stop, self._log)
            if self._group[0].step in (logged, end):
                self._due = self._group[0].step
            stop.poll()
            self._look_at(self._going(), stop)

    def _gather(self, group: list[Run]) -> None:
        """Makes these the runs that make the next steps; the first one shows people how it goes on."""
        if group == self._group:
            return
        self._take_in()
        for run in self._runs:
            run.console.close()
        group[0].console.start(group[0].step)
        self._group, self._taken = group, group[0].step

    def _look_at(self, runs: Sequence[Run], stop: StopSignal) -> None:
        """Evaluates those that are to be, and finishes those that are trained."""
        for run in runs:
            if run.evaluation_due or run.trained:
                self._take_in()
                self._dispatch.window.pause()
            with run.own_end():
                if run.status is None and run.evaluation_due:
                    run.evaluate(stop)
                if run.status is None and run.trained:
                    run.finish(stop)

    def _take_in(self) -> None:
        """Waits for the steps made so far, writes what is to be logged of them and takes in the rest."""
        self._log()
        if self._group:
            self._take_in_up_to(self._group[0].step)

    def _log(self) -> None:
        """Writes the log line that is due."""
        if self._due is None:
            return
        step, self._due = self._due, None
        self._take_in_up_to(step)
        for run in self._group:
            if run.status is None:
                run.log(step)

    def _take_in_up_to(self, step: int) -> None:
        found = self._dispatch.window.take(step - self._taken, len(self._group))
        self._taken = step
        for run, taken in zip(self._group, found, strict=True):
            if run.status is None:
                with run.own_end():
                    run.take_in(step, taken)

    def _save(self, runs: Sequence[Run]) -> None:
        """Saves these runs, none of whose states is not finite."""
        if runs:
            self._take_in()
            self._dispatch.window.pause()
        for run in runs:
            if run.status is None:
                with run.own_end():
                    run.save()

    def _leave(self, reason: Exception, stop: StopSignal) -> int:
        """Saves all runs because of a stop, or of data that can't be read; returns the exit status."""
        if isinstance(reason, UsageError) and peers.peers():
            raise reason  # This process's own: the others would not save with it.
        # An evaluation broken off is made up for when the run goes on: its step is not in the record.
        self._take_in()
        self._save(self._going())  # All, before one is waited for: time may be short.
        for run in self._going():
            with run.own_end():
                saved, asked = run.saved(), stop.asked()
                by = f"stopped by {stop.reason} and {saved}; the same command resumes"
                run.console.line(by if asked else saved)
        if isinstance(reason, UsageError) and not stop.asked():
            raise reason  # Of the data: what is trained so far is none the worse.
        return stop.exit_status if self._going() else self._status() or stop.exit_status
