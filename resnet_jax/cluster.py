"""How the processes of a run find each other: as flags say, or Slurm, Open MPI, Kubernetes or Cloud TPU."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import jax

from resnet_jax import peers
from resnet_jax.errors import UsageError

_PATIENCE = 5.0  # Seconds before a process says that it waits.


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run; None is left to JAX to find out.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which this one is.
      devices: which of the GPUs that it sees are its own.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None


def find_place(environ: Mapping[str, str], gpus: int, tpus: bool) -> Place | None:
    """The place that a launcher's environment variables give this process; None where there is just one process.

    Args:
      environ: the environment.
      gpus: how many GPUs this process sees.
      tpus: whether this is a machine with TPUs.

    Raises:
      UsageError: GPUs of this machine would go unused.
    """
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environ:  # Set by srun, not by sbatch.
        tasks = _tasks_here(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(environ.get("SLURM_NODEID", 0)))
        on_node = int(environ.get("SLURM_GPUS_ON_NODE", gpus))
        return Place(devices=own_gpus(int(environ["SLURM_LOCALID"]), tasks, gpus, on_node))
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        task, tasks = (int(environ[f"OMPI_COMM_WORLD_LOCAL_{name}"]) for name in ("RANK", "SIZE"))
        return Place(devices=own_gpus(task, tasks, gpus, gpus))
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:  # A pod of an indexed Job.
        return Place()
    return Place() if tpus else None


def _tasks_here(per_node: str, node: int) -> int:
    """Tasks on node ``node`` of Slurm's list, as in ``4(x2),3``."""
    counts = []
    for part in per_node.split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return counts[min(node, len(counts) - 1)]


def own_gpus(task: int, tasks: int, visible: int, on_node: int) -> tuple[int, ...] | None:
    """Which of the GPUs that it sees belong to a task: an equal share, or all where the launcher has shared them out.

    Args:
      task: this task's number on its node, from 0.
      tasks: how many there are on it.
      visible: GPUs that this task sees.
      on_node: GPUs of the job on this node.

    Returns:
      Their numbers; None where there are no GPUs.

    Raises:
      UsageError: some GPUs would go unused.
    """
    if not visible:
        return None
    if visible < on_node or tasks == 1:  # Bound to this task.
        used = visible * tasks
        if used < on_node:
            raise UsageError(f"{tasks} tasks with {visible} GPUs each leave {on_node - used} GPUs of this node unused")
        return tuple(range(visible))
    if visible % tasks:
        raise UsageError(
            f"{tasks} tasks don't share this node's {visible} GPUs equally; one task a node uses all of them"
        )
    share = visible // tasks
    return tuple(range(task * share, (task + 1) * share))


def _visible_gpus(environ: Mapping[str, str]) -> int:
    if environ.get("JAX_PLATFORMS", "") in ("cpu", "tpu"):
        return 0
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _has_tpus(environ: Mapping[str, str]) -> bool:
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu") or "TPU_SKIP_MDS_QUERY" in environ:
        return False
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))


def start(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    start_seconds: float = 300,
    peer_seconds: float = 60,
) -> None:
    """Joins the other processes where there are any: those that the arguments name, or that a launcher has started.

    Called before anything touches a device. Afterwards only process 0 writes to standard output.

    Args:
      coordinator, processes, process: as of ``Place``; all of them, or none to look for a launcher.
      start_seconds: how long to wait for the others.
      peer_seconds: a process that is silent for longer later on ends the run.

    Raises:
      UsageError: some are given and others are not, or they can't be.
    """
    given = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UsageError(f"--coordinator, --num_processes and --process_id go together; {missing[0]} is not given")
    if missing:
        place = find_place(os.environ, _visible_gpus(os.environ), _has_tpus(os.environ))
        if place is None:
            return
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
        if not 0 <= process < processes:
            raise UsageError(f"--process_id={process}: expected 0 to {processes - 1} with --num_processes={processes}")
        if processes == 1:
            return
        place = Place(coordinator, processes, process)
    _join(place, start_seconds, peer_seconds)
    if jax.process_count() == 1:
        return
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    peers.join(peer_seconds)
    print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)


def _join(place: Place, seconds: float, peer_seconds: float) -> None:
    if place.coordinator and place.process == 0:
        _check_port(place.coordinator)
    where = f" at {place.coordinator}" if place.coordinator else ""
    who = "" if place.process is None else f"process {place.process} of {place.processes} on "
    me = f"{who}{socket.gethostname()}"

    def say() -> None:
        print(f"{me}: waiting for the other processes{where}", file=sys.stderr, flush=True)

    def give_up() -> None:
        missing = f"not all processes have come{where} within {seconds:.0f} s"
        hint = "is each of them started, and can it reach that address?"
        peers.end(peers.EXIT_LOST, f"error: {me}: {missing}; {hint}")

    # JAX's own limit ends the process without a word that a user would understand.
    timers = [threading.Timer(_PATIENCE, say), threading.Timer(seconds, give_up)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method=None if place.coordinator is None else "deactivate",
            initialization_timeout=int(seconds) + 60,
            # Ours says more; this one is for process 0's own loss. JAX may take half of it for enough, and ours takes
            # some seconds to tell all processes: half of it is longer.
            heartbeat_timeout_seconds=int(2 * peer_seconds) + 20,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the other processes can't be found: {' '.join(str(error).split())}") from error
    finally:
        for timer in timers:
            timer.cancel()


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except (OSError, OverflowError) as error:
        raise UsageError(f"--coordinator={coordinator}: port {port} can't be used here ({error})") from error
