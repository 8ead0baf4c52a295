"""Test protocols: what the network sees of an image, which classes it is asked for, and which box is its answer.

The paper's Table 13 has a centre crop, and the whole image at several scales, "dense (fully convolutional)"; of the
true class, "oracle" testing, and of the five that a classifier thinks likeliest.
"""

from collections.abc import Callable, Iterator
import pathlib
import zipfile

import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from resnet_jax.data.crops import CenterCrop
from resnet_jax.data.stream import Rows
from resnet_jax.detection.batches import Resizing
from resnet_jax.detection.nms import vote
from resnet_jax.errors import UsageError
from resnet_jax.localization.batches import centre_batches, whole_batches
from resnet_jax.localization.data import Split

CENTER, MULTI_SCALE = PROTOCOLS = ("center", "multi_scale")
GUESSES = 5
_LONGEST = 2  # Times the shorter side: what is longer is scaled down.
Passes = list[Callable[[], Iterator[dict[str, np.ndarray]]]]


def check_protocol(protocol: str, config: ml_collections.ConfigDict) -> None:
    """Raises a UsageError for a protocol that there is not, or a middle that is larger than the image."""
    size, resize = config.data.image_size, config.eval.resize
    if protocol not in PROTOCOLS:
        raise UsageError(f"eval.protocol={protocol}: localization looks at {' or '.join(PROTOCOLS)}")
    if not size or resize < size:
        raise UsageError(
            f"data.image_size={size}: the side of the crops, above 0 and at most eval.resize={resize}, is needed"
        )


def centre_crop(config: ml_collections.ConfigDict) -> CenterCrop:
    """The single view of a config."""
    return CenterCrop(config.data.image_size, config.eval.resize, config.eval.interpolation)


def make_passes(
    protocol: str,
    split: Split,
    config: ml_collections.ConfigDict,
    place: tuple[int, int],
    devices: int,
    **reading: int | bool,
) -> Passes:
    """The looks at every image that a protocol takes, each a function to batches as of ``centre_batches``.

    Args:
      protocol: ``center``, the middle of the image; or ``multi_scale``, the whole of it at each of ``eval.scales``.
      split: the images.
      config: the whole config.
      place: (process, processes).
      devices: how many a batch is split over.
      **reading: ``workers`` and ``processes`` of the batches.

    Raises:
      UsageError: the config doesn't allow it.
    """
    check_protocol(protocol, config)
    size, images = config.data.image_size, len(split.annotations)

    def rows(pixels: int) -> Rows:
        """As many images a batch as take the memory that ``eval.batch_size`` centre crops do."""
        batch = min(config.eval.batch_size * size**2 // pixels, images)
        return Rows(max(1, -(-batch // devices)) * devices, *place)

    reading = {"content": split.content, **reading}
    if protocol == CENTER:
        return [lambda: centre_batches(split.annotations, centre_crop(config), rows(size**2), **reading)]

    def at(scale: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
        resizing = Resizing((scale,), _LONGEST * scale)
        largest = max(height * width for height, width in resizing.canvases)
        return lambda: whole_batches(split.annotations, resizing, rows(largest), **reading)

    return [at(scale) for scale in config.eval.scales]


def best_boxes(boxes: jax.Array, scores: jax.Array, voting_iou: float) -> tuple[jax.Array, jax.Array]:
    """The answer for each class, out of the candidates of all views.

    Args:
      boxes: [..., C, 4], in the image's pixels.
      scores: [..., C]; 0 for none.
      voting_iou: the best one becomes the mean, weighted by score, of all that overlap it so much; above 1: stays.

    Returns:
      [..., 4] and its score [...].
    """
    boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
    best = scores.argmax(-1)[..., None]
    found = jnp.take_along_axis(boxes, best[..., None], axis=-2)
    if voting_iou <= 1:
        none = jnp.zeros(scores.shape, jnp.int32)
        shape = found.shape
        arguments = (found, none[..., :1], boxes, scores, none, scores > 0)
        flat = [x.reshape(-1, *x.shape[scores.ndim - 1 :]) for x in arguments]
        found = jax.vmap(lambda *of_class: vote(*of_class, voting_iou))(*flat).reshape(shape)
    return found[..., 0, :], jnp.take_along_axis(scores, best, axis=-1)[..., 0]


def predicted_classes(path: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """The likeliest classes of each image as a classification's ``predictions.npz`` has them, the likeliest first.

    Args:
      path: the file.
      labels: int [N], the images' classes.
      classes: how many there are.

    Returns:
      int32 [N, 5], or as many as there are classes.

    Raises:
      UsageError: no such file, or of other images or classes.
    """
    where = f"localization.predictions={path}"
    try:
        with np.load(pathlib.Path(path).expanduser()) as stored:
            index, probabilities = stored["index"], stored["probabilities"]
            label = stored.get("label", labels)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{where}: no predictions.npz of a classification ({error})") from error
    if probabilities.shape != (len(labels), classes) or not np.array_equal(index, np.arange(len(labels))):
        raise UsageError(
            f"{where}: of {len(index)} images and {probabilities.shape[-1]} classes; the test set has {len(labels)} and"
            f" {classes}"
        )
    if not np.array_equal(label, labels):
        first = int(np.flatnonzero(label != labels)[0])
        raise UsageError(f"{where}: image {first} is of class {label[first]} there, and of {labels[first]} here")
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :GUESSES].astype(np.int32)
