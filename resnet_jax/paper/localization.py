"""Our localizers on the report's pages."""

from collections.abc import Sequence

from resnet_jax.paper.detection import data_name
from resnet_jax.paper.detection_tables import TOP5_LOCALIZATION
from resnet_jax.paper.page import NONE, Shown, number
from resnet_jax.paper.runs import Run
from resnet_jax.training.workdir import CENTER


def localizer_runs(runs: Sequence[Run]) -> Shown | None:
    """Every localization run, whatever it was trained on."""
    head = (
        "localizer",
        "network",
        "data",
        "steps",
        "seed",
        "top-1",
        "top-5",
        "class given",
        "other tests",
        "images/s",
        "minutes",
    )
    rows = []
    for run in runs:
        found = run.summary
        others = {name: summary for name, summary in run.summaries.items() if name != CENTER}
        rows.append((
            run.name,
            run.model,
            "ImageNet" if run.data == "imagenet" else data_name(run),
            "imported" if run.imported else f"{run.step:,}",
            NONE if run.imported else str(run.config["seed"]),
            number(found.get("top1_localization_error")),
            number(found.get(TOP5_LOCALIZATION)),
            number(found.get("class_given_localization_error")),
            ", ".join(f"{name} {number(other.get(TOP5_LOCALIZATION))}" for name, other in others.items()),
            number(found.get("images_per_second"), 1),
            number(found["seconds"] / 60 if found.get("seconds") else None, 1),
        ))  # fmt: skip
    note = ("Errors of the box of the true class (class given) and, where localization.predictions names them, of the"
            " classes that a classification predicts; other tests are top-5 errors.")  # fmt: skip
    return Shown("Localization runs", head, rows, note) if rows else None
