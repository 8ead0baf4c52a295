"""Says what a training will need and how fast it will be, on devices that nobody has to own; reads no data.

    python -m resnet_jax.plan --config=imagenet_50 --topology=v5e:16x16 --batch_per_chip=128
    python -m resnet_jax.plan --config=imagenet_152 --topology=v4:8x8x16 --batch_per_chip=128 --price=3 --json
    python -m resnet_jax.plan --config=imagenet_50 --topology=v5e:4x4 --batch_per_chip=128 --scaling
    python -m resnet_jax.plan --config=cifar_20 --topology=local

The training step is compiled by the TPU's own compiler (pip install 'resnet_jax[tpu]'; no TPU is needed), which takes
a minute or two for deep networks; local compiles it for the devices here. Exits with 1 where it does not fit.
"""

import dataclasses
import json
import os
import sys

from absl import flags

from resnet_jax import cli, compilation, config as config_lib
from resnet_jax.errors import UsageError
from resnet_jax.planning.chips import ENVIRONMENT

cli.define_config_flags()
flags.DEFINE_string(
    "topology",
    None,
    "Devices to compile for: local, or a TPU slice: v3:2x2, v4:8x8x16, v5e:16x16, v5p:4x4x4, v6e:16x16, ...",
)
flags.DEFINE_integer(
    "batch_per_chip", None, "Images a step of each JAX device (two a v3 chip), in place of batch_size.", lower_bound=1
)
flags.DEFINE_float("price", None, "Of a chip and hour, for the cost; no default, prices change.", lower_bound=0)
flags.DEFINE_bool("scaling", False, "Also say what 8 to 2,048 such chips come to, on paper.")
flags.DEFINE_bool("json", False, "Print one JSON object instead of text; unknown is null.")
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]]) -> int:
    """Flags in, one call."""
    config = config_lib.load_config(FLAGS.config)
    for name, value in overrides:
        config_lib.override(config, name, value)
    config_lib.validate(config)
    if config.task != "classification":
        raise UsageError(f"--config={FLAGS.config} is of task={config.task}; plan knows classification alone")
    if FLAGS.topology != "local":
        os.environ |= ENVIRONMENT
        compilation.leave_convolutions()

    from resnet_jax.classification.planned import plan  # JAX starts here, after its settings.
    from resnet_jax.planning.links import scaling_table
    from resnet_jax.planning.report import describe, describe_scaling
    from resnet_jax.planning.topology import open_topology, without_cache

    without_cache()
    if config.model.dtype == "float64":
        raise UsageError("model.dtype=float64 is for tests of equality; plan bfloat16 or float32")
    topology = open_topology(FLAGS.topology)
    if FLAGS.scaling and topology.chip is None:
        raise UsageError("--scaling needs a TPU topology, as v5e:4x4")
    progress = lambda line: print(line, file=sys.stderr, flush=True)
    found = plan(config, topology, FLAGS.batch_per_chip, FLAGS.price, progress)
    rows = []
    if FLAGS.scaling and found.compute_seconds:
        images = found.batch_size // found.chips
        rows = scaling_table(topology.chip, found.compute_seconds, images, found.collective_bytes, found.collectives)
    if FLAGS.json:
        scaling = {"scaling": [dataclasses.asdict(row) for row in rows]} if FLAGS.scaling else {}
        print(json.dumps(dataclasses.asdict(found) | scaling, indent=2))
    else:
        print("\n".join(describe(found, config.model.batch_norm) + (describe_scaling(rows) if rows else [])))
    return 0 if found.fits else 1


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["config", "topology"])
