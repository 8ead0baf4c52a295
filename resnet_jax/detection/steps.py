"""The jitted steps of detection: joint end-to-end training of RPN and head, and inference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import ml_collections
import optax

from resnet_jax.data import augment
from resnet_jax.detection.boxes import at_least_float32
from resnet_jax.detection.detections import Predictions, best_boxes, detect, predict
from resnet_jax.detection.faster_rcnn import FasterRCNN, Levels
from resnet_jax.detection.losses import head_losses, rpn_losses
from resnet_jax.detection.network import initialise, trained
from resnet_jax.detection.per_image import for_each_image
from resnet_jax.detection.proposals import (
    AnchorSample,
    Proposals,
    RoISample,
    Truth,
    join,
    propose,
    sample_anchors,
    sample_rois,
)
from resnet_jax.detection.settings import Settings
from resnet_jax.training import schedules, update
from resnet_jax.training.state import TrainState

# ``images`` uint8 [n, H, W, 3], ``extent`` int32 [n, 2], ... : see ``batches.training_batches``.
Batch = dict[str, jax.Array]
# Arrays that lie on the devices throughout: mean and std of the pixels, [3] each.
Resident = dict[str, jax.Array]


class Forward(NamedTuple):
    """What the losses of a batch of n images are computed from; for the parts see ``proposals``.

    Attributes:
      rpn_logits: [n, N], at every anchor, level by level.
      rpn_codes: [n, N, 4].
      anchors: sampled ones.
      rois: sampled ones.
      logits: [n, S, 1 + classes], of the RoIs.
      codes: [n, S, classes, 4].
    """

    rpn_logits: jax.Array
    rpn_codes: jax.Array
    anchors: AnchorSample
    rois: RoISample
    logits: jax.Array
    codes: jax.Array


def forward(network: FasterRCNN, images: jax.Array, batch: Batch, seed: int, settings: Settings) -> Forward:
    """The network in training: ``model.apply(..., method=forward)``.

    Args:
      network: bound to its variables.
      images: normalised [n, H, W, 3].
      batch: the rest of it.
      seed: what is drawn follows from (seed, epoch, index) of each image alone.
      settings: how proposals are made and what is drawn.
    """
    maps, map_extents = network.features(images, batch["extent"], train=True)
    shapes = [features.shape[1:3] for features in maps]
    rpn_logits, rpn_codes = network.propose(maps)

    def choose(logits, codes, truth, map_extents, extent, epoch, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), index)
        anchor_key, roi_key, drop_key = jax.random.split(key, 3)
        grids = network.grids(shapes, map_extents)
        anchors = sample_anchors(anchor_key, join(grids), truth, extent, settings)
        counts = settings.train_before_nms, settings.train_after_nms
        proposals = propose(logits, codes, grids, extent, *counts, settings)
        return anchors, sample_rois(roi_key, proposals, truth, settings), drop_key

    truth = Truth(batch["boxes"], batch["labels"], batch["valid"], batch["crowd"])
    outputs = jax.lax.stop_gradient((rpn_logits, rpn_codes))
    images_own = truth, map_extents, batch["extent"], batch["epoch"], batch["index"]
    anchors, rois, drop_keys = for_each_image(choose)(*outputs, *images_own)
    anchors, rois = jax.lax.stop_gradient((anchors, rois))
    logits, codes = network.classify(maps, map_extents, rois.boxes, batch["extent"], train=True, keys=drop_keys)
    rpn_logits, rpn_codes = (jnp.concatenate(levels, axis=1) for levels in (rpn_logits, rpn_codes))
    return Forward(rpn_logits, rpn_codes, anchors, rois, logits, codes)


def losses(found: Forward, settings: Settings) -> dict[str, jax.Array]:
    """The four parts of the loss, each the mean over images: scalars, float32 at least."""

    def of_image(found: Forward) -> tuple[jax.Array, ...]:
        anchors, rois = found.anchors, found.rois
        rpn = rpn_losses(
            found.rpn_logits[anchors.indices],
            found.rpn_codes[anchors.indices],
            anchors.foreground,
            anchors.targets,
            anchors.sampled,
            settings.anchor_beta,
        )
        return *rpn, *head_losses(found.logits, found.codes, rois.labels, rois.targets, rois.sampled, settings.roi_beta)

    names = ("rpn_objectness_loss", "rpn_box_loss", "class_loss", "box_loss")
    return {name: part.mean() for name, part in zip(names, jax.vmap(of_image)(found), strict=True)}


def make_train_step(
    model: FasterRCNN,
    optimizer: optax.GradientTransformationExtraArgs,
    config: ml_collections.ConfigDict,
    settings: Settings,
    total_steps: int,
) -> Callable[[TrainState, Batch, Resident], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step, to be jitted over a mesh (``jax.set_mesh``).

    Args:
      model: the network.
      optimizer: of ``make_optimizer``. Whatever it decays, frozen parameters stay as they are.
      config: the whole config, of which ``seed``, ``schedule`` and ``optimizer.ema`` are read.
      settings: Faster R-CNN's numbers.
      total_steps: length of the training, for the schedule.

    Returns:
      ``step(state, batch, resident) -> state, metrics``; the batch is one of ``batches.training_batches``. Metrics are
      scalars, means over the images: ``loss`` and its parts ``rpn_objectness_loss``, ``rpn_box_loss``, ``class_loss``,
      ``box_loss``; ``learning_rate``, ``gradient_norm`` (of what is trained) and, of the updated weights,
      ``weight_norm``.
    """
    schedule = schedules.make_schedule(config.schedule, total_steps)

    def step(state: TrainState, batch: Batch, resident: Resident):
        images = augment.normalise(batch["images"], resident["mean"], resident["std"])

        def total_loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            found, updated = model.apply(
                variables, images, batch, config.seed, settings, method=forward, mutable=["batch_stats"]
            )
            parts = losses(found, settings)
            return sum(parts.values()), (parts, updated.get("batch_stats", {}))

        trains = trained(model, state.params)

        def hold(tree):
            return jax.tree.map(lambda x, changes: x if changes else jnp.zeros_like(x), tree, trains)

        (loss, (parts, stats)), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params)
        grads = hold(grads)
        rate = schedules.learning_rate(config.schedule, schedule(state.step), state.schedule)
        state, norms = update.apply_gradients(state, grads, stats, rate, optimizer, config.optimizer.ema, hold)
        return state, {"loss": loss, **parts} | norms

    return step


