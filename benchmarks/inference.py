"""Inference: images per second of ours, with BN folded and not, of torch and of flax's layers, and what bounds it.

    python benchmarks/inference.py --batch=16
    python benchmarks/inference.py --batch=256 --seconds=5 --json=inference.json

The first is for two CPU cores, the second for a GPU. All have the same network (strides and shortcuts as --model says;
resnet50_v1_5 is torchvision's and flax's own), the same weights and the same normalised images on the device, and give
logits; these are compared, in float32, before the clock starts. BN's running statistics are those of the batch.
Contenders take turns, --repeats times; medians are printed (least-most).
"""

from absl import flags
import comparison
from comparison import FLAX, OURS, Entry
import turns

from resnet_jax import cli

PLAIN = "ours, BN not folded"
CHECKED = 2  # Images whose logits are compared.
# Of the largest logit: bfloat16 has 8 bits, and what each layer rounds adds up.
ROUNDED = {"bfloat16": 0.2, "float32": 5e-3}

comparison.define_flags("imagenet_50", "resnet50", 16, list(comparison.PEERS))
flags.DEFINE_integer("image_size", 224, "Side of the images, pixels.", lower_bound=32)
FLAGS = flags.FLAGS


def enter(name, network, exact, batch, dtype) -> Entry:
    """A flax module and its variables as an entry that is given images in ``dtype``; ``exact`` are its in float32."""
    import bounds
    import jax
    import numpy as np
    from our_contenders import logits_of

    model, variables = network
    arguments = jax.device_put((variables, batch.normalised.astype(dtype)))
    lowered = jax.jit(lambda variables, images: model.apply(variables, images, train=False)).lower(*arguments)
    compiled, latest = lowered.compile(), [None]

    def call():
        latest[0] = compiled(*arguments)

    contender = turns.Contender(name, call, lambda: jax.block_until_ready(latest))
    logits = logits_of(*exact, batch.normalised[:CHECKED], False)
    return Entry(contender, lambda: np.asarray(latest[0], np.float32), logits, bounds.cost_of(lowered, compiled))


def enter_jax(config, batch) -> tuple[list[Entry], object, dict]:
    """Ours and flax's, the shape of the network and its weights."""
    import flax_contenders as flaxes
    import jax
    from jax import numpy as jnp
    import our_contenders as lib

    from resnet_jax.models.fold import fold
    from resnet_jax.models.registry import create_model
    from resnet_jax.training.network import model_settings

    model = create_model(num_classes=lib.CLASSES, **model_settings(config.model))
    like = lib.shape_of(model)
    variables = lib.with_statistics(model, batch.normalised)
    exact = model.clone(dtype=jnp.float32)
    entries = [
        enter(OURS, fold(model, variables), fold(exact, variables), batch, like.dtype),
        enter(PLAIN, (model, variables), (exact, variables), batch, like.dtype),
    ]
    if "flax" in FLAGS.peers:
        padded = flaxes.ResNet(like._replace(dtype=jnp.float32), pad=1)
        entries.append(enter(FLAX, (flaxes.ResNet(like), variables), (padded, variables), batch, like.dtype))
    return entries, like, jax.device_get(variables)


def main(overrides: list[tuple[str, str]]) -> int:
    """Measures and prints the table."""
    turns.share_the_machine()
    comparison.check_peers(list(comparison.PEERS))
    import bounds  # JAX starts here, after its settings.
    import jax
    import numpy as np
    import our_contenders as lib

    from resnet_jax import distributed

    changes, notes = {"data.image_size": FLAGS.image_size, "model.batch_norm": "global"}, []
    config = comparison.make_config(comparison.settings(overrides, changes))
    size, side = config.batch_size, config.data.image_size
    batch = lib.make_batch(size, side, lib.CLASSES)
    with jax.set_mesh(distributed.make_mesh(jax.devices()[:1])):
        entries, like, variables = enter_jax(config, batch)
        precision = np.dtype(like.dtype).name
        found, device = comparison.torch_peers(jax.default_backend(), notes)
        for name, mode in found:
            import torch_contenders as torches

            network = torches.make_network(like, variables, device)
            logits = torches.logits_of(network, batch.normalised[:CHECKED], train=False)
            entries.append(Entry(*torches.predictor(name, network, batch.normalised, device, precision, mode), logits))
        notes.append(comparison.check_logits(entries, "BN of running statistics"))
        logits = comparison.warm(entries)
        apart = {
            name: comparison.differs(entries[0].logits, one[:CHECKED]) for name, one in logits.items() if name != FLAX
        }
        turns.require(max(apart.values()) < ROUNDED[precision], f"logits as measured, off by these shares: {apart}")
        notes.append(f"logits as measured, in {precision}: at most {max(apart.values()):.1g} of the largest off")
        if FLAX in logits:
            notes.append(f"{FLAX}: SAME padding while the clock runs, so that its logits are its own")
        if found:
            notes.append(f"torch: inference_mode, channels_last, the network in {precision}")
        peaks = bounds.peaks_of(jax.devices()[0], precision)
        contenders = [entry.contender for entry in entries]
        row = turns.measure(f"inference, {precision}", contenders, FLAGS.repeats, FLAGS.seconds, size)
    said = f"{config.model.name}, {size} images of {side}x{side}, {precision}"
    comparison.finish(row, entries, peaks, said, notes)
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__)
