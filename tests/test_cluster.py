"""Which launcher started this process, which GPUs are its own, and what processes say of one another."""

import time

import jax
import numpy as np
import pytest

from resnet_jax import peers
from resnet_jax.cluster import Place, find_place, own_gpus, start
from resnet_jax.errors import UsageError

# What srun sets for the second of two tasks on the second of two nodes.
SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environ", "gpus", "tpus", "place"),
    [
        ({}, 8, False, None),  # All GPUs of a machine belong to one process.
        ({}, 0, True, Place()),
        (SLURM, 8, False, Place(devices=(4, 5, 6, 7))),
        (SLURM, 2, False, Place(devices=(1,))),
        (SLURM, 0, False, Place()),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, 8, False, Place(devices=tuple(range(8)))),
        # --gpus-per-task: each task sees its own alone.
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, 4, False, Place(devices=(0, 1, 2, 3))),
        # In the batch script itself, and in a shell of salloc's, nothing was started yet.
        ({name: SLURM[name] for name in SLURM if "STEP" not in name}, 8, False, None),
        (SLURM | {"SLURM_NTASKS": "1"}, 8, False, None),
        (OPEN_MPI, 8, False, Place(devices=(2, 3))),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, 8, False, None),
        (KUBERNETES, 0, False, Place()),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 0, False, None),  # A notebook in a pod.
    ],
)
def test_the_launcher_is_known_by_its_environment(environ, gpus, tpus, place):
    assert find_place(environ, gpus, tpus) == place


@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
def test_tasks_share_a_node_s_gpus_out(tasks):
    shares = [own_gpus(task, tasks, 8, 8) for task in range(tasks)]
    assert sorted(sum(shares, ())) == list(range(8))


@pytest.mark.parametrize(
    ("tasks", "visible", "on_node", "words"),
    [(3, 8, 8, "don't share this node's 8 GPUs equally"), (2, 1, 8, "leave 6 GPUs of this node unused")],
)
def test_a_gpu_that_nobody_would_use_is_an_error(tasks, visible, on_node, words):
    with pytest.raises(UsageError, match=words):
        own_gpus(0, tasks, visible, on_node)


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.setattr("resnet_jax.cluster.find_place", lambda *unused: None)
    start(None, None, None)
    start("localhost:1", 1, 0)
    assert peers.peers() is None
    assert jax.process_count() == 1


def test_differing_values_are_named():
    ours = {"a": 1, "b": [1, 2], "c": None, "d": 4.0}
    assert peers.differing(dict(ours), ours) == ""
    assert peers.differing({**ours, "b": [1, 3]}, ours) == "b is [1, 3], not [1, 2]"
    others = {"a": 2, "b": 3, "d": 5.0, "e": 6}
    assert peers.differing(others, ours) == "a is 2, not 1; b is 3, not [1, 2]; d is 5.0, not 4.0; and 1 more"


def test_a_stall_is_told_of_by_who_is_furthest_behind(monkeypatch, capsys):
    clock = iter(np.arange(0, 2000, 100.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lives = [{"who": f"process {i} (host{i})", "step": 40 - i, "doing": "training", "progress": 90 - i} for i in (0, 1)]
    moved = ((), 0.0)
    for _ in range(5):  # At 0, 100, ..., 400 s.
        moved = peers.warn_of_stall(lives, *moved)
    told = capsys.readouterr().err
    assert told == "warning: nothing has moved for 400 s; furthest behind: process 1 (host1) at step 39 (training)\n"
    lives[1] = lives[1] | {"progress": 91}
    moved = peers.warn_of_stall(lives, *moved)
    assert not capsys.readouterr().err
