"""How long the training step takes to trace and to compile, and the memory it needs, by the depth of the network.

    python benchmarks/compile.py
    python benchmarks/compile.py --steps="cifar_1202 model.scan=true,cifar_1202 model.scan=true model.remat=true"

Each step is compiled in a process of its own, `python -m resnet_jax.plan --topology=local --json`, which uses no
compilation cache; a name that begins with ``flax:`` is the step of the same network in flax's own layers. They take
turns, --repeats times; medians are printed (least-most). What takes longer than --limit seconds is ended and said to.
Memory: of the step on the device, as the compiler says (nothing is run), and the most that the process took.
"""

import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from absl import flags
import turns

from resnet_jax import cli, compilation, config as config_lib
from resnet_jax.errors import UsageError
from resnet_jax.planning.chips import ENVIRONMENT

STEPS = (
    "cifar_20 model.scan=false",
    "cifar_20 model.scan=true",
    "cifar_56 model.scan=false",
    "cifar_56 model.scan=true",
    "cifar_110 model.scan=false",
    "cifar_110 model.scan=true",
    "cifar_1202 model.scan=true",
    "cifar_1202 model.scan=true model.remat=true",
    "imagenet_50 model.scan=false",
    "imagenet_152 model.scan=false",
    "imagenet_152 model.scan=true",
    "flax:cifar_20",
    "flax:cifar_110",
    "flax:imagenet_50",
)
PEER = "flax:"

flags.DEFINE_list("steps", list(STEPS), "What is compiled: a config, and fields that differ, separated by spaces.")
flags.DEFINE_string("topology", "local", "What it is compiled for, as of resnet_jax.plan.")
flags.DEFINE_string("peer", None, "Compile this step in flax's own layers, and print what came of it as JSON.")
flags.DEFINE_integer("batch", 0, "Images a device and step; 0: the configs'.", lower_bound=0)
flags.DEFINE_integer("repeats", 3, "Turns of each.", lower_bound=1)
flags.DEFINE_float("limit", 900, "Seconds that a process may take.", lower_bound=1)
flags.DEFINE_string("json", None, "File that all turns are written to.")
FLAGS = flags.FLAGS


def make_config(step: str):
    """The config of a step; a UsageError where it or its fields don't exist."""
    name, *fields = step.removeprefix(PEER).split()
    config = config_lib.load_config(name)
    for field in fields:
        config_lib.override(config, *field.partition("=")[::2])
    if FLAGS.batch:
        config.batch_size = FLAGS.batch
    config_lib.validate(config)
    return config


def compile_peer(step: str) -> dict:
    """The same as a plan says of one of our steps, of flax's layers."""
    import flax_contenders as flaxes
    import jax
    import our_contenders as lib

    from resnet_jax import distributed
    from resnet_jax.classification.planned import known_data
    from resnet_jax.planning.estimate import compile_step, estimate
    from resnet_jax.planning.topology import open_topology, without_cache

    without_cache()
    config, topology = make_config(step), open_topology(FLAGS.topology)
    mesh = distributed.make_mesh(topology.devices)
    config.data.image_size = config.data.image_size or known_data(config).shape[0]
    config.data.placement, config.model.batch_norm = "stream", "per_device"
    with jax.set_mesh(mesh):
        ours = lib.make_ours(config, mesh)
        found = flaxes.abstract_step(ours, lib.shape_of(ours.model), config.schedule.learning_rate, mesh)
        compiled = compile_step(*found, topology.memory_limit)
    return dataclasses.asdict(estimate(config.model.name, topology, config.batch_size, compiled, None))


def compile_once(step: str) -> dict | None:
    """What the plan of a step says, with ``seconds`` and ``peak_bytes`` of its process; None where it took too long.

    Raises:
      UsageError: the plan says so.
    """
    name, *fields = step.split()
    if step.startswith(PEER):
        command = [sys.executable, __file__, f"--peer={step}", f"--batch={FLAGS.batch}"]
    else:
        command = [sys.executable, "-m", "resnet_jax.plan", f"--config={name}", "--json"]
        command += [f"--config.{field}" for field in fields]
        command += [f"--batch_per_chip={FLAGS.batch}"] if FLAGS.batch else []
    command.append(f"--topology={FLAGS.topology}")
    home = pathlib.Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=told, env=environment)
        watch = threading.Timer(FLAGS.limit, process.send_signal, [signal.SIGKILL])
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        watch.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)  # It was waited for here.
        seconds = time.perf_counter() - begun
        if process.returncode == -signal.SIGKILL and seconds >= FLAGS.limit:
            return None
        out.seek(0)
        told.seek(0)
        if process.returncode not in (0, 1) or not (text := out.read()):
            raise UsageError(f"{step}: {(told.read().splitlines() or ['it said nothing'])[-1].removeprefix('error: ')}")
    return json.loads(text) | {"seconds": seconds, "peak_bytes": 1024 * usage.ru_maxrss}


def main(overrides: list[tuple[str, str]]) -> int:
    """Compiles in turns and prints the table."""
    if overrides:
        raise UsageError('fields go into --steps, as in --steps="cifar_110 model.scan=true"')
    if FLAGS.topology != "local":
        os.environ |= ENVIRONMENT
        compilation.leave_convolutions()
    if FLAGS.peer:
        print(json.dumps(compile_peer(FLAGS.peer)))
        return 0
    for step in FLAGS.steps:
        make_config(step)
    found: dict[str, list[dict]] = {step: [] for step in FLAGS.steps}
    slow: set[str] = set()
    for _ in range(FLAGS.repeats):
        for step in (step for step in FLAGS.steps if step not in slow):
            one = compile_once(step)
            if one is None:
                slow.add(step)
                print(f"{step}: more than {FLAGS.limit:.0f} s", file=sys.stderr, flush=True)
                continue
            found[step].append(one)
            said = f"traced in {one['trace_seconds']:.1f} s, compiled in {one['compile_seconds']:.1f} s"
            print(f"{step}: {said}", file=sys.stderr, flush=True)
    first = next((runs for runs in found.values() if runs), [])
    base = statistics.median(total(run) for run in first) if first else 0
    head = ["step", "batch", "traced in (s)", "compiled in (s)", "both, times the first's", "GFLOP a step",
            "memory of the step (GiB)", "of the process (GiB)"]  # fmt: skip
    lines = []
    for step, runs in found.items():
        if not runs:
            lines.append([step, "-", f"more than {FLAGS.limit:.0f} s", *["-"] * (len(head) - 3)])
            continue
        one = runs[-1]
        times = [turns.spread([run[name] for run in runs]) for name in ("trace_seconds", "compile_seconds")]
        operations = "-" if one["flops"] is None else f"{one['flops'] / 1e9:,.1f}"
        memory = "-" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 2**30:.2f}"
        peak = statistics.median(run["peak_bytes"] for run in runs) / 2**30
        relative = turns.figure(statistics.median(map(total, runs)) / base)
        lines.append([step, str(one["batch_per_device"]), *times, relative, operations, memory, f"{peak:.2f}"])
    said = f"training steps compiled for {FLAGS.topology}, no cache; medians of {FLAGS.repeats} turns (least-most)."
    content = {"turns": found, "too_slow": sorted(slow)}
    turns.report(said, turns.versions(("jax", "jaxlib", "flax")), turns.markdown(head, lines), [], FLAGS.json, content)
    return 0


def total(run: dict) -> float:
    """Seconds to trace and compile."""
    return run["trace_seconds"] + run["compile_seconds"]


if __name__ == "__main__":
    cli.run(main, __doc__)