def initial_state(
    model: FasterRCNN, optimizer: optax.GradientTransformationExtraArgs, config: ml_collections.ConfigDict
) -> TrainState:
    """The state before the first step, from ``config.seed``."""
    return update.initial_state(initialise(model, jax.random.key(config.seed)), optimizer, config.optimizer.ema)


def proposals_of(
    network: FasterRCNN, maps: Levels, map_extents: Levels, extent: jax.Array, settings: Settings
) -> Proposals:
    """The proposals of each image in test, [n, P, ...].

    Args:
      network: bound to its variables.
      maps: of ``network.features``, as the next.
      map_extents: likewise.
      extent: of the images, pixels, int [n, 2].
      settings: how many proposals, P.
    """
    shapes = [features.shape[1:3] for features in maps]

    def propose_in(logits, codes, map_extents, extent) -> Proposals:
        counts = settings.test_before_nms, settings.test_after_nms
        return propose(logits, codes, network.grids(shapes, map_extents), extent, *counts, settings)

    return for_each_image(propose_in)(*network.propose(maps), map_extents, extent)


def infer(network: FasterRCNN, images: jax.Array, extent: jax.Array, settings: Settings) -> Predictions:
    """The head's predictions at the proposals: ``model.apply(..., method=infer)``.

    Args:
      network: bound to its variables.
      images: normalised [n, H, W, 3].
      extent: int [n, 2].
      settings: how many proposals, P; and with ``refine`` their best boxes once more: 2 P regions.

    Returns:
      ``detections.Predictions`` [n, P or 2 P, classes, ...], before suppression.
    """
    maps, map_extents = network.features(images, extent)
    proposals = proposals_of(network, maps, map_extents, extent, settings)

    def predict_at(rois: jax.Array) -> Predictions:
        logits, codes = network.classify(maps, map_extents, rois, extent)
        return jax.vmap(lambda *of_image: predict(*of_image, settings))(logits, codes, rois, proposals.valid, extent)

    predictions = predict_at(proposals.boxes)
    if not settings.refine:
        return predictions
    again = predict_at(jax.vmap(best_boxes)(predictions))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), predictions, again)


def make_inference_step(
    model: FasterRCNN, settings: Settings
) -> Callable[[dict[str, Any], Batch, Resident], dict[str, jax.Array]]:
    """Builds ``step(variables, batch, resident)``: the objects found in each image, by falling score.

    A batch has ``images``, ``extent`` and ``scale``: canvas pixels per pixel of the image, float [n], or [n, 2] of
    height and width (extents are rounded to whole pixels: exact is extent / the image's size). Returned are ``boxes``
    [n, D, 4] in the image's own pixels, ``scores`` [n, D], ``labels`` int32 [n, D], classes from 0, and ``valid``
    bool [n, D], False (and all else 0) after the last one; D is ``settings.detections``.
    """

    def step(variables: dict[str, Any], batch: Batch, resident: Resident) -> dict[str, jax.Array]:
        images = augment.normalise(batch["images"], resident["mean"], resident["std"])
        predictions = model.apply(variables, images, batch["extent"], settings, method=infer)
        found = for_each_image(lambda *of_image: detect(Predictions(*of_image), settings))(*predictions)
        scale = at_least_float32(batch["scale"]).reshape(len(images), -1)
        down, across = scale[:, 0], scale[:, -1]
        scale = jnp.stack([across, down, across, down], axis=-1)[:, None]
        return {"boxes": found.boxes / scale, "scores": found.scores, "labels": found.labels, "valid": found.valid}

    return step
