"""Where a detector's images and boxes come from: each ``data.source`` of task=detection."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib

import ml_collections

from resnet_jax.data.image_folder import read_class_names
from resnet_jax.detection import coco, shapes, voc
from resnet_jax.detection.annotations import Annotations, for_training
from resnet_jax.detection.batches import Pixels, read_pixels
from resnet_jax.errors import UsageError, did_you_mean

# What a test set is called where nobody says; the first that is there.
_TEST_SPLITS = ("test", "val", "valid", "validation", "val2017")


@dataclasses.dataclass(frozen=True)
class Split:
    """Annotated images, and where their pixels come from."""

    annotations: Annotations
    pixels: Pixels = read_pixels


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
    kept = for_training(train, data.difficult, data.without_boxes)
    return splits | {"train": dataclasses.replace(splits["train"], annotations=kept)}


def _shapes(config: ml_collections.ConfigDict) -> dict[str, Split]:
    counts = dict(zip(shapes.SPLITS, config.data.shapes, strict=True))
    # Seed 0 whatever the run's: runs of several seeds are judged on the same pictures.
    return {split: Split(*shapes.shapes(count, 0, split)) for split, count in counts.items()}


def _voc(config: ml_collections.ConfigDict) -> dict[str, Split]:
    data, root = config.data, _folder(config.data)

    def read(split: str, labelled: bool = True) -> Split:
        if split in voc.SETS:
            classes = _class_names(data) or voc.CLASSES
            return Split(voc.read_devkit(str(root), split, classes, labelled, data.on_error))
        return Split(voc.read_voc(str(root), split, _class_names(data), labelled, data.on_error))

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
    voc_like = any((root / name).is_dir() for name in ("ImageSets", "VOCdevkit", "VOC2007", "VOC2012"))
    return (_voc if voc_like else _coco)(config)


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
