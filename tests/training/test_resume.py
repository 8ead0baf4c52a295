"""A run that is killed or stopped, and started again with the same command, is the run that never was.

Real processes, killed for good. A hook lets most of them send the signal to themselves at an exact place (a step, a
save, an evaluation), so that nothing here depends on how fast the machine is.
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
from jax import numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.metrics import MetricsWriter
from resnet_jax.training.schedules import initial_schedule_state
from resnet_jax.training.state import TrainState

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 60

# Everything that a state can hold is in use: momentum, averaged weights, plateau's memory (which drops the rate at
# steps 40 and 60), the best evaluation. 1,238 images train, so that an epoch ends within a step, every 19.3 of them.
CONFIG = f"""
import functools
from resnet_jax.config import load_config
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet

for name, blocks in (("tiny", (1, 1)), ("other", (2, 1))):
    MODELS[name] = functools.partial(ResNet, blocks=blocks, widths=(4, 8), shortcut="B", stem="cifar", stem_width=4)

def get_config():
    config = load_config("digits_20")
    config.model.name = "tiny"
    config.data.holdout = 200
    config.epochs, config.steps = 0.0, {STEPS}
    config.optimizer.ema = 0.9
    config.schedule.name = "plateau"
    config.schedule.learning_rate = 0.05
    config.schedule.warmup_steps = 5
    config.schedule.patience = 1
    config.schedule.threshold = 30.0
    config.eval.every = 20
    config.eval.batch_size = 50
    config.checkpoint.every = 8
    config.log.every = 5
    config.log.tensorboard = False
    return config
"""

KEEP_ALL = "--config.checkpoint.keep=1000"

# python -c HOOK SIGNAL PLACE STEP FLAGS...: resnet_jax.main, which sends itself a signal.
HOOK = """
import os, pathlib, runpy, signal, sys, threading, time

number, place, at = signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3])
sys.argv[1:4] = []
folder = next(pathlib.Path(flag.split("=")[1]) for flag in sys.argv if flag.startswith("--workdir=")) / "checkpoints"

from resnet_jax.classification.task import Classification
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.metrics import Console
from resnet_jax.training.run import Run

sent = []

def send():
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), number)

