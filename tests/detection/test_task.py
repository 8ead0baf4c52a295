"""Detection from the command line's config to a run: data, training, evaluation, files, weights, mistakes."""

import functools
import io
import json
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
from refusals import usage_error

from resnet_jax.config import check_task, flatten, load_config, override, validate
from resnet_jax.detection.annotations import Detections
from resnet_jax.detection.evaluation import figures
from resnet_jax.detection.predict import pictures_of, predict, test_pictures as pictures_of_the_test_set
from resnet_jax.detection.result_files import read_coco_results, read_voc_results
from resnet_jax.detection.sources import read_splits
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.source import read_weights
from resnet_jax.run import open_run, run_task
from resnet_jax.training.checkpoints import load_run_weights

TINY = {
    "model.name": "tiny", "data.shapes": "12,10", "data.workers": "2", "batch_size": "4", "steps": "4",
    "detection.shorter": "64", "detection.longer": "80", "detection.anchor_sizes": "16,32", "detection.pooled": "4",
    "detection.rpn_width": "8", "detection.train_before_nms": "40", "detection.train_after_nms": "16",
    "detection.test_before_nms": "40", "detection.test_after_nms": "12", "detection.rois_sampled": "8",
    "detection.score_threshold": "0", "detection.detections": "5", "eval.batch_size": "4", "log.every": "1",
    "log.tensorboard": "false", "schedule.learning_rate": "0.01", "schedule.warmup_steps": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    row = functools.partial(ResNet, blocks=(1, 1, 1, 1), widths=(4, 8, 8, 8), stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])


def settings(**changes: str):
    config = load_config("detection/shapes")
    for name, value in (TINY | {name.replace("__", "."): value for name, value in changes.items()}).items():
        override(config, name, value)
    validate(config)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        row = functools.partial(ResNet, blocks=(1, 1, 1, 1), widths=(4, 8, 8, 8), stem_width=4)
        patch.setitem(MODELS, "tiny", row)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        workdir = tmp_path_factory.mktemp("detection") / "run"
        assert run_task(settings(), workdir, "train") == 0
    return workdir


