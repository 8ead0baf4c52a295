"""Test protocols: how often, and at which sizes, the network looks at an image (section 3.4)."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from resnet_jax.classification.dense import dense_scores
from resnet_jax.classification.steps import Batch, Resident
from resnet_jax.data import augment
from resnet_jax.data.crops import Fit, FiveCrop
from resnet_jax.data.decode import resized_shape
from resnet_jax.data.feed import StreamFeed
from resnet_jax.errors import UsageError

CENTER, TEN_CROP, MULTI_SCALE = PROTOCOLS = ("center", "ten_crop", "multi_scale")
# The longer side over the shorter one, rounded up to one of these (and their doubles), so that few shapes are compiled;
# nearly all photos are 4:3 or 3:2, some a pixel more than that.
_RATIOS = (1.34, 1.51, 2.0)
_LONGEST = 16_384  # Side of a canvas, pixels: beyond, one odd file would take all memory.


@dataclasses.dataclass(frozen=True)
class Pass:
    """One look at some examples.

    Attributes:
      batches: of examples, as of ``Feed.evaluation``.
      inputs: what of a batch goes to the devices.
      step: ``step(variables, batch, resident)``, each example's ``probabilities``; jitted.
    """

    batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    inputs: tuple[str, ...]
    step: Callable[[Any, Batch, Resident], dict[str, jax.Array]]


def check_protocol(protocol: str, config: ml_collections.ConfigDict, streams: bool) -> None:
    """Raises a UsageError where the data (read in ``streams``, or not) or the scales don't allow a protocol."""
    size, scales = config.data.image_size, tuple(config.eval.scales)
    if protocol == CENTER:
        return
    if not streams or config.data.crop == "whole":
        raise UsageError(
            f"eval.protocol={protocol} looks at parts of images that are larger than the network's input; with"
            f" data.crop={config.data.crop} there are none"
        )
    if protocol == MULTI_SCALE and (not scales or min(scales) < size):
        raise UsageError(f"eval.scales={scales}: each shorter side must be at least data.image_size={size}")


def make_passes(
    protocol: str, model: nn.Module, variables: Any, feed: StreamFeed, config: ml_collections.ConfigDict, devices: int
) -> list[Pass]:
    """The passes of ``ten_crop`` or ``multi_scale``; an example's score is the mean over those that it is in.

    Args:
      protocol: which of them.
      model: the network.
      variables: its weights, or their shapes.
      feed: the examples.
      config: the whole config.
      devices: how many a batch is split over.

    Raises:
      UsageError: the data or the scales don't allow it.
    """
    check_protocol(protocol, config, isinstance(feed, StreamFeed))
    size, pixels = config.data.image_size, config.eval.batch_size * config.data.image_size**2

    def batch(pixels_each: int, examples: int) -> int:
        """As many examples as take the memory that ``eval.batch_size`` single views do."""
        return max(1, min(pixels // pixels_each, examples) // devices) * devices

    if protocol == TEN_CROP:
        crop = FiveCrop(size, config.eval.resize, config.eval.interpolation)
        count = batch(10 * size**2, feed.examples)
        return [Pass(lambda: feed.evaluation(count, crop=crop), feed.inputs, jax.jit(_ten_crop_step(model)))]

    scales = tuple(config.eval.scales)
    probe = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, probe)
    # VGG's first fully connected layer knows its own.
    window = getattr(model, "window", None) or features[f"stage{len(model.blocks)}"].shape[1]
    step, shapes, passes = jax.jit(_dense_step(model, window)), feed.shapes(), []
    for scale in scales:
        for canvas, index in _by_canvas(shapes, scale).items():
            if max(canvas) > _LONGEST:
                raise UsageError(f"{feed.where(index[0])}: too long a strip for eval.protocol=multi_scale")
            crop, count = Fit(scale, canvas, config.eval.interpolation), batch(2 * math.prod(canvas), len(index))
            passes.append(Pass(_sized(feed, count, crop, index, shapes), (*feed.inputs, "shapes"), step))
    print(
        f"multi_scale: {feed.examples} images at {len(scales)} scales have {len(passes)} shapes to compile", flush=True
    )
    return passes


def _sized(
    feed: StreamFeed, batch: int, crop: Fit, index: np.ndarray, shapes: np.ndarray
) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Batches that say how much of each canvas is the image: ``shapes``, int32 [n, 2]."""

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for host in feed.evaluation(batch, index, crop):
            resized = [resized_shape(*shapes[i], crop.shorter_side) if valid else (0, 0)
                       for i, valid in zip(host["index"], host["valid"], strict=True)]  # fmt: skip
            yield host | {"shapes": np.array(resized, np.int32)}

    return batches


def _by_canvas(shapes: np.ndarray, scale: int) -> dict[tuple[int, int], np.ndarray]:
    """Which images share a canvas (height, width) when their shorter side is ``scale``: int32 index by canvas."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (height, width) in enumerate(shapes.tolist()):
        if height:  # Else it can't be read.
            groups.setdefault(canvas_of(height, width, scale), []).append(i)
    return {canvas: np.array(index, np.int32) for canvas, index in groups.items()}


def canvas_of(height: int, width: int, scale: int) -> tuple[int, int]:
    """The (height, width) of the canvas for an image of this shape, its shorter side resized to ``scale``."""
    ratio = max(height, width) / min(height, width)
    limits = [limit for limit in _RATIOS if ratio <= limit]
    limit = limits[0] if limits else 2.0 ** math.ceil(math.log2(ratio))
    longer = math.ceil(scale * limit)
    return (scale, longer) if height <= width else (longer, scale)


def _ten_crop_step(model: nn.Module) -> Callable[[Any, Batch, Resident], dict[str, jax.Array]]:
    def step(variables: Any, batch: Batch, resident: Resident) -> dict[str, jax.Array]:
        crops = augment.normalise(batch["images"], resident["mean"], resident["std"])  # [n, 5, size, size, C]
        crops = jnp.concatenate([crops, crops[..., ::-1, :]], axis=1)
        logits = model.apply(variables, crops.reshape(-1, *crops.shape[2:]))
        return {"probabilities": jax.nn.softmax(logits).reshape(*crops.shape[:2], -1).mean(1)}

    return step


def _dense_step(model: nn.Module, window: int) -> Callable[[Any, Batch, Resident], dict[str, jax.Array]]:
    def step(variables: Any, batch: Batch, resident: Resident) -> dict[str, jax.Array]:
        mean = resident["mean"]
        mean = mean.mean((0, 1)) if mean.ndim == 3 else mean  # A mean image fits one size alone.
        images = augment.normalise(batch["images"], mean, resident["std"])
        return {"probabilities": dense_scores(model, variables, images, batch["shapes"], window)}

    return step
