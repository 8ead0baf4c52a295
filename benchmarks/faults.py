"""Kills and stops a run of several processes again and again, and compares what comes out with a run left in peace.

    python benchmarks/faults.py
    python benchmarks/faults.py --rounds=100 --processes=4 --seed=1 --output=faults

A tiny network learns scikit-learn's digits, with checkpoints, evaluations and logs every few steps. First a run that
nothing happens to; then one of the same config that is struck at a random moment in each round: while it starts,
trains, saves (in the background) or evaluates, by SIGTERM or SIGKILL, all processes at once or one of them alone. Each
round is the same command again. After the last round the run goes on to its end. Then both must be the same, bit for
bit, and every process must have ended in time, with the exit status that it should. Prints a table of Markdown; ends
with 1 if anything was wrong. Processes log to the output folder, where there is one for each round.
"""

import argparse
import collections
from collections.abc import Iterator, Sequence
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = pathlib.Path(__file__).with_name("fault_process.py")

# Everything that a state can hold is in use: momentum, averaged weights, plateau's memory, the best evaluation.
CONFIG = """
from resnet_jax.config import load_config

def get_config():
    config = load_config("digits_20")
    config.model.name = "tiny"
    config.batch_size = 64
    config.data.holdout = 200
    config.epochs, config.steps = 0.0, {steps}
    config.optimizer.ema = 0.9
    config.schedule.name = "plateau"
    config.schedule.learning_rate = 0.05
    config.schedule.warmup_steps = 5
    config.schedule.patience = 10
    config.eval.every = 12
    config.eval.batch_size = 40
    config.checkpoint.every = 8
    config.log.every = 4
    config.log.tensorboard = False
    return config
"""
# Steps from where a round goes on to where it is struck: at least two saves and an evaluation lie between.
MOST_STEPS = 24
DONE, LOST, PREEMPTED = 0, 69, 75
PEER_SECONDS = 5
# Seconds within which every process has ended,
STOP_SECONDS = 30  # after SIGTERM,
LOST_SECONDS = PEER_SECONDS + 20  # and after the death of another.
RUN_SECONDS = 600
# The longest delays into a phase; while saving and evaluating last, shorter ones follow if they were too long.
DELAYS = {"training": 0.05, "saving": 0.15, "evaluating": 0.1, "starting": 4.0}
SIGNALS = ("SIGTERM", "SIGKILL")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal to be sent; ``to`` are the processes that get it, of which ``by`` is the one that says when."""

    signal: str
    phase: str
    after: int
    delay: float
    by: int
    to: tuple[int, ...]

    def whom(self, processes: int) -> str:
        """Which processes of so many are struck."""
        return f"process {self.to[0]} alone" if len(self.to) < processes else "all" if processes > 1 else "the one"


@dataclasses.dataclass
class Round:
    """What became of a start of all processes."""

    statuses: list[int]
    events: list[list[dict[str, Any]]]  # Of each process, in order.
    errors: list[str]  # What each wrote to standard error.
    seconds: float  # In all.
    ended: float = 0.0  # Seconds from the fault until all processes had ended.
    fault: dict[str, Any] | None = None
    wrong: list[str] = dataclasses.field(default_factory=list)

    def steps(self, process: int, what: str) -> list[int]:
        """The steps of a process's events of a kind."""
        return [event["step"] for event in self.events[process] if event["what"] == what]


def faults(processes: int, seed: int) -> Iterator[Fault]:
    """Faults without end: all processes at once and, where there are several, one alone take turns.

    Of two processes, 32 faults have each signal in each phase to each process alone, and to both twice.
    """
    chance = random.Random(seed)
    alone = list(itertools.product(SIGNALS, DELAYS, range(processes)))
    chance.shuffle(alone)
    following = itertools.cycle(alone)

    def fault(name: str, phase: str, by: int, to: tuple[int, ...]) -> Fault:
        after = chance.randrange(1, MOST_STEPS - 8) if phase != "starting" else 0
        return Fault(name, phase, after, chance.uniform(0, DELAYS[phase]), by, to)

    for turn in itertools.count():
        for at, phase in enumerate(DELAYS):
            name = SIGNALS[(at + turn) % 2]
            yield fault(name, phase, chance.randrange(processes), tuple(range(processes)))
            if processes > 1:
                name, phase, victim = next(following)
                yield fault(name, phase, victim, (victim,))


