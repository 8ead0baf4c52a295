"""The training step of detection: RPN and head jointly, end to end."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
import ml_collections
import optax

from resnet_jax.data import augment
from resnet_jax.detection.faster_rcnn import FasterRCNN
from resnet_jax.detection.losses import head_losses, rpn_losses
from resnet_jax.detection.network import initialise, trained
from resnet_jax.detection.per_image import for_each_image
from resnet_jax.detection.proposals import (
    AnchorSample,
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


def forward(network: FasterRCNN, images: jax.Array, batch: Batch, seed: jax.Array, settings: Settings) -> Forward:
    """The network in training: ``model.apply(..., method=forward)``.

    Args:
      network: bound to its variables.
      images: normalised [n, H, W, 3].
      batch: the rest of it.
      seed: uint32 scalar; what is drawn follows from (seed, epoch, index) of each image alone.
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
    regions = (maps, map_extents, rois.boxes, batch["extent"])
    logits, codes = network.classify(*regions, train=True, keys=drop_keys, counted=rois.sampled)
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
      config: the whole config, of which ``schedule`` and ``optimizer.ema`` are read.
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
                variables, images, batch, resident["seed"], settings, method=forward, mutable=["batch_stats"]
            )
            parts = losses(found, settings)
            return sum(parts.values()), (parts, updated.get("batch_stats", {}))

        return update.descend(state, total_loss, schedule, optimizer, config, trained(model, state.params))

    return step


def initial_state(
    model: FasterRCNN, optimizer: optax.GradientTransformationExtraArgs, config: ml_collections.ConfigDict
) -> TrainState:
    """The state before the first step, from ``config.seed``."""
    return update.initial_state(initialise(model, jax.random.key(config.seed)), optimizer, config.optimizer.ema)
