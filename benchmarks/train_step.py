"""The full training step: images per second of ours, of torch and of flax's layers, in one run, and what bounds it.

    python benchmarks/train_step.py --batch=16
    python benchmarks/train_step.py --batch=256 --seconds=5 --json=train_step.json
    python benchmarks/train_step.py --batch=128 --model=resnet50_v1_5 --topology=v5e:4x4

The first is for two CPU cores, the second for a GPU; the third asks the TPU's compiler (extra ``tpu``, no TPU needed)
what it estimates of ours and of flax's layers. A step is forward and backward pass, BN statistics and the update by SGD
with momentum; the batch lies on the device. Ours is the step of `python -m resnet_jax.main` with --config: it takes
uint8, normalises, mirrors and adds colour noise itself; the others are given normalised images. All have the same
network (strides and shortcuts as --model says; resnet50_v1_5 is torchvision's and flax's own) and the same weights;
their logits are compared, in float32, before the clock starts. BN is over each device's examples unless
--config.model.batch_norm says otherwise. Contenders take turns, --repeats times; medians are printed (least-most).
"""

import math
import os

from absl import flags
import comparison
from comparison import FLAX, OURS, Entry
import turns

from resnet_jax import cli, compilation
from resnet_jax.errors import UsageError

CHECKED = 2  # Images whose logits are compared.

comparison.define_flags("imagenet_50", "resnet50", 16, list(comparison.PEERS))
flags.DEFINE_integer("image_size", 224, "Side of the images, pixels.", lower_bound=32)
flags.DEFINE_string("topology", None, "A TPU slice to compile for, as v5e:4x4 or v3:2x2; none: run on a device here.")
FLAGS = flags.FLAGS


def jitted(name, step, logits, state, *arguments) -> Entry:
    """Compiles ``step(state, *arguments) -> state, found`` for an entry; ``found`` is the loss or has it."""
    import bounds
    import jax

    lowered = jax.jit(step, donate_argnums=0).lower(state, *arguments)
    compiled, held = lowered.compile(), [state, None]

    def call():
        held[:] = compiled(held[0], *arguments)

    def loss():
        return float(held[1]["loss"] if isinstance(held[1], dict) else held[1])

    contender = turns.Contender(name, call, lambda: jax.block_until_ready(held))
    return Entry(contender, loss, logits, bounds.cost_of(lowered, compiled))


def enter_jax(config, mesh, notes):
    """Ours and flax's, the shape of the network, its weights, and the batch."""
    import flax_contenders as flaxes
    from jax import numpy as jnp
    import our_contenders as lib

    from resnet_jax import distributed

    ours, rate = lib.make_ours(config, mesh), config.schedule.learning_rate
    state, like = ours.start(), lib.shape_of(ours.model)
    variables = lib.named_variables(state.variables)
    batch = lib.make_batch(config.batch_size, config.data.image_size, like.num_classes)
    looked = batch.normalised[:CHECKED]
    logits = lib.logits_of(ours.model.clone(stacked=False, dtype=jnp.float32), variables, looked, True)
    own = jitted(OURS, ours.step, logits, state, *lib.fill(ours.arguments, batch, mesh))
    entries = [own._replace(cost=None) if lib.loops(ours.model) else own]
    if "flax" in FLAGS.peers:
        exact = flaxes.ResNet(like._replace(dtype=jnp.float32), pad=1)
        logits = lib.logits_of(exact, variables, looked, True)
        optimizer = flaxes.make_optimizer(rate)
        state = distributed.replicate(mesh, flaxes.initial_state(variables, optimizer))
        shown = {"images": batch.normalised.astype(like.dtype), "labels": batch.labels}
        step = flaxes.make_train_step(flaxes.ResNet(like), optimizer)
        entries.append(jitted(FLAX, step, logits, state, *distributed.shard_batch(mesh, shown).values()))
        notes.append(f"{FLAX}: {flaxes.DIFFERS}")
    return entries, like, variables, batch


def enter_torch(config, like, variables, batch, precision, notes):
    """torch's."""
    import jax

    found, device = comparison.torch_peers(jax.default_backend(), notes)
    entries = []
    for name, mode in found:
        import torch_contenders as torches

        network = torches.make_network(like, variables, device)
        logits = torches.logits_of(network, batch.normalised[:CHECKED], train=True)
        shown = torches.put_images(batch.normalised, device), torches.put_labels(batch.labels, device)
        trained = torches.trainer(name, network, lambda shown=shown: shown, config, device, precision, mode)
        entries.append(Entry(*trained, logits))
    if found:
        notes.append(f"torch: channels_last, {'autocast' if precision == 'bfloat16' else precision}")
    return entries


