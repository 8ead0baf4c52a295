"""Detection on the report's pages: whose average precision stands where, curves, and pictures of what was found."""

import json

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from detection_runs import PAPER_S_COCO, SHAPES, WEIGHTS, coco, shapes, voc, write_run
from PIL import Image
from report_pages import called, report

from resnet_jax.config import flatten, load_config
from resnet_jax.paper.detection_tables import (
    TABLE_7_VOC07,
    TABLE_7_VOC12,
    TABLE_9_TEST,
    TABLE_9_VAL,
    TABLE_13,
)
from resnet_jax.paper.page import MISSING


def test_the_tables_are_those_of_the_paper():
    """Tables 7 to 11, 13 and 14: what is printed there, in the order of the rows."""
    assert [row.paper for row in TABLE_7_VOC07.rows] == [(73.2,), (76.4,), (85.6,)]
    assert [row.paper for row in TABLE_7_VOC12.rows] == [(70.4,), (73.8,), (83.8,)]
    assert [row.paper for row in TABLE_9_VAL.rows] == [
        (41.5, 21.2),
        (48.4, 27.2),
        (49.9, 29.9),
        (51.1, 30.0),
        (53.8, 32.5),
    ]
    assert [row.paper for row in TABLE_9_TEST.rows] == [(53.3, 32.2), (55.7, 34.9), (59.0, 37.4)]
    assert [row.paper[0] for row in TABLE_13.rows] == [33.1, 13.3, 11.7, 14.4, 10.6, 8.9]


def test_a_whole_run_stands_in_its_row_with_its_difference_and_its_weights(tmp_path):
    vgg = {"model.name": "vgg16", "init.weights": "vgg16.safetensors"}
    page = report(tmp_path, voc(tmp_path / "mine", 76.93), voc(tmp_path / "old", 72.9, **vgg))
    row = page.row(TABLE_7_VOC07.title, "ResNet-101")
    assert (row["paper"], row["ours"], row["difference"]) == ("76.4", "76.9", "+0.5")
    assert row[""] == "mine, from resnet101.safetensors"
    row = page.row(TABLE_7_VOC07.title, "VGG-16")
    assert (row["ours"], row["difference"], row[""]) == ("72.9", "-0.3", "old, from vgg16.safetensors")
    for name in ("VGG-16", "ResNet-101"):
        assert page.row(TABLE_7_VOC12.title, name)["ours"] == MISSING


def test_of_average_precision_more_is_better(tmp_path):
    report(tmp_path, voc(tmp_path / "mine", 76.9), voc(tmp_path / "old", 72.9, **{"model.name": "vgg16"}))
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<td class="better">+0.5</td>' in page
    assert '<td class="worse">-0.3</td>' in page


def test_of_several_seeds_the_best_has_the_most(tmp_path):
    for seed, mean in enumerate((76.0, 77.0)):
        voc(tmp_path / "mine" / f"seed_{seed}", mean, seed=seed)
    row = report(tmp_path, tmp_path / "mine").row(TABLE_7_VOC07.title, "ResNet-101")
    assert (row["ours"], row["difference"]) == ("76.5", "+0.1")
    assert row[""] == "mean of 2 runs, +- 0.71, best 77.0, from resnet101.safetensors"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.train_split": "07_trainval"}, "with data.train_split: 07+12 -> 07_trainval"),
        ({"detection.neck": "fpn"}, "with detection.neck: c4 -> fpn"),
        ({"optimizer.weight_decay": 1e-4}, "with optimizer.weight_decay: 0.0005 -> 0.0001"),
        # Not learnt, but it changes what is measured.
        ({"detection.refine": True}, "with detection.refine: False -> True"),
        ({"detection.detection_nms": 0.5}, "with detection.detection_nms: 0.3 -> 0.5"),
        # A detector's weights whose classes were others.
        ({"init.head": "replace"}, "with init.head: keep -> replace"),
        ({"init.weights": "", "model.batch_norm": "group_norm"}, "from scratch"),
        ({"step": 100_000}, "after 100,000 of 110,000 iterations"),
        ({"step": 0}, "by imported weights, evaluated here"),
        ({"examples": 100}, "on 100 test images"),
    ],
)
def test_another_experiment_is_a_remark_and_no_figure(changes, says, tmp_path):
    row = report(tmp_path, voc(tmp_path / "mine", 77.0, **changes)).row(TABLE_7_VOC07.title, "ResNet-101")
    assert (row["ours"], row["difference"], row[""]) == (MISSING, "", f"77.0 {says} (mine)")


def test_how_map_is_counted_and_where_the_images_lie_are_no_differences(tmp_path):
    changes = {"detection.average_precision": "voc", "data.source": "folder", "data.dir": "VOCdevkit"}
    assert (
        report(tmp_path, voc(tmp_path / "mine", 77.0, **changes)).row(TABLE_7_VOC07.title, "ResNet-101")["ours"]
        == "77.0"
    )


