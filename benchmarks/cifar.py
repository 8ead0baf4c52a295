"""Training a small network on images that lie on the device: ours bare, `resnet_jax.main` as a whole, and torch.

    python benchmarks/cifar.py --seconds=5
    python benchmarks/cifar.py --seconds=5 --config.data.dir=cifar-10-binary.tar.gz --json=cifar.json

ResNet-20 on CIFAR-10 (the config), 128 images a step; without --config.data.dir of random pixels. Data (uint8) and
augmentation (zero-padded crop, mirror) are on the device in all. Ours bare is the jitted step alone, its batches of
indices on the device beforehand: one step a dispatch, and on accelerators --steps_per_dispatch of them, as main does,
also of --seeds_at_once networks: the images of all of them in a second, and the time of a step divided by their number.
Main is `python -m resnet_jax.main` in a process of its own, logging and saving as it goes: what it reports of its
windows after the first two, in which it compiles. torch crops and mirrors by indexing, channels_last. All have the same
network and begin with the same weights; logits are compared, in float32, before the clock starts. BN is over the whole
batch unless --config.model.batch_norm says otherwise. Contenders take turns, --repeats times; medians (least-most).
"""

import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from absl import flags
import comparison
from comparison import OURS, Entry
import numpy as np
import turns

from resnet_jax import cli
from resnet_jax.errors import UsageError

MAIN = "resnet_jax.main"
CHECKED = 8  # Images whose logits are compared.
PLACED = 16  # Batches of indices that lie on the device.
LOGGED = 100  # Steps between two lines of main's log, the config's, or fewer where steps are slow.
WINDOWS, COMPILING = 8, 2  # Such lines at least, of which so many tell of compiling.

comparison.define_flags("cifar_20", "", 0, ["main", "torch", "torch_compile"])
flags.DEFINE_integer("examples", 50_000, "Random images, where there is no --config.data.dir.", lower_bound=1000)
flags.DEFINE_integer("seeds_at_once", -1, "Runs in one program, of ours; 0: none; -1: 4, on CPUs none.", lower_bound=-1)
flags.DEFINE_integer("steps_per_dispatch", -1, "Of ours, besides one; 0: none; -1: 100, on CPUs none.", lower_bound=-1)
FLAGS = flags.FLAGS


def write_random(folder: pathlib.Path, examples: int) -> None:
    """Random images in the layout of CIFAR-10's binary archive, a fifth of them in each training file."""
    rng, record = np.random.default_rng(0), 1 + 3 * 32 * 32
    counts = {f"data_batch_{number}.bin": examples // 5 for number in range(1, 6)} | {"test_batch.bin": 1000}
    for name, count in counts.items():
        records = rng.integers(0, 256, (count, record), np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("".join(f"class{number}\n" for number in range(10)))


def enter_ours(task, mesh, steps: int, members: int) -> tuple[list[Entry], dict]:
    """Ours, one step a dispatch, ``steps`` of them and of ``members`` runs (0: none); and the initial weights."""
    import bounds
    import jax
    from jax import numpy as jnp
    import our_contenders as lib

    from resnet_jax import distributed
    from resnet_jax.training.members import SEED, make_members_step, stack_members

    resident, everywhere = task.resident, distributed.replicated(mesh)
    state = task.initial_state()
    variables = lib.named_variables(state.variables)
    looked = normalised(resident, CHECKED)
    logits = lib.logits_of(task.model.clone(stacked=False, dtype=jnp.float32), variables, looked, True)

    def scan(state, batches, resident):
        return jax.lax.scan(lambda state, batch: task.train_step(state, batch, resident), state, batches)

    def enter(name, step, state, batches, resident, pieces, logits=None):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
        placed, held = itertools.cycle(batches), [state, None]
        lowered = jitted.lower(held[0], batches[0], resident)
        compiled = lowered.compile()
        cost = None if pieces > 1 or lib.loops(task.model) else bounds.cost_of(lowered, compiled)

        def call():
            held[:] = compiled(held[0], next(placed), resident)

        contender = turns.Contender(name, call, lambda: jax.block_until_ready(held), pieces=pieces)
        return Entry(contender, lambda: float(jnp.ravel(held[1]["loss"])[0]), logits, cost)

    host = list(itertools.islice(task.batches(0), max(PLACED, steps)))
    singles = [distributed.shard_batch(mesh, batch) for batch in host[:PLACED]]
    entries = [enter(OURS, task.train_step, state, singles, resident, 1, logits)]
    stacked = jax.tree.map(lambda *batches: np.stack(batches), *host[: max(1, steps)])
    if steps:
        batches, name = [distributed.shard_batch(mesh, stacked, axis=1)], f"{OURS}, {steps} steps a dispatch"
        entries.append(enter(name, scan, task.initial_state(), batches, resident, steps))
    if members:
        together = make_members_step(scan if steps else task.train_step, mesh, members)
        batches = [stack_members(mesh, members * [stacked if steps else host[0]])]
        seeds = stack_members(mesh, [{SEED: np.uint32(seed)} for seed in range(members)])
        states, name = [task.initial_state() for _ in range(members)], f"{entries[-1].contender.name}, {members} seeds"
        entries.append(enter(name, together, states, batches, resident | seeds, members * max(1, steps)))
    return entries, variables


def normalised(resident: dict, count: int) -> np.ndarray:
    """The first images as the network sees them without augmentation, float32 [count, H, W, 3]."""
    from resnet_jax.data import augment

    return np.asarray(augment.normalise(resident["images"][:count], resident["mean"], resident["std"]), np.float32)


def enter_torch(config, task, variables, precision, notes) -> list[Entry]:
    """torch's."""
    import jax
    import our_contenders as lib

    found, device = comparison.torch_peers(jax.default_backend(), notes)
    entries = []
    for name, mode in found:
        import torch_contenders as torches

        network = torches.make_network(lib.shape_of(task.model), variables, device)
        logits = torches.logits_of(network, normalised(task.resident, CHECKED), train=True)
        arrays = {name: np.asarray(array) for name, array in task.resident.items()}
        batches = torches.augmented(arrays, config.batch_size, config.data.pad, config.data.flip, device)
        entries.append(Entry(*torches.trainer(name, network, batches, config, device, precision, mode), logits))
    if found:
        notes.append(f"torch: channels_last, {'autocast' if precision == 'bfloat16' else precision}")
    return entries


def enter_main(given, seconds_a_step: float, folder: pathlib.Path) -> tuple[Entry, list[str]]:
    """The command as a whole: an entry that reports, and what there is to say of it."""
    every = min(LOGGED, max(1, round(FLAGS.seconds / seconds_a_step)))
    windows = max(WINDOWS, COMPILING + math.ceil(FLAGS.seconds / (every * seconds_a_step)))
    steps, saved, notes, numbers = windows * every, windows // 2 * every, [], itertools.count()
    fields = {"steps": steps, "log.every": every, "checkpoint.every": saved, "eval.every": 0}
    settings = [f"--config.{name}={value}" for name, value in [*given.items(), *fields.items()]]
    home = pathlib.Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])}

    def reports() -> float:
        workdir = folder / f"run{next(numbers)}"
        command = [sys.executable, "-m", "resnet_jax.main", f"--config={FLAGS.config}", f"--workdir={workdir}"]
        done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"resnet_jax.main ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        windows = [record for record in records if "seconds_per_step" in record][COMPILING:]
        clock = (windows[-1]["seconds"] - windows[0]["seconds"]) / (windows[-1]["step"] - windows[0]["step"])
        found = statistics.median(window["seconds_per_step"] for window in windows)
        told = f"{MAIN}: {steps} steps, a line every {every}, a checkpoint every {saved}"
        notes[:] = [f"{told}; with all its time, checkpoints too, {1e3 * clock:.3g} ms a step (of the last run)"]
        return found

    return Entry(turns.Contender(MAIN, None, reports=reports), lambda: None), notes


