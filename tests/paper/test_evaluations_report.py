"""Evaluations of a run with other test-time settings than its own: each stands where its settings are the row's."""

import json

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from detection_runs import coco, evaluated, voc
from report_pages import report
from test_report import write_run

from resnet_jax.classification.predict import imagenet_names
from resnet_jax.paper.detection_tables import TABLE_7_VOC07, TABLE_9_VAL
from resnet_jax.paper.page import MISSING
from resnet_jax.paper.tables import SINGLE_CROP, TABLE_2, TABLE_4

REFINED = {"detection.refine": True}


def ours(page, title: str) -> str:
    row = page.row(TABLE_9_VAL.title, title)
    return f"{row['ours mAP@.5']} {row['ours mAP@[.5,.95]']}"


def test_one_training_fills_the_rows_that_differ_in_the_test_alone(tmp_path):
    run = coco(tmp_path / "mine", 48.0, 27.5)
    evaluated(run, "refine=true", settings=REFINED, **{"coco/AP50": 50.0, "coco/AP": 30.0})
    page = report(tmp_path, run)
    assert (ours(page, "ResNet-101"), ours(page, "+ box refinement")) == ("48.0 27.5", "50.0 30.0")
    for title in ("ResNet-101", "+ box refinement"):
        assert page.row(TABLE_9_VAL.title, title)[""] == "mine, from resnet101.safetensors"
    assert ours(page, "+ context") == f"{MISSING} {MISSING}"


def test_settings_and_protocol_together_are_found(tmp_path):
    run = coco(tmp_path / "mine", 47.0, 27.0, **{"detection.context": True})
    evaluated(run, "refine=true", settings=REFINED, **{"coco/AP50": 51.0, "coco/AP": 30.1})
    evaluated(run, "refine=true_multi_scale", "multi_scale", settings=REFINED, **{"coco/AP50": 54.0, "coco/AP": 33.0})
    page = report(tmp_path, run)
    assert ours(page, "+ context") == "51.0 30.1"
    assert ours(page, "+ multi-scale testing") == "54.0 33.0"
    assert "47.0 / 27.0 with detection.context" in page.row(TABLE_9_VAL.title, "ResNet-101")[""]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("detections=300", {"detection.detections": 300}, "with detection.detections: 100 -> 300"),
        (
            "voting_iou=0.7,refine=true",
            REFINED | {"detection.voting_iou": 0.7},
            "with detection.voting_iou: 0.5 -> 0.7",
        ),
    ],
)
def test_settings_that_no_row_has_are_a_remark(name, settings, says, tmp_path):
    run = coco(tmp_path / "mine", 48.0, 27.5)
    evaluated(run, name, settings=settings, **{"coco/AP50": 55.0, "coco/AP": 35.0})
    page = report(tmp_path, run)
    assert ours(page, "ResNet-101") == "48.0 27.5"
    remarks = [page.row(TABLE_9_VAL.title, row.title)[""] for row in TABLE_9_VAL.rows]
    assert sum(f"55.0 / 35.0 {says} (mine)" in remark for remark in remarks) == 1
    for row in TABLE_9_VAL.rows[2:]:
        assert ours(page, row.title) == f"{MISSING} {MISSING}"


def test_a_run_whose_own_test_was_refined_can_stand_in_the_baseline_s_row_too(tmp_path):
    run = coco(tmp_path / "mine", 50.0, 30.0, **REFINED)
    evaluated(run, "refine=false", settings={"detection.refine": False}, **{"coco/AP50": 48.0, "coco/AP": 27.5})
    page = report(tmp_path, run)
    assert (ours(page, "ResNet-101"), ours(page, "+ box refinement")) == ("48.0 27.5", "50.0 30.0")


def test_two_evaluations_that_are_the_same_to_a_row_count_once(tmp_path):
    """Which average precision is called mAP changes none of them."""
    run = voc(tmp_path / "mine", 76.0)
    evaluated(run, "average_precision=voc", settings={"detection.average_precision": "voc"}, map=77.0)
    assert report(tmp_path, run).row(TABLE_7_VOC07.title, "ResNet-101")[""] == "mine, from resnet101.safetensors"


def test_an_evaluation_of_before_the_training_s_end_is_no_figure(tmp_path):
    run = coco(tmp_path / "mine", 48.0, 27.5)
    evaluated(run, "refine=true", step=160_000, settings=REFINED)
    page = report(tmp_path, run)
    assert ours(page, "+ box refinement") == f"{MISSING} {MISSING}"
    assert "after 160,000 of 320,000 iterations" in page.row(TABLE_9_VAL.title, "+ box refinement")[""]
    assert ours(page, "ResNet-101") == "48.0 27.5"


def test_a_classification_looked_at_otherwise_is_a_remark(tmp_path):
    run = write_run(tmp_path / "mine", "imagenet_50", 24.0, 600_000, classes=list(imagenet_names()))
    evaluated(run, "resize=320", settings={"eval.resize": 320}, top1_error=22.0)
    evaluated(run, "scales=224-256_multi_scale", "multi_scale", settings={"eval.scales": [224, 256]}, top1_error=21.0)
    page = report(tmp_path, run)
    row = page.row(SINGLE_CROP.title, "ResNet-50")
    assert row["ours top-1"] == "24.00"
    assert "22.00 / 1.00 with eval.resize: 256 -> 320 (mine)" in row[""]
    row = page.row(TABLE_4.title, "ResNet-50")
    assert row["ours top-1"] == MISSING
    assert "21.00 / 1.00 with eval.scales: [224, 256, 384, 480, 640] -> [224, 256] (mine)" in row[""]


def test_scales_don_t_matter_to_a_single_crop(tmp_path):
    changes = {"eval.scales": [224, 256]}
    run = write_run(tmp_path / "mine", "imagenet_50", 24.0, 600_000, classes=list(imagenet_names()), **changes)
    assert report(tmp_path, run).row(SINGLE_CROP.title, "ResNet-50")["ours top-1"] == "24.00"


def test_a_calibrated_network_is_in_no_table(tmp_path):
    """Its statistics are others; the summary says the protocol of the plain one."""
    run = write_run(tmp_path / "mine", "imagenet_18_a", 24.0, 600_000, classes=list(imagenet_names()))
    evaluated(run, "calibrated", top1_error=11.0)
    evaluated(run, "calibrated_resize=320_ten_crop", "ten_crop", settings={"eval.resize": 320}, top1_error=11.0)
    page = report(tmp_path, run)
    assert page.row(TABLE_2.title, "ResNet-18")["ours"] == MISSING
    assert all("11.00" not in cell for row in page.tables[TABLE_2.title] for cell in row)


def test_an_older_evaluation_that_replaced_the_run_s_own_is_judged_by_its_settings(tmp_path):
    run = coco(tmp_path / "mine", 50.0, 30.0)
    found = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(found | {"evaluated_with": REFINED, "protocol": "center"}))
    page = report(tmp_path, run)
    assert (ours(page, "ResNet-101"), ours(page, "+ box refinement")) == (f"{MISSING} {MISSING}", "50.0 30.0")
