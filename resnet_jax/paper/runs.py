"""Runs of ours as a report sees them: what was trained on what, how far, with what errors."""

from collections.abc import Sequence
import dataclasses
import json
import os
from typing import Any

from resnet_jax.buckets import Folder, exists, is_folder, open_folder
from resnet_jax.classification.predict import imagenet_names
from resnet_jax.config import restore_config
from resnet_jax.errors import UsageError
from resnet_jax.pretrained.formats import CIFAR10
from resnet_jax.training.workdir import DATA, read_json

ANALYSIS = "analysis.json"
# What is in it, by kind.
_FIELDS = {
    "responses": {"layers", "deviations"},
    "removal": {"blocks", "whole", "top1_errors"},
    "landscape": {"distances", "losses"},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory.

    Attributes:
      folder: where it is.
      config: the flat config.
      summaries: by test protocol: what ``summary.json`` says; ``calibrated`` besides.
      data: ``cifar10``, ``imagenet`` or ``other``.
      metrics: the lines of ``metrics.jsonl``.
      analysis: what ``paper.analysis`` found, or nothing.
    """

    folder: Folder
    config: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    data: str
    metrics: list[dict[str, Any]]
    analysis: dict[str, Any]

    @property
    def model(self) -> str:
        """Our name of the network."""
        return self.config["model.name"]

    @property
    def name(self) -> str:
        """What the report calls it."""
        parent = f"{self.folder.parent.name}/" if self.folder.name.startswith("seed_") else ""
        return parent + self.folder.name

    @property
    def imported(self) -> bool:
        """Whether the weights are somebody else's, evaluated here."""
        return bool(self.config["init.weights"]) and not self.step

    @property
    def step(self) -> int:
        """How far it was trained, iterations."""
        return max(found.get("step", 0) for found in self.summaries.values())

    @property
    def summary(self) -> dict[str, Any]:
        """That of the single view."""
        return self.summaries.get("center", {})


def seeds_of(name: str) -> list[Folder]:
    """The runs in a folder that ``main --seeds`` made; any other path alone."""
    folder = open_folder("--runs", name)
    if exists(folder / "config.json"):
        return [folder]
    below = sorted(folder.glob("seed_*"), key=lambda path: (len(path.name), path.name))
    return [path for path in below if (path / "config.json").is_file()] or [folder]


def find_runs(folders: Sequence[str]) -> list[Folder]:
    """The work directories that are meant; of a folder of several seeds, each seed's.

    Raises:
      UsageError: there is none.
    """
    found = []
    for name in folders:
        folder = open_folder("--runs", name)
        if not is_folder(folder):
            raise UsageError(f"--runs={name}: no such folder")
        runs = seeds_of(name)
        if not (runs[0] / "config.json").is_file():
            raise UsageError(f"--runs={name}: no work directory of a run (no config.json in it)")
        found += runs
    return list({os.path.realpath(folder): folder for folder in found}.values())


def read_run(folder: Folder) -> Run:
    """Reads a work directory.

    Raises:
      UsageError: it has never been evaluated, is another version's, or damaged.
    """
    config = read_json(folder / "config.json")
    restore_config(config, str(folder))
    summaries = {}
    for path in (folder / "summary.json", *sorted(folder.glob("eval/*/summary.json"))):
        found = read_json(path)
        if found is not None:
            summaries["center" if path.parent == folder else path.parent.name] = found
    if not summaries:
        raise UsageError(f"{folder}: has no summary.json, since it was never evaluated; --mode=eval does it")
    metrics = []
    if (folder / "metrics.jsonl").is_file():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                metrics.append(json.loads(line))
            except ValueError:  # The last line of a run that was killed while it wrote.
                continue
    analysis = read_json(folder / ANALYSIS) or {}
    for kind, fields in _FIELDS.items():
        if kind in analysis and not fields <= set(analysis[kind]):
            raise UsageError(f"{folder / ANALYSIS}: damaged, or another version's; without it --analyze makes it anew")
    return Run(folder, config, summaries, _data_of(folder), metrics, analysis)


def _data_of(folder: Folder) -> str:
    classes = tuple((read_json(folder / DATA) or {}).get("classes", ()))
    return "cifar10" if classes == CIFAR10 else "imagenet" if set(classes) == set(imagenet_names()) else "other"
