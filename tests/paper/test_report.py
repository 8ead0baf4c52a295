"""The report: whose figure stands where, what is left empty, and pages that a browser can read."""

import json
import pathlib
import statistics
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from report_pages import called, report

from resnet_jax import UsageError
from resnet_jax.classification.predict import imagenet_names
from resnet_jax.config import flatten, load_config
from resnet_jax.paper import detection_tables, tables
from resnet_jax.paper.page import MISSING
from resnet_jax.paper.tables import TABLE_3, TABLE_5, TABLE_6

TABLES = (*tables.TABLES, *detection_tables.TABLES)
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_run(
    folder: pathlib.Path, config: str, error: float, step: int, classes=CIFAR10, predictions=None, **changes
) -> pathlib.Path:
    """A work directory as a run would leave it."""
    folder.mkdir(parents=True)
    values = flatten(load_config(config)) | changes
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "data.json").write_text(json.dumps({"classes": classes, "examples": 50_000}))
    summary = {"model": values["model.name"], "step": step, "top1_error": error, "top5_error": 1.0, "seconds": 60.0,
               "images_per_second": 100.0, "train_top1_error": 2.5, "protocol": "center",
               "examples": 10_000 if len(classes) == 10 else 50_000}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": at, "train_top1_error": 50.0 - at, "train_loss": 1.0} for at in (1, 2, 3)]
    lines += [{"step": 3, "test_top1_error": error}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if predictions is not None:
        np.savez(folder / "predictions.npz", **predictions)
    return folder


def test_the_tables_are_those_of_the_paper():
    """Spot checks against the printed tables, one of each kind of entry."""
    printed = {row.title: row.paper for row in TABLE_6.rows}
    assert [printed[f"ResNet-{depth}"][0] for depth in (20, 32, 44, 56, 110, 1202)] == [
        8.75,
        7.51,
        7.17,
        6.97,
        6.43,
        7.93,
    ]
    assert {row.title: row.paper for row in TABLE_3.rows}["ResNet-152"] == (21.43, 5.71)
    assert {row.title: row.paper for row in TABLE_5.rows}["ResNet (ILSVRC'15)"] == (3.57,)
    for table in TABLES:
        for row in table.rows:
            assert all(len(figures) == len(table.columns) for figures in (row.paper, *row.public.values()) if figures)


def test_a_whole_run_stands_in_its_row_with_its_difference_and_nothing_in_the_others(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "mine", "cifar_20", 8.5, 64_000))
    row = page.row(TABLE_6.title, "ResNet-20")
    assert (row["paper"], row["akamaster"], row["ours"], row["difference"]) == ("8.75", "8.27", "8.50", "-0.25")
    assert page.row(TABLE_6.title, "ResNet-110")["ours"] == MISSING
    # Others' methods are not ours to run.
    assert page.row(TABLE_6.title, "Maxout")["ours"] != MISSING


def test_what_is_not_the_paper_s_experiment_is_a_remark_and_no_figure(tmp_path):
    short = write_run(tmp_path / "short", "cifar_20", 42.16, 600)
    theirs = write_run(tmp_path / "theirs", "cifar_56", 6.61, 0, **{"init.weights": "net.th"})
    digits = write_run(tmp_path / "digits", "cifar_32", 1.0, 64_000, classes=list("0123456789"))
    page = report(tmp_path, short, theirs, digits)
    remarks = {"ResNet-20": "42.16 after 600 of 64,000 iterations (short)", "ResNet-56": "6.61 by imported weights",
               "ResNet-32": ""}  # fmt: skip
    for name, says in remarks.items():
        row = page.row(TABLE_6.title, name)
        assert (row["ours"], row["difference"]) == (MISSING, "")
        assert says in row[""]


@pytest.mark.parametrize(
    ("changes", "step", "says"),
    [
        ({"schedule.boundaries": [10, 20]}, 64_000, "with schedule.boundaries: [32000, 48000] -> [10, 20]"),
        ({"data.holdout": 5000}, 64_000, "with data.holdout: 0 -> 5000"),
        ({"loss.label_smoothing": 0.1, "batch_size": 64}, 64_000, "batch_size: 128 -> 64"),
        ({"init.weights": "net.th"}, 64_000, "fine-tuned from other weights"),
        ({}, 48_001, "after 48,001 of 64,000 iterations"),
    ],
)
def test_another_recipe_is_named_and_no_figure(changes, step, says, tmp_path):
    row = report(tmp_path, write_run(tmp_path / "mine", "cifar_20", 7.0, step, **changes)).row(
        TABLE_6.title, "ResNet-20"
    )
    assert (row["ours"], row["difference"]) == (MISSING, "")
    assert "7.00" in row[""]
    assert says in row[""]


def test_where_the_images_come_from_is_no_difference_and_a_run_named_twice_counts_once(tmp_path):
    changes = {"data.source": "image_folder", "data.dir": "cifar10", "seed": 3}
    run = write_run(tmp_path / "mine" / "seed_3", "cifar_20", 8.5, 64_000, **changes)
    row = report(tmp_path, run, tmp_path / "mine").row(TABLE_6.title, "ResNet-20")
    assert (row["ours"], row[""]) == ("8.50", "mine/seed_3")


