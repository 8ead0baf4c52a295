"""From a config to a run: devices, task, work directory, loop; and back from a work directory to its task."""

from collections.abc import Callable, Collection, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from typing import NamedTuple

import jax
import ml_collections

from resnet_jax import distributed, peers
from resnet_jax.buckets import Folder, absolute
from resnet_jax.classification.task import Classification
from resnet_jax.config import flatten, restore_config
from resnet_jax.detection.task import Detection
from resnet_jax.errors import UsageError
from resnet_jax.fields import FIELDS
from resnet_jax.localization.task import Localization
from resnet_jax.locks import lock
from resnet_jax.models.stacking import per_block
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights, resumed
from resnet_jax.pretrained.start import starting_weights
from resnet_jax.training.checkpoints import latest_step
from resnet_jax.training.loop import Training
from resnet_jax.training.run import Run
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Task
from resnet_jax.training.workdir import (
    DATA,
    check_data,
    check_recipe,
    check_shared,
    check_writable,
    open_workdir,
    read_json,
)

TASKS = {"classification": Classification, "detection": Detection, "localization": Localization}
CALIBRATED = "calibrated.safetensors"


def code_version() -> str:
    """Tells versions of this package's code, and of JAX, apart."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join([jax.__version__.encode(), *(file.read_bytes() for file in files)])).hexdigest()[:12]


class Member(NamedTuple):
    """One of the runs that a command does: its config and work directory, and what its lines begin with."""

    config: ml_collections.ConfigDict
    workdir: Folder
    name: str = ""


def run_task(config: ml_collections.ConfigDict, workdir: Folder, mode: str, explicit: Collection[str] = ()) -> int:
    """Trains (``train``), evaluates (``eval``) or calibrates in ``workdir``; returns the exit status.

    Args:
      config: the whole config.
      workdir: the work directory.
      mode: ``train``, ``eval``, or ``calibrate``: BN statistics become averages over the training set; what comes of it
        is evaluated and written to ``calibrated.safetensors`` in the work directory.
      explicit: names of the fields that the command line has set; weights don't change them.

    Raises:
      UsageError: before anything is written, where config, data, devices and work directory don't fit.
    """
    return run_members([Member(config, workdir)], mode, explicit)


def run_members(members: Sequence[Member], mode: str, explicit: Collection[str], whole_runs: bool = False) -> int:
    """``run_task`` of runs that differ in the seed alone: one, or to train at once several.

    Args:
      members: the runs.
      mode: as of ``run_task``; several are for ``train`` alone, and for classification of data on the devices.
      explicit: likewise.
      whole_runs: as of ``Training``.
    """
    with StopSignal() as stop, contextlib.ExitStack() as stack:
        members = [member._replace(workdir=absolute(member.workdir)) for member in members]
        for member in members:
            _check(member.config, member.workdir, mode)
        if members[0].config.model.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        mesh = distributed.make_mesh()
        stack.enter_context(jax.set_mesh(mesh))
        tasks: list[Task] = []
        for member in members:
            tasks.append(_make_task(member.config, member.workdir, mesh, mode, explicit))
            if len(tasks) > 1:
                tasks[-1].share_data(tasks[0])
        writes = [
            _claim(member.config, member.workdir, task, mode, explicit, stack)
            for member, task in zip(members, tasks, strict=True)
        ]
        runs = [
            Run(task, member.config, member.workdir, mesh, write, member.name)
            for member, task, write in zip(members, tasks, writes, strict=True)
        ]
        if mode == "train":
            return Training(runs, mesh, whole_runs=whole_runs).run(stop)
        (run,) = runs
        if mode == "eval":
            return run.evaluate_only(stop)
        return run.evaluate_only(stop, functools.partial(_calibrate, run), "calibrated")


def _check(config: ml_collections.ConfigDict, workdir: Folder, mode: str) -> None:
    """Raises a UsageError where a run can't be what is asked for, before data or devices are looked at."""
    done = latest_step(workdir)
    if peers.peers():
        own = {field.name for field in FIELDS if field.unit == "path" and not field.recipe}  # As disks are mounted.
        shared = {name: value for name, value in flatten(config).items() if name not in own}
        peers.peers().agree("config", {"mode": mode, "code": code_version()} | shared)
        seen = {"its newest checkpoint": done, "its config.json": read_json(workdir / "config.json")}
        peers.peers().agree("workdir", seen)  # Also where nothing is written, which would tell.
    if mode == "calibrate" and config.task != "classification":
        raise UsageError(f"--mode=calibrate is for classification, and this is task={config.task}")
    check_writable(workdir)
    only_evaluated = done is None and (workdir / "summary.json").is_file() and not (workdir / "metrics.jsonl").exists()
    if not only_evaluated:  # There nothing is lost by another recipe.
        check_recipe(workdir, flatten(config), training=mode == "train")
    if mode != "train" and done is None:
        if not config.init.weights:
            seeds = ",".join(sorted(path.name.removeprefix("seed_") for path in workdir.glob("seed_*")))
            way = f"its seeds have: add --seeds={seeds}" if seeds else "train it first, or set --config.init.weights"
            raise UsageError(f"--mode={mode}: {workdir} has no checkpoint; {way}")
        if config.init.head == "replace":
            raise UsageError(f"--mode={mode}: a new head knows nothing; --config.init.head=keep evaluates the weights'")


