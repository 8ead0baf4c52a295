"""What a task's step does once it has its gradients, and the state that it starts from."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
import optax

from resnet_jax.training.schedules import initial_schedule_state
from resnet_jax.training.state import TrainState


def initial_state(
    variables: dict[str, Any], optimizer: optax.GradientTransformationExtraArgs, ema: float
) -> TrainState:
    """The state before the first step.

    Args:
      variables: ``params`` and, where there are any, ``batch_stats``.
      optimizer: of ``make_optimizer``.
      ema: ``optimizer.ema``; 0 for no average.
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        schedule=initial_schedule_state(),
        # A copy: the state's buffers are donated, and none may be donated twice.
        average=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else None,
    )


def apply_gradients(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    rate: jax.Array,
    optimizer: optax.GradientTransformationExtraArgs,
    ema: float,
    hold: Callable[[Any], Any] = lambda updates: updates,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the weights; the learning rate's rules are the caller's.

    Args:
      state: before the step.
      grads: of the parameters.
      batch_stats: after the step.
      rate: the learning rate, float32 scalar.
      optimizer: of ``make_optimizer``.
      ema: decay of the average of weights and statistics; 0 for none.
      hold: sets the updates of what stays as it is to zero.

    Returns:
      The state after the step, and the scalars ``learning_rate``, ``gradient_norm`` and, of the updated weights,
      ``weight_norm``.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=rate)
    params, average = optax.apply_updates(state.params, hold(updates)), state.average
    if ema:
        average = optax.incremental_update({"params": params, "batch_stats": batch_stats}, average, 1 - ema)
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
    )
    norms = {"gradient_norm": optax.tree.norm(grads), "weight_norm": optax.tree.norm(params)}
    return state, {"learning_rate": rate} | norms