def run(config) -> int:
    """Runs the contenders on one device."""
    import bounds
    import jax
    import numpy as np

    from resnet_jax import distributed

    mesh, notes, size, side = distributed.make_mesh(jax.devices()[:1]), [], config.batch_size, config.data.image_size
    with jax.set_mesh(mesh):
        entries, like, variables, batch = enter_jax(config, mesh, notes)
        precision = np.dtype(like.dtype).name
        entries += enter_torch(config, like, variables, batch, precision, notes)
        notes.append(comparison.check_logits(entries, "BN of the batch"))
        losses = comparison.warm(entries)
        turns.require(all(map(math.isfinite, losses.values())), f"loss of the first step: {losses}")
        notes.append(f"loss of the first step: {', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}")
        peaks = bounds.peaks_of(jax.devices()[0], precision)
        contenders = [entry.contender for entry in entries]
        row = turns.measure(f"training, {precision}", contenders, FLAGS.repeats, FLAGS.seconds, size)
    said = f"{config.model.name}, {size} images of {side}x{side}, {precision}"
    comparison.finish(row, entries, peaks, said, notes)
    return 0


def plan_table(found, peaks, size) -> str:
    """Markdown: a line for each contender's estimate; ``size`` images a device and step."""
    import bounds

    head = ["", "images/s a chip", "M cycles for the batch", "cycles an image", "ours over it", "exchange (ms)"]
    head, lines = [*head, *bounds.COLUMNS], []
    for name, one in found.items():
        if not one.fits:
            lines.append([name, "does not fit", *["-"] * (len(head) - 2)])
            continue
        accessed, cycles = one.bytes_accessed_per_image, one.estimated_cycles
        cost = None if accessed is None else bounds.Cost(one.flops, accessed * size)
        lines.append([
            name,
            f"{one.images_per_second / one.chips:,.0f}",
            f"{cycles / 1e6:.1f}",
            f"{cycles / size:,.0f}",
            f"{found[OURS].estimated_cycles / cycles:.3f}" if found[OURS].fits else "-",
            f"{1e3 * one.collective_seconds:.2f}",
            *bounds.cells(cost, peaks, size, one.compute_seconds),
        ])  # fmt: skip
    return turns.markdown(head, lines)


def plan(config) -> int:
    """Asks the TPU's compiler about ours and flax's."""
    import dataclasses
    from functools import partial
    import sys

    import bounds
    import flax_contenders as flaxes
    import jax
    from jax import numpy as jnp
    import our_contenders as lib

    from resnet_jax import distributed
    from resnet_jax.planning.estimate import compile_step, estimate
    from resnet_jax.planning.report import MODEL
    from resnet_jax.planning.topology import open_topology, without_cache

    without_cache()
    topology = open_topology(FLAGS.topology)
    if topology.chip is None:
        raise UsageError(f"--topology={FLAGS.topology}: cycles are known of TPU slices alone, as v5e:4x4")
    mesh = distributed.make_mesh(topology.devices)
    size, side = config.batch_size, config.data.image_size
    config.batch_size = size * mesh.size
    progress = partial(print, file=sys.stderr, flush=True)
    with jax.set_mesh(mesh):
        ours = lib.make_ours(config, mesh)
        like, asked = lib.shape_of(ours.model), {OURS: (ours.step, ours.arguments)}
        if "flax" in FLAGS.peers:
            asked[FLAX] = flaxes.abstract_step(ours, like, config.schedule.learning_rate, mesh)
        found = {}
        for name, (step, arguments) in asked.items():
            progress(f"{name} on {topology.name}")
            compiled = compile_step(step, arguments, topology.memory_limit, progress)
            found[name] = estimate(config.model.name, topology, config.batch_size, compiled, None)
    peaks = bounds.peaks_of(topology.devices[0], jnp.dtype(like.dtype).name)
    precision = jnp.dtype(like.dtype).name
    said = (
        f"{config.model.name} on {topology.name}, {size} images of {side}x{side} a device, {precision}."
        f" Cycles are the compiler's estimate, of a device."
    )
    notes = [MODEL, f"{FLAX}: {flaxes.DIFFERS}", bounds.describe(peaks)]
    content = {"plans": {name: dataclasses.asdict(one) for name, one in found.items()}}
    packages = (*comparison.PACKAGES[:-1], "libtpu")
    turns.report(said, turns.versions(packages), plan_table(found, peaks, size), notes, FLAGS.json, content)
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    """Measures, or asks the compiler, and prints the table."""
    turns.share_the_machine()
    comparison.check_peers(list(comparison.PEERS))
    if FLAGS.topology:
        from resnet_jax.planning.chips import ENVIRONMENT

        os.environ |= ENVIRONMENT
        compilation.leave_convolutions()
    # Nothing is to be learnt: with weights that ran away, numbers may become so small that CPUs are slow with them.
    changes = {"data.placement": "stream", "schedule.learning_rate": 1e-9, "model.batch_norm": "per_device"}
    changes |= {"data.image_size": FLAGS.image_size}
    config = comparison.make_config(comparison.settings(overrides, changes))
    return plan(config) if FLAGS.topology else run(config)


if __name__ == "__main__":
    cli.run(main, __doc__)
