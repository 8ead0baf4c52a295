"""Runs of ours as a report sees them: what was trained on what, how far, with what errors."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

from resnet_jax.buckets import Folder, exists, is_folder, open_folder
from resnet_jax.classification.predict import imagenet_names
from resnet_jax.config import flatten, restore_config
from resnet_jax.detection import voc
from resnet_jax.errors import UsageError
from resnet_jax.pretrained.fetch import is_remote
from resnet_jax.pretrained.formats import CIFAR10
from resnet_jax.training.results import EVALUATED_WITH
from resnet_jax.training.workdir import CENTER, DATA, read_json

ANALYSIS = "analysis.json"
_CALIBRATED = "calibrated"  # How the folders of evaluations of such a network begin.
# What is in it, by kind.
_FIELDS = {
    "responses": {"layers", "deviations"},
    "removal": {"blocks", "whole", "top1_errors"},
    "landscape": {"distances", "losses"},
}

# data.test_split -> what the tables call the test set.
_VOC_TESTS = {"07_test": "voc07", "12_test": "voc12"}
_COCO_TESTS = {"val2014": "coco", "val2017": "coco", "test-dev2015": "coco_test_dev", "test-dev2017": "coco_test_dev"}
_COCO_CLASSES, _COCO_IDS = 80, frozenset(range(1, 91))


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory.

    Attributes:
      folder: where it is.
      config: the flat config.
      summaries: by the folder below ``eval``, or ``center`` for the run's own: what ``summary.json`` says.
      data: ``cifar10``, ``imagenet`` or ``other``; of localization ``imagenet`` or ``other``; of detection the test
        set: ``voc07``, ``voc12``, ``coco`` (val), ``coco_test_dev`` or ``other``.
      classes: names, in the order of their labels.
      train_examples: how many it was trained on; 0 where that is not known.
      continued: whether its ``init.weights`` were trained for the same task, by a run of detection or localization.
      metrics: the lines of ``metrics.jsonl``.
      analysis: what ``paper.analysis`` found, or nothing.
    """

    folder: Folder
    config: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    data: str
    classes: tuple[str, ...]
    train_examples: int
    continued: bool
    metrics: list[dict[str, Any]]
    analysis: dict[str, Any]

    @property
    def task(self) -> str:
        """What it learns."""
        return self.config["task"]

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
        return self.summaries.get(CENTER, {})

    @property
    def evaluations(self) -> Iterator["Evaluation"]:
        """Each that there is a summary of, the run's own first."""
        for name, found in self.summaries.items():
            other = EVALUATED_WITH in found and not name.startswith(_CALIBRATED)
            yield Evaluation(self, found.get("protocol", name) if other else name, found)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
      run: whose.
      protocol: the test protocol; of a calibrated network, whose weights are others, the folder's name.
      summary: what its ``summary.json`` says.
    """

    run: Run
    protocol: str
    summary: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The run's, with the settings that this evaluation was done with."""
        return self.run.config | self.summary.get(EVALUATED_WITH, {})

    @property
    def step(self) -> int:
        """How far the network was trained then, iterations."""
        return self.summary.get("step", self.run.step)


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
    config = flatten(restore_config(read_json(folder / "config.json"), str(folder)))
    summaries = {}
    for path in (folder / "summary.json", *sorted(folder.glob("eval/*/summary.json"))):
        found = read_json(path)
        if found is not None:
            summaries[CENTER if path.parent == folder else path.parent.name] = found
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
    known = read_json(folder / DATA) or {}
    data = _TESTS[config["task"]](config, known)
    classes, examples = tuple(known.get("classes", ())), known.get("examples", 0)
    return Run(folder, config, summaries, data, classes, examples, _continued(config), metrics, analysis)


def _continued(config: Mapping[str, Any]) -> bool:
    """Whether ``init.weights`` is a run of the same task; one that is not here is judged by what it was used for."""
    source, task = config["init.weights"], config["task"]
    if task == "classification" or not source or is_remote(source):
        return False
    path = pathlib.Path(source).expanduser()
    found = read_json(path / "config.json") if path.is_dir() else None
    if found is not None:
        return found.get("task", "classification") == task
    # A detector's outputs are replaced, a classification's are left behind anyhow; and files are of classification.
    return not path.exists() and config["init.head"] == "replace" and not path.suffix


def _of_classification(config: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    del config  # The same images have many sources.
    classes = tuple(known.get("classes", ()))
    return "cifar10" if classes == CIFAR10 else "imagenet" if set(classes) == set(imagenet_names()) else "other"


def _of_detection(config: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    classes, category_ids = known.get("classes", ()), known.get("category_ids", ())
    if set(classes) == set(voc.CLASSES):
        found = _VOC_TESTS
    elif len(classes) == _COCO_CLASSES and set(category_ids) <= _COCO_IDS:
        found = _COCO_TESTS
    else:
        found = {}
    return found.get(config["data.test_split"], "other")


def _of_localization(config: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    found = _of_classification(config, known)
    return found if found == "imagenet" else "other"


_TESTS = {"classification": _of_classification, "detection": _of_detection, "localization": _of_localization}
