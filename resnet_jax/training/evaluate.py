"""An evaluation in the midst of a run, which may be asked to stop, or not fit the devices' memory."""

from collections.abc import Callable

import jax
import ml_collections

from resnet_jax import peers
from resnet_jax.errors import UsageError
from resnet_jax.planning.memory import is_out_of_memory
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation, Task
from resnet_jax.training.workdir import CENTER


def polling(stop: StopSignal, step: int) -> Callable[[], None]:
    """What an evaluation calls often: it tells others where this process is, and raises ``Stopped`` when asked to."""

    def poll() -> None:
        peers.at(step, "evaluating")
        stop.poll()

    return poll


def evaluate(
    task: Task,
    config: ml_collections.ConfigDict,
    state: TrainState,
    split: str,
    step: int,
    stop: StopSignal,
    protocol: str = CENTER,
) -> Evaluation:
    """The task's evaluation of a split by a test protocol.

    Raises:
      Stopped: ``stop`` was asked to.
      UsageError: the devices' memory is too small for it.
    """
    try:
        return task.evaluate(state, split, polling(stop, step), protocol)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = config.eval.batch_size
        raise UsageError(f"out of memory in evaluation: less than eval.batch_size={size} takes less") from error
