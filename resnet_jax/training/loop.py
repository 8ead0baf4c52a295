"""The training loop: knows a task and not which one."""

from collections.abc import Sequence

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
    that ends before the others, as by diverging, is trained no more.
    """

    def __init__(self, runs: Sequence[Run], mesh: jax.sharding.Mesh, steps_per_dispatch: int | None = None):
        """Gets ready.

        Args:
          runs: opened.
          mesh: the devices, in force (``jax.set_mesh``).
          steps_per_dispatch: steps that the devices run without hearing from Python; see ``Dispatch``.
        """
        self._runs = runs
        first, self._devices = runs[0], mesh.size
        self._dispatch = Dispatch(first.task, first.config, mesh, first.console, steps_per_dispatch, first.workdir)
        self._group: list[Run] = []  # Those that made the steps that were not taken in yet,
        self._taken = 0  # the last one that was,
        self._due: int | None = None  # and the one whose log line is to be written.

    def run(self, stop: StopSignal) -> int:
        """Trains until the end, or until asked to stop; the same call goes on from there.

        Returns:
          The exit status of the first run that has one other than 0, or 0.
        """
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
        finally:
            self._dispatch.profile.close()
            for run in self._runs:
                run.close()
        return self._status()

    def _status(self) -> int:
        return next((run.status for run in self._runs if run.status), 0)

    def _begin(self) -> None:
        going = [run for run in self._runs if run.begin()]
        if going and not min(run.step for run in going):
            first = going[0]
            what = first.task.name if len(going) == 1 else f"{len(going)} times {first.task.name}"
            first.console.line(
                f"training {what} ({first.task.parameters:,} parameters) for {first.task.total_steps} steps of"
                f" {first.task.examples_per_step} images on {self._devices} {jax.devices()[0].device_kind}"
            )

    def _going(self) -> list[Run]:
        return [run for run in self._runs if run.status is None]

    def _train(self, stop: StopSignal) -> None:
        self._look(stop)  # At what was stopped between a step and its evaluation.
        while going := self._going():
            step = min(run.step for run in going)
            group = [run for run in going if run.step == step]
            if group != self._group:
                self._take_in()
                self._group, self._taken = group, step
            self._save([run for run in group if run.checkpoint_due])
            if self._going() != going:
                continue
            config, end = group[0].config, group[0].task.total_steps
            logged = _next_multiple(step, config.log.every, end)
            events = (config.eval.every, config.checkpoint.every)
            until = min([logged, *(_next_multiple(step, every, end) for every in events)]
                        + [run.step for run in going if run.step > step])  # fmt: skip
            self._dispatch.advance(self._group, until, stop, self._log)
            if group[0].step in (logged, end):
                self._due = group[0].step
            stop.poll()
            self._look(stop)

    def _look(self, stop: StopSignal) -> None:
        """Evaluates those that are to be, and finishes those that are trained."""
        for run in self._going():
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
            self._take(self._group[0].step)

    def _log(self) -> None:
        """Writes the log line that is due: while the devices are at the next steps, so that none waits for it."""
        if self._due is None:
            return
        step, self._due = self._due, None
        self._take(step)
        for run in self._group:
            if run.status is None:
                run.log(step)

    def _take(self, step: int) -> None:
        found = self._dispatch.window.take(step - self._taken, len(self._group))
        self._taken = step
        for run, taken in zip(self._group, found, strict=True):
            if run.status is None:
                with run.own_end():
                    run.take_in(step, taken)

    def _save(self, runs: Sequence[Run]) -> None:
        """Saves those of the group; only finite states are saved."""
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
        stopped = not isinstance(reason, UsageError) or stop.asked()
        for run in self._going():
            with run.own_end():
                saved = run.leave()
                run.console.line(
                    f"stopped by {stop.reason} and {saved}; the same command resumes" if stopped else saved
                )
        if not stopped:
            raise reason  # Of the data: what is trained so far is none the worse.
        return self._status() or stop.exit_status
