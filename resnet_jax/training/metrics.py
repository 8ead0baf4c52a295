"""What a run tells: metrics.jsonl, TensorBoard, and lines or a progress bar for the person who watches."""

import contextlib
import datetime
import io
import json
import os
import pathlib
import sys
from typing import Any

import tqdm

from resnet_jax.buckets import Folder, GrowingFiles, exists, in_bucket
from resnet_jax.errors import UsageError
from resnet_jax.output import write_whole


def _summary_writer() -> type:
    """tensorboardX's writer, imported without torch, which it takes seconds to import where it is installed."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


class Log:
    """A file that grows; what a full disk refuses is told of once, kept, and written when there is space again."""

    def __init__(self, file: io.RawIOBase):
        """Goes on writing at the end of an open, unbuffered file."""
        self._file, self._waiting, self._told = file, b"", False

    def write(self, data: bytes) -> None:
        """Adds to what the next ``flush`` writes."""
        self._waiting += data

    def flush(self) -> None:
        """Writes what waits, or as much of it as there is space for."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._told = False
        except OSError as error:
            if not self._told:
                print(f"warning: {self._file.name}: can't be written ({error.strerror}); training goes on, and what is"
                      " missing there is written once that is possible", file=sys.stderr, flush=True)  # fmt: skip
            self._told = True

    def close(self) -> None:
        """Writes what it can."""
        self.flush()
        with contextlib.suppress(OSError):
            self._file.close()


def _open_events(folder: str, purge_step: int) -> Any:
    """A SummaryWriter whose thread outlives a full disk: else it dies of it, and who adds scalars waits for ever."""
    events = _summary_writer()(folder, purge_step=purge_step)
    if hasattr(events, "file_writer"):
        writer = events.file_writer.event_writer._ev_writer
        with writer._lock:
            writer._py_recordio_writer._writer = Log(writer._py_recordio_writer._writer.detach())
    return events


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and, if asked, TensorBoard events; each record has its step.

    Buckets get them with a delay of up to half a minute; ``flush`` and ``close`` make up for it.
    """

    def __init__(self, workdir: Folder | None, first_step: int, tensorboard: bool, evaluated: bool = True):
        """Opens the logs and cuts back what an earlier run wrote after ``first_step``.

        Args:
          workdir: where ``metrics.jsonl`` is; None where another process writes it.
          first_step: the step that the run goes on from.
          tensorboard: whether to write events too.
          evaluated: whether the evaluation of ``first_step`` counts; if not, its record is cut as well.

        Raises:
          UsageError: they can't be written.
        """
        self._file = self._events = self._copies = None
        if workdir is None:
            return
        path = workdir / "metrics.jsonl"
        kept = []
        if exists(path):
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    at = record["step"]
                except (ValueError, TypeError, KeyError):  # The last line of a run that was killed while it wrote.
                    continue
                known = at < first_step or evaluated or "learning_rate" in record
                if at <= first_step and known:
                    kept.append(line + "\n")
        try:
            self._copies = GrowingFiles(workdir) if in_bucket(workdir) else None
            folder = self._copies.folder if self._copies else pathlib.Path(workdir)
            write_whole(folder / path.name, lambda file: file.write("".join(kept).encode()))
            self._file = Log((folder / path.name).open("ab", buffering=0))
            if tensorboard:
                self._events = _open_events(str(folder), first_step + 1)
        except OSError as error:
            raise UsageError(f"--workdir={workdir}: can't be written ({error.strerror or error})") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one record."""
        if self._file is None:
            return
        self._file.write(f"{json.dumps({'step': step, **values})}\n".encode())
        self._file.flush()
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Has a bucket catch up soon with what was written; files of this machine are always up to date."""
        if self._copies:
            if self._events:
                self._events.flush()
            self._copies.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()
        if self._copies:
            self._copies.close()


class Console:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, quiet: bool = False, name: str = ""):
        """Counts to ``total_steps``.

        Args:
          total_steps: see there.
          quiet: where another process speaks.
          name: what each line begins with, where several runs speak.
        """
        self._total, self._quiet, self._watched = total_steps, quiet, False
        self._name = name and f"{name}: "
        self._bar = None

    def start(self, step: int) -> None:
        """Begins to show the progress, from ``step``."""
        self._watched = not self._quiet
        # A terminal that doesn't know its width would show nothing of a bar.
        if self._watched and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:
            form = "{percentage:3.0f}%|{bar:10}| {n}/{total}, {remaining} left{postfix}"
            self._bar = tqdm.tqdm(
                total=self._total, initial=step, dynamic_ncols=True, smoothing=0.1, leave=False, bar_format=form
            )

    def line(self, text: str) -> None:
        """Prints a line (above the bar)."""
        if self._quiet:
            return
        with tqdm.tqdm.external_write_mode():  # Above a bar, whichever run's.
            print(f"{self._name}{text}", flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def progress(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Shows the training's metrics: ``loss``, ``top1_error`` where there is one, and ``images_per_second``."""
        if not self._watched:
            return
        shown = [f"loss {values['train_loss']:.4f}"]
        if "train_top1_error" in values:
            shown.append(f"error {values['train_top1_error']:.2f}%")
        speed = f"{values['images_per_second']:,.0f} images/s"
        if "data_wait_percent" in values:
            speed += f", {values['data_wait_percent']:.0f}% waiting for data"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*shown, speed]))
            return
        shown += [f"rate {values['learning_rate']:.4g}", speed]
        if values["seconds_per_step"]:
            shown.append(f"ETA {datetime.timedelta(seconds=round((self._total - step) * values['seconds_per_step']))}")
        self.line(f"step {step}/{self._total}  epoch {epoch:.1f}  {'  '.join(shown)}")

    def close(self) -> None:
        """Shows the progress no more."""
        self._watched = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None
