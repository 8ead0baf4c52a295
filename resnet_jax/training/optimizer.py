"""SGD with momentum as optax transformations, the paper's and Caffe's variant."""

from collections.abc import Mapping

import jax
import ml_collections
import optax


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by ``-learning_rate``, which each ``update`` is given: rules on errors decide it."""

    def update(updates, state, params=None, *, learning_rate, **unused):
        del params, unused
        return jax.tree.map(lambda u: -learning_rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def kernels_only(params: optax.Params) -> optax.Params:
    """A mask that is true for the kernels and false for biases and BN's scales."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


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
    """SGD as ``config.optimizer`` says; ``update(grads, state, params, learning_rate=rate)``.

    torch and optax keep the rate outside the velocity (v <- m v + g; w <- w - rate v), Caffe keeps it inside
    (v <- m v + rate g; w <- w - v).

    Args:
      config: the config's section.
      factors: of the learning rate, by the names of the network's modules; 0 leaves a module as it is.
    """
    momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    rate = scale_by_given_rate()
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        mask = kernels_only if config.decay == "kernels" else None
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    parts += [rate, momentum] if config.momentum_style == "caffe" else [momentum, rate]
    if factors:
        parts.append(scale_modules(factors))
    return optax.with_extra_args_support(optax.chain(*parts))