class Launcher:
    """Starts the processes of the run, always by the same command."""

    def __init__(self, folder: pathlib.Path, processes: int, steps: int):
        """Writes the config to ``folder``; the compilation cache is there too."""
        self.folder, self.processes = folder, processes
        self._config = folder / "tiny.py"
        self._config.write_text(CONFIG.format(steps=steps))
        self._environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def run(self, workdir: pathlib.Path, name: str, fault: Fault | None = None) -> Round:
        """Runs all processes until the last has ended; ``name`` is that of the folder for what they say."""
        events = self.folder / name
        events.mkdir()
        running, started = [], time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for process in range(self.processes):
            sent = dataclasses.asdict(fault) if fault and fault.by == process else None
            plan = json.dumps({"events": str(events), "process": process, "fault": sent})
            command = [sys.executable, str(PROGRAM), plan, f"--config={self._config}", f"--workdir={workdir}"]
            if self.processes > 1:
                command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={self.processes}"]
                command += [f"--process_id={process}", f"--peer_seconds={PEER_SECONDS}", "--start_seconds=60"]
            with (events / f"{process}.out").open("w") as out, (events / f"{process}.err").open("w") as err:
                running.append(
                    subprocess.Popen(
                        command, env=self._environment, cwd=self.folder, stdout=out, stderr=err, start_new_session=True
                    )
                )
        ends, wrong = _wait(running, events, started + RUN_SECONDS)
        told = [_read_lines(events / f"{process}.jsonl") for process in range(self.processes)]
        errors = [(events / f"{process}.err").read_text() for process in range(self.processes)]
        statuses = [process.returncode for process in running]
        found = Round(statuses, told, errors, max(ends) - started, wrong=wrong)
        found.fault = next((event for each in told for event in each if event["what"] == "fault"), None)
        if found.fault:
            found.ended = max(ends) - found.fault["at"]
        for number, process in enumerate(running):
            if _alive(process.pid):
                found.wrong.append(f"process {number} left processes behind")
                os.killpg(process.pid, signal.SIGKILL)
        return found


def _wait(running: Sequence[subprocess.Popen], events: pathlib.Path, until: float) -> tuple[list[float], list[str]]:
    """Waits for the processes; returns when each ended, and what is wrong: that some had to be killed."""
    ends: dict[int, float] = {}
    while len(ends) < len(running):
        for number, process in enumerate(running):
            if number not in ends and process.poll() is not None:
                ends[number] = time.monotonic()
        if ends and until - time.monotonic() > STOP_SECONDS + LOST_SECONDS:
            until = time.monotonic() + STOP_SECONDS + LOST_SECONDS  # Who ends, ends soon after the others.
        if time.monotonic() > until:
            late = [number for number in range(len(running)) if number not in ends]
            for number in late:
                running[number].send_signal(signal.SIGUSR1)  # It writes where it stands.
                time.sleep(1)
                running[number].kill()
                running[number].wait()
                ends[number] = time.monotonic()
            return [ends[number] for number in sorted(ends)], [f"processes {late} did not end and were killed"]
        time.sleep(0.005)
    return [ends[number] for number in sorted(ends)], []


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def whole_checkpoints(workdir: pathlib.Path) -> set[int]:
    """The steps of the checkpoints that are whole, by their names."""
    folder = workdir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.exists() else set()


def check_end(fault: Fault, found: Round, workdir: pathlib.Path) -> int | None:
    """Whether all ended as they should; returns the step that the next round must go on from, where that is known."""
    wrong, processes = found.wrong, range(len(found.statuses))
    limit = STOP_SECONDS if fault.signal == "SIGTERM" else LOST_SECONDS
    if found.ended > limit:
        wrong.append(f"ended {found.ended:.1f} s after the fault; at most {limit} s is right")
    for process in processes:
        if fault.signal == "SIGTERM":
            expected = {PREEMPTED}
        elif process in fault.to:
            expected = {-signal.SIGKILL}
        else:  # When process 0 is lost, JAX ends the others.
            expected = {-signal.SIGABRT} if 0 in fault.to else {LOST}
        if found.statuses[process] not in expected:
            wrong.append(f"process {process} ended with {found.statuses[process]}, not {expected}")
        if "Traceback" in found.errors[process] and LOST not in expected:
            wrong.append(f"process {process} wrote a traceback")
    newest = max(whole_checkpoints(workdir), default=0)
    finished = max(found.steps(0, "saved"), default=0)
    if newest < finished:
        wrong.append(f"the checkpoint of step {finished}, which was finished, is gone")
    if fault.signal == "SIGKILL":
        return newest
    # SIGTERM: all have saved the same step, or one had nothing to save yet, and no step can be finished without it.
    if all("nothing was lost" not in error for error in found.errors):
        last = {(found.steps(process, "save") or [None])[-1] for process in processes}
        if len(last) > 1 or newest not in last:
            wrong.append(f"SIGTERM: the processes stopped at {last}; the newest checkpoint is {newest}")
    elif all(any(event["what"] == "first step" for event in found.events[process]) for process in processes):
        wrong.append("a process said that nothing was lost, and all had made steps")
    return newest