def summary(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def leaves(workdir: pathlib.Path) -> list[np.ndarray]:
    return jax.tree.leaves(load_run_weights(str(workdir)))


@pytest.mark.slow
def test_a_run_says_what_it_found_in_every_picture(trained):
    found, test = summary(trained), read_splits(settings())["test"].annotations
    assert found["examples"] == 10 and found["step"] == 4 and found["model"] == "tiny (c4)"
    assert found["best_map"] == found["map"]
    detections = read_coco_results(str(trained / "detections.json"), test)
    assert found["detections"] == sum(map(len, detections)) > 10
    again = figures(test, detections, "voc")
    assert again == {name: found[name] for name in again} and again["map"] == again["ap50"]
    assert {name for name in again if "/" in name} <= {f"ap50/{name}" for name in test.classes}
    by_class = [found[f"ap50/{name}"] for name in test.classes if f"ap50/{name}" in found]
    assert found["map"] == pytest.approx(np.mean(by_class))
    in_vocs_form = read_voc_results(str(trained / "voc"), "test", test)
    for one, other in zip(detections, in_vocs_form, strict=True):
        order = np.argsort(one.labels, kind="stable")
        np.testing.assert_array_equal(one.boxes[order], other.boxes)
    with np.load(trained / "predictions.npz") as arrays:
        np.testing.assert_array_equal(arrays["index"], np.repeat(np.arange(10), [len(d) for d in detections]))
        np.testing.assert_array_equal(arrays["boxes"], np.concatenate([d.boxes for d in detections]))
    with Image.open(trained / "found.png") as sheet:
        assert sheet.width == 4 * 400 + 3 * 8
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    parts = ("rpn_objectness_loss", "rpn_box_loss", "class_loss", "box_loss")
    for line in steps:
        assert line["train_loss"] == pytest.approx(sum(line[f"train_{part}"] for part in parts), rel=1e-5)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_run_that_never_stopped(trained, tmp_path):
    workdir = tmp_path / "run"
    assert run_task(settings(schedule__name="constant", steps="2"), workdir, "train") == 0
    assert run_task(settings(schedule__name="constant", steps="4"), workdir, "train") == 0
    assert run_task(settings(schedule__name="constant"), tmp_path / "whole", "train") == 0
    for one, other in zip(leaves(workdir), leaves(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(one, other)
    for changed in (leaves(trained), leaves(workdir)):
        assert all(np.isfinite(array).all() for array in changed)


@pytest.mark.slow
def test_evaluation_again_gives_the_same_and_other_thresholds_may_be_asked_for(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = summary(workdir)
    assert run_task(settings(), workdir, "eval") == 0
    assert summary(workdir) == before
    assert run_task(settings(detection__detections="2"), workdir, "eval") == 0
    other = summary(workdir / "eval/detections=2")
    assert other["detections"] == 20 < before["detections"]
    assert other["evaluated_with"] == {"detection.detections": 2} and summary(workdir) == before


@pytest.mark.slow
def test_predictions_are_what_evaluation_found(trained):
    config, weights = settings(), read_weights(str(trained), None, ("detection",))[1]
    pictures, pixels = pictures_of_the_test_set(config, 6)
    expected = read_coco_results(str(trained / "detections.json"), read_splits(config)["test"].annotations)
    for found, other in zip(predict(config, weights, pictures, pixels, batch=4), expected, strict=False):
        np.testing.assert_allclose(found.objects.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(found.objects.scores, other.scores, atol=1e-5)
        np.testing.assert_array_equal(found.objects.labels, other.labels)


@pytest.mark.slow
def test_files_are_looked_at_upright(trained, tmp_path):
    config, weights = settings(), read_weights(str(trained), None, ("detection",))[1]
    pictures, pixels = pictures_of_the_test_set(config, 1)
    upright = pixels(pictures[0])
    turned = Image.fromarray(np.rot90(upright).copy())  # A quarter to the left; 6 says: turn right to see it.
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    files = [str(tmp_path / name) for name in ("turned.png", "upright.png")]
    one, other = predict(config, weights, *pictures_of(files), batch=2)
    np.testing.assert_array_equal(one.pixels, other.pixels)
    np.testing.assert_array_equal(one.objects.boxes, other.objects.boxes)
    assert one.name == files[0]


@pytest.mark.slow
def test_a_classifiers_layers_are_the_backbone_and_a_detectors_everything(trained, tmp_path):
    classifier = load_config("digits_20")
    for name, value in {"model.name": "tiny", "data.source": "image_folder", "steps": "1"}.items():
        override(classifier, name, value)
    for i in range(4):
        folder = tmp_path / "images" / ("train", "test")[i % 2] / "ab"[i // 2]
        folder.mkdir(parents=True)
        Image.fromarray(np.full((40, 40, 3), 60 * i, np.uint8)).save(folder / "x.png")
    classifier.data.dir, classifier.batch_size, classifier.data.pad = str(tmp_path / "images"), 2, 0
    assert run_task(classifier, tmp_path / "classifier", "train") == 0
    given = load_run_weights(str(tmp_path / "classifier"))
    fine = {"model__batch_norm": "frozen", "model__freeze_at": "2", "model__width": "1"}
    with open_of(settings(init__weights=str(tmp_path / "classifier"), **fine), tmp_path / "a") as (task, state):
        for part in ("stem", "stage1", "stage4"):
            same(state.params["backbone"][part], given["params"][part])
            same(state.batch_stats["backbone"][part], given["batch_stats"][part])
        mean = np.asarray(json.loads((tmp_path / "classifier/data.json").read_text())["preprocessing"]["mean"])
        np.testing.assert_allclose(task.resident["mean"], mean, rtol=1e-6)
    detector = load_run_weights(str(trained))
    with open_of(settings(init__weights=str(trained)), tmp_path / "b") as (_, state):
        same(state.params, detector["params"])
    new = settings(init__weights=str(trained), init__head="replace", seed="3")
    with open_of(new, tmp_path / "c") as (_, state):
        same(state.params["rpn"], detector["params"]["rpn"])
        kernel = state.params["head"]["classes"]["kernel"]
        assert not np.array_equal(kernel, detector["params"]["head"]["classes"]["kernel"])


def open_of(config, workdir):
    """A run of a config whose weights are those it starts from."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(flatten(config)))
    return open_run(workdir, "detection")


def same(some, others) -> None:
    for one, other in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_two_devices_train_and_find_what_one_does(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:2])
    assert run_task(settings(), tmp_path / "run", "train") == 0
    for one, other in zip(leaves(trained), leaves(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert summary(tmp_path / "run")["examples"] == 10


@pytest.mark.slow
def test_a_test_set_whose_boxes_are_kept_secret_gets_its_files(tmp_path):
    assert run_task(settings(detection__labelled="false", steps="1"), tmp_path / "run", "train") == 0
    found = summary(tmp_path / "run")
    assert found["examples"] == 10 and "map" not in found and found["best_map"] is None
    assert len(json.loads((tmp_path / "run/detections.json").read_text())) == found["detections"]


def test_the_figure_that_counts_is_the_one_asked_for():
    pytest.importorskip("pycocotools")
    test = read_splits(settings())["test"].annotations
    exact = [Detections(image.boxes, image.labels, np.ones(len(image.labels), np.float32)) for image in test.images]
    for kind in ("voc07", "voc", "coco"):
        found = figures(test, exact, kind)
        assert found["map"] == pytest.approx(100) and ("coco/AP" in found) == (kind == "coco")
    moved = [Detections(d.boxes + np.float32([8, 0, 8, 0]), d.labels, d.scores) for d in exact]
    found = figures(test, moved, "coco")
    assert found["map"] == found["coco/AP"] < found["ap50"]


MISTAKES = {
    "model.batch_norm=frozen keeps the statistics": {"model__batch_norm": "frozen"},
    "model.freeze_at=2 keeps layers": {"model__freeze_at": "2"},
    "data.source=digits is no source of task=detection": {"data__source": "digits"},
    "data.source=voc needs --config.data.dir": {"data__source": "voc"},
    "data.dir=/nowhere: no such folder": {"data__source": "coco", "data__dir": "/nowhere"},
    "model.num_classes=7, but the data have 5": {"model__num_classes": "7"},
    "data.mean=channel: of task=detection it is imagenet or none": {"data__mean": "channel"},
    "eval.every looks at figures": {"detection__labelled": "false", "eval__every": "2"},
    "detection.neck=fpn goes with ImageNet's": {"model__name": "cifar_plain20", "detection__neck": "fpn"},
    "init.weights=/nowhere: no such file": {"init__weights": "/nowhere"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_written(message, tmp_path):
    assert message in usage_error(run_task, settings(**MISTAKES[message]), tmp_path / "run", "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_of_other_classes_or_another_task_are_refused(trained, tmp_path):
    config = load_config("digits_20")
    config.init.weights = str(trained)
    config.model.name = "tiny"
    assert "is a run of task=detection" in usage_error(run_task, config, tmp_path / "run", "train")
    assert "--mode=calibrate is for classification" in usage_error(run_task, settings(), trained, "calibrate")
    assert "holds a run of another recipe (detection.pooled: 4 -> 5)" in usage_error(
        run_task, settings(detection__pooled="5"), trained, "train"
    )


def test_settings_of_the_other_task_are_refused():
    assert usage_error(check_task, settings(), ["data.pad"]) == (
        "--config.data.pad is a setting of classification, and this is task=detection"
    )
    assert "is a setting of detection" in usage_error(check_task, load_config("digits_20"), ["detection.neck"])
    check_task(settings(), ["detection.neck", "batch_size"])


def test_a_folder_of_ones_own_in_either_form(tmp_path):
    image = io.BytesIO()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(image, "PNG")
    for split in ("train", "valid"):
        folder = tmp_path / "coco" / split
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(image.getvalue())
        annotations = [{"id": 1, "image_id": 4, "category_id": 9, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}]
        images = [{"id": 4, "file_name": "a.png", "width": 60, "height": 40}]
        content = {"images": images, "categories": [{"id": 9, "name": "cell"}], "annotations": annotations}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    for name in ("train", "val"):
        (tmp_path / f"voc/ImageSets/Main/{name}.txt").write_text(f"{name}\n")
        (tmp_path / f"voc/JPEGImages/{name}.png").write_bytes(image.getvalue())
        box = "<xmin>2</xmin><ymin>3</ymin><xmax>31</xmax><ymax>22</ymax>"
        size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
        (tmp_path / f"voc/Annotations/{name}.xml").write_text(
            f"<annotation>{size}<object><name>cell</name><bndbox>{box}</bndbox></object></annotation>"
        )
    for form in ("coco", "voc"):
        splits = read_splits(settings(data__source="folder", data__dir=str(tmp_path / form)))
        for split in splits.values():
            (one,) = split.annotations.images
            assert split.annotations.classes == ("cell",) and split.pixels(one).shape == (40, 60, 3)
            np.testing.assert_array_equal(one.boxes, [[1, 2, 31, 22]])
