"""COCO's twelve figures: against pycocotools driven directly, and by hand."""

import contextlib
import io
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from resnet_jax.detection.annotations import Annotations, Detections, annotated_image
from resnet_jax.detection.coco import read_coco, read_split
from resnet_jax.detection.coco_metrics import NAMES, coco_metrics
from resnet_jax.detection.result_files import coco_file, read_coco_results
from resnet_jax.errors import UsageError

pycocotools = pytest.importorskip("pycocotools")

DATA = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere"))


def directly(path: pathlib.Path, results: list | str) -> np.ndarray:
    """The twelve figures as pycocotools' own example computes them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def generate(folder: pathlib.Path, seed: int) -> tuple[pathlib.Path, list]:
    """Annotations with crowds, images without boxes and gaps in the ids, and detections of them, as COCO has both."""
    rng = np.random.default_rng(seed)
    ids, categories = rng.permutation(200)[:25].tolist(), [1, 2, 7, 90]
    images = [{"id": id, "file_name": f"{id}.jpg", "width": 640, "height": 480} for id in ids]
    annotations, results = [], []

    def rounded(box: np.ndarray) -> list:
        low = box[:2].clip(0, [600, 440])
        return [round(side, 2) for side in (*low, *box[2:].clip(2, [640, 480] - low))]

    for image in ids[3:]:
        for _ in range(rng.integers(1, 9)):
            box = np.concatenate([rng.uniform(0, 400, 2), np.exp(rng.uniform(1.5, 5.5, 2))])
            box[2:] = np.minimum(box[2:], [639 - box[0], 479 - box[1]])
            category = int(rng.choice(categories[:3]))  # Of the last there are no boxes.
            number = len(annotations) + 1
            crowd = int(rng.random() < 0.15)
            annotations.append({"id": number, "image_id": image, "category_id": category, "bbox": rounded(box),
                                "area": round(box[2] * box[3] * rng.uniform(0.5, 1), 3), "iscrowd": crowd})  # fmt: skip
            for _ in range(rng.integers(0, 8)):
                jitter = box + rng.normal(0, 0.08, 4) * np.tile(box[2:], 2)
                category = category if rng.random() < 0.8 else int(rng.choice(categories))
                # Of two decimals: equal scores in one image and in several.
                results.append({"image_id": image, "category_id": category, "bbox": rounded(jitter),
                                "score": round(rng.random(), 2)})  # fmt: skip
    for image in ids[:2]:  # Found where nothing is; and in one image more of a class than are counted.
        for _ in range(120):
            box = np.concatenate([rng.uniform(0, 400, 2), rng.uniform(5, 80, 2)])
            results.append({"image_id": image, "category_id": 1, "bbox": rounded(box), "score": round(rng.random(), 2)})
    for image in images:
        (folder / image["file_name"]).touch()
    path = folder / "instances.json"
    names = [{"id": number, "name": f"class {number}"} for number in categories]
    path.write_text(json.dumps({"images": images, "categories": names, "annotations": annotations}))
    return path, results


@pytest.mark.parametrize("seed", range(4))
def test_the_twelve_figures_are_pycocotools(tmp_path, seed, capsys):
    path, results = generate(tmp_path, seed)
    expected = directly(path, results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    annotations = read_coco(str(path), str(tmp_path))
    assert any(image.crowd.any() for image in annotations.images)
    assert any(len(image.boxes) == 0 for image in annotations.images)
    detections = read_coco_results(str(tmp_path / "results.json"), annotations)
    figures = coco_metrics(annotations, detections)
    assert capsys.readouterr().out == ""
    assert tuple(figures) == NAMES
    np.testing.assert_allclose(list(figures.values()), expected, rtol=0, atol=1e-9)
    assert len(np.unique(expected)) == 12 and (expected > 0).all() and (expected < 1).all()
    # What we write is what its test server would score.
    (tmp_path / "ours.json").write_bytes(coco_file(annotations, detections))
    np.testing.assert_allclose(directly(path, str(tmp_path / "ours.json")), expected, rtol=0, atol=1e-9)


def one_image(boxes: list, **flags) -> Annotations:
    return Annotations(("a",), (1,), (annotated_image("name", "", 640, 480, boxes, [0] * len(boxes), **flags),))


def found(*boxes: tuple) -> list[Detections]:
    """Of class 0, the first the surest."""
    scores = np.linspace(0.9, 0.1, len(boxes), dtype=np.float32)
    return [Detections(np.float32(boxes).reshape(-1, 4), np.zeros(len(boxes), np.int32), scores)]


SMALL, MEDIUM, LARGE = (0, 0, 20, 10), (100, 0, 150, 50), (200, 0, 400, 200)


def test_a_case_worked_by_hand():
    # SMALL is found with an IoU of 0.625, which suffices at .50, .55 and .60; then MEDIUM exactly; LARGE is missed.
    figures = coco_metrics(one_image([SMALL, MEDIUM, LARGE]), found((0, 0, 20, 6.25), MEDIUM))
    # Both right: precision 1 up to recall 2/3, which is 67 of the 101 recalls 0, .01, ... 1. At .65 and beyond the
    # first is wrong: precision 1/2 up to recall 1/3, 34 recalls.
    expected = {
        "AP": (3 * 67 / 101 + 7 * 34 / 101 / 2) / 10,
        "AP50": 67 / 101,
        "AP75": 34 / 101 / 2,
        "APs": 0.3,
        "APm": 1,  # Neither the right nor the wrong small detection counts among boxes of medium size.
        "APl": 0,
        "AR1": 0.3 * 1 / 3,
        "AR10": (3 * 2 / 3 + 7 * 1 / 3) / 10,
        "AR100": (3 * 2 / 3 + 7 * 1 / 3) / 10,
        "ARs": 0.3,
        "ARm": 1,
        "ARl": 0,
    }
    assert figures == pytest.approx(expected, abs=1e-9)


def test_what_lies_in_crowds_and_difficult_boxes_is_not_judged():
    inside = (210, 10, 300, 100)
    perfect = found(inside, MEDIUM, inside)
    assert coco_metrics(one_image([LARGE, MEDIUM], crowd=[True, False]), perfect)["AP"] == pytest.approx(1)
    assert coco_metrics(one_image([LARGE, MEDIUM], difficult=[True, False]), perfect)["AP"] == pytest.approx(1)
    assert coco_metrics(one_image([LARGE, MEDIUM]), perfect)["AP"] < 0.5


def test_the_files_area_tells_small_from_large():
    figures = coco_metrics(one_image([LARGE], area=[1000.0]), found(LARGE))
    assert (figures["APs"], figures["APm"], figures["APl"]) == pytest.approx((1, -1, -1))


def test_nothing_found_is_zero_and_nothing_to_find_minus_one():
    figures = coco_metrics(one_image([LARGE]), found())
    assert (figures["AP"], figures["APl"], figures["APs"], figures["AR100"]) == (0, 0, -1, 0)
    assert set(coco_metrics(one_image([]), found(LARGE)).values()) == {-1}


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    for module in ("pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"resnet_jax\[detection\]"):
        coco_metrics(one_image([LARGE]), found(LARGE))


@pytest.mark.skipif(not (DATA / "coco64").is_dir(), reason="RESNET_JAX_DATA does not name a folder with coco64")
def test_coco64_with_jittered_boxes_scores_as_its_own_file_does(tmp_path):
    annotations = read_split(str(DATA / "coco64"), "val2017")
    rng = np.random.default_rng(0)
    detections = [
        Detections(
            (image.boxes + rng.normal(0, 4, image.boxes.shape)).astype(np.float32),
            image.labels,
            rng.random(len(image.labels), np.float32),
        )
        for image in annotations.images
    ]
    (tmp_path / "results.json").write_bytes(coco_file(annotations, detections))
    expected = directly(DATA / "coco64/annotations/instances_val2017.json", str(tmp_path / "results.json"))
    np.testing.assert_allclose(list(coco_metrics(annotations, detections).values()), expected, rtol=0, atol=1e-9)
