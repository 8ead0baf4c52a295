"""Runs of several real processes on this machine, each with virtual CPU devices, for tests."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A network that compiles in a second, trained by the command itself.
TINY = """
import functools, runpy, sys
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
MODELS["tiny"] = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="B", stem="cifar", stem_width=4)
sys.argv[0] = "resnet_jax"
runpy.run_module("resnet_jax.main", run_name="__main__")
"""
SETTINGS = ("--config=digits_20", "--config.model.name=tiny", "--config.schedule.name=constant", "--config.log.every=1",
            "--config.log.tensorboard=false", "--config.eval.every=0", "--config.eval.batch_size=100")  # fmt: skip


@dataclasses.dataclass
class Finished:
    """How a process ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def start(number: int, of: int, port: int, *flags: str, devices: int = 1, code: str = TINY) -> subprocess.Popen:
    """Starts process ``number`` of ``of``; with ``of`` 1 it is a run like any other."""
    among = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={of}", f"--process_id={number}"] if of > 1 else []
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", code, *SETTINGS, *among, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def finish(processes: list[subprocess.Popen], seconds: float = 180) -> list[Finished]:
    """Waits for all of them; none is left behind."""
    try:
        ends = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Finished(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as trial:
        trial.bind(("", 0))
        return trial.getsockname()[1]


def run(of: int, *flags: str, devices: int = 1, code: str = TINY) -> list[Finished]:
    """A run of ``of`` processes with ``devices`` devices each, to its end."""
    port = free_port()
    return finish([start(number, of, port, *flags, devices=devices, code=code) for number in range(of)])