def check_start(found: Round, expected: int) -> None:
    """Whether all processes went on from the same step, the one they had to, and nothing was damaged."""
    for process, error in enumerate(found.errors):
        resumed = found.steps(process, "resumed")
        if resumed and resumed != [expected]:
            found.wrong.append(f"process {process} went on from {resumed}, not from step {expected}")
        if "damaged" in error:
            found.wrong.append(f"process {process} found a damaged checkpoint")


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """A checkpoint's arrays by name, read by Orbax alone."""
    import jax
    from orbax.checkpoint import v1 as ocp

    folder = workdir / "checkpoints" / str(step)
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), ocp.metadata(folder).metadata)
    state = ocp.load(folder, like)  # Onto the host: the processes' devices are not there any more.
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    times = ("seconds", "seconds_per_step", "images_per_second")
    return {name: value for name, value in record.items() if not name.endswith(times)}


def differences(workdir: pathlib.Path, expected: pathlib.Path, steps: int) -> Iterator[str]:
    """How a run differs from another: its last state, its log, its summary, its predictions, and what lies about."""
    ours, theirs = arrays(workdir, steps), arrays(expected, steps)
    if ours.keys() != theirs.keys() or len(ours) < 30:
        yield "the last checkpoints have other arrays"
    for name in sorted(ours.keys() & theirs.keys()):
        if (ours[name].dtype, ours[name].tobytes()) != (theirs[name].dtype, theirs[name].tobytes()):
            yield f"the last checkpoints differ in {name}"
    log, other = (list(map(_without_times, _read_lines(folder / "metrics.jsonl"))) for folder in (workdir, expected))
    logged = [(record["step"], sorted(record)) for record in log]
    if logged != sorted(logged, key=lambda entry: entry[0]):
        yield "metrics.jsonl is not in order"
    for entry, count in collections.Counter(map(str, logged)).items():
        if count > 1:
            yield f"metrics.jsonl has {count} records of {entry}"
    if log != other:
        first = next((pair for pair in itertools.zip_longest(log, other) if pair[0] != pair[1]), None)
        yield f"metrics.jsonl differs: {first[0]} is not {first[1]}"
    if len(other) < steps // 4:
        yield f"metrics.jsonl of the run left in peace has {len(other)} records"
    summaries = [_without_times(json.loads((folder / "summary.json").read_text())) for folder in (workdir, expected)]
    if summaries[0] != summaries[1]:
        yield f"summary.json differs: {summaries[0]} is not {summaries[1]}"
    with np.load(workdir / "predictions.npz") as ours, np.load(expected / "predictions.npz") as theirs:
        differ = [name for name in theirs if name not in ours or ours[name].tobytes() != theirs[name].tobytes()]
        if differ or set(ours) != set(theirs):
            yield f"predictions.npz differs in {differ}"
    if left := [path.name for path in workdir.rglob("*") if re.search("partial|tmp", path.name)]:
        yield f"left lying about: {left}"


def table(struck: Sequence[tuple[Fault, Round]], processes: int) -> str:
    """Rounds by what they were struck in, as Markdown: how many, exit statuses of process 0, 1, ..., longest time."""
    cells = collections.defaultdict(list)
    for fault, found in struck:
        cells[found.fault["phase"], fault.whom(processes), fault.signal].append(found)
    lines = [f"| struck while | whom | {' | '.join(SIGNALS)} |", "|---|---|---|---|"]
    whoms = sorted({whom for _, whom, _ in cells})
    for phase, whom in itertools.product(DELAYS, whoms):
        shown = []
        for rounds in (cells[phase, whom, name] for name in SIGNALS):
            statuses = "; ".join(sorted({", ".join(map(str, found.statuses)) for found in rounds}))
            longest = max((found.ended for found in rounds), default=0)
            shown.append(f"{len(rounds)} ({statuses}): {longest:.1f} s" if rounds else "0")
        lines.append(f"| {phase} | {whom} | {' | '.join(shown)} |")
    return "\n".join(lines)


