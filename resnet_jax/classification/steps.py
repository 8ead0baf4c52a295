"""The jitted steps of classification, as pure functions."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections
import optax

from resnet_jax.data import augment
from resnet_jax.distributed import count_devices, platform
from resnet_jax.training import schedules, update
from resnet_jax.training.state import TrainState

Batch = dict[str, jax.Array]
# Arrays that lie on the devices throughout: mean, std; in training the run's seed, uint32; and for small data images
# uint8 [N, H, W, C], labels int32 [N].
Resident = dict[str, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example: logits [N, classes], labels int [N] -> [N], in nats."""
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def label_rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many other classes score at least the label's: [N, classes], int [N] -> int32 [N].

    An example is a top-k error where this is k or more; ties, and so NaNs, count against the network.
    """
    score = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    return (~(logits < score)).sum(-1, dtype=jnp.int32) - 1


def merge_batch_stats(parts: Any, momentum: float) -> Any:
    """Running statistics after one step whose batch was worked through in parts, [K, ...] in each leaf.

    Every part started from the same running statistics r and ended at m r + (1 - m) batch. Means average;
    variances average plus the variance of the parts' means, which is what E[x], E[x^2] of the whole batch give.
    """

    def merge(stats: dict[str, Any]) -> dict[str, Any]:
        if "mean" not in stats:
            return {name: merge(value) for name, value in stats.items()}
        spread = stats["mean"].var(0) / (1 - momentum)
        return {"mean": stats["mean"].mean(0), "var": stats["var"].mean(0) + spread}

    return merge(parts)


def split_batch(batch: Batch, parts: int, devices: int) -> Batch:
    """Splits [B, ...] into [parts, B / parts, ...], each device's own examples staying on it."""

    def split(x: jax.Array) -> jax.Array:
        by_device = x.reshape(devices, parts, x.shape[0] // (devices * parts), *x.shape[1:])
        return by_device.swapaxes(0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])

    return jax.tree.map(split, batch)


def take_images(batch: Batch, resident: Resident) -> tuple[jax.Array, jax.Array]:
    """A batch's images uint8 [B, H, W, C] and labels int32 [B]: its own, or the resident ones of its ``index``."""
    if "images" in batch:
        return batch["images"], batch["labels"]
    return tuple(jnp.take(resident[name], batch["index"], axis=0, mode="clip") for name in ("images", "labels"))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    config: ml_collections.ConfigDict,
    total_steps: int,
) -> Callable[[TrainState, Batch, Resident], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step, to be jitted over a mesh (``jax.set_mesh``).

    Args:
      model: the network.
      optimizer: of ``make_optimizer``.
      config: the whole config.
      total_steps: length of the training, for the schedule.

    Returns:
      ``step(state, {"index", "epoch"}, resident) -> state, metrics``; index and epoch are int32 [B]; a batch may
      bring its own ``images`` and ``labels``. Metrics are scalars: ``loss`` (mean over the batch), ``top1_error``
      (%), ``learning_rate``, ``gradient_norm`` and, of the updated weights, ``weight_norm``.
    """
    schedule = schedules.make_schedule(config.schedule, total_steps)
    parts = config.optimizer.accumulate
    dropout = getattr(model, "dropout", 0.0)
    unroll = platform() == "cpu"  # XLA:CPU runs convolutions many times slower inside a loop.

    def step(state: TrainState, batch: Batch, resident: Resident):
        augment_seed, dropout_seed = jax.random.split(jax.random.key(resident["seed"]))

        def forward(params, part, number):
            images, labels = take_images(part, resident)
            images = augment.normalise(images, resident["mean"], resident["std"])
            keys = augment.example_keys(augment_seed, part["epoch"], part["index"])
            data = config.data
            images = augment.augment(keys, images, data.pad, data.flip, data.color_noise, resident["std"])
            key = jax.random.fold_in(jax.random.fold_in(dropout_seed, state.step), number)
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key} if dropout else None,
            )
            loss = cross_entropy(logits, labels, config.loss.label_smoothing).mean()
            error = 100 * (label_rank(logits, labels) > 0).mean(dtype=loss.dtype)
            return loss, (error, updated.get("batch_stats", {}))

        def one_part(numbered):
            (loss, (error, stats)), grads = jax.value_and_grad(forward, has_aux=True)(state.params, *numbered)
            return grads, (loss, error, stats)

        def add_part(total, numbered):
            grads, found = one_part(numbered)
            return jax.tree.map(jnp.add, total, grads), found

        if parts == 1:
            grads, (loss, error, stats) = one_part((batch, 0))
        else:
            # Summed as they come, gradients take the memory of one part's, and devices exchange the sum alone.
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            numbered = (split_batch(batch, parts, count_devices()), jnp.arange(parts))
            total, (loss, error, stats) = jax.lax.scan(add_part, zeros, numbered, unroll=unroll)
            loss, error, grads = loss.mean(), error.mean(), jax.tree.map(lambda x: x / parts, total)
            stats = merge_batch_stats(stats, config.model.batch_norm_momentum)

        rate = schedules.learning_rate(config.schedule, schedule(state.step), state.schedule)
        schedule_state = schedules.after_step(config.schedule, state.schedule, error)
        state, norms = update.apply_gradients(state, grads, stats, rate, optimizer, config.optimizer.ema)
        return state.replace(schedule=schedule_state), {"loss": loss, "top1_error": error} | norms

    return step


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """The state before the first step, from ``config.seed``; images are ``image_shape`` (H, W, C)."""
    variables = model.init(jax.random.key(config.seed), jnp.zeros((1, *image_shape)))
    return update.initial_state(variables, optimizer, config.optimizer.ema)


def make_eval_step(model: nn.Module) -> Callable[[dict[str, Any], Batch, Resident], dict[str, jax.Array]]:
    """Builds ``step(variables, batch, resident)``: each example's ``loss``, ``rank`` and ``probabilities``.

    A batch has ``index``, or ``images`` and ``labels``.
    """

    def step(variables: dict[str, Any], batch: Batch, resident: Resident) -> dict[str, jax.Array]:
        images, labels = take_images(batch, resident)
        logits = model.apply(variables, augment.normalise(images, resident["mean"], resident["std"]), train=False)
        return {
            "loss": cross_entropy(logits, labels),
            "rank": label_rank(logits, labels),
            "probabilities": jax.nn.softmax(logits),
        }

    return step
