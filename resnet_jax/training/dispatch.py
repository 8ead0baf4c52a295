"""How the devices are given their training steps: one by one, or several at once."""

from collections.abc import Callable, Sequence
import itertools
import math
from typing import Any

import jax
import numpy as np

from resnet_jax import distributed, peers
from resnet_jax.config import reads
from resnet_jax.errors import UsageError
from resnet_jax.planning import memory
from resnet_jax.training import members
from resnet_jax.training.profile import Profile
from resnet_jax.training.record import Window
from resnet_jax.training.run import Run
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.state import TrainState


class Dispatch:
    """A task's training step, jitted, and how many of them the devices run without hearing from Python.

    Attributes:
      window: the metrics of the steps that were not looked at yet.
      profile: the trace of some of the steps, where one is asked for.
    """

    def __init__(self, run: Run, mesh: jax.sharding.Mesh, steps: int | None = None, whole_runs: bool = False):
        """Chooses how many steps share a dispatch.

        Args:
          run: what is trained; of several runs, any.
          mesh: the devices.
          steps: how many at once; by default one on CPUs, where loops make convolutions slow, and where data comes
            from files; elsewhere as many as fit between logs, evaluations and checkpoints.
          whole_runs: whether each device works on whole runs (``members``), as it must where there are several.
        """
        self._task, config = run.task, run.config
        self._config, self._mesh, self._whole_runs = config, mesh, whole_runs
        self.window = Window()
        self.profile = Profile(config.profile.steps, run.workdir / "profile", self.window.pause, run.console.line)
        between_events = math.gcd(config.log.every, config.eval.every, config.checkpoint.every)
        usual = 1 if jax.default_backend() == "cpu" else between_events
        self._steps = 1 if self._task.streams else steps or usual
        self._programs: dict[tuple[bool, int], Callable[..., Any]] = {}
        self._called: tuple[Callable[..., Any], Any] | None = None  # What was called last, with which shapes,
        self._kind: Any = None  # and what told it from others.
        self._seeds: tuple[list[int], dict[str, jax.Array]] = ([], {})  # Of the runs called last.

    def _scan(self, state: TrainState, batches: Any, resident: Any):
        return jax.lax.scan(lambda s, batch: self._task.train_step(s, batch, resident), state, batches)

    def _program(self, several: bool, runs: int) -> Callable[..., Any]:
        """The jitted step of so many runs, or of one; of one dispatch's steps where there are several."""
        if (several, runs) not in self._programs:
            step = self._scan if several else self._task.train_step
            step = members.make_members_step(step, self._mesh, runs) if self._whole_runs else step
            jitted = jax.jit(step, donate_argnums=0, out_shardings=distributed.replicated(self._mesh))
            self._programs[several, runs] = jitted
        return self._programs[several, runs]

    def advance(self, runs: Sequence[Run], until: int, stop: StopSignal, meanwhile: Callable[[], None]) -> None:
        """Takes runs from the step that all are at to ``until``, or until a stop is asked for or one has ended.

        Which steps share a dispatch follows from their numbers and the intervals of the config, so that a run that
        is resumed with the same command does the same arithmetic.

        Args:
          runs: their ``state``, ``step`` and ``batches`` move on.
          until: a step.
          stop: tells when to stop.
          meanwhile: called after each dispatch, while the devices are at it.
        """
        step = runs[0].step
        while step < until and all(run.status is None for run in runs) and not stop.asked():
            together = self._steps > 1 and step % self._steps == 0 and step + self._steps <= until
            count = self._steps if together else 1
            with self.profile.dispatch(step, count):
                peers.at(step, "waiting for data")
                try:
                    batch = self._next(runs, count)
                except UsageError as error:  # Data that can't be read.
                    stop.fail(error)
                    break
                peers.at(step, "training")
                shapes = tuple(array.shape for array in jax.tree.leaves(batch))
                kind = (together, len(runs), shapes)  # Each is compiled.
                self.window.start(kind)
                metrics = self._call(self._program(together, len(runs)), runs, batch, kind)
                self.window.add(metrics, count, kind)
                stop.unsaved = True
                if self._task.streams:  # Each step that waits for the device holds a batch in its memory.
                    self.window.wait_for_all_but(self._config.data.prefetch)
                for run in runs:
                    run.step = step + count
                    run.console.advance(run.step)
                meanwhile()
            step += count

    def _next(self, runs: Sequence[Run], count: int) -> dict[str, jax.Array]:
        """The batches of ``count`` steps on the devices: runs first where there are several, then steps likewise."""
        if self._task.streams:
            return self.window.wait_for(runs[0].batches)
        chunks = []
        for run in runs:
            chunk: list[dict[str, np.ndarray]] = list(itertools.islice(run.batches, count))
            chunks.append(chunk[0] if count == 1 else jax.tree.map(lambda *parts: np.stack(parts), *chunk))
        if self._whole_runs:
            return members.stack_members(self._mesh, chunks)
        return distributed.shard_batch(self._mesh, chunks[0], axis=int(count > 1))

    def _call(self, step: Callable[..., Any], runs: Sequence[Run], batch: Any, kind: Any) -> dict[str, jax.Array]:
        if self._whole_runs:
            arguments = ([run.state for run in runs], batch, self._task.resident | self._stacked_seeds(runs))
        else:
            arguments = (runs[0].state, batch, self._task.resident)
        if kind != self._kind:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)
            self._called, self._kind = (step, shapes), kind
        after, metrics = step(*arguments)
        for run, state in zip(runs, after if self._whole_runs else [after], strict=True):
            run.state = state
        return metrics

    def _stacked_seeds(self, runs: Sequence[Run]) -> dict[str, jax.Array]:
        seeds = [run.config.seed for run in runs]
        if seeds != self._seeds[0]:
            own = [{members.SEED: np.uint32(seed)} for seed in seeds]
            self._seeds = seeds, members.stack_members(self._mesh, own)
        return self._seeds[1]

    def what_fits(self, error: Exception) -> str | None:
        """What to do about a step that the devices' memory was too small for; None of another error."""
        if not self._called or not memory.is_out_of_memory(error):
            return None
        if self._whole_runs and self._kind[1] > 1:
            return "so many runs at once are too much for a device; a smaller --seeds_at_once needs less"
        config = self._config
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        parts, norm = config.optimizer.accumulate, config.model.batch_norm
        in_parts = reads(config, "optimizer.accumulate")
        # On CPUs unrolled blocks are merged again with what was to be computed twice.
        scans = config.model.scan == "true" or jax.default_backend() != "cpu"
        remat = reads(config, "model.remat") and not config.model.remat and scans
        return memory.explain(
            error, *self._called, limit, config.batch_size, self._mesh.size, parts, norm, in_parts, remat
        )
