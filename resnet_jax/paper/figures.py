"""The paper's figures of our runs, as SVG that takes its colours for text from the page around it."""

from collections.abc import Callable, Mapping, Sequence
import html
import io
import re
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
import numpy as np

from resnet_jax.paper.runs import Run

_INK = "#012345"  # Stands for the page's own colour of text.
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "grid.color": _INK,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "resnet_jax",
    # Readable on white and on black.
    "axes.prop_cycle": matplotlib.cycler(color=["#d1495b", "#2e86ab", "#5b9a2f", "#b8860b", "#8e6bbf", "#4f8f8b"]),
}


def draw(paint: Callable[[Sequence[Any]], None], panels: int = 1, label: str = "") -> str:
    """A figure of panels, two in a row, which ``paint`` gets, as an ``<svg>`` element.

    ``label`` says what is shown to those who can't see it.
    """
    columns, rows = min(2, panels), -(-panels // 2)
    with plt.rc_context(_STYLE):
        size = (5.6 * columns, 3.8 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for unused in axes.flat[panels:]:
            unused.remove()
        paint(axes.flat[:panels])
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    spoken = f' role="img" aria-label="{html.escape(label, quote=True)}"'
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda match: match[1] + spoken, svg, count=1)


def training_curves(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """Figures 1, 4 and 6: errors by iteration, thin lines of training, bold ones of the test set."""

    def paint(axes: Sequence[Any]) -> None:
        for run in runs:
            colour = colours[run.name]
            for metric, width in (("train", 0.8), ("test", 2.4), ("holdout", 2.4)):
                name = f"{metric}_top1_error"
                points = [(line["step"], line[name]) for line in run.metrics if name in line]
                label = {"train": None, "test": run.name, "holdout": f"{run.name} (held out)"}[metric]
                if points:
                    axes[0].plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label)
        axes[0].set(xlabel="iteration", ylabel="error, %")
        axes[0].legend()

    return draw(paint, label=f"Training and test error by iteration of {', '.join(run.name for run in runs)}")


def detector_curves(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """The mean average precision and the losses of detectors by iteration; what no run has logged has no panel."""
    shown = {
        "test_map": "mAP, %",
        "train_loss": "loss",
        "train_rpn_objectness_loss": "RPN: objectness",
        "train_rpn_box_loss": "RPN: boxes",
        "train_class_loss": "regions: classes",
        "train_box_loss": "regions: boxes",
    }
    shown = {name: title for name, title in shown.items() if any(name in line for run in runs for line in run.metrics)}

    def paint(axes: Sequence[Any]) -> None:
        for axis, (name, title) in zip(axes, shown.items(), strict=True):
            for run in runs:
                points = [(line["step"], line[name]) for line in run.metrics if name in line]
                style = {"linewidth": 2.4, "marker": "o", "markersize": 4} if name == "test_map" else {"linewidth": 1.2}
                if points:
                    axis.plot(*zip(*points, strict=True), color=colours[run.name], label=run.name, **style)
            axis.set(xlabel="iteration", ylabel=title, xlim=(0, None), ylim=(0, None))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        max(axes, key=lambda axis: len(axis.get_lines())).legend()  # A run may have losses alone.

    label = f"Average precision and losses by iteration of {', '.join(run.name for run in runs)}"
    return draw(paint, panels=len(shown), label=label)


def responses(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """Figure 7: deviations of layer responses, in the layers' order and by size."""

    def paint(axes: Sequence[Any]) -> None:
        for run in runs:
            values = np.array(run.analysis["responses"]["deviations"])
            for axis, shown in zip(axes, (values, np.sort(values)[::-1]), strict=True):
                axis.plot(np.arange(1, len(shown) + 1), shown, color=colours[run.name], linewidth=1.6, label=run.name)
        for axis, order in zip(axes, ("in order", "by size"), strict=True):
            axis.set(xlabel=f"3x3 layer, {order}", ylabel="standard deviation", ylim=(0, None))
        axes[0].legend()

    return draw(paint, panels=2, label=f"Layer responses of {', '.join(run.name for run in runs)}")


def removal(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """The error without one block, block by block, with the whole network's as a line."""

    def paint(axes: Sequence[Any]) -> None:
        for axis, run in zip(axes, runs, strict=True):
            found = run.analysis["removal"]
            axis.bar(np.arange(1, len(found["blocks"]) + 1), found["top1_errors"], color=colours[run.name], width=0.7)
            axis.axhline(found["whole"], color=_INK, linewidth=1, linestyle="--")
            axis.set(title=run.name, xlabel="block left out", ylabel="error, %", ylim=(0, 100))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw(paint, panels=len(runs), label="Error without one block, block by block")


def landscape(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """The loss along random filter-normalised directions."""

    def paint(axes: Sequence[Any]) -> None:
        for run in runs:
            found = run.analysis["landscape"]
            for line, losses in enumerate(found["losses"]):
                label = run.name if line == 0 else None
                axes[0].plot(found["distances"], losses, color=colours[run.name], linewidth=1.4, label=label)
        losses = [loss for run in runs for line in run.analysis["landscape"]["losses"] for loss in line]
        wide = max(losses) > 20 * min(losses)
        axes[0].set(xlabel="distance, in lengths of each filter", ylabel="loss", yscale="log" if wide else "linear")
        axes[0].legend()

    return draw(paint, label="Loss along random directions in the space of weights")
