"""Several seeds of one config: a run of each, and what is said of them together."""

from collections.abc import Collection, Sequence
import statistics

import jax
import ml_collections

from resnet_jax import distributed
from resnet_jax.buckets import Folder
from resnet_jax.data.feed import streams
from resnet_jax.errors import UsageError
from resnet_jax.output import write_json
from resnet_jax.run import TASKS, Member, run_members
from resnet_jax.training.results import title
from resnet_jax.training.workdir import CENTER, read_json, results_folder


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
      at_once: how many of them train in one program, each device working on whole runs; a run's times are those of
        all that it was trained with.

    Raises:
      UsageError: as ``run_task``; or ``at_once`` is not for what is asked.
    """
    if at_once > 1:
        _check_at_once(config, mode, f"--seeds_at_once={at_once}")
    name, task = "calibrated" if mode == "calibrate" else "", TASKS[config.task]
    protocol = CENTER if mode == "train" else config.eval.protocol
    for first in range(0, len(seeds), at_once):
        members = []
        for seed in seeds[first : first + at_once]:
            own = config.copy_and_resolve_references()
            own.seed = seed
            members.append(Member(own, workdir / f"seed_{seed}", f"seed {seed}" if at_once > 1 else ""))
        if distributed.leads():
            print(f"seed {', '.join(str(member.config.seed) for member in members)}", flush=True)
        status = run_members(members, mode, explicit, whole_runs=at_once > 1)
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


def _check_at_once(config: ml_collections.ConfigDict, mode: str, where: str) -> None:
    reason = ""
    if mode != "train":
        reason = f"is for --mode=train, not for {mode}"
    elif jax.process_count() > 1:
        reason = "is for one process; several share each seed's batches"
    elif config.task != "classification" or streams(config.data):
        reason = "is for small images that lie on the devices, not for those that are read as training goes"
    if reason:
        raise UsageError(f"{where} {reason}; without it one seed follows another")
