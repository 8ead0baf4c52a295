"""What a task's step does once it has its gradients, and the state that it starts from."""

from collections.abc import Callable
from typing import Any

from flax import traverse_util
import jax
from jax import numpy as jnp
import ml_collections
import optax

from resnet_jax import distributed
from resnet_jax.training import schedules
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
        schedule=schedules.initial_schedule_state(),
        # A copy: the state's buffers are donated, and none may be donated twice.
        average=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else None,
    )


def start_from(mesh: jax.sharding.Mesh, state: TrainState, weights: dict[str, Any]) -> TrainState:
    """The state with other initial weights; arrays that are not among ``weights`` stay as they are.

    Args:
      mesh: over whose devices they are replicated.
      state: before the first step.
      weights: ``params`` and ``batch_stats``, NumPy arrays, or parts of them.
    """
    new = traverse_util.flatten_dict({"params": state.params, "batch_stats": state.batch_stats})
    given = {path: array.astype(new[path].dtype) for path, array in traverse_util.flatten_dict(weights).items()}
    variables = traverse_util.unflatten_dict(new | given)
    variables.setdefault("batch_stats", {})  # Of a network without BN there is nothing to flatten.
    average = distributed.replicate(mesh, variables) if state.average else None
    return state.replace(**distributed.replicate(mesh, variables), average=average)


def after_evaluation(
    mesh: jax.sharding.Mesh, state: TrainState, config: ml_collections.ConfigDict, error: float
) -> TrainState:
    """The state once the rule that watches the evaluated error (the section ``schedule``) has heard of it."""
    schedule = schedules.after_evaluation(config, state.schedule, error)
    if schedule is state.schedule:
        return state
    return state.replace(schedule=distributed.replicate(mesh, schedule))


def apply_gradients(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    rate: jax.Array,
    optimizer: optax.GradientTransformationExtraArgs,
    ema: float,
    trained: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the weights; the learning rate's rules are the caller's.

    Args:
      state: before the step.
      grads: of the parameters.
      batch_stats: after the step.
      rate: the learning rate, float32 scalar.
      optimizer: of ``make_optimizer``.
      ema: decay of the average of weights and statistics; 0 for none.
      trained: a tree of bools like ``grads``; where False, parameters stay as they are, whatever the optimizer decays.
        None: all are trained.

    Returns:
      The state after the step, and the scalars ``learning_rate``, ``gradient_norm`` (of what is trained) and, of the
      updated weights, ``weight_norm``.
    """

    def hold(tree: Any) -> Any:
        if trained is None:
            return tree
        return jax.tree.map(lambda x, changes: x if changes else jnp.zeros_like(x), tree, trained)

    grads = hold(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=rate)
    params, average = optax.apply_updates(state.params, hold(updates)), state.average
    if ema:
        average = optax.incremental_update({"params": params, "batch_stats": batch_stats}, average, 1 - ema)
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
    )
    norms = {"gradient_norm": optax.tree.norm(grads), "weight_norm": optax.tree.norm(params)}
    return state, {"learning_rate": rate} | norms


def descend(
    state: TrainState,
    total_loss: Callable[[Any], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]],
    schedule: Callable[[jax.Array], jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    config: ml_collections.ConfigDict,
    trained: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step down the gradient of a loss of several parts.

    Args:
      state: before the step.
      total_loss: parameters -> the loss, a scalar, and (its parts by name, the new ``batch_stats``).
      schedule: of ``schedules.make_schedule``.
      optimizer: of ``make_optimizer``.
      config: the whole config.
      trained: as of ``apply_gradients``.

    Returns:
      The state after it, and scalars: ``loss``, its parts, and those of ``apply_gradients``.
    """
    (loss, (parts, stats)), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params)
    rate = schedules.learning_rate(config.schedule, schedule(state.step), state.schedule)
    state, norms = apply_gradients(state, grads, stats, rate, optimizer, config.optimizer.ema, trained)
    return state, {"loss": loss, **parts} | norms