def test_a_run_of_before_a_field_came_has_the_field_s_default(tmp_path):
    run = write_run(tmp_path / "mine", "cifar_20", 8.5, 64_000)
    values = json.loads((run / "config.json").read_text())
    for field in ("task", "model.freeze_at", "detection.refine"):
        del values[field]
    (run / "config.json").write_text(json.dumps(values))
    assert report(tmp_path, run).row(TABLE_6.title, "ResNet-20")["ours"] == "8.50"


def test_every_row_s_config_is_of_its_network():
    for table in TABLES:
        for row in table.rows:
            if row.config:
                assert row.settings.get("model.name", load_config(row.config).model.name) in row.models


def test_several_seeds_are_a_mean_with_its_deviation(tmp_path):
    errors = (6.5, 6.9, 6.4)
    for seed, error in enumerate(errors):
        write_run(tmp_path / "cifar_110" / f"seed_{seed}", "cifar_110", error, 64_000, seed=seed)
    row = report(tmp_path, tmp_path / "cifar_110").row(TABLE_6.title, "ResNet-110")
    assert row["ours"] == f"{statistics.mean(errors):.2f}" == "6.60"
    assert row["difference"] == "-0.01"  # Of the printed mean, 6.61, not of the best.
    assert f"mean of 3 runs, +- {np.std(errors, ddof=1):.2f}, best 6.40" in row[""]


def test_other_protocols_stand_in_their_own_tables(tmp_path):
    run = write_run(tmp_path / "imagenet", "imagenet_50", 24.0, 600_000, classes=list(imagenet_names()))
    ten = run / "eval" / "ten_crop"
    ten.mkdir(parents=True)
    (ten / "summary.json").write_text(
        json.dumps({"top1_error": 22.8, "top5_error": 6.6, "step": 600_000, "examples": 50_000})
    )
    page = report(tmp_path, run)
    row = page.row(TABLE_3.title, "ResNet-50")
    assert (row["ours top-1"], row["ours top-5"], row["difference"]) == ("22.80", "6.60", "-0.05 / -0.11")
    assert page.row("Table 4: ImageNet validation, single models, fully convolutional at several scales", "ResNet-50")[
        "ours top-1"
    ] == MISSING  # fmt: skip


def test_runs_of_one_test_set_are_averaged(tmp_path):
    label = np.array([0, 1])
    first = {"index": np.arange(2), "label": label, "probabilities": np.eye(10, dtype=np.float32)[[0, 0]]}
    # Surer of the second example's class than the first is of another, and wrong about nothing.
    second = first | {"probabilities": np.full((2, 10), 0.0, np.float32)}
    second["probabilities"][:, :2] = [[0.9, 0.1], [0.0, 1.0]]
    second["probabilities"][1, 1] = 1.01
    folders = [
        write_run(tmp_path / name, "cifar_20", 50.0, 600, predictions=p) for name, p in (("a", first), ("b", second))
    ]
    page = report(tmp_path, *folders)
    assert page.row("Ensembles", "a")["top-1"] == "50.00"
    assert page.row("Ensembles", "ensemble of these 2")["top-1"] == "0.00"


def test_pictures_are_in_the_page_and_beside_the_markdown_and_take_the_page_s_colour(tmp_path):
    run = write_run(tmp_path / "mine", "cifar_20", 8.5, 64_000)
    analysis = {
        "responses": {"layers": ["a", "b", "c"], "deviations": [0.5, 1.5, 1.0]},
        "removal": {"blocks": ["stage1/block1"], "whole": 8.0, "top1_errors": [20.0], "examples": 10},
        "landscape": {"distances": [-1.0, 0.0, 1.0], "losses": [[3.0, 1.0, 4.0]], "examples": 10},
    }
    (run / "analysis.json").write_text(json.dumps(analysis))
    report(tmp_path, run)
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("<svg") == 4
    assert "currentColor" in page
    assert "mine 1.000" in page  # The responses' mean.
    # One file: nothing is fetched from anywhere.
    assert "<script" not in page
    assert "src=" not in page
    for number in range(1, 5):
        assert f"figure_{number}.svg" in text
        ElementTree.parse(tmp_path / "out" / f"figure_{number}.svg")


def test_the_command_writes_both_pages(tmp_path):
    write_run(tmp_path / "mine", "cifar_20", 8.5, 64_000)
    result = called("--runs=mine", "--output=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["wrote out/report.html", "wrote out/report.md"]


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "never", "cifar_20", 8.5, 64_000)
    (run / "summary.json").unlink()
    old = write_run(tmp_path / "old", "cifar_20", 8.5, 64_000, **{"model.width_of_old": 3})
    broken = write_run(tmp_path / "broken", "cifar_20", 8.5, 64_000)
    (broken / "predictions.npz").write_bytes(b"PK\x03\x04 no more")
    for folder, says in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "empty", "no work directory of a run"),
                         (run, "never evaluated"), (old, "model.width_of_old is unknown here"),
                         (broken, "no whole file of predictions")):  # fmt: skip
        with pytest.raises(UsageError, match=says) as error:
            report(tmp_path, folder)
        assert "\n" not in str(error.value)
    assert "landscapes is unknown" in called("--runs=old", "--output=out", "--analyze=landscapes", cwd=tmp_path).stderr
