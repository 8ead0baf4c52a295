"""A table of the paper's beside our runs: whose figure stands in which row, and what sets the others apart."""

from collections.abc import Mapping, Sequence
import math
import pathlib
import statistics
from typing import Any

from resnet_jax.config import flatten, load_config, recipe_changes
from resnet_jax.fields import FIELDS, OF_EVALUATION
from resnet_jax.paper.detection_tables import (
    AP,
    AP50,
    AP50_11_POINT,
    AP50_AREA,
    GIVEN,
    PREDICTED,
    TOP5_LOCALIZATION,
)
from resnet_jax.paper.page import MISSING, NONE, Shown, number
from resnet_jax.paper.runs import Evaluation, Run
from resnet_jax.paper.tables import TOP1, TOP5, Row, Table

NAMES = {TOP1: "top-1", TOP5: "top-5", AP50_11_POINT: "mAP", AP50_AREA: "mAP", AP50: "mAP@.5", AP: "mAP@[.5,.95]",
         TOP5_LOCALIZATION: "top-5"}  # fmt: skip
# What may be otherwise in the same experiment: chance, and where the same images come from.
_FREE = {"seed", "model.name", "model.num_classes", "model.dtype", "data.source", "data.labels"}
_SPLITS = {"data.train_split", "data.test_split"}  # Of data that are known by their classes.
_FREE_IN = {
    "classification": {"data.name"} | _SPLITS,
    "detection": {"init.weights", "detection.roi"},  # The remark says with which; what weights, is looked at besides.
    "localization": {"init.weights"} | _SPLITS,
}
_PREDICTIONS = "localization.predictions"
# Settings of an evaluation that don't touch the figures of the tables: which of them is called mAP, or is known.
_NO_TEST = {"detection.labelled", "detection.average_precision"}
_OF_SCALES = {"eval.scales", "detection.test_scales", "detection.test_side"}  # Read by the protocol multi_scale alone.
_OF_CROPS = {"eval.resize"}  # By all others.
_TASKS = {field.name: field.tasks for field in FIELDS}  # None: all.
_CONTINUED = {"detection": "from a detector's weights", "localization": "from a localizer's weights"}
_TEST_SETS = {"cifar10": 10_000, "imagenet": 50_000, "voc07": 4_952, "voc12": 10_991, "coco": 40_504}  # Their images.


def compare(table: Table, runs: Sequence[Run]) -> Shown:
    """The paper's table with public figures and ours; networks that nobody trained here are marked."""
    publics = list(dict.fromkeys(whose for row in table.rows for whose in row.public))
    columns = [NAMES[metric] for metric in table.columns]
    several = len(columns) > 1

    def heads(whose: str) -> list[str]:
        return [f"{whose} {column}" if several else whose for column in columns]

    head = [
        "",
        *heads("paper"),
        *(name for whose in publics for name in heads(whose)),
        *heads("ours"),
        "difference",
        "",
    ]
    rows, placed = [], _placed(table, runs)
    for row in table.rows:
        cells = _figures_of(row.paper, table)
        for whose in publics:
            cells += _figures_of(row.public.get(whose, ()), table)
        ours, difference, remark = _ours(table, row, placed[row.title])
        remarks = "; ".join(text for text in (row.remark, remark) if text)
        rows.append((row.title, *cells, *ours, difference, remarks))
    return Shown(table.title, tuple(head), rows, table.note, table.rises)


def _placed(table: Table, runs: Sequence[Run]) -> Mapping[str, list[Evaluation]]:
    """By row: the evaluations that are looked at there; of several rows of its network each has the nearest one."""
    placed = {row.title: [] for row in table.rows}
    for run in runs:
        if (run.task, run.data) != (table.task, table.data):
            continue
        for one in run.evaluations:
            rows = [row for row in table.rows if run.model in row.models and table.protocol_of(row) == one.protocol]
            if rows:
                placed[min(rows, key=lambda row: len(_changes(row, table, one))).title].append(one)
    return placed


def _figures_of(values: Sequence[float | None], table: Table) -> list[str]:
    shown = [number(value, table.places) for value in values]
    return shown + [NONE] * (len(table.columns) - len(shown))


