"""Says what is in pictures: the likeliest classes of files, folders or glob patterns.

python -m resnet_jax.predict --workdir=runs/mine photo.jpg holiday/ 'more/*.png'
python -m resnet_jax.predict --weights=resnet50.safetensors --model=resnet50_v1_5 --json photo.jpg
"""

import json
import pathlib
import re

from absl import flags

from resnet_jax import cli
from resnet_jax.errors import UsageError

flags.DEFINE_string("workdir", None, "A run of ours; this or --weights.")
flags.DEFINE_string("weights", None, "What convert takes as --weights; with --model, unless it says so itself.")
flags.DEFINE_string("model", None, "Our name of the network that the weights are of.")
flags.DEFINE_integer("top", 5, "How many classes are named.", lower_bound=1)
flags.DEFINE_integer("batch", 32, "Images at a time.", lower_bound=1)
flags.DEFINE_bool("json", False, "Print JSON, an object a line.")
flags.DEFINE_string("features", None, "Write pooled features to this .npz: files, features [N, channels].")
flags.DEFINE_string("heatmap", None, "Write pictures into this folder that show where the network looked.")
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]], images: list[str]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of predict; --help lists them")
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("give one of --workdir=RUN and --weights=FILE")
    if not images:
        raise UsageError("name images: files, folders or patterns")
    if FLAGS.features and not FLAGS.features.endswith(".npz"):
        raise UsageError(f"--features={FLAGS.features}: the file's name ends in .npz")

    import numpy as np

    from resnet_jax.classification import predict as predict_lib
    from resnet_jax.pretrained.source import read_weights

    paths = predict_lib.find_images(images)
    model, weights = read_weights(FLAGS.workdir or FLAGS.weights, FLAGS.model)
    names, features = predict_lib.class_names(weights), []
    heatmaps = pathlib.Path(FLAGS.heatmap).expanduser() if FLAGS.heatmap else None
    for number, found in enumerate(predict_lib.predict(model, weights, paths, FLAGS.batch)):
        best = found.probabilities.argsort()[::-1][: FLAGS.top]
        said = [{"class": names[i], "probability": round(float(found.probabilities[i]), 6)} for i in best]
        if FLAGS.json:
            print(json.dumps({"file": found.path, "predictions": said}), flush=True)
        else:
            print(
                f"{found.path}: " + ", ".join(f"{100 * one['probability']:.1f}% {one['class']}" for one in said),
                flush=True,
            )
        features.append(found.features)
        if heatmaps:
            if found.heatmap is None:
                raise UsageError(f"--heatmap: {model} has no map of classes (its classifier does not read an average)")
            heatmaps.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", pathlib.Path(found.path).stem)
            predict_lib.draw_heatmap(found).save(heatmaps / f"{number:04}_{name}.png")
    if FLAGS.features:
        np.savez(FLAGS.features, files=np.array(paths), features=np.stack(features))
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__, takes_arguments=True)
