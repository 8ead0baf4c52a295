"""COCO's annotations, folders of one's own in its format, and what is wrong with them."""

import copy
import json
import os
import pathlib

import numpy as np
import pytest
from refusals import usage_error

from resnet_jax.data.decode import image_shape
from resnet_jax.detection.annotations import check_image_size, for_training
from resnet_jax.detection.coco import read_coco, read_split

DATA = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere"))

CONTENT = {
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "nine.jpg", "width": 100, "height": 50},
        {"id": 4, "file_name": "deep/four.jpg", "width": 30, "height": 40},
        {"id": 7, "file_name": "seven.jpg", "width": 20, "height": 20},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}],
    "annotations": [
        {"id": 3, "image_id": 4, "category_id": 13, "bbox": [1.5, 2, 10, 20.25], "area": 77.5, "iscrowd": 0},
        {"id": 5, "image_id": 9, "category_id": 90, "bbox": [0, 0, 100, 50], "area": 4000, "iscrowd": 1},
        {"id": 8, "image_id": 4, "category_id": 1, "bbox": [0, 0, 3, 4]},
    ],
}


def write(root: pathlib.Path, content: dict = CONTENT, split: str = "val2017") -> pathlib.Path:
    for name in ("nine.jpg", "deep/four.jpg", "seven.jpg"):
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_gaps_in_the_ids_close_and_boxes_become_corners(tmp_path):
    write(tmp_path)
    data = read_split(str(tmp_path), "val2017")
    assert data.classes == ("person", "stop sign", "toothbrush")
    assert data.category_ids == (1, 13, 90)
    assert [image.id for image in data.images] == [9, 4, 7]
    crowd, two, empty = data.images
    assert pathlib.Path(two.path) == tmp_path / "val2017/deep/four.jpg"
    assert (two.width, two.height) == (30, 40)
    np.testing.assert_array_equal(two.boxes, np.float32([[1.5, 2, 11.5, 22.25], [0, 0, 3, 4]]))
    assert two.boxes.dtype == np.float32 and two.labels.dtype == np.int32
    assert two.labels.tolist() == [1, 0]
    assert two.area.tolist() == [77.5, 12]  # COCO's own, and the box's where there is none.
    assert crowd.crowd.tolist() == [True] and not two.crowd.any() and not two.difficult.any()
    assert empty.boxes.shape == (0, 4)
    assert [image.id for image in for_training(data).images] == [4]
    assert [image.id for image in for_training(data, difficult=True).images] == [4]
    assert [len(image.boxes) for image in for_training(data, without_boxes=True).images] == [1, 2, 0]
    assert for_training(data, without_boxes=True).images[0].crowd.all()  # What lies in it is no background.


def test_given_classes_set_the_order_of_the_labels(tmp_path):
    write(tmp_path)
    data = read_split(str(tmp_path), "val2017", classes=("toothbrush", "person", "stop sign"))
    assert data.category_ids == (90, 1, 13)
    assert data.images[1].labels.tolist() == [2, 1]
    message = usage_error(read_split, str(tmp_path), "val2017", classes=("toothbrush", "person"))
    assert "instances_val2017.json: annotation 3 (image 4): category 13 is not in the list" in message
    message = usage_error(read_split, str(tmp_path), "val2017", classes=("tothbrush",))
    assert "class 'tothbrush' is no category of it; did you mean 'toothbrush'?" in message


def test_labelling_tools_layout_and_any_other(tmp_path):
    path = write(tmp_path)
    path.rename(tmp_path / "val2017/_annotations.coco.json")
    expected = [image.id for image in read_split(str(tmp_path), "val2017").images]
    (tmp_path / "val2017/_annotations.coco.json").rename(tmp_path / "mine.json")
    assert [image.id for image in read_coco(str(tmp_path / "mine.json"), str(tmp_path / "val2017")).images] == expected
    message = usage_error(read_split, str(tmp_path), "val2017")
    assert "neither annotations/instances_val2017.json nor val2017/_annotations.coco.json" in message


def test_a_secret_test_set_is_listed_without_annotations(tmp_path):
    content = {key: value for key, value in CONTENT.items() if key != "annotations"}
    path = write(tmp_path, content)
    assert "no list 'annotations'" in usage_error(read_split, str(tmp_path), "val2017")
    path.rename(path.with_name("image_info_val2017.json"))
    data = read_split(str(tmp_path), "val2017", labelled=False)
    assert [len(image.boxes) for image in data.images] == [0, 0, 0]


