"""What localization is trained and tested on: images of one class each, and the boxes of that class in them."""

import dataclasses

import ml_collections
import numpy as np

from resnet_jax.data.crops import CenterCrop
from resnet_jax.data.decode import BrokenImage
from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD, Sums
from resnet_jax.detection.annotations import Annotations
from resnet_jax.detection.batches import read_pixels
from resnet_jax.detection.shapes import SPLITS, shapes
from resnet_jax.detection.sources import read_splits as read_detection_splits
from resnet_jax.errors import UsageError
from resnet_jax.localization.batches import Content, read_content

_MEASURED = 1000  # Images whose pixels are looked at for their mean.


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one class each, and where they come from."""

    annotations: Annotations
    content: Content = read_content


def of_one_class(annotations: Annotations) -> Annotations:
    """Gives each image one class, that of its largest box (the first of equals), and leaves the boxes of others out.

    Boxes around crowds are left out too, and images without any other.

    Raises:
      UsageError: nothing is left.
    """
    images = []
    for image in annotations.images:
        image = image.select(~image.crowd)
        if len(image.boxes):
            sides = image.boxes[:, 2:] - image.boxes[:, :2]
            images.append(image.select(image.labels == image.labels[sides.prod(1).argmax()]))
    if not images:
        raise UsageError(
            f"none of {len(annotations)} images has a box (other than around a crowd): nothing to localize"
        )
    return dataclasses.replace(annotations, images=tuple(images))


def read_splits(config: ml_collections.ConfigDict) -> dict[str, Split]:
    """The splits ``train`` and ``test`` of ``config.data``: detection's sources, and of ``shapes`` one a picture.

    Raises:
      UsageError: an unknown source, or data that are not there, malformed, or without boxes.
    """
    if config.data.source == "shapes":
        counts = zip(SPLITS, config.data.shapes, strict=True)
        # Seed 0 whatever the run's: runs of several seeds are judged on the same pictures.
        return {split: Split(*shapes(count, 0, split, most=1)) for split, count in counts}
    found = read_detection_splits(config)
    return {
        name: Split(of_one_class(split.annotations), read_content if split.pixels is read_pixels else split.pixels)
        for name, split in found.items()
    }


def channel_statistics(
    data: ml_collections.ConfigDict, split: Split, view: CenterCrop
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel as ``data.mean`` and ``data.std`` say, float32 [3], where white is 1.

    ``channel`` is measured on the middle of a thousand of the split's images, in even steps.

    Raises:
      UsageError: a mean image, which fits views of one size alone; an image that can't be read.
    """
    if data.mean == "pixel":
        raise UsageError("data.mean=pixel: localization looks at images of several sizes; channel, imagenet or none")
    known = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "none": (np.zeros(3), np.ones(3))}
    known = {name: [np.array(x, np.float32) for x in pair] for name, pair in known.items()}
    if "channel" in (data.mean, data.std):
        sums, images = Sums(), split.annotations.images
        for i in np.unique(np.linspace(0, len(images) - 1, _MEASURED).astype(int)):
            sums.add(_seen(split, view, i))
        found = sums.statistics()
        known["channel"] = [found.mean, found.std]
    return known[data.mean][0], known[data.std][1]


def _seen(split: Split, view: CenterCrop, i: int) -> np.ndarray:
    image = split.annotations.images[i]
    try:
        return view(split.content(image), np.empty(0))
    except (OSError, BrokenImage) as error:
        raise UsageError(f"{image.path}: not a readable image ({getattr(error, 'strerror', None) or error})") from error
