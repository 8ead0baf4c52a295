"""Localization on the report's pages: Tables 13 and 14, and the list of runs."""

import json
import pathlib

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from report_pages import report

from resnet_jax.classification.predict import imagenet_names
from resnet_jax.config import flatten, load_config
from resnet_jax.paper.detection_tables import TABLE_13
from resnet_jax.paper.page import MISSING

IMAGENET = tuple(imagenet_names())
TRAINED = 544_546
STEPS = 21_272  # 10 epochs of them in batches of 256, rounded up.
CROP = "ResNet-101, per-class RPN, class given, one crop"
DENSE = "ResNet-101, per-class RPN, class given, dense"
PREDICTED = "ResNet-101, per-class RPN, predicted classes, dense"
OTHERS = "ResNet-101, per-class RPN and R-CNN, predicted classes, dense"
PREDICTIONS = {"localization.predictions": "runs/imagenet_101/predictions.npz"}


def summary(folder: pathlib.Path, top5: float, given: float, step: int = STEPS, examples: int = 50_000, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {"top1_localization_error": top5 + 10, "top5_localization_error": top5, "step": step, "examples": examples,
             "class_given_localization_error": given, "seconds": 60.0, "images_per_second": 8.0}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(found | more))


def localizer(folder: pathlib.Path, error: float, classes=IMAGENET, given=None, examples=50_000, **changes):
    """A work directory of localization with the single crop's figures."""
    step = changes.pop("step", STEPS)
    summary(folder, error, error if given is None else given, step, examples)
    config = flatten(load_config("detection/localization")) | {"init.weights": "/weights/resnet101.safetensors"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "data.json").write_text(json.dumps({"classes": classes, "examples": TRAINED}))
    return folder


def ours(page) -> list[str]:
    return [page.row(TABLE_13.title, name)["ours"] for name in (CROP, DENSE, PREDICTED, OTHERS)]


def test_one_run_stands_in_three_rows_by_its_protocols_and_classes(tmp_path):
    run = localizer(tmp_path / "mine", 13.5)
    summary(run / "eval" / "multi_scale", 11.6, 11.6, protocol="multi_scale")
    name = "predictions=runs,imagenet_101,predictions.npz_multi_scale"
    summary(run / "eval" / name, 14.4, 11.6, protocol="multi_scale", evaluated_with=PREDICTIONS)
    page = report(tmp_path, run)
    assert ours(page) == ["13.5", "11.6", "14.4", MISSING]
    row = page.row(TABLE_13.title, CROP)
    assert (row["paper"], row["difference"], row[""]) == ("13.3", "+0.2", "mine, from resnet101.safetensors")
    row = page.row(TABLE_13.title, PREDICTED)
    assert row["difference"] == "0.0"
    assert row[""] == "mine, from resnet101.safetensors, classes by runs/imagenet_101/predictions.npz"


def test_a_run_of_predicted_classes_stands_in_their_row_alone(tmp_path):
    run = localizer(tmp_path / "mine", 16.0, given=13.5, **PREDICTIONS)
    summary(run / "eval" / "multi_scale", 14.6, 11.6)
    page = report(tmp_path, run)
    assert ours(page) == [MISSING, MISSING, "14.6", MISSING]
    assert page.row(TABLE_13.title, CROP)[""] == (
        "16.0 with localization.predictions: the true class -> a classification's (mine)"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"localization.voting_iou": 0.5}, "with localization.voting_iou: 2.0 -> 0.5"),
        ({"localization.other_classes": True}, "with localization.other_classes: False -> True"),
        ({"eval.resize": 288}, "with eval.resize: 256 -> 288"),
        ({"epochs": 5.0}, "with epochs: 10.0 -> 5.0"),
        ({"init.weights": "", "model.batch_norm": "group_norm"}, "from scratch"),
        ({"step": 1000}, "after 1,000 of 21,272 iterations"),
        ({"step": 0}, "by imported weights, evaluated here"),
        ({"examples": 500}, "on 500 test images"),
    ],
)
def test_another_experiment_is_a_remark_and_no_figure(changes, says, tmp_path):
    row = report(tmp_path, localizer(tmp_path / "mine", 13.0, **changes)).row(TABLE_13.title, CROP)
    assert (row["ours"], row[""]) == (MISSING, f"13.0 {says} (mine)")


def test_where_the_images_come_from_is_no_difference(tmp_path):
    changes = {"data.source": "coco", "data.train_split": "loc_train", "data.test_split": "loc_val", "seed": 2}
    assert ours(report(tmp_path, localizer(tmp_path / "mine", 13.0, **changes)))[0] == "13.0"


def test_a_localizer_that_goes_on_from_another_is_a_remark(tmp_path):
    first = localizer(tmp_path / "first", 13.4)
    run = localizer(tmp_path / "mine", 13.0, **{"init.weights": str(first)})
    row = report(tmp_path, run).row(TABLE_13.title, CROP)
    assert (row["ours"], row[""]) == (MISSING, "13.0 from a localizer's weights (mine)")


def test_other_networks_and_data_are_in_the_list_of_runs_alone(tmp_path):
    small = localizer(tmp_path / "small", 15.0, **{"model.name": "resnet50"})
    drawn = localizer(tmp_path / "drawn", 2.0, classes=("circle", "square"), **{"data.source": "shapes"})
    summary(drawn / "eval" / "multi_scale", 1.0, 0.5)
    page = report(tmp_path, small, drawn)
    assert ours(page) == [MISSING] * 4
    assert not any("small" in row[-1] or "drawn" in row[-1] for row in page.tables[TABLE_13.title][1:])
    row = page.row("Localization runs", "drawn")
    assert [row[name] for name in ("network", "data", "steps", "top-1", "top-5", "class given", "other tests")] == [
        "resnet101", "shapes", "21,272", "12.00", "2.00", "2.00", "multi_scale 1.00"]  # fmt: skip
    assert page.row("Localization runs", "small")["data"] == "ImageNet"
    assert {"Runs", "Detection runs"}.isdisjoint(page.tables)
