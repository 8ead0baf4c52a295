"""Says what is in pictures: the likeliest classes of files, folders or glob patterns; of a detector's run the objects.

python -m resnet_jax.predict --workdir=runs/mine photo.jpg holiday/ 'more/*.png'
python -m resnet_jax.predict --workdir=runs/shapes --output=found
python -m resnet_jax.predict --weights=resnet50.safetensors --model=resnet50_v1_5 --json photo.jpg
python -m resnet_jax.predict --workdir=runs/imagenet_50 --submission=test.txt --devkit=FOLDER test/
"""

import json
import pathlib
import re
import sys
from typing import Any

from absl import flags

from resnet_jax import cli
from resnet_jax.buckets import is_folder, open_folder
from resnet_jax.errors import UsageError
from resnet_jax.output import check_folder, write_whole

flags.DEFINE_string("workdir", None, "A run of ours; this or --weights.")
flags.DEFINE_string("weights", None, "What convert takes as --weights; with --model, unless it says so itself.")
flags.DEFINE_string("model", None, "Our name of the network that the weights are of.")
flags.DEFINE_integer("top", 5, "How many classes are named.", lower_bound=1)
flags.DEFINE_integer("batch", None, "Images at a time (32; of a detector 4).", lower_bound=1)
flags.DEFINE_bool("json", False, "Print JSON, an object a line.")
flags.DEFINE_string("features", None, "Write pooled features to this .npz: files, features [N, channels].")
flags.DEFINE_string("heatmap", None, "Write pictures into this folder that show where the network looked.")
flags.DEFINE_string(
    "submission", None, "Write this .txt for ImageNet's test server: five classes a line, an image each."
)
flags.DEFINE_string("devkit", None, "ImageNet's development kit (folder or tar), for --submission.")
flags.DEFINE_string("output", None, "Detector: write the pictures with boxes drawn into them into this folder.")
flags.DEFINE_float(
    "threshold", 0.5, "Detector: the least score of what is drawn and printed.", lower_bound=0, upper_bound=1
)
flags.DEFINE_integer(
    "limit", 16, "Detector: without images, so many pictures of the run's own test set are looked at.", lower_bound=1
)
FLAGS = flags.FLAGS
_CLASSIFICATION, _DETECTION = ("top", "features", "heatmap", "submission", "devkit"), ("output", "threshold", "limit")


def main(overrides: list[tuple[str, str]], images: list[str]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of predict; --help lists them")
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("give one of --workdir=RUN and --weights=FILE")
    if FLAGS.workdir and not is_folder(open_folder("--workdir", FLAGS.workdir)):
        raise UsageError(f"--workdir={FLAGS.workdir}: no such folder; a file of weights is --weights=FILE")
    detector = bool(FLAGS.workdir) and _task_of_run() == "detection"
    for flag in _CLASSIFICATION if detector else _DETECTION:
        if FLAGS[flag].present:
            raise UsageError(f"--{flag} is for {'classifiers, and this is a detector' if detector else 'detectors'}")
    if not images and not detector:
        raise UsageError("name images: files, folders or patterns")
    return _find_objects(images) if detector else _classify(images)


def _task_of_run() -> str:
    from resnet_jax.run import read_config

    return read_config(open_folder("--workdir", FLAGS.workdir))[0].task


def _find_objects(images: list[str]) -> int:
    output = pathlib.Path(FLAGS.output).expanduser() if FLAGS.output else None
    if output:
        check_folder("--output", FLAGS.output, output)

    from PIL import Image

    from resnet_jax.data.pictures import find_images
    from resnet_jax.detection import predict as predict_lib
    from resnet_jax.pretrained.source import read_weights
    from resnet_jax.run import read_config

    config, _ = read_config(open_folder("--workdir", FLAGS.workdir))
    model, weights = read_weights(FLAGS.workdir, FLAGS.model, ("detection",))
    if images:
        pictures, pixels = predict_lib.pictures_of(find_images(images))
    else:
        pictures, pixels = predict_lib.test_pictures(config, FLAGS.limit)
    print(f"{model}, {len(pictures)} images{'' if images else ' of its test set'}", file=sys.stderr, flush=True)
    for number, whole in enumerate(predict_lib.predict(config, weights, pictures, pixels, FLAGS.batch or 4)):
        found = whole.above(FLAGS.threshold)
        said = predict_lib.as_json(found, weights.classes)
        if FLAGS.json:
            print(json.dumps(said), flush=True)
        else:
            listed = [f"{100 * one['score']:.1f}% {one['class']} {_rounded(one['box'])}" for one in said["objects"]]
            print(f"{found.name}: {', '.join(listed) or _nothing(whole, weights.classes)}", flush=True)
        if output:
            drawn = Image.fromarray(predict_lib.draw(found, weights.classes))
            _save_picture(output, number, found.name, drawn)
    return 0


def _nothing(found: Any, classes: tuple[str, ...]) -> str:
    """What is said of a picture in which nothing is sure enough; objects come by falling score."""
    if not len(found.objects):
        return "nothing"
    surest = f"{100 * found.objects.scores[0]:.0f}% {classes[found.objects.labels[0]]}"
    return f"nothing of {100 * FLAGS.threshold:.0f}% or more (the surest: {surest}; --threshold)"


def _rounded(box: list[float]) -> str:
    return f"({', '.join(str(round(side)) for side in box)})"


def _save_picture(folder: pathlib.Path, number: int, name: str, picture: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "_", str(pathlib.Path(name).with_suffix("").name))
    write_whole(folder / f"{number:04}_{stem}.png", lambda file: picture.save(file, "PNG"))


def _classify(images: list[str]) -> int:
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
    from resnet_jax.data.pictures import find_images
    from resnet_jax.pretrained.source import read_weights

    paths = find_images(images)
    model, weights = read_weights(FLAGS.workdir or FLAGS.weights, FLAGS.model)
    print(f"{model}, {len(paths)} images", file=sys.stderr, flush=True)
    if heatmaps and not predict_lib.has_map(model, weights):
        raise UsageError(f"--heatmap: {model} has no map of classes (its classifier does not read an average)")
    numbers = predict_lib.challenge_numbers(FLAGS.devkit, weights) if submission else None
    names, vectors, lines = predict_lib.class_names(weights), [], []
    for number, found in enumerate(predict_lib.predict(model, weights, paths, FLAGS.batch or 32)):
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
            _save_picture(heatmaps, number, found.path, predict_lib.draw_heatmap(found))
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
