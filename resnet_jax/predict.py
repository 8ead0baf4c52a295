"""Says what is in pictures: the likeliest classes of files, folders or glob patterns.

python -m resnet_jax.predict --workdir=runs/mine photo.jpg holiday/ 'more/*.png'
python -m resnet_jax.predict --weights=resnet50.safetensors --model=resnet50_v1_5 --json photo.jpg
python -m resnet_jax.predict --workdir=runs/imagenet_50 --submission=test.txt --devkit=FOLDER test/
"""

import json
import pathlib
import re
import sys

from absl import flags

from resnet_jax import cli
from resnet_jax.buckets import is_folder, open_folder
from resnet_jax.errors import UsageError
from resnet_jax.output import check_folder, write_whole

flags.DEFINE_string("workdir", None, "A run of ours; this or --weights.")
flags.DEFINE_string("weights", None, "What convert takes as --weights; with --model, unless it says so itself.")
flags.DEFINE_string("model", None, "Our name of the network that the weights are of.")
flags.DEFINE_integer("top", 5, "How many classes are named.", lower_bound=1)
flags.DEFINE_integer("batch", 32, "Images at a time.", lower_bound=1)
flags.DEFINE_bool("json", False, "Print JSON, an object a line.")
flags.DEFINE_string("features", None, "Write pooled features to this .npz: files, features [N, channels].")
flags.DEFINE_string("heatmap", None, "Write pictures into this folder that show where the network looked.")
flags.DEFINE_string(
    "submission", None, "Write this .txt for ImageNet's test server: five classes a line, an image each."
)
flags.DEFINE_string("devkit", None, "ImageNet's development kit (folder or tar), for --submission.")
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]], images: list[str]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of predict; --help lists them")
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("give one of --workdir=RUN and --weights=FILE")
    if not images:
        raise UsageError("name images: files, folders or patterns")
    features = _file("features", ".npz")
    submission = _file("submission", ".txt")
    if submission and not FLAGS.devkit:
        raise UsageError("--submission needs --devkit=FOLDER_OR_TAR, ImageNet's development kit, which has the server's"
                         " numbers of the classes")  # fmt: skip
    heatmaps = pathlib.Path(FLAGS.heatmap).expanduser() if FLAGS.heatmap else None
    if heatmaps:
        check_folder("--heatmap", FLAGS.heatmap, heatmaps)

    import numpy as np

    from resnet_jax.classification import predict as predict_lib
    from resnet_jax.pretrained.source import read_weights

    paths = predict_lib.find_images(images)
    if FLAGS.workdir and not is_folder(open_folder("--workdir", FLAGS.workdir)):
        raise UsageError(f"--workdir={FLAGS.workdir}: no such folder; a file of weights is --weights=FILE")
    model, weights = read_weights(FLAGS.workdir or FLAGS.weights, FLAGS.model)
    print(f"{model}, {len(paths)} images", file=sys.stderr, flush=True)
    if heatmaps and not predict_lib.has_map(model, weights):
        raise UsageError(f"--heatmap: {model} has no map of classes (its classifier does not read an average)")
    numbers = predict_lib.challenge_numbers(FLAGS.devkit, weights) if submission else None
    names, vectors, lines = predict_lib.class_names(weights), [], []
    for number, found in enumerate(predict_lib.predict(model, weights, paths, FLAGS.batch)):
        order = found.probabilities.argsort()[::-1]
        said = [(names[i], float(found.probabilities[i])) for i in order[: FLAGS.top]]
        if FLAGS.json:
            predictions = [{"class": name, "probability": round(share, 6)} for name, share in said]
            print(json.dumps({"file": found.path, "predictions": predictions}), flush=True)
        else:
            print(f"{found.path}: {', '.join(f'{100 * share:.1f}% {name}' for name, share in said)}", flush=True)
        if features:
            vectors.append(found.features)
        if numbers is not None:
            lines.append(" ".join(str(numbers[i]) for i in order[:5]))
        if heatmaps:
            heatmaps.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", pathlib.Path(found.path).stem)
            drawn = predict_lib.draw_heatmap(found)
            write_whole(heatmaps / f"{number:04}_{name}.png", lambda file, drawn=drawn: drawn.save(file, "PNG"))
    if features:
        write_whole(features, lambda file: np.savez(file, files=np.array(paths), features=np.stack(vectors)))
    if submission:
        write_whole(submission, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
    return 0


def _file(flag: str, ending: str) -> pathlib.Path | None:
    """The file that a flag names, whose folder is there."""
    value = FLAGS[flag].value
    if not value:
        return None
    path = pathlib.Path(value).expanduser()
    if path.suffix != ending:
        raise UsageError(f"--{flag}={value}: the file's name ends in {ending}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--{flag}={value}: no folder {path.absolute().parent}")
    return path


if __name__ == "__main__":
    cli.run(main, __doc__, takes_arguments=True)
