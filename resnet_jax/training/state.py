"""The state of a training run: all that a step changes and a checkpoint holds."""

from typing import Any

from flax import struct
import jax

from resnet_jax.training.schedules import ScheduleState


@struct.dataclass
class TrainState:
    """Arrays replicated on every device.

    Attributes:
      step: steps done, int32 scalar.
      params: parameters, float32.
      batch_stats: BatchNorm's running means and variances, float32.
      opt_state: optax's state.
      schedule: what the learning rate rules remember.
      average: moving average of {params, batch_stats}, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    schedule: ScheduleState
    average: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated: the averaged weights where there are any."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}
