"""BN statistics as averages over the training set, which the authors released theirs as, in place of moving ones."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from resnet_jax.classification.steps import Batch, Resident, take_images
from resnet_jax.data import augment
from resnet_jax.data.order import epoch_order


def make_statistics_step(model: nn.Module) -> Callable[[dict[str, Any], Batch, Resident], Any]:
    """Builds ``step(variables, batch, resident)``: every BN's mean and variance over the batch, as ``batch_stats``.

    Layers see what they see in training: inputs that were normalised by the statistics of their own group of examples.
    """
    # A running average that keeps nothing is the batch's own; what fine-tuning froze is looked at too.
    thawed = {"freeze_at": 0} if hasattr(model, "freeze_at") else {}
    scope = "global" if model.batch_norm == "frozen" else model.batch_norm
    forgetful = model.clone(batch_norm_momentum=0.0, batch_norm=scope, **thawed)

    def step(variables: dict[str, Any], batch: Batch, resident: Resident) -> Any:
        images, _ = take_images(batch, resident)
        images = augment.normalise(images, resident["mean"], resident["std"])
        # VGG's dropout comes after all of its BN.
        rngs = {"dropout": jax.random.key(0)}
        _, updated = forgetful.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return updated["batch_stats"]

    return step


def average_statistics(batches: Iterator[Any]) -> Any:
    """Statistics over all batches of one size: means average; variances, by way of E[x^2].

    Args:
      batches: nested ``batch_stats`` with ``mean`` and ``var`` of each batch.

    Returns:
      The same of all of them, float32 NumPy arrays.
    """
    count, sums = 0, None
    for stats in batches:
        moments = _moments(jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(stats)))
        sums = moments if sums is None else jax.tree.map(np.add, sums, moments)
        count += 1
    return _statistics(jax.tree.map(lambda x: x / count, sums))


def _moments(stats: Any) -> Any:
    if "mean" not in stats:
        return {name: _moments(part) for name, part in stats.items()}
    return {"mean": stats["mean"], "square": stats["var"] + np.square(stats["mean"])}


def _statistics(moments: Any) -> Any:
    if "mean" not in moments:
        return {name: _statistics(part) for name, part in moments.items()}
    variance = np.maximum(moments["square"] - np.square(moments["mean"]), 0)
    return {"mean": moments["mean"].astype(np.float32), "var": variance.astype(np.float32)}


def whole_batches(examples: int, batch: int, seed: int) -> np.ndarray:
    """The training order's first epoch without the few examples that would not fill a batch, int32.

    A folder's own order, class by class, would give batches that are like no batch of training.
    """
    return epoch_order(seed, 0, examples)[: examples // batch * batch]
