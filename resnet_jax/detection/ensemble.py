"""Several detectors as one (appendix B): all members' proposals, their mean predictions."""

from collections.abc import Sequence

from resnet_jax.detection.task import Detection
from resnet_jax.errors import UsageError
from resnet_jax.training.state import TrainState


def check_members(runs: Sequence[str], tasks: Sequence[Detection]) -> None:
    """Raises a UsageError that names the first run whose classes, test images or sizes are others than the first's."""
    first = tasks[0]
    for run, task in zip(runs[1:], tasks[1:], strict=True):
        if task.classes != first.classes:
            raise UsageError(f"{run} has other classes than {runs[0]}")
        if task.fingerprint()["test images"] != first.fingerprint()["test images"]:
            raise UsageError(f"{run} and {runs[0]} were not trained for the same test set: its images are others")
        if task.settings.box_stds != first.settings.box_stds:
            raise UsageError(f"{run} and {runs[0]} were trained with different detection.box_stds")
        if task.resizing != first.resizing:
            raise UsageError(f"{run} and {runs[0]} see images at other sizes (detection.shorter, detection.longer)")


def evaluate(
    tasks: Sequence[Detection], states: Sequence[TrainState], protocol: str
) -> tuple[dict[str, float], dict[str, bytes]]:
    """The figures of several detectors as one, on the first one's test set and with its numbers; and result files.

    Args:
      tasks: the members, of which ``check_members`` is true.
      states: their weights.
      protocol: ``center`` or ``multi_scale``.
    """
    first = tasks[0]
    step = first.inference_step([task.model for task in tasks], protocol)
    variables, residents = [state.variables for state in states], [task.resident for task in tasks]
    detections = first.look(lambda batch: step(variables, batch, residents), "test", protocol)
    return first.judge("test", detections), first.result_files("test", detections)
