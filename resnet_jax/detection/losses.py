"""The losses of Faster R-CNN, of the anchors or RoIs that were sampled in one image.

Both box losses are summed over the foreground and divided by the number of all that were sampled, foreground or
background. So does py-faster-rcnn's end-to-end training (RPN_POSITIVE_WEIGHT = -1; SmoothL1Loss divides the head's
by its RoIs), and so do detectron2 and torchvision. Equation 1 of Faster R-CNN divides the RPN's by the number of
anchor positions and weights it by 10, which comes to about the same (2400 / 10 against 256). Several images: the
mean of theirs.
"""

import jax
from jax import numpy as jnp
import optax

from resnet_jax.detection import boxes as box_ops


def smooth_l1(errors: jax.Array, beta: float) -> jax.Array:
    """|x| - beta / 2 beyond ``beta``, x^2 / (2 beta) within: any shape, unreduced (Fast R-CNN, equation 3, at 1).

    py-faster-rcnn's sigma is 1 / sqrt(beta): 3 (beta = 1 / 9) in the RPN, 1 in the head. beta = 0 is the plain L1 loss,
    detectron2's default.
    """
    errors = box_ops.at_least_float32(errors)
    size = errors * jnp.sign(errors)  # Unlike jnp.abs, without a gradient at 0.
    if not beta:
        return size
    within = jnp.clip(errors, -beta, beta)  # Where the square is not taken it shall not overflow either.
    return jnp.where(size < beta, within * within / (2 * beta), size - beta / 2)


def mean_of_sampled(losses: jax.Array, sampled: jax.Array) -> jax.Array:
    """The sum of losses [S], over how many of bool [S] are True; 0 if none is."""
    return jnp.where(sampled, losses, 0).sum() / jnp.maximum(sampled.sum(), 1)


def box_losses(codes: jax.Array, targets: jax.Array, foreground: jax.Array, beta: float) -> jax.Array:
    """Smooth L1 of codes [S, 4] against targets [S, 4], summed over the four: [S], 0 where not foreground."""
    # Masked before anything is computed: whatever padding holds, its gradient is 0 and not NaN.
    errors = jnp.where(foreground[:, None], box_ops.at_least_float32(codes) - targets, 0)
    return smooth_l1(errors, beta).sum(-1)


def objectness_losses(logits: jax.Array, foreground: jax.Array) -> jax.Array:
    """Cross-entropy of object or not, in nats: logits [S], bool [S] -> [S].

    One logit an anchor, as in detectron2; py-faster-rcnn's softmax over two is this of their difference.
    """
    logits = box_ops.at_least_float32(logits)
    return optax.sigmoid_binary_cross_entropy(logits, foreground.astype(logits.dtype))


def class_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy in nats: logits [S, 1 + classes], labels int [S], of which 0 is background -> [S]."""
    return optax.softmax_cross_entropy_with_integer_labels(box_ops.at_least_float32(logits), labels)


def rpn_losses(
    logits: jax.Array,
    codes: jax.Array,
    foreground: jax.Array,
    targets: jax.Array,
    sampled: jax.Array,
    beta: float,
) -> tuple[jax.Array, jax.Array]:
    """The losses of the sampled anchors of one image: two scalars, of objectness and of boxes.

    Args:
      logits: [S], of being an object.
      codes: [S, 4], as predicted.
      foreground: bool [S].
      targets: [S, 4], of ``boxes.encode``.
      sampled: bool [S], False for what only fills up.
      beta: of ``smooth_l1``.
    """
    logits = jnp.where(sampled, logits, 0)
    objectness = mean_of_sampled(objectness_losses(logits, foreground), sampled)
    return objectness, mean_of_sampled(box_losses(codes, targets, foreground & sampled, beta), sampled)


def head_losses(
    logits: jax.Array,
    codes: jax.Array,
    labels: jax.Array,
    targets: jax.Array,
    sampled: jax.Array,
    beta: float,
) -> tuple[jax.Array, jax.Array]:
    """The losses of the sampled RoIs of one image: two scalars, of classes and of boxes.

    Args:
      logits: [S, 1 + classes].
      codes: [S, classes, 4], each class's box, of which the label's is trained; [S, 1, 4]: one box for all classes.
      labels: int [S], 0 for background.
      targets: [S, 4], of ``boxes.encode`` with the head's stds.
      sampled: bool [S], False for what only fills up.
      beta: of ``smooth_l1``.
    """
    labels = jnp.where(sampled, labels, 0)
    logits = jnp.where(sampled[:, None], logits, 0)
    classes = mean_of_sampled(class_losses(logits, labels), sampled)
    own = jnp.clip(labels - 1, 0, codes.shape[1] - 1)
    codes = jnp.take_along_axis(codes, own[:, None, None], axis=1)[:, 0]
    return classes, mean_of_sampled(box_losses(codes, targets, labels > 0, beta), sampled)