def before(owner, name, action):
    original = getattr(owner, name)

    def hooked(self, *args, **kwargs):
        action(*args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(owner, name, hooked)

def at_step(step):
    if step == at:
        send()

def before_save(state, step, *rest):
    if step >= at:
        send()

def while_saving(state, step, *rest):
    def watch():  # What is being written has a longer name until it is whole: 48.orbax-checkpoint-tmp.
        while not any(folder.glob(f"{step}.*")):
            time.sleep(0)  # As often as can be: it is there for milliseconds.
        send()

    if step >= at:
        threading.Thread(target=watch, daemon=True).start()

evaluate = Classification.evaluate

def while_evaluating(task, state, split, poll, *rest):
    polls = []

    def counting():
        polls.append(True)
        if int(state.step) >= at and split == place and len(polls) == 3:
            send()
        poll()

    return evaluate(task, state, split, counting, *rest)

if place == "step":
    before(Console, "advance", at_step)
elif place == "before save":
    before(Checkpoints, "save", before_save)
elif place == "save":
    before(Checkpoints, "save", while_saving)
elif place == "report":
    before(Run, "_report", lambda *_: send())
else:  # A split that is evaluated: holdout or test.
    Classification.evaluate = while_evaluating

runpy.run_module("resnet_jax.main", run_name="__main__", alter_sys=True)
"""


class Program:
    """The program on one config, with one compilation cache."""

    def __init__(self, folder):
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG)
        self._environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, workdir, *flags, send=None):
        """Starts it; ``send`` is (signal, place, step)."""
        program = ["-m", "resnet_jax.main"] if send is None else ["-c", HOOK, *map(str, send)]
        command = [sys.executable, *program, f"--config={self.config}", f"--workdir={workdir}", *flags]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment, cwd=workdir.parent, stdout=pipe, stderr=pipe, text=True)

    def run(self, workdir, *flags, send=None, status=0):
        """Runs it to its end with exit status ``status``; returns what it printed."""
        with self.start(workdir, *flags, send=send) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == status, (out, err)
        assert "Traceback" not in err
        return out if status != 2 else err

    def kill(self, workdir, place, step):
        """Runs it until it is killed."""
        self.run(workdir, send=("SIGKILL", place, step), status=-signal.SIGKILL)
        assert not (workdir / "summary.json").exists()

    def resume(self, workdir, *flags, send=None, status=0):
        """Runs it again; returns the step it resumes from, which is a whole checkpoint's, and what it printed."""
        whole = saved_steps(workdir)
        out = self.run(workdir, *flags, send=send, status=status)
        steps = [int(step) for step in re.findall(r"^resuming from step (\d+)$", out, re.MULTILINE)]
        assert len(steps) == 1
        assert steps[0] == max(whole)
        return steps[0], out


def saved_steps(workdir):
    folder = workdir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.exists() else set()


def arrays(workdir, step):
    """A checkpoint's arrays by name, read by Orbax alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax would rather be told the devices.
        state = ocp.load(workdir / "checkpoints" / str(step))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_bits(state, expected, but=""):
    assert state.keys() == expected.keys()
    assert len(state) > 80  # The parameters, BatchNorm's statistics, the velocity, the average, the schedule.
    differ = [name for name in expected if state[name].tobytes() != expected[name].tobytes()]
    assert not [name for name in differ if not (but and but in name)]


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "seconds_per_step") and
            not key.endswith("images_per_second")}  # fmt: skip


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(workdir, expected, end=STEPS, but=""):
    """The same arrays at the end (``but`` for some), the same log but for times, and the same summary."""
    assert_same_bits(arrays(workdir, end), arrays(expected, end), but)
    log = [without_times(record) for record in records(workdir)]
    logged = [(record["step"], sorted(record)) for record in log]
    assert logged == sorted(logged, key=lambda entry: entry[0])  # Ascending,
    assert len({str(entry) for entry in logged}) == len(logged)  # and nothing twice.
    assert log == [without_times(record) for record in records(expected)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, expected)]
    assert without_times(summaries[0]) == without_times(summaries[1])
    with np.load(workdir / "predictions.npz") as ours, np.load(expected / "predictions.npz") as theirs:
        assert ours["probabilities"].tobytes() == theirs["probabilities"].tobytes()
    leftovers = [path.name for path in workdir.rglob("*") if "partial" in path.name or "tmp" in path.name]
    assert not leftovers


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def uninterrupted(program, tmp_path_factory):
    """A run that nobody disturbed; it compiles what the others read from the cache, and keeps all its checkpoints."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    program.run(workdir, KEEP_ALL)
    assert saved_steps(workdir) == {8, 16, 20, 24, 32, 40, 48, 56, 60}
    return workdir


def test_the_reference_run_logs_every_step_it_should(uninterrupted):
    log = records(uninterrupted)
    assert [record["step"] for record in log if "train_loss" in record] == list(range(5, STEPS + 1, 5))
    assert [record["step"] for record in log if "holdout_top1_error" in record] == [20, 40, 60]
    rates = {record["step"]: record["learning_rate"] for record in log if "learning_rate" in record}
    np.testing.assert_allclose([rates[40], rates[45]], [0.05, 0.005], rtol=1e-6)  # Plateau's memory is at work.


@pytest.mark.slow
def test_a_run_killed_in_an_epoch_in_a_save_and_in_an_evaluation_ends_as_if_it_never_was(
    program, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    program.kill(run, "step", 33)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 33, "train_lo')  # Killed while it wrote.

    resumed, _ = program.resume(run, send=("SIGKILL", "save", 48), status=-signal.SIGKILL)
    assert resumed in (24, 32)  # 32 if it was whole already.
    assert list((run / "checkpoints").glob("48.*")), "it was to be killed while it wrote a checkpoint"

    resumed, _ = program.resume(run, send=("SIGKILL", "holdout", 60), status=-signal.SIGKILL)
    assert resumed == 40
    assert records(run)[-1]["step"] == 60
    assert not (run / "summary.json").exists()

    resumed, _ = program.resume(run)
    assert resumed in (48, 56)
    assert_same_run(run, uninterrupted)


def test_sigterm_and_ctrl_c_save_and_the_run_ends_as_if_they_never_came(program, uninterrupted, tmp_path):
    run = tmp_path / "run"
    out = program.run(run, send=("SIGTERM", "before save", 24), status=75)  # It saves the step that it was to save.
    assert out.splitlines()[-1] == "stopped by SIGTERM and saved at step 24; the same command resumes"
    # What the undisturbed run saved while it trained on is the state of the run that stopped there: the buffers
    # that later steps reuse did not leak into the checkpoint.
    assert_same_bits(arrays(run, 24), arrays(uninterrupted, 24))

    resumed, out = program.resume(run, send=("SIGINT", "step", 33), status=130)
    assert resumed == 24
    assert out.splitlines()[-1] == "stopped by SIGINT and saved at step 33; the same command resumes"

    resumed, _ = program.resume(run)
    assert resumed == 33
    assert_same_run(run, uninterrupted)


def test_a_finished_run_started_again_says_so_and_touches_nothing(program, uninterrupted):
    before = contents(uninterrupted)
    out = program.run(uninterrupted, KEEP_ALL)
    assert re.fullmatch(r".* is finished: step 60, top1 error .*\n", out)
    assert contents(uninterrupted) == before


def test_a_run_does_not_resume_with_another_recipe_and_lists_the_fields(program, uninterrupted):
    before = contents(uninterrupted)
    err = program.run(uninterrupted, "--config.model.name=other", "--config.batch_size=32", status=2)
    assert re.fullmatch(r"error: .+\n", err)
    changes = "model.name: tiny -> other; batch_size: 64 -> 32"
    assert f"--workdir={uninterrupted} holds a run of another recipe ({changes})" in err
    assert contents(uninterrupted) == before


def test_a_run_is_not_cut_short_by_a_shorter_length(program, uninterrupted):
    before = contents(uninterrupted)
    err = program.run(uninterrupted, KEEP_ALL, "--config.steps=30", status=2)
    assert re.fullmatch(r"error: .*step 60.*30.*\n", err)
    assert contents(uninterrupted) == before


@pytest.fixture(scope="module")
def lengthened(program, uninterrupted, tmp_path_factory):
    run = tmp_path_factory.mktemp("lengthened") / "run"
    shutil.copytree(uninterrupted, run)
    resumed, _ = program.resume(run, "--config.steps=80")
    assert resumed == 60
    return run


@pytest.mark.slow
def test_a_finished_run_goes_on_to_a_longer_length(uninterrupted, lengthened):
    assert json.loads((lengthened / "summary.json").read_text())["step"] == 80
    assert records(lengthened)[: len(records(uninterrupted))] == records(uninterrupted)
    assert arrays(lengthened, 80)["['step']"] == 80


@pytest.mark.slow
def test_a_lengthened_run_is_the_run_of_that_length(program, lengthened, tmp_path):
    program.run(tmp_path / "run", "--config.steps=80")
    assert_same_run(lengthened, tmp_path / "run", end=80)


# A rate that suddenly is 1e37: the step after finds what the weights have become.
EXPLODES = ("--config.schedule.name=steps", "--config.schedule.factor=1e38")


def assert_finite(state):
    spoilt = [name for name, array in state.items() if not np.isfinite(array).all()]
    assert set(spoilt) <= {"['schedule']['best_error']"}  # Infinity before the first evaluation.


def test_a_run_that_diverges_stops_with_the_step_and_the_last_good_checkpoint(program, tmp_path):
    run = tmp_path / "run"
    out = program.run(run, *EXPLODES, "--config.schedule.boundaries=10", status=1)  # Step 11 spoils the weights.
    line = out.splitlines()[-1]
    assert re.match(r"stopped: diverged at step 11: loss \S+, gradient norm \S+, weight norm (nan|inf); ", line)
    assert line.endswith(f"the last good checkpoint is {run}/checkpoints/8")
    assert_finite(arrays(run, 8))
    assert not (run / "summary.json").exists()


@pytest.mark.slow
def test_what_is_called_a_good_checkpoint_is_finite(program, tmp_path):
    run = tmp_path / "run"
    out = program.run(run, *EXPLODES, "--config.schedule.boundaries=15,15", status=1)  # Step 16 is to be saved.
    assert out.splitlines()[-1].endswith(f"the last good checkpoint is {run}/checkpoints/8")
    assert_finite(arrays(run, 8))


def test_what_a_donated_step_does_to_its_buffers_does_not_reach_a_checkpoint(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    weights = {"kernel": jnp.zeros((1024, 4096), jnp.float32)}  # 16 MB: it takes a while to write.
    state = step(TrainState(jnp.int32(0), weights, {}, (), initial_schedule_state(), None))
    assert weights["kernel"].is_deleted()  # Steps do reuse the buffers.
    checkpoints = Checkpoints(tmp_path, keep=3)
    for saved in (1, 21, 41):
        assert int(state.step) == saved
        checkpoints.save(state, saved, {}, None)
        for _ in range(20):
            state = step(state)
    checkpoints.close()
    for saved in (1, 21, 41):
        stored = arrays(tmp_path, saved)
        assert stored["['step']"] == saved
        assert (stored["['params']['kernel']"] == saved).all()


def test_the_log_is_cut_back_to_the_step_that_a_run_resumes_from(tmp_path):
    lines = ['{"step": 5, "train_loss": 2.0}', '{"step": 10, "train_loss": 1.0}', '{"step": 15, "train_loss": 0.5}']
    for tail in ('{"step": 1', '{"step": 20, "train_loss": 0.', "\0\0\0\0"):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
        writer = MetricsWriter(tmp_path, first_step=10, tensorboard=False)
        writer.write(12, {"train_loss": 0.7})
        writer.close()
        assert [(record["step"], record["train_loss"]) for record in records(tmp_path)] == [(5, 2), (10, 1), (12, 0.7)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("step", 1),  # Nothing is saved yet.
        ("save", 8),  # Nor here.
        ("step", 20),  # After a step, before its evaluation.
        ("save", 20),  # The best so far.
        ("before save", 40),
        ("holdout", 40),
        ("save", 60),
        ("test", 60),
        ("report", 60),
    ],
)
def test_a_run_killed_anywhere_ends_as_if_it_never_was(program, uninterrupted, tmp_path, place, step):
    run = tmp_path / "run"
    program.kill(run, place, step)
    if saved_steps(run):
        program.resume(run)
    else:
        assert program.run(run).startswith("training tiny")
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "step"), [("step", 1), ("save", 24), ("before save", 20), ("holdout", 20), ("holdout", 60), ("test", 60)]
)
def test_a_run_stopped_anywhere_ends_as_if_it_never_was(program, uninterrupted, tmp_path, place, step):
    run = tmp_path / "run"
    out = program.run(run, send=("SIGTERM", place, step), status=75)
    stopped = re.fullmatch(
        r"stopped by SIGTERM and saved at step (\d+); the same command resumes", out.splitlines()[-1]
    )
    resumed, _ = program.resume(run)
    assert resumed == int(stopped[1]) >= step
    # Stopped in the last evaluation, the last step is saved before the plateau rule has heard of it; a run that goes
    # on from there evaluates it first.
    assert_same_run(run, uninterrupted, but="['schedule']" if (place, step) == ("holdout", 60) else "")


@pytest.mark.slow
def test_a_checkpoint_that_is_saved_again_is_not_lost_by_a_kill(program, uninterrupted, tmp_path):
    run = tmp_path / "run"
    program.run(run, send=("SIGTERM", "holdout", 20), status=75)
    program.resume(run, send=("SIGKILL", "save", 20), status=-signal.SIGKILL)  # The best, so it is saved once more.
    assert saved_steps(run) == {16, 20}
    program.resume(run)
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_a_run_killed_from_outside_again_and_again_ends_as_if_it_never_was(program, uninterrupted, tmp_path):
    run, moment, kills = tmp_path / "run", random.Random(0), 0
    while not (run / "summary.json").exists():
        before = max(saved_steps(run), default=0)
        with program.start(run) as process:
            while process.poll() is None:
                if max(saved_steps(run), default=0) > before:  # It got further; let it be a while longer.
                    time.sleep(moment.uniform(0, 0.05))
                    process.kill()
                    break
                time.sleep(0.001)
            process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        kills += process.returncode != 0
    assert kills >= 2
    assert_same_run(run, uninterrupted)