def test_the_paper_s_pooling_is_the_paper_s_experiment_and_is_named(tmp_path):
    run = voc(tmp_path / "mine", 76.5, **{"detection.roi": "pool"})
    row = report(tmp_path, run).row(TABLE_7_VOC07.title, "ResNet-101")
    assert (row["ours"], row[""]) == ("76.5", "mine, from resnet101.safetensors, RoI pooling")


def test_of_either_pooling_both_are_named(tmp_path):
    for seed, roi in enumerate(("align", "pool")):
        voc(tmp_path / "mine" / f"seed_{seed}", 76.0 + seed, seed=seed, **{"detection.roi": roi})
    row = report(tmp_path, tmp_path / "mine").row(TABLE_7_VOC07.title, "ResNet-101")
    assert row[""].endswith("from resnet101.safetensors, RoIAlign and RoI pooling")


def test_a_run_from_a_detector_s_weights_is_not_the_plain_experiment(tmp_path):
    first = coco(tmp_path / "first", 48.0, 27.0)
    runs = [voc(tmp_path / "mine", 80.0, **{"init.weights": str(first), "init.head": "replace"}),
            voc(tmp_path / "again", 77.0, **{"init.weights": str(tmp_path / "mine")}),
            voc(tmp_path / "gone", 81.0, **{"init.weights": "/elsewhere/coco", "init.head": "replace"})]  # fmt: skip
    row = report(tmp_path, *runs).row(TABLE_7_VOC07.title, "ResNet-101")
    assert row["ours"] == MISSING
    assert row[""] == "; ".join(
        f"{figure} from a detector's weights ({name})"
        for figure, name in (("80.0", "mine"), ("77.0", "again"), ("81.0", "gone"))
    )


def test_a_run_from_a_classification_of_ours_is_the_plain_experiment(tmp_path):
    network = tmp_path / "imagenet_101"
    network.mkdir()
    (network / "config.json").write_text(json.dumps(flatten(load_config("imagenet_101"))))
    run = voc(tmp_path / "mine", 76.5, **{"init.weights": str(network)})
    row = report(tmp_path, run).row(TABLE_7_VOC07.title, "ResNet-101")
    assert (row["ours"], row[""]) == ("76.5", "mine, from imagenet_101")


def test_each_improvement_has_its_row_and_a_run_stands_in_one_of_them(tmp_path):
    both = {"detection.refine": True, "detection.context": True}
    runs = [
        coco(tmp_path / "plain", 48.0, 27.5),
        coco(tmp_path / "refined", 50.0, 30.0, **{"detection.refine": True}),
        coco(tmp_path / "both", 51.0, 30.1, **both),
        coco(tmp_path / "scales", 54.0, 33.0, "multi_scale", **both | {"eval.scales": [200, 400, 600, 800, 1000]}),
    ]
    page = report(tmp_path, *runs)
    rows = ("ResNet-101", "+ box refinement", "+ context", "+ multi-scale testing")
    for name, folder, figures in zip(rows, runs, ("48.0 27.5", "50.0 30.0", "51.0 30.1", "54.0 33.0"), strict=True):
        row = page.row(TABLE_9_VAL.title, name)
        assert f"{row['ours mAP@.5']} {row['ours mAP@[.5,.95]']}" == figures
        assert row[""] == f"{folder.name}, from resnet101.safetensors"
    assert page.row(TABLE_9_VAL.title, "+ context")["difference"] == "-0.1 / +0.1"


def test_what_is_between_two_rows_is_a_remark_in_one(tmp_path):
    page = report(tmp_path, coco(tmp_path / "mine", 49.0, 28.0, **{"detection.context": True}))
    rows = [page.row(TABLE_9_VAL.title, row.title)[""] for row in TABLE_9_VAL.rows]
    assert [text for text in rows if text] == ["49.0 / 28.0 with detection.context: False -> True (mine)"]


def test_the_newer_split_of_coco_is_not_the_paper_s(tmp_path):
    newer = {"data.train_split": "train2017", "data.test_split": "val2017"}
    row = report(tmp_path, coco(tmp_path / "mine", 50.0, 30.0, **newer)).row(TABLE_9_VAL.title, "ResNet-101")
    assert row["ours mAP@.5"] == MISSING
    assert "50.0 / 30.0 with data.train_split: train2014 -> train2017, data.test_split: val2014 -> val2017" in row[""]


def test_a_test_set_without_boxes_has_no_figures(tmp_path):
    secret = {"data.train_split": "07++12", "data.test_split": "12_test", "detection.labelled": False}
    run = write_run(tmp_path / "mine", "detection/voc", 110_000, examples=10_991, **WEIGHTS | secret)
    page = report(tmp_path, run)
    row = page.row(TABLE_7_VOC12.title, "ResNet-101")
    assert (row["ours"], row[""]) == (
        MISSING, "evaluated without figures, since the test set's boxes are not known (mine)")  # fmt: skip
    assert page.row("Detection runs", "mine")["mAP"] == "–"  # noqa: RUF001


