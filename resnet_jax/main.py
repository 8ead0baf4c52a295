"""Trains or evaluates a network.

    python -m resnet_jax.main --config=digits_20
    python -m resnet_jax.main --config=configs/cifar_20.py --workdir=runs/mine --config.seed=1
    python -m resnet_jax.main --config=cifar_20 --workdir=runs/mine --mode=eval
    python -m resnet_jax.main --config=cifar_110 --seeds=0,1,2,3,4

The same command again resumes. The work directory gets config.json, metrics.jsonl, TensorBoard events,
checkpoints/, summary.json and predictions.npz.
"""

import os

from absl import flags

from resnet_jax import buckets, cli, compilation, config as config_lib, limits
from resnet_jax.errors import UsageError

cli.define_config_flags()
flags.DEFINE_string("workdir", None, "Folder of the run, also gs://BUCKET/PATH; runs/<config's name> when not given.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "calibrate"],
    "train (or resume); eval: evaluate the latest checkpoint;"
    " calibrate: make BN statistics averages over the training set, evaluate, and write calibrated.safetensors.",
)
flags.DEFINE_list(
    "seeds", None, "Several runs, one a seed (--seeds=0,1,2), each in its own folder seed_<N> of workdir."
)
flags.DEFINE_integer(
    "seeds_at_once",
    1,
    "How many of --seeds train in one program: of small images on the devices, which one network does not fill.",
    lower_bound=1,
)
flags.DEFINE_string("coordinator", None, "Several processes started by hand: HOST:PORT of process 0.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
flags.DEFINE_float("start_seconds", 300, "How long a process waits for the others at the start.", lower_bound=1)
flags.DEFINE_float("peer_seconds", 60, "A process that is silent for so long ends the others.", lower_bound=5)
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]]) -> int:
    """Flags in, one call."""
    config = config_lib.load_config(FLAGS.config)
    for name, value in overrides:
        config_lib.override(config, name, value)
    config_lib.validate(config)
    config_lib.check_task(config, [name for name, _ in overrides])
    workdir = buckets.open_folder("--workdir", FLAGS.workdir or f"runs/{config_lib.find_config(FLAGS.config).stem}")
    if config.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"

    from resnet_jax import cluster, peers  # JAX starts here, after its settings.

    cluster.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.start_seconds, FLAGS.peer_seconds)
    if peers.peers():
        compilation.keep_shared_programs()
    from resnet_jax.run import run_task
    from resnet_jax.seeds import run_seeds

    explicit = [name for name, _ in overrides]
    if FLAGS.seeds is None:
        if FLAGS.seeds_at_once > 1:
            raise UsageError(f"--seeds_at_once={FLAGS.seeds_at_once} needs --seeds, as --seeds=0,1,2")
        return run_task(config, workdir, FLAGS.mode, explicit)
    seeds = [int(seed) if seed.isdecimal() else None for seed in FLAGS.seeds]
    known = seeds and None not in seeds and all(map(limits.SEED.test, seeds))
    if not known or len(set(seeds)) < len(seeds) or "seed" in explicit:
        given = ",".join(FLAGS.seeds)
        raise UsageError(f"--seeds={given}: expected different whole numbers below 2**32, as 0,1, and no --config.seed")
    return run_seeds(config, workdir, FLAGS.mode, seeds, explicit, FLAGS.seeds_at_once)


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["config"])
