"""What a trained detector finds in pictures: boxes, and pictures with boxes drawn into them."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np

from resnet_jax.data.pictures import read_upright
from resnet_jax.data.stream import Rows
from resnet_jax.detection.annotations import AnnotatedImage, Annotations, Detections, annotated_image
from resnet_jax.detection.batches import Pixels, Resizing, evaluation_batches
from resnet_jax.detection.draw import draw_large
from resnet_jax.detection.evaluation import collect
from resnet_jax.detection.inference import inputs, make_inference_step
from resnet_jax.detection.settings import make_settings
from resnet_jax.detection.sources import read_splits
from resnet_jax.detection.start import make_model
from resnet_jax.pretrained.load import Pretrained


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found in one picture.

    Attributes:
      name: its file, or of a data set its id.
      pixels: uint8 [H, W, 3], upright.
      objects: boxes in its pixels, by falling score.
    """

    name: str
    pixels: np.ndarray
    objects: Detections

    def above(self, score: float) -> "Found":
        """The same with the objects of at least this score."""
        keep = self.objects.scores >= score
        fields = {name: getattr(self.objects, name)[keep] for name in ("boxes", "labels", "scores")}
        return dataclasses.replace(self, objects=Detections(**fields))


def predict(
    config: ml_collections.ConfigDict,
    weights: Pretrained,
    pictures: Sequence[AnnotatedImage],
    pixels: Pixels,
    batch: int = 4,
) -> Iterator[Found]:
    """Looks for objects in pictures, as the run's evaluation does.

    Args:
      config: the run's.
      weights: the run's, with its classes.
      pictures: which; their boxes are not looked at.
      pixels: where they come from.
      batch: how many at a time; a batch of each canvas is compiled once.

    Raises:
      UsageError: a picture can't be read.
    """
    model = make_model(config, len(weights.classes), weights)
    step = jax.jit(make_inference_step((model,), make_settings(config.detection)))
    resizing = Resizing(config.detection.shorter, config.detection.longer)
    values = weights.preprocessing
    resident = {name: np.array(getattr(values, name), np.float32) for name in ("mean", "std")}
    ids = tuple(range(1, 1 + len(weights.classes)))
    for start in range(0, len(pictures), batch):
        chosen = tuple(pictures[start : start + batch])
        read = {image.id: pixels(image) for image in chosen}
        annotations = Annotations(weights.classes, ids, chosen)
        batches = evaluation_batches(annotations, resizing, Rows(batch), pixels=lambda image, read=read: read[image.id])
        outputs: list[Any] = []
        for arrays in batches:
            found = step((weights.variables,), inputs(arrays), (resident,))
            outputs.append(jax.device_get(found) | {n: arrays[n] for n in ("index", "real")})
        for image, objects in zip(chosen, collect(outputs, len(chosen)), strict=True):
            yield Found(image.path or str(image.id), read[image.id], objects)


def pictures_of(paths: Sequence[str]) -> tuple[list[AnnotatedImage], Pixels]:
    """Files as ``predict`` takes them: without boxes, and their pixels upright (EXIF).

    Raises:
      UsageError: one can't be read.
    """
    pictures = []
    for number, path in enumerate(paths):
        height, width = read_upright(path).shape[:2]
        pictures.append(annotated_image(number, path, width, height, [], []))
    return pictures, lambda image: read_upright(image.path)


def test_pictures(config: ml_collections.ConfigDict, count: int) -> tuple[list[AnnotatedImage], Pixels]:
    """The first pictures of a run's own test set, as ``predict`` takes them."""
    split = read_splits(config)["test"]
    return list(split.annotations.images[:count]), split.pixels


def as_json(found: Found, classes: Sequence[str]) -> dict[str, Any]:
    """``file``, ``width``, ``height`` and ``objects``: each its ``class``, ``score`` and ``box`` (left, top, right,
    bottom; pixels).
    """  # fmt: skip
    height, width = found.pixels.shape[:2]
    objects = [
        {"class": classes[label], "score": round(float(score), 6), "box": [round(float(side), 2) for side in box]}
        for box, label, score in zip(found.objects.boxes, found.objects.labels, found.objects.scores, strict=True)
    ]
    return {"file": found.name, "width": width, "height": height, "objects": objects}


def draw(found: Found, classes: Sequence[str]) -> np.ndarray:
    """The picture with a named box around each object, uint8 [H, W, 3]; small ones enlarged."""
    objects = found.objects
    return draw_large(found.pixels, objects.boxes, objects.labels, classes, objects.scores)