def summary(struck: Sequence[tuple[Fault, Round]], processes: int) -> str:
    """How many rounds there were of each kind."""
    counts = collections.Counter(found.fault["phase"] for _, found in struck)
    counts["one process alone"] = sum(len(fault.to) < processes for fault, _ in struck)
    counts |= collections.Counter(fault.signal for fault, _ in struck)
    return f"{len(struck)} rounds: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def versions() -> str:
    """The machine and what runs on it."""
    from importlib import metadata

    names = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
    installed = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {installed}; {datetime.date.today()}"


def main() -> int:
    """Runs everything, prints what came of it, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=32, help="faults (default 32)")
    parser.add_argument("--processes", type=int, default=2, help="of the run (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--steps", type=int, help="of the run (default: enough for all rounds)")
    parser.add_argument("--output", type=pathlib.Path, help="keep everything in this new folder")
    args = parser.parse_args()
    steps = args.steps or MOST_STEPS * (args.rounds + 1)
    folder = (args.output or pathlib.Path(tempfile.mkdtemp(prefix="faults-"))).absolute()
    folder.mkdir(parents=True, exist_ok=not args.output)
    launcher, started = Launcher(folder, args.processes, steps), time.monotonic()
    struck, wrong = [], []

    def tell(name: str, found: Round) -> None:
        for each in found.wrong:
            print(f"  WRONG: {each}; see {folder / name}", flush=True)
            wrong.append(f"{name}: {each}")

    steady = launcher.run(folder / "steady", "in_peace")
    print(f"in peace: {steps} steps in {steady.seconds:.1f} s, exit statuses {steady.statuses}", flush=True)
    if any(steady.statuses):
        print(steady.errors[0], file=sys.stderr)
        return 1
    workdir, expected = folder / "struck", 0
    for attempt, fault in enumerate(faults(args.processes, args.seed)):
        if len(struck) == args.rounds or attempt == 2 * args.rounds:
            break
        name = f"round_{attempt + 1:03}"
        found = launcher.run(workdir, name, fault)
        check_start(found, expected)
        if found.fault is None:
            tell(name, found)
            print(f"{name}: ended before it was struck, exit statuses {found.statuses}; not counted", flush=True)
            if (workdir / "summary.json").exists():
                wrong.append("the run was over before all rounds were; --steps says how long it is")
                break
            expected = max(whole_checkpoints(workdir), default=0)
            continue
        expected = check_end(fault, found, workdir)
        struck.append((fault, found))
        phase, step = found.fault["phase"], found.fault["step"]
        where = phase if phase == "starting" else f"{phase} at step {step}"
        print(f"{name}: {fault.signal} to {fault.whom(args.processes)} while {where}: ended with {found.statuses} in"
              f" {found.ended:.1f} s, goes on from step {expected}", flush=True)  # fmt: skip
        tell(name, found)
    last = launcher.run(workdir, "to_the_end")
    check_start(last, expected)
    if any(last.statuses):
        last.wrong.append(f"exit statuses {last.statuses}")
    print(f"to the end: {last.seconds:.1f} s, exit statuses {last.statuses}", flush=True)
    tell("to_the_end", last)
    differing = list(differences(workdir, folder / "steady", steps)) if not any(last.statuses) else []
    for each in differing:
        print(f"  WRONG: {each}")
    wrong += differing
    if len(struck) < args.rounds:
        wrong.append(f"{len(struck)} rounds of {args.rounds}")
    print(f"\n{summary(struck, args.processes)}; {args.processes} processes, {steps} steps,"
          f" {time.monotonic() - started:.0f} s\n{versions()}\n\n{table(struck, args.processes)}\n")  # fmt: skip
    for name, limit in (("SIGTERM", STOP_SECONDS), ("SIGKILL", LOST_SECONDS)):
        if times := [found.ended for fault, found in struck if fault.signal == name]:
            print(f"longest until all had ended after {name}: {max(times):.1f} s (limit {limit} s)")
    if wrong:
        print("\nWRONG:", *wrong, sep="\n  ")
        print(f"everything is in {folder}")
        return 1
    print("the end is that of the run in peace, bit for bit: state, log, summary, predictions")
    if not args.output:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
