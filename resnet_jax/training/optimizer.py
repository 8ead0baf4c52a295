"""SGD with momentum as optax transformations, the paper's and Caffe's variant, and LARS for large batches."""

from collections.abc import Mapping

import jax
from jax import numpy as jnp
import ml_collections
import optax

from resnet_jax.models.stacking import in_run


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by ``-learning_rate``, which each ``update`` is given: rules on errors decide it."""

    def update(updates, state, params=None, *, learning_rate, **unused):
        del params, unused
        return jax.tree.map(lambda u: -learning_rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def kernels_only(params: optax.Params) -> optax.Params:
    """A mask that is true for the kernels and false for biases and BN's scales."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def adapt_kernels(trust: float, weight_decay: float) -> optax.GradientTransformation:
    """LARS (You, Gitman, Ginsburg, 2017, algorithm 1): each kernel w with gradient g gets the update
    ``trust |w| / (|g| + decay |w|) (g + decay w)``; biases and BN's scales keep theirs, undecayed.

    optax's ``scale_by_trust_ratio`` divides by |g + decay w| instead, which is up to the square root of two smaller
    where g is orthogonal to w (as before BN it is): published rates are for the paper's. A kernel or gradient of norm
    zero has ratio one, as in optax and MLPerf's reference.
    """  # fmt: skip

    def adapt(path, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        if path[-1].key != "kernel":
            return gradient
        wide = jnp.promote_types(gradient.dtype, jnp.float32)
        # Blocks that are stored together have a norm each.
        axes = tuple(range(1 if in_run(key.key for key in path) else 0, kernel.ndim))
        size, slope = (
            jnp.sqrt(jnp.square(array.astype(wide)).sum(axes, keepdims=True)) for array in (kernel, gradient)
        )
        usable = (size > 0) & (slope > 0)
        ratio = jnp.where(usable, trust * size / jnp.where(usable, slope + weight_decay * size, 1), 1)
        return ratio.astype(gradient.dtype) * (gradient + weight_decay * kernel)

    def update(updates, state, params=None):
        return jax.tree.map_with_path(adapt, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_modules(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of whole modules, by their names (``stem``, ``stage1``, ``head``), by a factor."""

    def update(updates, state, params=None):
        del params
        scaled = jax.tree.map_with_path(lambda path, u: factors.get(path[0].key, 1.0) * u, updates)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: ml_collections.ConfigDict, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """SGD or LARS as ``config.optimizer`` says; ``update(grads, state, params, learning_rate=rate)``.

    torch and optax's SGD keep the rate outside the velocity (v <- m v + g; w <- w - rate v); Caffe, the authors of LARS
    and optax's ``lars`` keep it inside (v <- m v + rate g; w <- w - v).

    Args:
      config: the config's section.
      factors: of the learning rate, by the names of the network's modules; 0 leaves a module as it is.
    """
    momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    rate = scale_by_given_rate()
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "lars":
        parts.append(adapt_kernels(config.trust, config.weight_decay))
    elif config.weight_decay:
        mask = kernels_only if config.decay == "kernels" else None
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    parts += [rate, momentum] if config.momentum_style == "caffe" else [momentum, rate]
    if factors:
        parts.append(scale_modules(factors))
    return optax.with_extra_args_support(optax.chain(*parts))
