"""What the loop asks of a task: the one interface between training and classification, detection, ..."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from resnet_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      metrics: plain numbers; errors in %, ``examples`` the count.
      predictions: arrays that go to ``predictions.npz``, the first axis over examples; and which ``test_set`` it was.
      files: what is written besides: name -> content.
    """

    metrics: dict[str, float]
    predictions: dict[str, np.ndarray]
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """A task: its state, step, input and evaluation.

    Attributes:
      name: the model's name.
      parameters: how many the network has.
      total_steps: length of the training.
      examples_per_step: the global batch size.
      examples_per_epoch: length of the training set.
      resident: arrays on the devices that every step reads and none changes.
      streams: whether batches bring data from files, so that steps may have to wait for it.
      broken: examples that could not be read so far and were left out: where -> why.
      validation: the split that ``eval.every`` looks at; ``test`` unless examples are held out.
      objective: the metric that decides what is best, and whose rise or fall the plateau rule watches.
      sign: 1 where less of it is better, -1 where more is.
      description: what a run remembers of its data: ``classes`` (names), ``examples``, ``preprocessing``, ``settings``
        (attributes of the network that the config does not say) and ``mean_image`` (an array or None).
    """

    name: str
    parameters: int
    total_steps: int
    examples_per_step: int
    examples_per_epoch: int
    resident: dict[str, jax.Array]
    streams: bool
    broken: dict[str, str]
    validation: str
    objective: str
    sign: int
    description: dict[str, Any]

    def fingerprint(self) -> dict[str, str]:
        """Tells data apart: what all processes of a run must have alike, by what it is called."""

    def share_data(self, other: "Task") -> None:
        """Takes the data of another run's task, which are the same, instead of its own; of tasks that don't stream."""

    def initial_state(self) -> TrainState:
        """The state before the first step, laid out on the devices."""

    def train_step(self, state: TrainState, batch: Any, resident: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step, pure; metrics are scalars: ``loss``, ``gradient_norm``, ``weight_norm``, ``learning_rate``, ..."""

    def batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of each step's batch, from ``first_step`` (0 is the first) to the end.

        It may have ``close``, and raise a UsageError for data that can't be read.
        """

    def evaluate(self, state: TrainState, split: str, poll: Callable[[], None], protocol: str = "center") -> Evaluation:
        """Evaluates every example of a split once; ``poll`` is called often and may raise to break off."""

    def after_evaluation(self, state: TrainState, error: float) -> TrainState:
        """Lets the rules that watch the evaluated error (``sign`` times the objective) act."""