def test_what_rounding_puts_outside_is_cut_back(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["bbox"] = [-0.01, 0, 30.02, 40.01]
    write(tmp_path, content)
    data = read_split(str(tmp_path), "val2017")
    np.testing.assert_array_equal(data.images[1].boxes[0], np.float32([0, 0, 30, 40]))


@pytest.mark.parametrize(
    ("bbox", "fault"),
    [
        ([20, 2, 11, 10], "bbox [20, 2, 11, 10] lies outside the image, which is 30 x 40 as its annotation says"),
        ([-1, 2, 10, 10], "bbox [-1, 2, 10, 10] lies outside"),
        ([1, 2, 10, 0.0], "bbox [1, 2, 10, 0.0] is inverted or empty"),
        ([9, 2, -4, 10], "bbox [9, 2, -4, 10] is inverted or empty"),
        ([float("nan"), 2, 10, 10], "bbox [NaN, 2, 10, 10] is not finite"),
    ],
)
def test_a_box_that_can_not_be_used_is_named_or_left_out_aloud(tmp_path, capsys, bbox, fault):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["bbox"] = bbox
    write(tmp_path, content)
    message = usage_error(read_split, str(tmp_path), "val2017")
    assert f"annotation 3 (image 4): {fault}" in message and "data.on_error=skip" in message
    data = read_split(str(tmp_path), "val2017", on_error="skip")
    assert data.images[1].labels.tolist() == [0]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"annotation 3 (image 4): {fault}" in printed


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("annotations", 1, "category_id"), 2, "annotation 5 (image 9): category 2 is not in the list"),
        (("annotations", 1, "category_id"), "90", 'annotation 5: category_id is "90", not a whole number'),
        (("annotations", 1, "image_id"), 1, "annotation 5: there is no image 1"),
        (("annotations", 1, "bbox"), [1, 2, 3], "annotation 5: bbox is [1, 2, 3], not four numbers"),
        (("annotations", 1, "bbox"), [1, 2, 3, "4"], 'annotation 5: bbox is [1, 2, 3, "4"], not four numbers'),
        (("annotations", 1, "bbox"), None, "annotation 5: bbox is null, not four numbers"),
        (("annotations", 1, "iscrowd"), 2, "annotation 5: iscrowd is 2, neither 0 nor 1"),
        (("annotations", 1, "area"), -1, "annotation 5: area is -1, not a number of pixels"),
        (("annotations", 1), 5, "annotations[1] is no object"),
        (("annotations",), {}, "no list 'annotations'"),
        (("images", 2, "id"), 9, "image 9 is listed twice"),
        (("images", 2, "id"), None, "image None: id is null, not a whole number"),
        (("images", 2, "file_name"), "eight.jpg", "image 7: no file "),
        (("images", 2, "file_name"), "nowhere/seven.jpg", "image 7: no file "),
        (("images", 2, "width"), 0, "image 7: width is 0"),
        (("images", 2, "height"), 2.5, "image 7: height is 2.5, not a whole number"),
        (("images",), [], "annotation 3: there is no image 4"),
        (("categories", 1, "id"), 90, "category 90: the id or the name 'person' is listed twice"),
        (("categories", 1, "name"), "toothbrush", "category 1: the id or the name 'toothbrush' is listed twice"),
        (("categories",), [], "no category in it"),
    ],
)
def test_each_mistake_is_one_line_with_file_and_id(tmp_path, place, value, message):
    content = copy.deepcopy(CONTENT)
    item = content
    for key in place[:-1]:
        item = item[key]
    item[place[-1]] = value
    path = write(tmp_path, content)
    text = usage_error(read_split, str(tmp_path), "val2017")
    assert str(path) in text and message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [],\n "annotations": [}', "line 2, column 18: not JSON (Expecting value)"),
        (b"", "line 1, column 1: not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not COCO's format (expected an object with images, annotations and categories)"),
    ],
    ids=["broken", "empty", "no text", "deep", "list"],
)
def test_what_is_no_json_is_named_with_its_line(tmp_path, content, message):
    path = write(tmp_path)
    path.write_bytes(content)
    assert message in usage_error(read_split, str(tmp_path), "val2017")
    assert "not readable" in usage_error(read_coco, str(tmp_path / "none.json"), str(tmp_path))


@pytest.mark.skipif(not (DATA / "coco64").is_dir(), reason="RESNET_JAX_DATA does not name a folder with coco64")
def test_coco64_has_the_right_counts():
    data = read_split(str(DATA / "coco64"), "val2017")
    assert (len(data), len(data.classes), sum(len(image.boxes) for image in data.images)) == (64, 80, 440)
    assert data.category_ids[0] == 1 and data.category_ids[-1] == 90 and 12 not in data.category_ids
    image = data.images[0]
    assert (image.id, data.classes[image.labels[0]]) == (139, "potted plant")
    np.testing.assert_allclose(image.boxes[0], [236.98, 142.51, 261.68, 212.01], rtol=1e-6)
    assert image.area[0] == 1716.65
    for image in data.images:
        check_image_size(image, *image_shape(pathlib.Path(image.path).read_bytes()))
