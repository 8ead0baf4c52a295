"""Our detectors on the report's pages: all of them, their classes' average precision, and what they found."""

from collections.abc import Mapping, Sequence
import pathlib

from resnet_jax.paper import figures
from resnet_jax.paper.page import NONE, Figure, Shown, number
from resnet_jax.paper.runs import Run
from resnet_jax.training.workdir import CENTER

_CLASS = "ap50/"  # Before a class's name in a summary.
_POINTS = 2  # From which on a line is drawn.


def detector_runs(runs: Sequence[Run]) -> Shown | None:
    """Every detection run, whatever it was trained on."""
    head = (
        "detector",
        "network",
        "neck",
        "data",
        "steps",
        "seed",
        "mAP",
        "as of",
        "AP50",
        "11 points",
        "other tests",
        "images/s",
        "minutes",
    )
    rows = []
    for run in runs:
        found = run.summary
        rows.append((
            run.name,
            run.model,
            run.config["detection.neck"],
            data_name(run),
            "imported" if run.imported else f"{run.step:,}",
            NONE if run.imported else str(run.config["seed"]),
            number(found.get("map")),
            run.config["detection.average_precision"],
            number(found.get("ap50")),
            number(found.get("ap50_11_point")),
            ", ".join(f"{name} {number(run.summaries[name].get('map'))}" for name in run.summaries if name != CENTER),
            number(found.get("images_per_second"), 1),
            number(found["seconds"] / 60 if found.get("seconds") else None, 1),
        ))  # fmt: skip
    note = ("mAP is voc07's (11 points) or voc's (the area under the curve), both at an IoU of .5, or coco's, the mean"
            " over IoUs from .5 to .95. AP50 is the area, and beside it stands the AP of 11 points.")  # fmt: skip
    return Shown("Detection runs", head, rows, note) if rows else None


def by_class(runs: Sequence[Run]) -> list[Shown]:
    """Average precision of each class, a column for each run; runs of other data have a table of their own."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        classes = tuple(name.removeprefix(_CLASS) for name in run.summary if name.startswith(_CLASS))
        if classes:
            groups.setdefault((data_name(run), *run.classes), []).append(run)
    shown = []
    for (data, *classes), members in groups.items():
        rows = [(name, *(number(run.summary.get(_CLASS + name)) for run in members)) for name in classes]
        rows.append(("mean", *(number(run.summary.get("ap50")) for run in members)))
        head = ("class", *(run.name for run in members))
        note = "The area under the curve at an IoU of .5; a class without objects in the test set has none."
        shown.append(Shown(f"AP50 by class: {data}", head, rows, note))
    return shown


def pictures(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Figure]:
    """Learning curves, those of the same data together, and what each run has drawn of what it found."""
    drawn = []
    curves = [run for run in runs if any(_is_curve(run, name) for name in ("test_map", "train_loss"))]
    for data in dict.fromkeys(map(data_name, curves)):
        chosen = [run for run in curves if data_name(run) == data]
        text = "The test set's mAP, and the training loss with its parts: the proposals' (RPN) and the regions'."
        drawn.append(
            Figure(f"Training of detectors: {data}", text, figures.detector_curves(chosen, colours), wide=True)
        )
    for run in runs:
        sheet = run.folder / "found.png"
        if sheet.is_file():
            text = "The first pictures of the test set, with the surest of what was found in them."
            drawn.append(Figure(f"Found by {run.name}", text, png=sheet.read_bytes(), wide=True))
    return drawn


def _is_curve(run: Run, name: str) -> bool:
    return sum(name in line for line in run.metrics) >= _POINTS


def data_name(run: Run) -> str:
    """What people call the data of a run."""
    source = run.config["data.source"]
    if source == "folder":
        return pathlib.PurePath(run.config["data.dir"]).name
    splits = [run.config[f"data.{split}_split"] for split in ("train", "test")]
    return source if source == "shapes" else f"{source} {splits[0]}, {splits[1] or 'test'}"
