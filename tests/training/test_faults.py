"""Runs of several processes that are stopped, or lose one of them, at the worst moments; each in real processes.

``benchmarks/faults.py`` strikes at random moments and compares what comes of it with a run that nothing happened to;
here is a short turn of it, and the places that chance rarely finds.
"""

import os
import pathlib
import subprocess
import sys
import time

from processes import TINY, finish, free_port, run, start
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = ("--config.steps=40", "--config.checkpoint.every=10", "--peer_seconds=5")


def hooked(code: str) -> str:
    """The program, with ``code`` run before it; ``process`` is the number of the process that runs it."""
    imports = "import os, signal, sys, threading, time\n"
    number = "process = int(next(flag for flag in sys.argv if '--process_id=' in flag).split('=')[1])\n"
    return imports + number + "kill = lambda name: os.kill(os.getpid(), signal.Signals[name])\n" + code + TINY


def both(workdir: pathlib.Path, code: str, *flags: str):
    """Runs two processes with ``code`` in them."""
    port = free_port()
    flags = (f"--workdir={workdir}", *SETTINGS, *flags)
    return finish([start(number, 2, port, *flags, code=hooked(code)) for number in range(2)])


def saved_steps(workdir: pathlib.Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob("*")}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "rounds"), [(2, 5), (1, 2)])
def test_a_run_struck_at_random_moments_ends_as_one_that_is_left_in_peace(tmp_path, processes, rounds):
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "benchmarks/faults.py", f"--processes={processes}", f"--rounds={rounds}"]
    command += [f"--output={tmp_path / 'faults'}"]
    found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"\n{rounds} rounds: " in found.stdout
    assert "bit for bit" in found.stdout


@pytest.mark.slow
def test_sigterm_when_one_process_has_made_its_first_step_and_the_other_is_about_to(tmp_path):
    code = """
from resnet_jax.training.metrics import Console
from resnet_jax.training.record import Window
add, shown = Window.add, Console.advance

def slowly(*arguments):
    if not process:  # As when it compiles for longer than the other.
        time.sleep(60)
    add(*arguments)

def struck(console, step):
    if process:
        kill("SIGTERM")
    shown(console, step)

Window.add, Console.advance = slowly, struck
"""
    began = time.monotonic()
    ends = both(tmp_path / "run", code)
    assert [end.status for end in ends] == [75, 75], [end.err for end in ends]
    assert "process 0" in ends[1].err
    assert all("stopped by a notice of preemption; nothing was lost" in end.err for end in ends)
    assert time.monotonic() - began < 60
    assert not saved_steps(tmp_path / "run")


@pytest.mark.slow
def test_a_process_that_is_lost_before_its_first_sign_of_life_ends_the_other(tmp_path):
    code = """
from resnet_jax import peers
join = peers.join
peers.join = lambda seconds: kill("SIGKILL") if process else join(seconds)
"""
    began = time.monotonic()
    ends = both(tmp_path / "run", code)
    assert [end.status for end in ends] == [69, -9], [end.err for end in ends]
    assert "process 1 was lost at step 0 (starting): silent for 5 s" in ends[0].err
    assert time.monotonic() - began < 60  # JAX's own limit is 100 s.


@pytest.mark.slow
def test_a_process_that_is_lost_when_all_is_done_does_not_hold_up_the_other(tmp_path):
    code = """
import jax
shutdown = jax.distributed.shutdown
jax.distributed.shutdown = lambda: kill("SIGKILL") if process else shutdown()
"""
    workdir, began = tmp_path / "run", time.monotonic()
    ends = both(workdir, code)
    assert [end.status for end in ends] == [69, -9], [end.err for end in ends]
    assert "all is done" in ends[0].err
    assert time.monotonic() - began < 80
    assert (workdir / "summary.json").exists()
    ends = run(2, f"--workdir={workdir}", *SETTINGS)
    assert [end.status for end in ends] == [0, 0]
    assert "is finished: step 40" in ends[0].out


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_all_at_the_same_step(tmp_path):
    code = """
from resnet_jax.training.metrics import Console
shown = Console.advance

def struck(console, step):
    if process and step == 15:
        kill("SIGINT")
    shown(console, step)

Console.advance = struck
"""
    ends = both(tmp_path / "run", code)
    assert [end.status for end in ends] == [75, 130], [end.err for end in ends]
    (line,) = [line for line in ends[0].out.splitlines() if line.startswith("stopped by")]
    step = line.split("saved at step ")[1].split(";")[0]
    assert step in saved_steps(tmp_path / "run")
    assert 15 <= int(step) < 40
