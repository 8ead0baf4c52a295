"""What an evaluation leaves behind: ``predictions.npz``, ``summary.json``, and a line for people."""

from typing import Any

import numpy as np

from resnet_jax.buckets import Folder
from resnet_jax.output import make_folder, write_json, write_whole
from resnet_jax.training.task import Evaluation


def write_results(folder: Folder, summary: dict[str, Any], evaluation: Evaluation) -> None:
    """Writes both files into ``folder``, which is made where needed; the evaluation's figures join the summary's.

    Raises:
      UsageError: they can't be written.
    """
    make_folder(folder)
    write_whole(folder / "predictions.npz", lambda file: np.savez(file, **evaluation.predictions))
    write_json(folder / "summary.json", summary | evaluation.metrics)


def describe(metrics: dict[str, float]) -> str:
    """The figures a person looks for first."""
    errors = [name for name in ("top1_error", "top5_error") if name in metrics]
    shown = [f"{name.replace('_', ' ')} {metrics[name]:.2f}%" for name in errors]
    return ", ".join([*shown, f"loss {metrics['loss']:.4f}", f"{metrics['examples']} examples"])
