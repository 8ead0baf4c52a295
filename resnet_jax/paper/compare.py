"""A table of the paper's beside our runs: whose figure stands in which row, and what sets the others apart."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import statistics

from resnet_jax.config import flatten, load_config, recipe_changes
from resnet_jax.fields import FIELDS
from resnet_jax.paper.page import MISSING, NONE, Shown, number
from resnet_jax.paper.runs import Run
from resnet_jax.paper.tables import AP, AP50, AP50_11_POINT, AP50_AREA, TOP1, TOP5, TOP5_LOCALIZATION, Row, Table
from resnet_jax.training.results import EVALUATED_WITH

NAMES = {TOP1: "top-1", TOP5: "top-5", AP50_11_POINT: "mAP", AP50_AREA: "mAP", AP50: "mAP@.5", AP: "mAP@[.5,.95]",
         TOP5_LOCALIZATION: "top-5"}  # fmt: skip
# What may be otherwise in the same experiment: chance, and where the same images come from.
_FREE = {"seed", "model.name", "model.num_classes", "model.dtype", "data.source", "data.labels"}
_FREE_IN = {
    "classification": {"data.name", "data.train_split", "data.test_split"},  # The data are known by their classes.
    "detection": {"init.weights"},  # All detectors begin with some; the remark says with which.
}
# What changes a detector's figures without being learnt.
_TEST_SETTINGS = [field.name for field in FIELDS if field.task == "detection" and not field.recipe
                  and field.name not in ("detection.labelled", "detection.average_precision")]  # fmt: skip
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


def _placed(table: Table, runs: Sequence[Run]) -> Mapping[str, list[Run]]:
    """By row: the runs that are looked at there; of several rows of its network a run has the nearest one."""
    placed = {row.title: [] for row in table.rows}
    for run in runs:
        fitting = [row for row in table.rows if (run.task, run.data) == (table.task, table.data)
                   and run.model in row.models and table.protocol_of(row) in run.summaries]  # fmt: skip
        for protocol in dict.fromkeys(table.protocol_of(row) for row in fitting):
            rows = [row for row in fitting if table.protocol_of(row) == protocol]
            placed[min(rows, key=lambda row: len(_changes(row, table, run))).title].append(run)
    return placed


def _figures_of(values: Sequence[float | None], table: Table) -> list[str]:
    shown = [number(value, table.places) for value in values]
    return shown + [NONE] * (len(table.columns) - len(shown))


def _ours(table: Table, row: Row, runs: Sequence[Run]) -> tuple[list[str], str, str]:
    """Our figures for a row, their difference from the paper's, and what has to be said of them."""
    if not row.models:
        return [NONE] * len(table.columns), "", ""
    protocol = table.protocol_of(row)
    differing = [(run, _what_differs(row, table, run)) for run in runs]
    same = [run for run, why in differing if not why]
    remarks = [f"{_measured(run.summaries[protocol], table)}{why} ({run.name})" for run, why in differing if why]
    if not same:
        return [MISSING] * len(table.columns), "", "; ".join(remarks)
    figures = [[run.summaries[protocol][metric] for run in same] for metric in table.columns]
    means = [statistics.fmean(values) for values in figures]
    printed = row.mean if row.mean and len(same) > 1 else row.paper
    differences = [_difference(ours - theirs, table.places)
                   for ours, theirs in zip(means, printed, strict=False) if theirs is not None]  # fmt: skip
    said = same[0].name
    if len(same) > 1:
        best = (max if table.rises else min)(figures[0])
        said = f"mean of {len(same)} runs, +- {statistics.stdev(figures[0]):.2f}, best {number(best, table.places)}"
    if table.task == "detection":
        weights = dict.fromkeys(pathlib.PurePath(run.config["init.weights"]).name for run in same)
        said += f", from {' and '.join(weights)}"
    return [number(mean, table.places) for mean in means], " / ".join(differences), "; ".join([said, *remarks])


def _difference(value: float, places: int) -> str:
    shown = f"{value:+.{places}f}"
    return shown if float(shown) else shown[1:]


def _what_differs(row: Row, table: Table, run: Run) -> str:
    """Why a run is not the row's experiment, or has no figure of it; empty where it stands in the row."""
    summary = run.summaries[table.protocol_of(row)]
    run = dataclasses.replace(run, config=run.config | summary.get(EVALUATED_WITH, {}))
    if run.imported:
        return "by imported weights, evaluated here"
    if table.task == "classification" and run.config["init.weights"]:
        return "fine-tuned from other weights"
    if table.task == "detection" and not run.config["init.weights"]:
        return "from scratch"
    if not row.config:
        return "by a recipe of one's own"
    if changes := _changes(row, table, run):
        return f"with {', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}"
    steps = load_config(row.config).steps
    if run.step != steps:
        return f"after {run.step:,} of {steps:,} iterations"
    if not _has_figures(summary, table):
        if not run.config["detection.labelled"]:
            return "evaluated without figures, since the test set's boxes are not known"
        return f"evaluated without {' and '.join(metric for metric in table.columns if metric not in summary)}"
    examples = summary.get("examples")
    return "" if examples == _TEST_SETS[table.data] else f"on {examples} test images"


def _changes(row: Row, table: Table, run: Run) -> list[str]:
    """The settings in which a run is another experiment than the row's, as ``name: the row's -> the run's``."""
    if not row.config:
        return []
    settings = table.settings | row.settings
    wanted = flatten(load_config(row.config)) | settings
    changes = recipe_changes(wanted, run.config)
    listed = {change.split(":")[0] for change in changes}
    tested = [*settings, *(_TEST_SETTINGS if table.task == "detection" else ())]
    changes += [f"{name}: {wanted[name]} -> {run.config[name]}" for name in dict.fromkeys(tested)
                if name not in listed and wanted[name] != run.config[name]]  # fmt: skip
    free = _FREE | _FREE_IN[table.task]
    return [change for change in changes if change.split(":")[0] not in free]


def _has_figures(summary: Mapping[str, float], table: Table) -> bool:
    return all(summary.get(metric) is not None for metric in table.columns)


def _measured(summary: Mapping[str, float], table: Table) -> str:
    if not _has_figures(summary, table):
        return ""
    return " / ".join(number(summary[metric], table.places) for metric in table.columns) + " "