def _make_task(
    config: ml_collections.ConfigDict, workdir: Folder, mesh: jax.sharding.Mesh, mode: str, explicit: Collection[str]
) -> Task:
    """The task of a run, which fits what its work directory has."""
    done = latest_step(workdir)
    start = starting_weights(config) if done is None else resumed(workdir)
    task = TASKS[config.task](config, mesh, start, explicit)
    if done is not None:
        check_data(workdir, task.description, training=mode == "train")
    if mode == "train" and (done or 0) > task.total_steps:
        raise UsageError(f"--workdir={workdir} is at step {done} already, beyond the {task.total_steps} asked for")
    if peers.peers():
        peers.peers().agree("data", task.fingerprint())
    return task


def _claim(
    config: ml_collections.ConfigDict,
    workdir: Folder,
    task: Task,
    mode: str,
    explicit: Collection[str],
    stack: contextlib.ExitStack,
) -> bool:
    """Writes what a run is into its work directory, which is locked until ``stack`` is left; false where it may not."""
    if mode != "train" and latest_step(workdir) is not None:
        return False  # Another command's settings are not the run's.
    if distributed.leads():
        open_workdir(workdir, flatten(config), task.description | {"explicit": sorted(explicit)})
        stack.enter_context(lock(workdir / ".lock", f"--workdir={workdir}: another process is training there"))
    check_shared(workdir)
    return True


def _calibrate(run: Run, state: TrainState, poll: Callable[[], None]) -> TrainState:
    state = run.task.calibrated(state, poll)
    if not distributed.leads():
        return state
    found = Pretrained.of_run(run.task.description, per_block(jax.device_get(state.variables)))
    found = dataclasses.replace(found, history={"source": f"{run.workdir.name}, calibrated (a run of ours)"})
    save_safetensors(run.workdir / CALIBRATED, run.config.model.name, found)
    print(f"wrote {run.workdir / CALIBRATED}", flush=True)
    return state


def read_config(workdir: Folder) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config that a run was made with, and which of its fields the command line had set.

    Raises:
      UsageError: no run of this version's is there.
    """
    values = read_json(workdir / "config.json")
    if values is None:
        raise UsageError(f"{workdir}: no work directory of a run (no config.json in it)")
    return restore_config(values, str(workdir)), (read_json(workdir / DATA) or {}).get("explicit", [])


def evaluate_run(workdir: Folder, protocol: str) -> int:
    """Evaluates a run again, by any test protocol, as ``--mode=eval`` with its own config does."""
    config, explicit = read_config(workdir)
    config.eval.protocol = protocol
    return run_task(config, workdir, "eval", explicit)


@contextlib.contextmanager
def open_run(workdir: Folder, kind: str = "classification") -> Iterator[tuple[Task, TrainState]]:
    """A run that exists, for whoever looks into it: its task and its state, with the devices' mesh in force.

    Raises:
      UsageError: no run of this version's and of this kind of task is there, or its data are not.
    """
    (config, explicit), mesh = read_config(workdir), distributed.make_mesh()
    if config.task != kind:
        raise UsageError(f"{workdir}: is a run of task={config.task}; here one of {kind} is needed")
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    with jax.set_mesh(mesh):
        if latest_step(workdir) is None:
            start = starting_weights(config)
        else:
            # What these were trained with is known, whatever the command line said then.
            start, config.init.head, explicit = read_weights(str(workdir), None, (kind,))[1], "keep", ()
        if start is None:
            raise UsageError(f"{workdir}: has no checkpoint")
        task = TASKS[config.task](config, mesh, start, explicit)
        check_data(workdir, task.description, training=False)
        yield task, task.initial_state()
