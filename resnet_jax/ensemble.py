"""Averages the predictions of several runs: each member's error, and the ensemble's.

    python -m resnet_jax.ensemble --runs=runs/cifar_56,runs/cifar_110
    python -m resnet_jax.ensemble --runs=runs/a,runs/b,runs/c --select=0.5

The runs must have been evaluated on the same examples; --evaluate evaluates those that were not. Detectors look at
their test set together: all members' proposals, their mean predictions (the paper's appendix B).
"""

import collections
import contextlib
import json
import pathlib
import sys

from absl import flags

from resnet_jax import cli
from resnet_jax.buckets import is_folder, open_folder
from resnet_jax.errors import UsageError
from resnet_jax.output import write_files, write_whole

flags.DEFINE_list("runs", None, "Work directories, or .npz files of predictions, separated by commas.")
flags.DEFINE_enum(
    "protocol", "center", ["center", "ten_crop", "multi_scale", "calibrated"], "Which evaluation's predictions."
)
flags.DEFINE_bool("evaluate", False, "Evaluate the runs that have no such predictions first.")
flags.DEFINE_float(
    "select", 0.0, "Choose members on this share of the examples and judge them on the rest; 0: take all."
)
flags.DEFINE_string(
    "output", None, "Write the ensemble's predictions to this .npz; of detectors its result files to this folder."
)
flags.DEFINE_bool("json", False, "Print one JSON object.")
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of ensemble; --help lists them")
    if not 0 <= FLAGS.select < 1:
        raise UsageError(f"--select={FLAGS.select} is a share of the examples: at least 0 and below 1")
    from resnet_jax.paper.runs import seeds_of

    runs = [str(found) for run in FLAGS.runs for found in ([run] if run.endswith(".npz") else seeds_of(run))]
    detectors, output = _are_detectors(runs), pathlib.Path(FLAGS.output).expanduser() if FLAGS.output else None
    if output and not detectors and output.suffix != ".npz":
        raise UsageError(f"--output={FLAGS.output}: the file's name ends in .npz")
    if output and not output.absolute().parent.is_dir():
        raise UsageError(f"--output={FLAGS.output}: no folder {output.absolute().parent}")
    return _detect(runs, output) if detectors else _classify(runs, output)


def _are_detectors(runs: list[str]) -> bool:
    from resnet_jax.training.workdir import read_json

    folders = [open_folder("--runs", run) for run in runs if not run.endswith(".npz")]
    configs = [read_json(folder / "config.json") or {} for folder in folders if is_folder(folder)]
    return any(config.get("task") == "detection" for config in configs)


def _detect(runs: list[str], output: pathlib.Path | None) -> int:
    for flag in ("evaluate", "select"):
        if FLAGS[flag].present:
            raise UsageError(f"--{flag} is for classifiers, and these are detectors")
    if FLAGS.protocol not in ("center", "multi_scale"):
        raise UsageError(f"--protocol={FLAGS.protocol}: of detectors it is center or multi_scale")

    from resnet_jax.detection import ensemble
    from resnet_jax.run import open_run
    from resnet_jax.training.results import describe

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_run(open_folder("--runs", run), "detection")) for run in runs]
        tasks, states = [task for task, _ in opened], [state for _, state in opened]
        ensemble.check_members(runs, tasks)
        found = {}
        for number, run in enumerate([*runs, f"ensemble of {len(runs)}"]):
            chosen = slice(number, number + 1) if number < len(runs) else slice(None)
            found[run], files = ensemble.evaluate(tasks[chosen], states[chosen], FLAGS.protocol)
            if not FLAGS.json:
                print(f"{run}: {describe(found[run])}", flush=True)
    if output:  # The ensemble's: it came last.
        write_files(output, files)
        print(f"wrote {output}", file=sys.stderr)
    if FLAGS.json:
        print(json.dumps({"members": {run: found[run] for run in runs}, "ensemble": found[f"ensemble of {len(runs)}"]}))
    return 0


def _classify(runs: list[str], output: pathlib.Path | None) -> int:
    import numpy as np

    from resnet_jax.classification import ensemble

    files = [ensemble.predictions_file(run, FLAGS.protocol) for run in runs]
    if FLAGS.evaluate and FLAGS.protocol != "calibrated":
        from resnet_jax.run import evaluate_run

        missing = [run for run, file in zip(runs, files, strict=True) if not file.is_file()]
        with contextlib.redirect_stdout(sys.stderr):  # Whoever reads --json wants nothing else.
            for run in missing:
                status = 0 if run.endswith(".npz") else evaluate_run(open_folder("--runs", run), FLAGS.protocol)
                if status:
                    return status
    members = [ensemble.read_predictions(file) for file in files]
    ensemble.check_same_examples(runs, members)

    seen = ensemble.hold_out(len(members[0]["index"]), FLAGS.select)
    if FLAGS.select and not 0 < seen.sum() < len(seen):
        raise UsageError(
            f"--select={FLAGS.select} of {len(seen)} examples leaves none to choose on, or none to judge on"
        )
    judged, taken = ~seen if FLAGS.select else None, list(range(len(members)))
    if FLAGS.select:
        taken = ensemble.select_greedily(members, seen)
    together = ensemble.combine([members[i] for i in taken])
    rows = [(run, ensemble.errors(member, judged)) for run, member in zip(runs, members, strict=True)]
    chosen = [runs[i] for i in taken]
    rows.append((f"ensemble of {len(chosen)}", ensemble.errors(together, judged)))
    if FLAGS.json:
        print(json.dumps({"members": dict(rows[:-1]), "chosen": chosen, "ensemble": rows[-1][1]}))
    else:
        width = max(len(name) for name, _ in rows)
        for name, found in rows:
            print(f"{name:{width}}  top1 error {found['top1_error']:6.2f}%  top5 error {found['top5_error']:6.2f}%"
                  f"  loss {found['loss']:.4f}  {found['examples']} examples")  # fmt: skip
        if FLAGS.select:
            counts = ", ".join(f"{count} x {run}" for run, count in collections.Counter(chosen).items())
            print(f"chosen on the other {seen.sum()} examples: {counts}")
    if output:
        write_whole(output, lambda file: np.savez(file, **together))
        print(f"wrote {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["runs"])
