"""Learning rates: functions of the step, and rules that watch an error."""

from collections.abc import Callable

from flax import struct
import jax
from jax import numpy as jnp
import ml_collections

# The training error that the warm-up rule watches keeps this share of its past at each step: about 20 steps' worth.
_ERROR_DECAY = 0.95


@struct.dataclass
class ScheduleState:
    """What the rules remember; scalars, saved in the checkpoint.

    Attributes:
      training_error: running training error, %, float32.
      warmed_up: whether it has been below ``schedule.warmup_error``, bool.
      factor: what ``plateau`` has multiplied the rate by so far, float32.
      best_error: the lowest evaluated error, %, float32.
      waited: evaluations since then, int32.
    """

    training_error: jax.Array
    warmed_up: jax.Array
    factor: jax.Array
    best_error: jax.Array
    waited: jax.Array


def initial_schedule_state() -> ScheduleState:
    """Nothing seen yet."""
    return ScheduleState(
        training_error=jnp.float32(100),
        warmed_up=jnp.bool_(False),
        factor=jnp.float32(1),
        best_error=jnp.float32(jnp.inf),
        waited=jnp.int32(0),
    )


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The rate as a function of the step (from 0), before the rules: float32 scalar -> float32 scalar."""
    end_step = config.end_step or total_steps
    peak, end = config.learning_rate, config.end_rate

    def rate(step: jax.Array) -> jax.Array:
        progress = jnp.clip(step / max(end_step, 1), 0, 1)
        match config.name:
            case "steps":
                drops = sum((step >= boundary) * 1 for boundary in config.boundaries)
                value = peak * jnp.float32(config.factor) ** drops
            case "linear":
                value = peak + (end - peak) * progress
            case "cosine":
                value = end + (peak - end) * (1 + jnp.cos(jnp.pi * progress)) / 2
            case "polynomial":  # The others fall during the warm-up too; here it may be a quarter of the training.
                left = 1 - jnp.clip((step - config.warmup_steps) / max(end_step - config.warmup_steps, 1), 0, 1)
                value = end + (peak - end) * left**config.power
            case _:  # constant; plateau's drops are in its state
                value = jnp.float32(peak)
        if config.warmup_steps:
            value *= jnp.minimum(1, (step + 1) / config.warmup_steps)
        return jnp.asarray(value, jnp.float32)

    return rate


def learning_rate(config: ml_collections.ConfigDict, scheduled: jax.Array, state: ScheduleState) -> jax.Array:
    """The rate to use: the scheduled one, held at ``warmup_rate`` while warming up, times plateau's factor."""
    if config.warmup_error:
        scheduled = jnp.where(state.warmed_up, scheduled, config.warmup_rate)
    return scheduled * state.factor


def after_step(config: ml_collections.ConfigDict, state: ScheduleState, batch_error: jax.Array) -> ScheduleState:
    """Takes in one step's training error (%): the warm-up of deep CIFAR nets ends for good below ``warmup_error``."""
    if not config.warmup_error:
        return state
    error = _ERROR_DECAY * state.training_error + (1 - _ERROR_DECAY) * batch_error.astype(jnp.float32)
    return state.replace(training_error=error, warmed_up=state.warmed_up | (error < config.warmup_error))


def after_evaluation(config: ml_collections.ConfigDict, state: ScheduleState, error: float) -> ScheduleState:
    """Takes in an evaluated error (%): after ``patience`` evaluations without a better one the rate drops."""
    if config.name != "plateau":
        return state
    if error < state.best_error - config.threshold:
        return state.replace(best_error=jnp.float32(error), waited=jnp.int32(0))
    waited = state.waited + 1
    if waited < config.patience:
        return state.replace(waited=waited)
    return state.replace(waited=jnp.int32(0), factor=state.factor * jnp.float32(config.factor))
