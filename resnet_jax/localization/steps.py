"""The jitted steps of localization, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
import ml_collections
import optax

from resnet_jax.data import augment
from resnet_jax.detection import boxes as box_ops
from resnet_jax.detection.losses import box_losses, mean_of_sampled, objectness_losses
from resnet_jax.detection.matching import FOREGROUND, match, sample
from resnet_jax.detection.network import trained
from resnet_jax.detection.proposals import AnchorSample
from resnet_jax.localization.crops import to_image
from resnet_jax.localization.network import Localizer, initialise
from resnet_jax.localization.settings import Settings
from resnet_jax.models.padding import inside
from resnet_jax.training import schedules, update
from resnet_jax.training.state import TrainState

# ``images`` uint8 [n, H, W, 3], ``labels`` int32 [n], ...: see ``batches.training_batches``.
Batch = dict[str, jax.Array]
# Arrays that lie on the devices throughout: mean and std of the pixels, [3] each.
Resident = dict[str, jax.Array]


def sample_anchors(
    key: jax.Array, anchors: jax.Array, boxes: jax.Array, valid: jax.Array, partial: jax.Array, settings: Settings
) -> AnchorSample:
    """Draws one image's anchors; also those that reach beyond the crop, as those of large objects do.

    Args:
      key: a JAX key.
      anchors: [N, 4].
      boxes: [G, 4], of the image's class, within the crop.
      valid: bool [G], those that are trained; none, and all that is drawn is background.
      partial: bool [G], those of which the crop holds too little: what overlaps them is no background either.
      settings: how many, and of what.
    """
    ious = box_ops.intersection_over_union(anchors, boxes)
    unclear = ((ious >= settings.anchor_low) & partial).any(1)
    box, role = match(ious, valid, settings.anchor_high, settings.anchor_low, best_for_each=True, ignored=unclear)
    indices, sampled = sample(key, role, settings.anchors_sampled, settings.anchors_foreground)
    targets = box_ops.encode(boxes[box[indices]], anchors[indices])
    return AnchorSample(indices, sampled, (role[indices] == FOREGROUND) & sampled, targets)


def losses(
    logits: jax.Array, codes: jax.Array, others: jax.Array | None, label: jax.Array, chosen: AnchorSample, beta: float
) -> tuple[jax.Array, jax.Array]:
    """One image's two losses, scalars: the logistic one and smooth L1, each over the number of sampled anchors.

    The paper samples as many positives as negatives of an image, lest negatives dominate. If every class learnt from
    every image, one of 1000 would see some 2000 negatives for each positive all the same. So we read that an image
    trains the outputs of its own class: whether an anchor is on the object, given that there is one. The other
    reading, that all other classes say no besides, is ``localization.other_classes``.

    Args:
      logits: [N], of the image's class.
      codes: [N, 4], likewise.
      others: [classes, N], logits of all classes, for the other reading; else None.
      label: int, the class.
      chosen: the anchors.
      beta: of ``detection.losses.smooth_l1``.
    """
    at, sampled, foreground, targets = chosen
    of_scores = objectness_losses(jnp.where(sampled, logits[at], 0), foreground)
    if others is not None:
        no = objectness_losses(jnp.where(sampled, others[:, at], 0), jnp.zeros_like(sampled))
        of_scores += jnp.where(jnp.arange(len(others))[:, None] == label, 0, no).sum(0)
    of_boxes = box_losses(codes[at], targets, foreground, beta)
    return mean_of_sampled(of_scores, sampled), mean_of_sampled(of_boxes, sampled)


def total_losses(
    network: Localizer, images: jax.Array, batch: Batch, seed: jax.Array, settings: Settings
) -> dict[str, jax.Array]:
    """``class_loss`` and ``box_loss``, means over the images: ``model.apply(..., method=total_losses)``.

    Args:
      network: bound to its variables.
      images: normalised [n, H, W, 3].
      batch: the rest of it.
      seed: a JAX key; what is drawn follows from (seed, epoch, index) of each image alone.
      settings: localization's numbers.
    """
    features, _ = network.features(images, train=True)
    own = batch["labels"][:, None]
    logits, codes = network.logits(features, own)[:, 0], network.codes(features, own)[:, 0]
    others = network.logits(features, None) if settings.other_classes else None
    anchors = network.anchors(*features.shape[1:3])

    def of_image(key, logits, codes, others, label, *boxes):
        chosen = sample_anchors(key, anchors, *boxes, settings)
        return losses(logits, codes, others, label, chosen, settings.anchor_beta)

    keys = augment.example_keys(seed, batch["epoch"], batch["index"])
    boxes = (batch[name] for name in ("boxes", "valid", "partial"))
    class_loss, box_loss = jax.vmap(of_image)(keys, logits, codes, others, batch["labels"], *boxes)
    return {"class_loss": class_loss.mean(), "box_loss": box_loss.mean()}


def make_train_step(
    model: Localizer,
    optimizer: optax.GradientTransformationExtraArgs,
    config: ml_collections.ConfigDict,
    settings: Settings,
    total_steps: int,
) -> Callable[[TrainState, Batch, Resident], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step, to be jitted over a mesh (``jax.set_mesh``).

    Args:
      model: the network.
      optimizer: of ``make_optimizer``.
      config: the whole config, of which ``schedule``, ``optimizer.ema`` and ``data.color_noise`` are read.
      settings: localization's numbers.
      total_steps: length of the training, for the schedule.

    Returns:
      ``step(state, batch, resident) -> state, metrics``; the batch is one of ``batches.training_batches``. Metrics are
      scalars, means over the images: ``loss`` and its parts ``class_loss`` and ``box_loss``; ``learning_rate``,
      ``gradient_norm`` (of what is trained) and, of the updated weights, ``weight_norm``.
    """
    schedule = schedules.make_schedule(config.schedule, total_steps)

    def step(state: TrainState, batch: Batch, resident: Resident):
        colour_seed, anchor_seed = jax.random.split(jax.random.key(resident["seed"]))
        images = augment.normalise(batch["images"], resident["mean"], resident["std"])
        keys = augment.example_keys(colour_seed, batch["epoch"], batch["index"])
        # Crops are mirrored with their boxes, before they come here.
        images = augment.augment(keys, images, 0, False, config.data.color_noise, resident["std"])

        def total_loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            parts, updated = model.apply(
                variables, images, batch, anchor_seed, settings, method=total_losses, mutable=["batch_stats"]
            )
            return sum(parts.values()), (parts, updated.get("batch_stats", {}))

        return update.descend(state, total_loss, schedule, optimizer, config, trained(model, state.params))

    return step