def _ours(table: Table, row: Row, evaluations: Sequence[Evaluation]) -> tuple[list[str], str, str]:
    """Our figures for a row, their difference from the paper's, and what has to be said of them."""
    if not row.models:
        return [NONE] * len(table.columns), "", ""
    same, remarks = {}, []
    for one in evaluations:
        if why := _what_differs(row, table, one):
            remarks.append(f"{_measured(one.summary, table)}{why} ({one.run.name})")
        else:
            same.setdefault(one.run.folder, one)  # A run counts once.
    if not same:
        return [MISSING] * len(table.columns), "", "; ".join(remarks)
    same = list(same.values())
    figures = [[one.summary[metric] for one in same] for metric in table.columns]
    means = [statistics.fmean(values) for values in figures]
    printed = row.mean if row.mean and len(same) > 1 else row.paper
    differences = [_difference(ours - theirs, table.places)
                   for ours, theirs in zip(means, printed, strict=False) if theirs is not None]  # fmt: skip
    said = same[0].run.name
    if len(same) > 1:
        best = (max if table.rises else min)(figures[0])
        said = f"mean of {len(same)} runs, +- {statistics.stdev(figures[0]):.2f}, best {number(best, table.places)}"
    said = ", ".join([said, *_made_with(table, same)])
    return [number(mean, table.places) for mean in means], " / ".join(differences), "; ".join([said, *remarks])


def _made_with(table: Table, same: Sequence[Evaluation]) -> list[str]:
    """What is free in a row's experiment, and should be known."""
    said = []
    if table.task in _CONTINUED:
        weights = dict.fromkeys(pathlib.PurePath(one.config["init.weights"]).name for one in same)
        said.append(f"from {' and '.join(weights)}")
    regions = dict.fromkeys(one.config["detection.roi"] for one in same)
    if table.task == "detection" and "pool" in regions:
        said.append(" and ".join({"align": "RoIAlign", "pool": "RoI pooling"}[kind] for kind in regions))
    classes = dict.fromkeys(one.config[_PREDICTIONS] for one in same if one.config[_PREDICTIONS])
    if table.task == "localization" and classes:
        said.append(f"classes by {' and '.join(classes)}")
    return said


def _difference(value: float, places: int) -> str:
    shown = f"{value:+.{places}f}"
    return shown if float(shown) else shown[1:]


def _what_differs(row: Row, table: Table, one: Evaluation) -> str:
    """Why an evaluation is not of the row's experiment, or has no figure of it; empty where it stands in the row."""
    run, weights = one.run, one.config["init.weights"]
    if run.imported:
        return "by imported weights, evaluated here"
    if table.task == "classification" and weights:
        return "fine-tuned from other weights"
    if table.task in _CONTINUED and not weights:
        return "from scratch"
    if run.continued:
        return _CONTINUED[table.task]
    if not row.config:
        return "by a recipe of one's own"
    if changes := _changes(row, table, one):
        return f"with {', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}"
    config = load_config(row.config)
    steps = config.steps or math.ceil(config.epochs * run.train_examples / config.batch_size)
    if one.step != steps:
        return f"after {one.step:,} of {steps:,} iterations"
    if not _has_figures(one.summary, table):
        if not one.config["detection.labelled"]:
            return "evaluated without figures, since the test set's boxes are not known"
        return f"evaluated without {' and '.join(metric for metric in table.columns if metric not in one.summary)}"
    examples = one.summary.get("examples")
    return "" if examples == _TEST_SETS[table.data] else f"on {examples} test images"


def _changes(row: Row, table: Table, one: Evaluation) -> list[str]:
    """The settings in which an evaluation is of another experiment than the row's, ``name: the row's -> its own``."""
    if not row.config:
        return []
    settings = table.settings | row.settings
    wanted, found = (_asked(values) for values in (flatten(load_config(row.config)), one.config))
    wanted |= settings
    changes = recipe_changes(wanted, found)
    listed = {change.split(":")[0] for change in changes}
    changes += [f"{name}: {wanted[name]} -> {found[name]}"
                for name in dict.fromkeys([*settings, *_test_settings(table.task, one.protocol)])
                if name not in listed and wanted[name] != found[name]]  # fmt: skip
    free = _FREE | _FREE_IN[table.task]
    return [change for change in changes if change.split(":")[0] not in free]


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what a localizer is asked for in place of where that lies."""
    return {**config, _PREDICTIONS: PREDICTED if config[_PREDICTIONS] else GIVEN}


def _test_settings(task: str, protocol: str) -> list[str]:
    """What changes an evaluation's figures without being learnt."""
    unread = _NO_TEST | (_OF_CROPS if protocol == "multi_scale" else _OF_SCALES)
    return [name for name in OF_EVALUATION if task in (_TASKS[name] or (task,)) and name not in unread]


def _has_figures(summary: Mapping[str, float], table: Table) -> bool:
    return all(summary.get(metric) is not None for metric in table.columns)


def _measured(summary: Mapping[str, float], table: Table) -> str:
    if not _has_figures(summary, table):
        return ""
    return " / ".join(number(summary[metric], table.places) for metric in table.columns) + " "
