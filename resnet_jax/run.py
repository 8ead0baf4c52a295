"""From a config to a run: devices, task, work directory, loop; and back from a work directory to its task."""

from collections.abc import Callable, Collection, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import statistics
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
from resnet_jax.output import write_json
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights, resumed
from resnet_jax.pretrained.start import starting_weights
from resnet_jax.training.checkpoints import latest_step
from resnet_jax.training.loop import Training
from resnet_jax.training.results import title
from resnet_jax.training.run import Run
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Task
from resnet_jax.training.workdir import (
    CENTER,
    DATA,
    check_data,
    check_recipe,
    check_shared,
    check_writable,
    open_workdir,
    read_json,
    results_folder,
)

TASKS = {"classification": Classification, "detection": Detection, "localization": Localization}
CALIBRATED = "calibrated.safetensors"


def code_version() -> str:
    """Tells versions of this package's code, and of JAX, apart."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join([jax.__version__.encode(), *(file.read_bytes() for file in files)])).hexdigest()[:12]


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


class Member(NamedTuple):
    """One of the runs that a command does at once: its config and work directory, and what its lines begin with."""

    config: ml_collections.ConfigDict
    workdir: Folder
    name: str = ""


def run_members(members: Sequence[Member], mode: str, explicit: Collection[str]) -> int:
    """``run_task`` of runs that differ in the seed alone: one, or to be trained in one program several."""
    with StopSignal() as stop, contextlib.ExitStack() as stack:
        members = [member._replace(workdir=absolute(member.workdir)) for member in members]
        for member in members:
            _check(member.config, member.workdir, mode)
        if members[0].config.model.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        mesh = distributed.make_mesh()
        stack.enter_context(jax.set_mesh(mesh))
        runs = [_open(member, mesh, mode, explicit, stack, watched=member is members[0]) for member in members]
        if mode == "train":
            return Training(runs, mesh).run(stop)
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


def _open(
    member: Member,
    mesh: jax.sharding.Mesh,
    mode: str,
    explicit: Collection[str],
    stack: contextlib.ExitStack,
    watched: bool,
) -> Run:
    """A run that can be what is asked for; where it is written to, its folder is locked until ``stack`` is left."""
    config, workdir, name = member
    done, train = latest_step(workdir), mode == "train"
    start = starting_weights(config) if done is None else resumed(workdir)
    task = TASKS[config.task](config, mesh, start, explicit)
    if name and task.streams:
        raise UsageError("--seeds_at_once is for data that lies on the devices (data.placement), not for streams")
    if done is not None:
        check_data(workdir, task.description, training=train)
    if train and (done or 0) > task.total_steps:
        raise UsageError(f"--workdir={workdir} is at step {done} already, beyond the {task.total_steps} asked for")
    if peers.peers():
        peers.peers().agree("data", task.fingerprint())
    writes = train or done is None  # Another command's settings are not the run's.
    if writes and distributed.leads():
        open_workdir(workdir, flatten(config), task.description | {"explicit": sorted(explicit)})
        stack.enter_context(lock(workdir / ".lock", f"--workdir={workdir}: another process is training there"))
    if writes:
        check_shared(workdir)
    return Run(task, config, workdir, mesh, writes, name, watched)


def _calibrate(run: Run, state: TrainState, poll: Callable[[], None]) -> TrainState:
    state = run.task.calibrated(state, poll)
    if not distributed.leads():
        return state
    found = Pretrained.of_run(run.task.description, per_block(jax.device_get(state.variables)))
    found = dataclasses.replace(found, history={"source": f"{run.workdir.name}, calibrated (a run of ours)"})
    save_safetensors(run.workdir / CALIBRATED, run.config.model.name, found)
    print(f"wrote {run.workdir / CALIBRATED}", flush=True)
    return state


def run_seeds(
    config: ml_collections.ConfigDict,
    workdir: Folder,
    mode: str,
    seeds: Sequence[int],
    explicit: Collection[str],
    at_once: int = 1,
) -> int:
    """Does the same for several seeds; returns the exit status of the first that has one.

    Each has its folder ``seed_<N>`` in ``workdir``; the same call goes on where it was stopped. ``seeds.json`` (of
    another evaluation than the usual one ``seeds_<its name>.json``) has the errors, their mean and their standard
    deviation (of a sample: n - 1).

    Args:
      config: the whole config.
      workdir: of all.
      mode: as of ``run_task``.
      seeds: whole numbers.
      explicit: as of ``run_task``.
      at_once: how many of them train in one program.

    Raises:
      UsageError: as ``run_task``; or ``at_once`` is not for what is asked.
    """
    if at_once > 1 and mode != "train":
        raise UsageError(f"--seeds_at_once={at_once} is for --mode=train; {mode} takes one seed after another")
    if at_once > 1 and jax.process_count() > 1:
        raise UsageError(f"--seeds_at_once={at_once} is for one process; several share each seed's batches")
    name, task = "calibrated" if mode == "calibrate" else "", TASKS[config.task]
    protocol = CENTER if mode == "train" else config.eval.protocol
    for first in range(0, len(seeds), at_once):
        members = []
        for seed in seeds[first : first + at_once]:
            own = config.copy_and_resolve_references()
            own.seed = seed
            members.append(Member(own, workdir / f"seed_{seed}", f"seed {seed}" if at_once > 1 else ""))
        print(f"seed {', '.join(str(member.config.seed) for member in members)}", flush=True)
        status = run_members(members, mode, explicit)
        if status:
            return status
    if not distributed.leads():  # Who has written them.
        return 0
    folders = {seed: results_folder(workdir / f"seed_{seed}", name, protocol) for seed in seeds}
    figures = {str(seed): read_json(folder / "summary.json")[task.objective] for seed, folder in folders.items()}
    found = {task.objective: figures, **spread(list(figures.values()), task.sign)}
    last = folders[seeds[-1]].name
    where = workdir / ("seeds.json" if last.startswith("seed_") else f"seeds_{last}.json")
    write_json(where, found)
    deviation = "" if found["std"] is None else f" +- {found['std']:.2f}"
    print(f"{len(seeds)} seeds: {title(task.objective)} {found['mean']:.2f}{deviation}%, best {found['best']:.2f}%;"
          f" wrote {where}", flush=True)  # fmt: skip
    return 0


def spread(values: Sequence[float], sign: int = 1) -> dict[str, float | None]:
    """``mean``, ``std`` (n - 1; None of a single value) and ``best``, the least (``sign`` -1: the most)."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "best": sign * min(sign * value for value in values),
    }


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