def main(overrides: list[tuple[str, str]]) -> int:
    """Measures and prints the table."""
    turns.share_the_machine()
    comparison.check_peers(["main", "torch", "torch_compile"])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if "data.dir" not in dict(overrides):
            write_random(folder, FLAGS.examples)
        fields = comparison.settings(overrides, {"data.dir": name, "model.batch_norm": "per_device"})
        measure_all(comparison.make_config(fields), fields, folder)
    return 0


def measure_all(config, fields, folder: pathlib.Path) -> None:
    """Lets them take turns; ``fields`` are those in which the config differs from --config."""
    import bounds  # JAX starts here, after its settings.
    import jax

    from resnet_jax import distributed
    from resnet_jax.classification.task import Classification

    mesh, notes, told = distributed.make_mesh(jax.devices()[:1]), [], []

    def chosen(given: int, on_accelerators: int) -> int:
        usual = 0 if jax.default_backend() == "cpu" else on_accelerators
        return usual if given < 0 else given

    steps, members = chosen(FLAGS.steps_per_dispatch, 100), chosen(FLAGS.seeds_at_once, 4)
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        entries, variables = enter_ours(task, mesh, steps, members)
        precision = np.dtype(task.model.dtype).name
        entries += enter_torch(config, task, variables, precision, notes)
        notes.append(comparison.check_logits(entries, "BN of the batch"))
        losses = comparison.warm(entries)
        turns.require(all(map(math.isfinite, losses.values())), f"loss of the first step: {losses}")
        notes.append(f"loss of the first step: {', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}")
        peaks = bounds.peaks_of(jax.devices()[0], precision)
        if "main" in FLAGS.peers:
            entry, told = enter_main(fields, min(turns.work(one.contender, 3)[0] for one in entries), folder)
            entries.append(entry)
        contenders = [entry.contender for entry in entries]
        row = turns.measure(f"training, {precision}", contenders, FLAGS.repeats, FLAGS.seconds, config.batch_size)
    fastest = min((entry.contender.name for entry in entries if entry.contender.name.startswith(OURS)),
                  key=lambda name: statistics.median(row.turns[name]))  # fmt: skip
    if MAIN in row.turns:
        notes += [f"{MAIN} is {turns.spread(turns.ratios(row, MAIN, fastest))} times as fast as {fastest}", *told]
    said = (
        f"{config.model.name}, {config.batch_size} images of {task.image_shape[0]}x{task.image_shape[1]}, {precision}"
    )
    comparison.finish(row, entries, peaks, said, notes)


if __name__ == "__main__":
    cli.run(main, __doc__)
