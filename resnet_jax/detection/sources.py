"""Where a detector's images and boxes come from: each ``data.source`` of task=detection."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import sys

import ml_collections

from resnet_jax import distributed
from resnet_jax.data.image_folder import read_class_names
from resnet_jax.detection import coco, shapes, voc
from resnet_jax.detection.annotations import Annotations, for_training
from resnet_jax.detection.batches import Pixels, read_pixels
from resnet_jax.detection.result_files import NOTHING, voc_files
from resnet_jax.errors import UsageError, did_you_mean

# What a test set is called where nobody says; the first that is there.
_TEST_SPLITS = ("test", "val", "valid", "validation", "val2017")


@dataclasses.dataclass(frozen=True)
class Split:
    """Annotated images.

    Attributes:
      annotations: theirs.
      pixels: where the images come from.
      image_set: what VOC's result files call it; empty for COCO's, which have none.
    """

    annotations: Annotations
    pixels: Pixels = read_pixels
    image_set: str = ""


def read_splits(config: ml_collections.ConfigDict) -> dict[str, Split]:
    """The splits ``train`` (less what ``for_training`` leaves out) and ``test`` of ``config.data``.

    Raises:
      UsageError: an unknown source, or data that are not there, malformed, or of other classes in the test set.
    """
    data = config.data
    if data.source not in SOURCES:
        raise UsageError(f"data.source={data.source} is no source of task=detection{did_you_mean(data.source, SOURCES)}"
                         f" ({', '.join(SOURCES)})")  # fmt: skip
    splits = SOURCES[data.source](config)
    train, test = splits["train"].annotations, splits["test"].annotations
    if (train.classes, train.category_ids) != (test.classes, test.category_ids):
        names = [", ".join(part.classes[:5]) for part in (train, test)]
        raise UsageError(
            f"data.dir={data.dir}: the training set has {len(train.classes)} classes ({names[0]}, ...) and the test set"
            f" {len(test.classes)} ({names[1]}, ...); list those that count in data.labels=FILE"
        )
    if splits["test"].image_set:
        voc_files(splits["test"].image_set, test, [NOTHING] * len(test))  # Names that no file can have are found now.
    if (config.task != "detection" or config.detection.labelled) and all(
        (image.crowd | image.difficult).all() for image in test.images
    ):
        raise UsageError(f"data.dir={data.dir}: no box to be found in the test set")
    kept = for_training(train, data.difficult, data.without_boxes)
    if len(kept) < len(train):
        left = len(train) - len(kept)
        _warn(f"{left} training images without an object are left out; data.without_boxes=true keeps them")
    for label in sorted(set(range(len(train.classes))) - _labels(kept)):
        _warn(f"no training image has a {train.classes[label]!r}")
    return splits | {"train": dataclasses.replace(splits["train"], annotations=kept)}


def _warn(text: str) -> None:
    if distributed.leads():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def describe_splits(splits: Mapping[str, Split]) -> str:
    """A line for people: how many images and objects, and the classes."""
    counts = []
    for name, split in splits.items():
        images = split.annotations.images
        counts.append(f"{name} {len(images)} images with {sum(len(image.boxes) for image in images)} objects")
    classes = splits["train"].annotations.classes
    named = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    return f"data: {'; '.join(counts)}; {len(classes)} classes ({named})"


def _labels(annotations: Annotations) -> set[int]:
    return {int(label) for image in annotations.images for label in image.labels}


def _shapes(config: ml_collections.ConfigDict) -> dict[str, Split]:
    counts = dict(zip(shapes.SPLITS, config.data.shapes, strict=True))
    # Seed 0 whatever the run's: runs of several seeds are judged on the same pictures.
    return {split: Split(*shapes.shapes(count, 0, split), split) for split, count in counts.items()}


def _voc(config: ml_collections.ConfigDict) -> dict[str, Split]:
    data, root = config.data, _folder(config.data)

    def read(split: str, labelled: bool = True) -> Split:
        if split in voc.SETS:
            classes = _class_names(data) or voc.CLASSES
            annotations = voc.read_devkit(str(root), split, classes, labelled, data.on_error)
            return Split(annotations, image_set=voc.SETS[split][-1][1])
        annotations = voc.read_voc(str(root), split, _class_names(data), labelled, data.on_error)
        return Split(annotations, image_set=split)

    lists = root / "ImageSets" / "Main"
    there = [split for split in _TEST_SPLITS if (lists / f"{split}.txt").is_file()]
    test = data.test_split or next(iter(there), "07_test" if data.train_split in voc.SETS else "test")
    return {"train": read(data.train_split), "test": read(test, config.detection.labelled)}


def _coco(config: ml_collections.ConfigDict) -> dict[str, Split]:
    data, root = config.data, _folder(config.data)

    def read(split: str, labelled: bool = True) -> Split:
        return Split(coco.read_split(str(root), split, _class_names(data), labelled, data.on_error))

    there = [split for split in _TEST_SPLITS if coco.has_split(str(root), split)]
    test = data.test_split or next(iter(there), "test")
    return {"train": read(data.train_split), "test": read(test, config.detection.labelled)}


def _any_form(config: ml_collections.ConfigDict) -> dict[str, Split]:
    root = _folder(config.data)
    if any((root / name).is_dir() for name in ("ImageSets", "VOCdevkit", "VOC2007", "VOC2012")):
        return _voc(config)
    if not (root / "annotations").is_dir() and not any(root.glob("*/_annotations.coco.json")):
        raise UsageError(
            f"data.dir={config.data.dir}: neither VOC's layout (Annotations, ImageSets/Main, JPEGImages) nor COCO's"
            " (annotations/instances_<split>.json, or <split>/_annotations.coco.json)"
        )
    return _coco(config)


def _folder(data: ml_collections.ConfigDict) -> pathlib.Path:
    if not data.dir:
        raise UsageError(f"data.source={data.source} needs --config.data.dir=FOLDER")
    root = pathlib.Path(data.dir).expanduser()
    if not root.is_dir():
        raise UsageError(f"data.dir={data.dir}: no such folder")
    return root


def _class_names(data: ml_collections.ConfigDict) -> tuple[str, ...] | None:
    return read_class_names(data.labels) if data.labels else None


SOURCES: Mapping[str, Callable[[ml_collections.ConfigDict], dict[str, Split]]] = {
    "voc": _voc,
    "coco": _coco,
    "folder": _any_form,
    "shapes": _shapes,
}
