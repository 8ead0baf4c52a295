"""Puts the paper's tables and figures beside those of runs: report.html, one file for a browser, and report.md.

    python -m resnet_jax.report --runs=runs/cifar_20,runs/cifar_plain_20 --output=report
    python -m resnet_jax.report --runs=runs/cifar_20 --output=report --analyze=responses,removal,landscape

A folder of several seeds (main --seeds) counts with all of them. What --analyze finds is kept in each work directory;
it is of classification networks alone.
"""

import importlib.util
import pathlib

from absl import flags

from resnet_jax import cli
from resnet_jax.errors import UsageError
from resnet_jax.output import check_folder

flags.DEFINE_list("runs", None, "Work directories, separated by commas.")
flags.DEFINE_string("output", None, "The folder to write.")
flags.DEFINE_list("analyze", [], "Look into the networks first: responses (figure 7), removal (of blocks), landscape.")
flags.DEFINE_integer("examples", 1000, "Test images that removal and landscape look at.", lower_bound=1)
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of report; --help lists them")
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"report needs {package}: pip install 'resnet_jax[report]'")

    from resnet_jax.paper.analysis import KINDS, analyse
    from resnet_jax.paper.report import write_report
    from resnet_jax.paper.runs import find_runs, read_run

    check_folder("--output", FLAGS.output, pathlib.Path(FLAGS.output).expanduser())
    for kind in FLAGS.analyze:
        if kind not in KINDS:
            raise UsageError(f"--analyze={kind} is unknown: {', '.join(KINDS)}")
    folders = find_runs(FLAGS.runs)
    runs = [read_run(folder) for folder in folders]  # Mistakes are cheaper to find than layer responses.
    if FLAGS.analyze:
        networks = [run for run in runs if run.task == "classification"]
        if not networks:
            raise UsageError(f"--analyze is of classification networks, and {FLAGS.runs[0]} is a run of"
                             f" task={runs[0].task}")  # fmt: skip
        for run in runs:
            if run in networks:
                analyse(run.folder, FLAGS.analyze, FLAGS.examples)
            else:
                print(f"{run.folder}: left out of --analyze, which is of classification networks; task={run.task}")
    for path in write_report([read_run(folder) for folder in folders], pathlib.Path(FLAGS.output).expanduser()):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["runs", "output"])
