"""The paper's tables and figures beside our runs', as Markdown and as one page of HTML."""

from collections.abc import Mapping, Sequence
import datetime
import functools
import importlib.resources
import pathlib
import statistics
from typing import Any

import jinja2

from resnet_jax import __version__
from resnet_jax.classification import ensemble
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import IMAGENET
from resnet_jax.models.summary import summarize
from resnet_jax.paper import detection, detection_tables, figures
from resnet_jax.paper.compare import NAMES, compare
from resnet_jax.paper.localization import localizer_runs
from resnet_jax.paper.page import NONE, Figure, Shown, number
from resnet_jax.paper.runs import Run
from resnet_jax.paper.tables import MULTIPLY_ADDS, TABLES, TOP1, TOP5


def write_report(runs: Sequence[Run], output: pathlib.Path) -> list[pathlib.Path]:
    """Writes ``report.html`` and ``report.md``, whose pictures lie beside it.

    Args:
      runs: what is reported; none of them twice.
      output: a folder; made where needed.

    Returns:
      The two files.

    Raises:
      UsageError: it can't be written.
    """
    # A run has one colour throughout.
    colours = {run.name: f"C{place % 6}" for place, run in enumerate(runs)}
    classifiers, detectors, localizers = (
        [run for run in runs if run.task == task] for task in ("classification", "detection", "localization")
    )
    drawn = _figures(classifiers, colours) + detection.pictures(detectors, colours)
    compared = [compare(table, runs) for table in (*TABLES, *detection_tables.TABLES)]
    values = {
        "version": __version__,
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "runs": _known([_runs(classifiers), detection.detector_runs(detectors), localizer_runs(localizers)]),
        "tables": _known([_ensembles(classifiers), *detection.by_class(detectors), *compared, _sizes()]),
        "figures": drawn,
    }
    folder = importlib.resources.files("resnet_jax.paper")
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for place, figure in enumerate(drawn, start=1):
            (output / figure.file(place)).write_bytes(figure.content)
        for name in ("report.html", "report.md"):
            template = folder.joinpath(f"{name}.jinja").read_text(encoding="utf-8")
            made = jinja2.Environment(
                autoescape=name.endswith(".html"),
                trim_blocks=True,
                lstrip_blocks=True,
                undefined=jinja2.StrictUndefined,
            ).from_string(template)
            (output / name).write_text(made.render(values), encoding="utf-8")
            written.append(output / name)
    except OSError as error:
        raise UsageError(f"--output={output}: can't be written ({error.strerror})") from error
    return written


def _known(tables: Sequence[Shown | None]) -> list[Shown]:
    return [table for table in tables if table]


def _runs(runs: Sequence[Run]) -> Shown | None:
    head = (
        "run",
        "network",
        "data",
        "steps",
        "seed",
        "train error",
        "test error",
        "by protocol",
        "images/s",
        "minutes",
    )
    rows = []
    for run in runs:
        found = run.summary
        rows.append((
            run.name,
            run.model,
            run.data if run.data != "other" else run.config["data.source"],
            "imported" if run.imported else f"{run.step:,}",
            NONE if run.imported else str(run.config["seed"]),
            number(found.get("train_top1_error")),
            number(found.get("top1_error")),
            ", ".join(f"{name} {summary['top1_error']:.2f}" for name, summary in run.summaries.items()),
            number(found.get("images_per_second"), 0),
            number(found["seconds"] / 60 if found.get("seconds") else None, 1),
        ))  # fmt: skip
    return Shown("Runs", head, rows) if rows else None


def _ensembles(runs: Sequence[Run]) -> Shown | None:
    """The runs that were evaluated on the same test set, and their probabilities averaged."""
    groups: dict[tuple, list[tuple[Run, Any]]] = {}
    for run in runs:
        file = run.folder / "predictions.npz"
        if file.is_file():
            scores = ensemble.read_predictions(file)
            key = (scores["index"].tobytes(), scores["label"].tobytes(), scores["probabilities"].shape[1])
            groups.setdefault(key, []).append((run, scores))
    rows = []
    for members in groups.values():
        if len(members) > 1:
            named = [(run.name, scores) for run, scores in members]
            together = ensemble.combine([scores for _, scores in members])
            named.append((f"ensemble of these {len(members)}", together))
            for name, scores in named:
                found = ensemble.errors(scores)
                rows.append((name, *(f"{found[metric]:.2f}" for metric in (TOP1, TOP5)), f"{found['loss']:.4f}"))
    note = "Probabilities averaged over runs that were evaluated on the same examples."
    return Shown("Ensembles", ("", NAMES[TOP1], NAMES[TOP5], "loss"), rows, note) if rows else None


@functools.cache  # Seconds, of networks that don't change.
def _sizes() -> Shown:
    """Table 1: the networks' sizes, computed from the networks."""
    rows = []
    for depth in IMAGENET:
        found, printed = summarize(f"resnet{depth}"), MULTIPLY_ADDS[depth]
        rows.append((
            f"ResNet-{depth}",
            f"{printed / 1e9:.1f}e9",
            f"{found.multiply_adds / 1e9:.3f}e9",
            f"{100 * (found.multiply_adds / printed - 1):+.1f}%",
            f"{found.parameters:,}",
        ))  # fmt: skip
    head = ("", "multiply-adds, paper", "ours", "difference", "parameters")
    return Shown("Table 1: ImageNet networks", head, rows)


def _figures(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Figure]:
    """Whatever the runs have the data for."""
    curves = [run for run in runs if sum("train_top1_error" in line for line in run.metrics) > 1]
    drawn = []
    for data in dict.fromkeys(run.data for run in curves):
        chosen = [run for run in curves if run.data == data]
        text = "Thin lines are training errors, bold ones the test set's."
        title = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}.get(data, "other data")
        drawn.append(Figure(f"Training on {title} (figures 1, 4, 6)", text, figures.training_curves(chosen, colours)))
    for kind, title, paint, text in (
        ("responses", "Layer responses (figure 7)", figures.responses,
         "Deviations of the 3x3 layers' outputs over the test set, after BN and before the ReLU or the addition."),
        ("removal", "One block left out", figures.removal,
         "The error of a trained network without one of its blocks; the dashed line is the whole network's."),
        ("landscape", "A slice of the loss", figures.landscape,
         "The loss along three random directions, each filter of which is as long as the network's own."),
    ):  # fmt: skip
        chosen = [run for run in runs if kind in run.analysis]
        if chosen:
            means = [f"{run.name} {statistics.fmean(run.analysis[kind]['deviations']):.3f}" for run in chosen
                     if kind == "responses"]  # fmt: skip
            said = f"{text} Means: {', '.join(means)}." if means else text
            counts = sorted({run.analysis[kind]["examples"] for run in chosen if "examples" in run.analysis[kind]})
            said += f" Of {' or '.join(map(str, counts))} test images, drawn at random." if counts else ""
            wide = kind == "responses" or (kind == "removal" and len(chosen) > 1)
            drawn.append(Figure(title, said, paint(chosen, colours), wide=wide))
    return drawn
