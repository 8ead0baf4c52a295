"""A trace of some training steps, which TensorBoard's profiler and Perfetto open."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import tempfile

import jax

from resnet_jax import distributed
from resnet_jax.buckets import Folder
from resnet_jax.errors import UsageError
from resnet_jax.output import write_files

STEP = "train"  # What a dispatch of steps is called in the trace; its ``step_num`` is the number of its first one.


class Profile:
    """Traces the steps of ``profile.steps`` on process 0, once, and not the first dispatch of a process: it compiles.

    Dispatches are traced whole: where the devices run many steps at once, those around the ones asked for too. A trace
    that can't be made or written costs a warning, not the run.
    """

    def __init__(self, steps: str, folder: Folder, pause: Callable[[], None], say: Callable[[str], None]):
        """Nothing is traced yet.

        Args:
          steps: the first and the last one, counted from 1, as ``10:15``; empty: none.
          folder: where the trace goes.
          pause: waits for the devices, and takes the time that follows for none of the training's.
          say: tells people something.
        """
        first, _, last = steps.partition(":")
        self._first, self._last = int(first or 0), int(last or 0)
        self._folder, self._pause, self._say = folder, pause, say
        self._wanted: bool | None = None if steps and distributed.leads() else False  # None before the first dispatch.
        self._trace: tempfile.TemporaryDirectory | None = None
        self._traced = (0, 0)

    @contextlib.contextmanager
    def dispatch(self, step: int, count: int) -> Iterator[None]:
        """Around the dispatch of ``count`` steps that follow ``step``."""
        first, last = step + 1, step + count
        if self._wanted is None:
            self._wanted = first <= self._last
        elif self._wanted and not self._trace and last >= self._first:
            self._open(first)
        if not self._trace:
            yield
            return
        with jax.profiler.StepTraceAnnotation(STEP, step_num=first):
            yield
        self._traced = (self._traced[0], last)
        if last >= self._last:
            self._pause()
            self.close()

    def _open(self, first: int) -> None:
        self._pause()
        self._wanted, self._traced = False, (first, first)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Every call of Python would crowd out the devices' own events.
        trace = tempfile.TemporaryDirectory(prefix="resnet_jax_profile_", ignore_cleanup_errors=True)
        with self._warning():
            jax.profiler.start_trace(trace.name, create_perfetto_trace=True, profiler_options=options)
            self._trace = trace

    def close(self) -> None:
        """Writes what has been traced, if a trace is being made; says so if no step of those asked for was run."""
        if not self._trace:
            if self._wanted:
                self._say(f"warning: no profile: steps {self._first} to {self._last} were not run after the first ones")
            self._wanted = False
            return
        trace, self._trace = self._trace, None
        with trace, self._warning():
            jax.profiler.stop_trace()
            root = pathlib.Path(trace.name)
            files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            write_files(self._folder, files)
            self._say("profile of steps {} to {}: {}".format(*self._traced, self._folder))

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError, UsageError) as error:  # JAX's are RuntimeErrors.
            self._say(f"warning: no profile ({' '.join(str(error).split())}); training goes on")
