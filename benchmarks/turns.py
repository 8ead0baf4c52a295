"""How contenders are measured beside each other: in turns, in one run, after their results were found right."""

from collections.abc import Callable, Mapping, Sequence
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from typing import Any, NamedTuple

_TRIED = 2  # Calls by which it is estimated how many a turn has; the first may wait for what went before.


class Contender(NamedTuple):
    """Who does the work.

    Attributes:
      name: as tables say it.
      call: does the work once, or has a device begin with it; None of who ``reports``.
      wait: returns when all that was begun is done.
      reports: works for a turn and says how many seconds a piece took, where that can't be seen from here.
      pieces: of work that a call does.
    """

    name: str
    call: Callable[[], Any] | None
    wait: Callable[[], Any] = lambda: None
    reports: Callable[[], float] | None = None
    pieces: int = 1


class Row(NamedTuple):
    """A measured piece of work: seconds that it takes each contender, turn by turn; ``images`` where images count.

    ``cpu`` are those that all cores spent on it.
    """

    what: str
    images: int
    turns: dict[str, list[float]]
    cpu: dict[str, list[float]]


def work(contender: Contender, calls: int) -> tuple[float, float]:
    """Seconds a piece of work takes by the clock, and of all cores together."""
    if contender.reports:
        return contender.reports(), 0.0
    begun, spent = time.perf_counter(), time.process_time()
    for _ in range(calls):
        contender.call()
    contender.wait()
    pieces = calls * contender.pieces
    return (time.perf_counter() - begun) / pieces, (time.process_time() - spent) / pieces


def measure(what: str, contenders: Sequence[Contender], repeats: int, seconds: float, images: int = 0) -> Row:
    """Lets contenders take turns.

    Args:
      what: the work.
      contenders: who does it; each has been called before: compiled and warm.
      repeats: turns of each.
      seconds: a turn has as many calls as fit in about so long, one at least.
      images: that a piece of work is about; 0 where they don't count.
    """
    turns: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    calls: dict[str, int] = {}
    for _ in range(repeats):
        for contender in contenders:
            name = contender.name
            if name not in calls:
                tried = min(work(contender, 1)[0] for _ in range(_TRIED)) if seconds and contender.call else 0
                calls[name] = max(1, round(seconds / (tried * contender.pieces))) if tried else 1
            wall, own = work(contender, calls[name])
            turns[name].append(wall)
            cpu[name].append(own)
    middle = {name: [1e3 * statistics.median(seconds[name]) for seconds in (turns, cpu)] for name in turns}
    found = ", ".join(f"{name} {wall:.1f} ms (CPU {own:.1f})" for name, (wall, own) in middle.items())
    print(f"{what}: {found}", file=sys.stderr, flush=True)
    return Row(what, images, turns, cpu)


def require(right: bool, message: str) -> None:
    """Ends the program: wrong results are not measured."""
    if not right:
        print(f"WRONG: {message}", file=sys.stderr)
        sys.exit(1)


def figure(value: float) -> str:
    """A number in three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def spread(values: Sequence[float]) -> str:
    """Median (least-most), in three digits."""
    middle, least, most = map(figure, (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


def ratios(row: Row, ours: str, theirs: str) -> list[float]:
    """How many times as fast ``ours`` is, turn by turn."""
    return [other / mine for mine, other in zip(row.turns[ours], row.turns[theirs], strict=True)]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def contender_table(row: Row, ours: str, costs: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Markdown: a line for each contender of one piece of work.

    Args:
      row: what was measured.
      ours: with whom the others are compared.
      costs: further cells of those that have them, by name.
      columns: what these are.
    """
    head = ["", "images/s", "ms a batch", f"{ours} is so many times as fast", *columns]
    lines = []
    for name, turns in row.turns.items():
        compared = "1" if name == ours else spread(ratios(row, ours, name)) if ours in row.turns else "-"
        rates = spread([row.images / seconds for seconds in turns])
        milliseconds = figure(1e3 * statistics.median(turns))
        lines.append([name, rates, milliseconds, compared, *costs.get(name, ["-"] * len(columns))])
    return markdown(head, lines)


def versions(packages: Sequence[str]) -> str:
    """Machine, versions of what is installed of ``packages``, date and load."""
    from importlib import metadata

    import jax

    installed = [package for package in packages if importlib.util.find_spec(package.replace("-", "_"))]
    found = ", ".join(f"{package} {metadata.version(package)}" for package in installed)
    accelerator = "" if jax.default_backend() == "cpu" else f"{jax.devices()[0].device_kind}, "
    cores = len(os.sched_getaffinity(0))
    processor = platform.processor() or platform.machine()
    return (
        f"{accelerator}{processor}, {cores} cores (load {os.getloadavg()[1]:.1f}); Python {platform.python_version()},"
        f" {found}; {datetime.date.today()}"
    )


def command() -> str:
    """The command line, as tables name it."""
    return shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])


def report(
    said: str, machine: str, table: str, notes: Sequence[str], path: str | None, content: Mapping[str, Any]
) -> None:
    """Prints the table with what one needs to trust it, and writes all turns to ``path`` where there is one."""
    print(f"`{command()}`: {said}\n{machine}.\n\n{table}\n")
    print("\n".join(f"- {note}" for note in notes), flush=True)
    if path:
        content = {"command": command(), "versions": machine, "notes": list(notes), **content}
        pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n")


def torch_device(backend: str) -> tuple[str, str]:
    """torch's name of JAX's ``backend`` (``cpu``, ``cuda``), set up to be fast; or "", and why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "", "is not installed"
    import torch

    device = {"cpu": "cpu", "gpu": "cuda"}.get(backend, "")
    if not device or (device == "cuda" and not torch.cuda.is_available()):
        return "", f"sees no {backend}"
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, as JAX's default.
    return device, ""


def share_the_machine() -> None:
    """Settings for JAX and torch side by side in one process; before either starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too.
    # Where cores are shared, torch's threads that spin while they wait make it five times as slow as it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
