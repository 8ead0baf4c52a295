"""What an evaluation leaves behind: ``predictions.npz``, ``summary.json``, and a line for people."""

import re
from typing import Any

import numpy as np

from resnet_jax.buckets import Folder
from resnet_jax.fields import OF_EVALUATION
from resnet_jax.output import make_folder, write_files, write_json, write_whole
from resnet_jax.training.record import Record
from resnet_jax.training.task import Evaluation, Task

_OF_PROTOCOLS = ("eval.scales", "detection.test_scales", "detection.test_side")  # Those name a folder already.
EVALUATED_WITH = "evaluated_with"  # In a summary: settings of the evaluation that are not the run's own.
# Percentages that people look for first, and what they call them.
_HEADLINES = {
    "top1_error": "top1 error",
    "top5_error": "top5 error",
    "map": "mAP",
    "ap50": "AP50",
    "top1_localization_error": "top1 localization error",
    "top5_localization_error": "top5 localization error",
    "class_given_localization_error": "class given",
}


def write_results(folder: Folder, summary: dict[str, Any], evaluation: Evaluation) -> None:
    """Writes the files into ``folder``, which is made where needed; the evaluation's figures join the summary's.

    Raises:
      UsageError: they can't be written.
    """
    make_folder(folder)
    write_whole(folder / "predictions.npz", lambda file: np.savez(file, **evaluation.predictions))
    write_files(folder, evaluation.files)
    write_json(folder / "summary.json", summary | evaluation.metrics)


def summarize(task: Task, step: int, record: Record) -> dict[str, Any]:
    """What is known of a training after ``step``; the evaluation's figures come beside it."""
    speed = record.steps_per_second
    streamed = {
        "data_wait_percent": record.data_wait_percent,
        "broken_images": len(record.broken | task.broken),
    }
    objective = task.objective
    return {
        "model": task.name,
        "params": task.parameters,
        "step": step,
        "epoch": step * task.examples_per_step / task.examples_per_epoch,
        f"train_{objective}": record.epoch_average(objective),
        f"best_{objective}": record.best,
        "best_step": record.best_step,
        "images_per_second": speed and speed * task.examples_per_step,
        "seconds": record.seconds,
    } | (streamed if task.streams else {})


def other_settings(now: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """In what an evaluation differs from the run's own: its results stand beside those, which they don't replace.

    Args:
      now: the flat config that it is done with.
      own: the run's.

    Returns:
      What is added to the summary, and parts of the folder's name, as ``refine=true``; nothing of either where none
      differs.
    """
    other = {field: now[field] for field in OF_EVALUATION if now[field] != own.get(field, now[field])}
    names = [f"{field.split('.')[-1]}={_plain(value)}" for field, value in other.items() if field not in _OF_PROTOCOLS]
    return {EVALUATED_WITH: other} if other else {}, names


def _plain(value: Any) -> str:
    """A setting's value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", ",", "-".join(map(str, value)) if isinstance(value, list) else str(value).lower())


def title(metric: str) -> str:
    """What people call a metric."""
    return _HEADLINES.get(metric, metric)


def describe(metrics: dict[str, float]) -> str:
    """The figures a person looks for first."""
    shown = [f"{title} {metrics[name]:.2f}%" for name, title in _HEADLINES.items() if name in metrics]
    shown += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    return ", ".join([*shown, f"{metrics['examples']} examples"])
