"""Detections in COCO's and VOC's result files: there and back, and what is wrong with them."""

import json
import pathlib

import numpy as np
import pytest
from refusals import usage_error

from resnet_jax.detection.annotations import Annotations, Detections, annotated_image
from resnet_jax.detection.result_files import (
    coco_file,
    read_coco_results,
    read_voc_results,
    voc_files,
)


@pytest.fixture
def found() -> tuple[Annotations, list[Detections]]:
    """Random detections of four images, in one of which nothing was found, and no class 'b' at all."""
    rng = np.random.default_rng(0)
    images = tuple(annotated_image(id, "", 500, 400, [], []) for id in (12, 3, 44, 5))
    detections = []
    for count in (50, 0, 7, 1):
        corners = rng.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0, 100, (count, 2))], 1).astype(np.float32)
        scores = rng.random(count, np.float32)
        detections.append(Detections(boxes, rng.choice([0, 2], count).astype(np.int32), scores))
    return Annotations(("a", "b", "a c"), (3, 7, 90), images), detections


def write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def same(one: Detections, other: Detections) -> None:
    for field in ("boxes", "labels", "scores"):
        mine, theirs = getattr(one, field), getattr(other, field)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_cocos_result_format_and_back_is_exact(tmp_path, found):
    annotations, detections = found
    path = str(tmp_path / "results.json")
    pathlib.Path(path).write_bytes(coco_file(annotations, detections))
    entries = json.loads(pathlib.Path(path).read_text())
    assert len(entries) == 58 and set(entries[0]) == {"image_id", "category_id", "bbox", "score"}
    box = detections[2].boxes[0].astype(float)
    assert entries[50]["image_id"] == 44 and entries[50]["category_id"] in (3, 90)
    assert entries[50]["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    for one, other in zip(detections, read_coco_results(path, annotations), strict=True):
        same(one, other)


def test_the_devkits_result_files_and_back_are_exact(tmp_path, found):
    annotations, detections = found
    write(tmp_path / "results", voc_files("test", annotations, detections))
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["comp4_det_test_a c.txt", "comp4_det_test_a.txt", "comp4_det_test_b.txt"]
    assert (tmp_path / "results/comp4_det_test_b.txt").read_text() == ""
    for one, other in zip(detections, read_voc_results(str(tmp_path / "results"), "test", annotations), strict=True):
        order = np.argsort(one.labels, kind="stable")
        same(Detections(one.boxes[order], one.labels[order], one.scores[order]), other)


def test_the_devkits_boxes_are_inclusive_and_start_at_one(tmp_path):
    annotations = Annotations(("dog",), (1,), (annotated_image("old name", "", 500, 400, [], []),))
    found = Detections(np.float32([[0, 0, 500, 400]]), np.int32([0]), np.float32([0.5]))
    write(tmp_path, voc_files("val", annotations, [found]))
    assert (tmp_path / "comp4_det_val_dog.txt").read_text() == "old name 0.5 1.0 1.0 500.0 400.0\n"
    same(read_voc_results(str(tmp_path), "val", annotations)[0], found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not COCO's result format (expected a list)"),
        ("[", "line 1, column 2: not JSON"),
        ("[5]", "entry 0 is no object"),
        ('[{"image_id": 13, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 1}]', "entry 0: there is no image 13"),
        ('[{"image_id": 12, "category_id": 4, "bbox": [1, 2, 3, 4], "score": 1}]', "entry 0: category 4 is not in"),
        ('[{"image_id": 12, "category_id": 3, "bbox": [1, 2, 3], "score": 1}]', "entry 0: bbox is [1, 2, 3], not"),
        ('[{"image_id": 12, "category_id": 3, "bbox": [1, 2, 3, 4]}]', "entry 0: score is null, not a number"),
        ('[{"image_id": [], "category_id": 3, "bbox": [1, 2, 3, 4]}]', "entry 0: there is no image []"),
    ],
)
def test_a_damaged_coco_result_names_its_entry(tmp_path, found, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    assert message in usage_error(read_coco_results, str(path), found[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("13 .5 1 1 2 2\n", "comp4_det_test_a.txt, line 1: there is no image 13"),
        ("12 .5 1 1 2 2\n12 .5 1 1 2\n", "comp4_det_test_a.txt, line 2: expected: image score xmin ymin xmax ymax"),
        ("12 x 1 1 2 2\n", "line 1: expected"),
        ("12 nan 1 1 2 2\n", "line 1: expected"),
        ("\n", "line 1: expected"),
    ],
)
def test_a_damaged_voc_result_names_its_line(tmp_path, found, content, message):
    write(tmp_path, voc_files("test", *found))
    (tmp_path / "comp4_det_test_a.txt").write_text(content)
    assert message in usage_error(read_voc_results, str(tmp_path), "test", found[0])
    (tmp_path / "comp4_det_test_a.txt").unlink()
    assert "comp4_det_test_a.txt: not a readable text file" in usage_error(
        read_voc_results, str(tmp_path), "test", found[0]
    )


def test_detections_that_do_not_fit_the_images_are_refused(found):
    annotations, detections = found
    with pytest.raises(ValueError, match="3 images"):
        coco_file(annotations, detections[:3])
    wrong = Detections(np.zeros((1, 4), np.float32), np.int32([3]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match=r"image 5: labels outside 0\.\.2"):
        voc_files("test", annotations, [*detections[:3], wrong])
