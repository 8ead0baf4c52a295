"""The paper's tables and figures beside our runs', as Markdown and as one page of HTML."""

from collections.abc import Sequence
import dataclasses
import datetime
import importlib.resources
import pathlib
import statistics
from typing import Any

import jinja2

from resnet_jax import __version__
from resnet_jax.classification import ensemble
from resnet_jax.config import flatten, load_config, recipe_changes
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import IMAGENET
from resnet_jax.models.summary import summarize
from resnet_jax.paper import figures
from resnet_jax.paper.runs import Run
from resnet_jax.paper.tables import MULTIPLY_ADDS, TABLES, Row, Table

NONE = "–"  # noqa: RUF001  Where the paper has no figure.
MISSING = "not run"
# What may be otherwise in the same experiment: chance, and where the same images come from.
_FREE = {"seed", "model.name", "model.num_classes", "model.dtype", "data.source", "data.name", "data.train_split",
         "data.test_split", "data.labels"}  # fmt: skip
_TEST_SETS = {"cifar10": 10_000, "imagenet": 50_000}  # Their images.
_NAMES = {"top1_error": "top-1", "top5_error": "top-5"}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A table ready for the page: ``rows`` of cells, the first the row's name."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture ready for the page: ``svg``, its ``title`` and ``text``, and whether it has panels side by side."""

    title: str
    svg: str
    text: str
    wide: bool = False


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
    drawn = _figures(runs)
    values = {
        "version": __version__,
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "runs": _runs(runs),
        "tables": [_ensembles(runs), *(_compare(table, runs) for table in TABLES), _sizes()],
        "figures": drawn,
    }
    values["tables"] = [table for table in values["tables"] if table]
    folder = importlib.resources.files("resnet_jax.paper")
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number, figure in enumerate(drawn, start=1):
            # Alone in its file a picture has no page to take its colour from.
            alone = figure.svg.replace("<svg", '<svg style="color: #666"', 1)
            (output / f"figure_{number}.svg").write_text(alone, encoding="utf-8")
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


def _compare(table: Table, runs: Sequence[Run]) -> Shown:
    """The paper's table with public figures and ours; networks that nobody trained here are marked."""
    publics = list(dict.fromkeys(whose for row in table.rows for whose in row.public))
    columns = [_NAMES[metric] for metric in table.columns]
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
    rows = []
    for row in table.rows:
        cells = [*_figures_of(row.paper, columns)]
        for whose in publics:
            cells += _figures_of(row.public.get(whose, ()), columns)
        ours, difference, remark = _ours(table, row, runs)
        remarks = "; ".join(text for text in (row.remark, remark) if text)
        rows.append((row.title, *cells, *ours, difference, remarks))
    return Shown(table.title, tuple(head), rows, table.note)


def _figures_of(values: Sequence[float | None], columns: Sequence[str]) -> list[str]:
    shown = [NONE if value is None else f"{value:.2f}" for value in values]
    return shown + [NONE] * (len(columns) - len(shown))


def _ours(table: Table, row: Row, runs: Sequence[Run]) -> tuple[list[str], str, str]:
    """Our figures for a row, their difference from the paper's, and what has to be said of them."""
    if not row.models:
        return [NONE] * len(table.columns), "", ""
    found = [run for run in runs
             if run.model in row.models and run.data == table.data and table.protocol in run.summaries]  # fmt: skip
    others = {run.name: _what_differs(row, table, run) for run in found}
    same = [run for run in found if not others[run.name]]
    remarks = [f"{_errors(run, table)} {others[run.name]} ({run.name})" for run in found if others[run.name]]
    if not same:
        return [MISSING] * len(table.columns), "", "; ".join(remarks)
    errors = [[run.summaries[table.protocol][metric] for run in same] for metric in table.columns]
    means = [statistics.fmean(values) for values in errors]
    printed = row.mean if row.mean and len(same) > 1 else row.paper
    differences = [f"{ours - theirs:+.2f}".replace("+0.00", "0.00").replace("-0.00", "0.00")
                   for ours, theirs in zip(means, printed, strict=False) if theirs is not None]  # fmt: skip
    said = same[0].name
    if len(same) > 1:
        said = f"mean of {len(same)} runs, +- {statistics.stdev(errors[0]):.2f}, best {min(errors[0]):.2f}"
    return [f"{mean:.2f}" for mean in means], " / ".join(differences), "; ".join([said, *remarks])


def _what_differs(row: Row, table: Table, run: Run) -> str:
    """Why a run is not the row's experiment; empty where it is."""
    if run.imported:
        return "by imported weights, evaluated here"
    if run.config["init.weights"]:
        return "fine-tuned from other weights"
    if not row.config:
        return "by a recipe of one's own"
    config = flatten(load_config(row.config))
    changes = [change for change in recipe_changes(config, run.config) if change.split(":")[0] not in _FREE]
    if changes:
        return f"with {', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}"
    if run.step != config["steps"]:
        return f"after {run.step:,} of {config['steps']:,} iterations"
    examples = run.summaries[table.protocol].get("examples")
    return "" if examples == _TEST_SETS[table.data] else f"on {examples} test images"


def _errors(run: Run, table: Table) -> str:
    return " / ".join(f"{run.summaries[table.protocol][metric]:.2f}" for metric in table.columns)


def _runs(runs: Sequence[Run]) -> Shown:
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
            _number(found.get("train_top1_error")),
            _number(found.get("top1_error")),
            ", ".join(f"{name} {summary['top1_error']:.2f}" for name, summary in run.summaries.items()),
            _number(found.get("images_per_second"), 0),
            _number(found["seconds"] / 60 if found.get("seconds") else None, 1),
        ))  # fmt: skip
    return Shown("Runs", head, rows)


def _number(value: float | None, places: int = 2) -> str:
    return NONE if value is None else f"{value:,.{places}f}"


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
                rows.append((name, *(f"{found[metric]:.2f}" for metric in _NAMES), f"{found['loss']:.4f}"))
    note = "Probabilities averaged over runs that were evaluated on the same examples."
    return Shown("Ensembles", ("", "top-1", "top-5", "loss"), rows, note) if rows else None


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


def _figures(runs: Sequence[Run]) -> list[Figure]:
    """Whatever the runs have the data for."""
    curves = [run for run in runs if sum("train_top1_error" in line for line in run.metrics) > 1]
    # A run has one colour throughout.
    colours = {run.name: f"C{number % 6}" for number, run in enumerate(runs)}
    drawn = []
    for data in dict.fromkeys(run.data for run in curves):
        chosen = [run for run in curves if run.data == data]
        text = "Thin lines are training errors, bold ones the test set's."
        title = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}.get(data, "other data")
        drawn.append(Figure(f"Training on {title} (figures 1, 4, 6)", figures.training_curves(chosen, colours), text))
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
            drawn.append(Figure(title, paint(chosen, colours), said, wide))
    return drawn
