"""VOC's annotations: devkits, folders of one's own, and what is wrong with them."""

import os
import pathlib

import numpy as np
from PIL import Image
import pytest
from refusals import usage_error

from resnet_jax.data.decode import image_shape
from resnet_jax.detection.annotations import check_image_size, for_training
from resnet_jax.detection.voc import CLASSES, read_devkit, read_voc

DATA = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere"))


def object_xml(name: str, box: tuple, difficult: str = "<difficult>0</difficult>", extra: str = "") -> str:
    corners = "".join(f"<{tag}>{side}</{tag}>" for tag, side in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{name}</name>\n{difficult}\n{extra}<bndbox>{corners}</bndbox>\n</object>\n"


def write_image(root: pathlib.Path, name: str, *objects: str, size: tuple[int, int] = (40, 30)) -> None:
    """A picture and its annotation, in which the first <object> is on line 3."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / "JPEGImages" / f"{name}.jpg")
    width, height = size
    xml = f"<annotation>\n<size><width>{width}</width><height>{height}</height></size>\n{''.join(objects)}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(xml)


def write_set(root: pathlib.Path, image_set: str, *names: str) -> None:
    (root / "ImageSets/Main" / f"{image_set}.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def year(tmp_path) -> pathlib.Path:
    root = tmp_path / "VOC2007"
    head = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>\n"
    write_image(root, "b", object_xml("dog", (1, 1, 40, 30)), object_xml("person", (5, 6, 5, 9), extra=head))
    write_image(
        root, "a", object_xml("cat", (2.5, 3, 10, 12), "<difficult>1</difficult>"), object_xml("dog", (1, 2, 3, 4), "")
    )
    write_image(root, "c")
    write_set(root, "trainval", "b", "a")
    write_set(root, "test", "c")
    return root


def test_boxes_become_continuous_and_start_at_zero(year):
    data = read_voc(str(year), "trainval")
    assert data.classes == CLASSES and len(CLASSES) == 20
    assert data.category_ids == tuple(range(1, 21))
    first, second = data.images
    assert (first.id, second.id) == ("b", "a")
    assert pathlib.Path(first.path) == year / "JPEGImages" / "b.jpg"
    assert (first.width, first.height) == (40, 30)
    # The whole image, and a box of one column of pixels; the head's box is not an object's.
    np.testing.assert_array_equal(first.boxes, np.float32([[0, 0, 40, 30], [4, 5, 5, 9]]))
    np.testing.assert_array_equal(second.boxes, np.float32([[1.5, 2, 10, 12], [0, 1, 3, 4]]))
    assert first.boxes.dtype == np.float32 and first.labels.dtype == np.int32
    assert first.labels.tolist() == [CLASSES.index("dog"), CLASSES.index("person")]
    assert second.difficult.tolist() == [True, False]
    assert not first.crowd.any()
    assert first.area.tolist() == [1200, 4]


def test_an_image_without_objects_has_empty_arrays(year):
    (image,) = read_voc(str(year), "test").images
    assert image.boxes.shape == (0, 4) and image.labels.shape == image.area.shape == image.difficult.shape == (0,)


def test_training_leaves_difficult_boxes_and_empty_images_out_unless_asked(year):
    write_set(year, "all", "a", "b", "c")
    data = read_voc(str(year), "all")
    assert [(image.id, len(image.boxes)) for image in for_training(data).images] == [("a", 1), ("b", 2)]
    assert [len(image.boxes) for image in for_training(data, difficult=True).images] == [2, 2]
    assert [len(image.boxes) for image in for_training(data, without_boxes=True).images] == [1, 2, 0]
    assert [len(image.boxes) for image in data.images] == [2, 2, 0]
    message = usage_error(for_training, read_voc(str(year), "test"), without_boxes=True)
    assert "no box to train on" in message


def test_own_classes_are_all_that_the_folder_names_in_order(year):
    write_image(year, "d", object_xml("zebra", (1, 1, 2, 2)), object_xml("ant", (1, 1, 2, 2)))
    data = read_voc(str(year), "trainval", classes=None)
    assert data.classes == ("ant", "cat", "dog", "person", "zebra")
    assert data.images[0].labels.tolist() == [2, 3]
    given = read_voc(str(year), "trainval", classes=("person", "dog", "cat"))
    assert given.classes == ("person", "dog", "cat")
    assert given.images[0].labels.tolist() == [1, 0]


@pytest.mark.parametrize("inside", ["", "VOCdevkit"])
def test_the_unions_are_the_papers(tmp_path, inside):
    for number in (2007, 2012):
        root = tmp_path / inside / f"VOC{number}"
        for image_set in ("train", "val", "trainval", "test"):
            parts = ("train", "val") if image_set == "trainval" else (image_set,)
            names = [f"{number}_{part}" for part in parts]
            for name in names:
                write_image(root, name, object_xml("cow", (1, 1, 9, 9)))
            write_set(root, image_set, *names)

    def ids(name: str) -> list:
        return [image.id for image in read_devkit(str(tmp_path), name).images]

    assert ids("07+12") == ["2007_train", "2007_val", "2012_train", "2012_val"]
    assert ids("07++12") == ["2007_train", "2007_val", "2007_test", "2012_train", "2012_val"]
    assert ids("12_val") == ["2012_val"]
    assert "did you mean '07++12'" in usage_error(read_devkit, str(tmp_path), "07+++12")
    (tmp_path / inside / "VOC2012").rename(tmp_path / "elsewhere")
    assert "no folder VOC2012 in it, of which 07+12 needs trainval" in usage_error(read_devkit, str(tmp_path), "07+12")


def test_a_name_in_both_parts_of_a_union_is_named(tmp_path):
    for number in (2007, 2012):
        write_image(tmp_path / f"VOC{number}", "1")
        write_set(tmp_path / f"VOC{number}", "trainval", "1")
    assert "07+12: image 1 is listed twice" in usage_error(read_devkit, str(tmp_path), "07+12")


def test_a_secret_test_set_is_listed_without_annotations(year):
    (year / "Annotations" / "c.xml").unlink()
    (image,) = read_voc(str(year), "test", labelled=False).images
    assert (image.id, image.width, image.height, len(image.boxes)) == ("c", 40, 30, 0)
    (year / "JPEGImages" / "c.jpg").write_text("no image")
    assert "c.jpg: not a readable image" in usage_error(read_voc, str(year), "test", labelled=False)


def test_boxes_of_tools_that_count_from_zero_begin_at_the_edge(year):
    write_image(year, "b", object_xml("cat", (0, 0, 39, 29)), object_xml("cat", (1, 1, 39, 29)))
    first = next(image for image in read_voc(str(year), "trainval").images if image.id == "b")
    np.testing.assert_array_equal(first.boxes, [[0, 0, 39, 29]] * 2)


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((-1, 1, 5, 5), "box (-1, 1, 5, 5) of 'dog' lies outside the image, which is 40 x 30 as its annotation says"),
        ((1, 1, 41, 5), "box (1, 1, 41, 5) of 'dog' lies outside"),
        ((1, 1, 5, 31), "box (1, 1, 5, 31) of 'dog' lies outside"),
        ((9, 1, 5, 5), "box (9, 1, 5, 5) of 'dog' is inverted or empty"),
        ((1, 6, 5, 5), "box (1, 6, 5, 5) of 'dog' is inverted or empty"),
    ],
)
def test_a_box_that_can_not_be_used_is_named_or_left_out_aloud(year, capsys, box, fault):
    write_image(year, "b", object_xml("cat", (1, 1, 2, 2)), object_xml("dog", box))
    message = usage_error(read_voc, str(year), "trainval")
    assert f"{year / 'Annotations' / 'b.xml'}, line 8: {fault}" in message and "data.on_error=skip" in message
    data = read_voc(str(year), "trainval", on_error="skip")
    assert [len(image.boxes) for image in data.images] == [1, 2]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"b.xml, line 8: {fault}" in printed
    assert "data.on_error=ignore is unknown" in usage_error(read_voc, str(year), "trainval", on_error="ignore")


def rewrite(path: str, old: str, new: str):
    def change(root: pathlib.Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewrite("Annotations/b.xml", "dog", "dgo"), "line 3: class 'dgo' is not in the list; did you mean 'dog'?"),
        (rewrite("Annotations/b.xml", "</name>", "</nme>"), "b.xml, line 4: not well-formed XML (mismatched tag)"),
        (rewrite("Annotations/b.xml", "<annotation>", ""), "line 3: not well-formed XML (junk after document element)"),
        (rewrite("Annotations/b.xml", "<xmin>1<", "<xmin>one<"), "b.xml, line 6: <xmin> is 'one', not a number"),
        (rewrite("Annotations/b.xml", "<xmin>1<", "<xmin>nan<"), "b.xml, line 6: <xmin> is 'nan', not a number"),
        (rewrite("Annotations/b.xml", "<xmin>1</xmin>", ""), "b.xml, line 6: <bndbox> has no <xmin>"),
        (rewrite("Annotations/b.xml", "<name>dog</name>", "<name/>"), "b.xml, line 4: <name> is empty"),
        (rewrite("Annotations/b.xml", "cult>0<", "cult>2<"), "b.xml, line 3: <difficult> is 2, neither 0 nor 1"),
        (rewrite("Annotations/b.xml", "<width>40</width>", ""), "b.xml, line 2: <size> has no <width>"),
        (rewrite("Annotations/b.xml", "<width>40<", "<width>0<"), "b.xml, line 2: an image of 0 x 30 pixels"),
        (lambda root: (root / "Annotations/b.xml").write_bytes(b""), "line 1: not well-formed XML (no element found)"),
        (lambda root: (root / "Annotations/b.xml").write_text("<?xml version='1.0' encoding='x'?><a/>"), "b.xml"),
        (lambda root: (root / "Annotations/b.xml").unlink(), "trainval.txt, line 1: no annotation"),
        (lambda root: (root / "JPEGImages/a.jpg").unlink(), "trainval.txt, line 2: no image"),
        (lambda root: (root / "JPEGImages/a.png").touch(), "a is more than one image (a.jpg, a.png)"),
        (lambda root: write_set(root, "trainval", "a", "b", "a"), "trainval.txt: image a is listed twice"),
        (lambda root: write_set(root, "trainval"), "trainval.txt: no image in it"),
        (lambda root: write_set(root, "trainval", "nobody"), "trainval.txt, line 1: no image"),
        (lambda root: (root / "ImageSets/Main/trainval.txt").write_bytes(b"\xff\xfe"), "not a readable text file"),
        (lambda root: (root / "ImageSets/Main/trainval.txt").rename(root / "ImageSets/Main/trainvol.txt"),
         "trainval.txt: no such image set; did you mean 'trainvol'?"),
        (lambda root: (root / "JPEGImages").rename(root / "images"), "no folder JPEGImages in it"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_with_file_and_line(year, change, message):
    change(year)
    assert message in usage_error(read_voc, str(year), "trainval")


def test_no_classes_to_be_found_is_a_mistake(year):
    for name in ("a", "b"):
        write_image(year, name)
    assert "no annotation with an object" in usage_error(read_voc, str(year), "trainval", classes=None)


def test_an_image_of_another_size_than_its_annotation_is_named(year):
    image = read_voc(str(year), "trainval").images[0]
    check_image_size(image, *image_shape(pathlib.Path(image.path).read_bytes()))
    message = usage_error(check_image_size, image, 31, 40)
    assert message == f"{image.path}: the image is 40 x 31, but its annotation (b) says 40 x 30"
    assert "EXIF rotation is ignored" in usage_error(check_image_size, image, 40, 30)


def check_sizes(data) -> None:
    for image in data.images:
        check_image_size(image, *image_shape(pathlib.Path(image.path).read_bytes()))


@pytest.mark.skipif(not (DATA / "bccd").is_dir(), reason="RESNET_JAX_DATA does not name a folder with bccd")
def test_bccd_has_the_right_counts():
    parts = {name: read_voc(str(DATA / "bccd"), name, classes=None) for name in ("train", "val", "trainval", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 205, "val": 87, "trainval": 292, "test": 72}
    labels = np.concatenate([image.labels for part in ("trainval", "test") for image in parts[part].images])
    assert parts["test"].classes == ("Platelets", "RBC", "WBC")
    assert np.bincount(labels).tolist() == [361, 4155, 372]
    check_sizes(parts["test"])


@pytest.mark.skipif(not (DATA / "voc100").is_dir(), reason="RESNET_JAX_DATA does not name a folder with voc100")
def test_voc100_has_the_right_counts():
    data = read_voc(str(DATA / "voc100"), "val")
    assert len(data) == 100
    counts = np.bincount(np.concatenate([image.labels for image in data.images]), minlength=20)
    assert counts.sum() == 273 and counts[CLASSES.index("person")] == 91
    assert sum(image.difficult.sum() for image in data.images) == 38
    assert data.images[0].id == "2007_000027"
    np.testing.assert_array_equal(data.images[0].boxes, np.float32([[173, 100, 349, 351]]))
    check_sizes(data)