def initial_state(
    model: Localizer, optimizer: optax.GradientTransformationExtraArgs, config: ml_collections.ConfigDict
) -> TrainState:
    """The state before the first step, from ``config.seed``."""
    return update.initial_state(initialise(model, jax.random.key(config.seed)), optimizer, config.optimizer.ema)


def make_inference_step(
    model: Localizer, settings: Settings
) -> Callable[[dict[str, Any], Batch, Resident], dict[str, jax.Array]]:
    """Builds ``step(variables, batch, resident)``: the likeliest boxes of each class that is asked for.

    A batch has ``images`` uint8 [n, H, W, 3], each in the upper left of its canvas, their ``extent`` int [n, 2], their
    ``frame`` float32 [n, 4] (see ``crops``) and ``classes`` int [n, k]. Returned are ``boxes`` [n, k, candidates, 4],
    the parts of them within the view, in the image's own pixels, by falling ``scores`` [n, k, candidates] in (0, 1);
    where there are fewer anchors, both are 0 behind them.
    """

    def step(variables: dict[str, Any], batch: Batch, resident: Resident) -> dict[str, jax.Array]:
        images = augment.normalise(batch["images"], resident["mean"], resident["std"])
        features, cells = model.apply(variables, images, batch["extent"], method="features")
        logits, codes = (
            model.apply(variables, features, batch["classes"], method=output) for output in ("logits", "codes")
        )
        height, width = features.shape[1:3]
        anchors = model.anchors(height, width)
        real = jnp.repeat(inside((height, width), cells).reshape(len(images), -1), model.anchors_per_cell, axis=1)
        # By logits, of which fewer are equal than of scores near 0 and 1.
        logits = jnp.where(real[:, None], logits, -jnp.inf)
        count = min(settings.candidates, logits.shape[-1])
        logits, best = jax.lax.top_k(logits, count)
        boxes = box_ops.decode(jnp.take_along_axis(codes, best[..., None], axis=2), anchors[best])
        down, across = (jnp.broadcast_to(batch["extent"][:, axis, None, None], best.shape) for axis in (0, 1))
        boxes = to_image(box_ops.clip(boxes, down, across), batch["frame"][:, None])
        there, missing = logits > -jnp.inf, settings.candidates - count
        scores = jnp.where(there, jnp.maximum(jax.nn.sigmoid(logits), jnp.finfo(logits.dtype).tiny), 0)
        return {
            "boxes": jnp.pad(jnp.where(there[..., None], boxes, 0), ((0, 0), (0, 0), (0, missing), (0, 0))),
            "scores": jnp.pad(scores, ((0, 0), (0, 0), (0, missing))),
        }

    return step
