"""Draws learning curves of runs: training error thin, test error bold, as in the paper's figures.

python benchmarks/plot_curves.py OUTPUT.png RUN [RUN ...]        (pip install matplotlib)
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def curve(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have ``name``."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def main(output: str, *runs: str) -> None:
    """One line pair per run, errors in %."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run in runs:
        folder = pathlib.Path(run)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (line,) = axes.plot(*curve(records, "test_top1_error"), lw=2, label=f"{folder.name}: test")
        axes.plot(*curve(records, "train_top1_error"), lw=0.8, color=line.get_color(), label=f"{folder.name}: training")
    axes.set(xlabel="iteration", ylabel="error (%)")
    axes.set_yscale("symlog", linthresh=1)  # Logarithmic down to 1%, linear from there to 0.
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.grid(which="both", lw=0.3)
    axes.legend(frameon=False)
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