def test_figures_by_other_rules_are_no_figures_of_the_table(tmp_path):
    run = coco(tmp_path / "mine", 50.0, 30.0, **{"detection.average_precision": "voc"})
    found = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({k: v for k, v in found.items() if not k.startswith("coco/")}))
    row = report(tmp_path, run).row(TABLE_9_VAL.title, "ResNet-101")
    assert row[""] == "evaluated without coco/AP50 and coco/AP (mine)"


def test_data_of_one_s_own_are_in_no_table_of_the_paper(tmp_path):
    """Whatever they call their splits and the network."""
    found = {"map": 90.0, "ap50_11_point": 90.0, "ap50": 90.0, "coco/AP": 60.0, "coco/AP50": 90.0}
    own = write_run(tmp_path / "own", "detection/voc", 110_000, SHAPES, 4952, found, **WEIGHTS)
    like = write_run(tmp_path / "like", "detection/coco", 320_000, SHAPES, 40_504, found, **WEIGHTS | PAPER_S_COCO)
    page = report(tmp_path, own, like)
    for table in (TABLE_7_VOC07, TABLE_7_VOC12, TABLE_9_VAL, TABLE_9_TEST):
        for _, *cells in page.tables[table.title][1:]:
            assert not {"90.0", "60.0"} & set(cells)
            assert "own" not in cells[-1].split()
    assert page.row("Detection runs", "own")["mAP"] == "90.00"


def test_every_detection_run_is_listed_and_its_classes(tmp_path):
    folder = {"data.source": "folder", "data.dir": "/data/bccd", "detection.neck": "fpn"}
    page = report(tmp_path, shapes(tmp_path / "drawn"), shapes(tmp_path / "cells", **folder))
    row = page.row("Detection runs", "drawn")
    assert [row[name] for name in ("network", "neck", "data", "steps", "mAP", "AP50", "11 points")] == [
        "resnet18", "c4", "shapes", "800", "84.80", "84.80", "81.10"]  # fmt: skip
    assert [page.row("Detection runs", "cells")[name] for name in ("neck", "data")] == ["fpn", "bccd"]
    assert page.tables["AP50 by class: shapes"] == [
        ["class", "drawn"], ["circle", "94.80"], ["square", "74.80"], ["mean", "84.80"]]  # fmt: skip
    assert page.row("AP50 by class: bccd", "circle") == {"cells": "94.80"}
    assert "Runs" not in page.tables  # Those of classification.


def test_a_class_that_the_test_set_has_not_has_no_average_precision(tmp_path):
    run = write_run(tmp_path / "mine", "detection/shapes", 800, SHAPES, 300, {"map": 90.0, "ap50/circle": 90.0})
    assert report(tmp_path, run).row("AP50 by class: shapes", "square") == {"mine": "–"}  # noqa: RUF001


def test_learning_curves_have_a_panel_for_what_was_logged(tmp_path):
    report(tmp_path, shapes(tmp_path / "mine"))
    drawn = (tmp_path / "out" / "figure_1.svg").read_text()
    for axis in ("mAP, %", ">loss<", "RPN: objectness"):
        assert axis in drawn
    assert "RPN: boxes" not in drawn
    assert "Training of detectors: shapes" in (tmp_path / "out" / "report.md").read_text()


def test_what_a_run_found_is_in_the_page_and_beside_the_markdown(tmp_path):
    run = shapes(tmp_path / "mine")
    sheet = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(sheet).save(run / "found.png")
    report(tmp_path, run)
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert '<img src="data:image/png;base64,' in page
    assert page.count("src=") == 1
    assert "figure_2.png" in text
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "figure_2.png")), sheet)


def test_only_classification_is_analysed(tmp_path):
    shapes(tmp_path / "mine")
    result = called("--runs=mine", "--output=out", "--analyze=removal", cwd=tmp_path)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert "--analyze is of classification networks, and mine is a run of task=detection" in message
    assert not (tmp_path / "out").exists()


def test_detection_runs_beside_others_are_left_out_of_the_analysis(tmp_path):
    """With what was looked into already, so that nothing is opened."""
    shapes(tmp_path / "mine")
    other = tmp_path / "net"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(flatten(load_config("cifar_20"))))
    (other / "summary.json").write_text(json.dumps({"step": 0, "top1_error": 9.0}))
    known = {"step": 0, "asked": 1000, "blocks": ["a"], "whole": 8.0, "top1_errors": [9.0], "examples": 10}
    (other / "analysis.json").write_text(json.dumps({"removal": known}))
    result = called("--runs=mine,net", "--output=out", "--analyze=removal", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == (
        "mine: left out of --analyze, which is of classification networks; task=detection"
    )
