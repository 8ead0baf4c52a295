"""Writes a data set of image files as a few large ones (ArrayRecord shards), with its mean image.

    python -m resnet_jax.prepare --source=image_folder --data_dir=FOLDER --output=DIR
    python -m resnet_jax.prepare --source=ilsvrc --data_dir=FOLDER --output=DIR

Train from it with --config.data.source=array_record --config.data.dir=DIR. The same command again goes on where it
was stopped. ilsvrc is ImageNet as it is handed out: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz in one folder.
"""

import pathlib

from absl import flags

from resnet_jax import cli
from resnet_jax.config import default_config
from resnet_jax.errors import UsageError

flags.DEFINE_enum("source", None, ["image_folder", "ilsvrc", "tfds"], "What is read, as data.source.")
flags.DEFINE_string("data_dir", "", "Where it is, as data.dir.")
flags.DEFINE_string("name", "", "tfds: the data set's name, as data.name.")
flags.DEFINE_string("labels", "", "image_folder: text file with one class folder a line, as data.labels.")
flags.DEFINE_string("output", None, "Folder that the shards go to; new or empty, or begun by the same command.")
flags.DEFINE_integer("workers", -1, "Shards that are written at a time; -1: one per core.", lower_bound=-1)
flags.DEFINE_integer("shard_mb", 256, "About how large a shard is, MB.", lower_bound=1)
flags.DEFINE_bool("mean", True, "Compute the mean image of the training set, which decodes every image.")
flags.DEFINE_integer("mean_size", 224, "Side of the mean image, pixels (data.image_size).", lower_bound=1)
flags.DEFINE_integer("mean_resize", 256, "Shorter side before its centre crop, pixels (eval.resize).", lower_bound=1)
flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "A file that can't be read: stop there, or leave it out.")
FLAGS = flags.FLAGS

# What errors call config fields is called so here.
_FLAG_OF = {"data.dir": "--data_dir", "data.source": "--source", "data.name": "--name", "data.labels": "--labels"}


def main(overrides: list[tuple[str, str]]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of prepare; --help lists them")
    if FLAGS.mean and FLAGS.mean_resize < FLAGS.mean_size:
        raise UsageError(f"--mean_resize={FLAGS.mean_resize} is less than --mean_size={FLAGS.mean_size}")

    from resnet_jax.data import array_record
    from resnet_jax.data.crops import CenterCrop
    from resnet_jax.data.sources import open_dataset, worker_count

    data = default_config().data
    data.source, data.dir, data.name, data.labels = FLAGS.source, FLAGS.data_dir, FLAGS.name, FLAGS.labels
    folder = pathlib.Path(FLAGS.output).expanduser().absolute()
    mean = CenterCrop(FLAGS.mean_size, FLAGS.mean_resize) if FLAGS.mean else None
    workers, skip = worker_count(FLAGS.workers), FLAGS.on_error == "skip"
    inside = pathlib.Path(FLAGS.data_dir).expanduser().resolve()
    if FLAGS.data_dir and inside in folder.resolve().parents:
        raise UsageError(f"--output={FLAGS.output} lies inside --data_dir; choose a folder elsewhere")
    try:
        index = array_record.write(open_dataset(data), folder, workers, FLAGS.shard_mb, mean, skip)
    except UsageError as error:
        text = str(error)
        for field, flag in _FLAG_OF.items():
            text = text.replace(field, flag)
        raise UsageError(text) from error
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        raise
    counts = ", ".join(f"{sum(shards.values())} {split}" for split, shards in index["splits"].items())
    left_out = f"; left out {len(index['skipped'])}, listed in index.json" if index["skipped"] else ""
    print(f"{folder}: {counts} images of {len(index['classes'])} classes{left_out}")
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["source", "output"])
