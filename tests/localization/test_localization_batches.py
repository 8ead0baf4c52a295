"""Batches: pixels and boxes that belong together, for training and for evaluation."""

import io

import numpy as np
from PIL import Image
import pytest
from tiny_localizer import Made, bounds, rectangle

from resnet_jax.data.crops import CenterCrop, ScaleCrop
from resnet_jax.data.stream import Rows
from resnet_jax.detection.annotations import Annotations, annotated_image
from resnet_jax.detection.batches import Resizing
from resnet_jax.errors import UsageError
from resnet_jax.localization.batches import centre_batches, training_batches, whole_batches
from resnet_jax.localization.crops import to_image

CROP = ScaleCrop(96, 100, 160)


@pytest.fixture(scope="module")
def made():
    random = np.random.default_rng(5)
    rectangles = []
    for i in range(10):
        height, width = random.integers(110, 220, 2).tolist()
        left, top = random.integers(0, 60, 2).tolist()
        size = random.integers(25, 50, 2).tolist()
        rectangles.append(rectangle(i, height, width, (left, top, left + size[0], top + size[1]), i % 3))
    return Made(*rectangles)


def train(made, first=0, end=8, rows=None, **changes):
    arguments = {"least_visible": 0.2, "content": made.content} | changes
    return list(training_batches(made.annotations, CROP, 3, rows or Rows(5), first, end, **arguments))


def test_boxes_lie_around_what_they_are_of(made):
    seen, mirrored = 0, 0
    plain = train(made, flip=False)
    for batch, unmirrored in zip(train(made), plain, strict=True):
        assert batch["images"].shape == (5, 96, 96, 3) and batch["boxes"].shape == (5, 8, 4)
        np.testing.assert_array_equal(batch["labels"], batch["index"] % 3)
        assert not batch["valid"][:, 1:].any() and not batch["partial"][:, 1:].any()
        assert not (batch["valid"] & batch["partial"]).any()
        for row in range(5):
            if batch["valid"][row, 0]:
                np.testing.assert_allclose(bounds(batch["images"][row]), batch["boxes"][row, 0], atol=1.01)
                seen += 1
            elif not batch["partial"][row, 0]:
                assert bounds(batch["images"][row]).max() <= 96 and batch["images"][row].mean() < 5
            if (batch["images"][row] != unmirrored["images"][row]).any():
                np.testing.assert_array_equal(batch["images"][row], unmirrored["images"][row, :, ::-1])
                mirrored += 1
    assert 20 <= seen < 40 and 10 < mirrored < 30


def test_every_image_comes_once_an_epoch_and_later_otherwise(made):
    batches = train(made)
    for epoch in range(4):
        pair = batches[2 * epoch : 2 * epoch + 2]
        assert sorted(np.concatenate([batch["index"] for batch in pair]).tolist()) == list(range(10))
        assert {e for batch in pair for e in batch["epoch"].tolist()} == {epoch}
    boxes = {tuple(b["boxes"][row, 0].tolist()) for b in batches for row in range(5) if b["index"][row] == 0}
    assert len(boxes) > 1


def test_batches_do_not_depend_on_where_they_begin_or_who_reads_them(made):
    whole = train(made, 0, 4)
    again = train(made, 2, 4, workers=2)
    halves = [train(made, 2, 4, Rows(10, process, 2)) for process in range(2)]
    wide = train(made, 2, 4, Rows(10))
    for name in whole[0]:
        for a, b in zip(whole[2:], again, strict=True):
            np.testing.assert_array_equal(a[name], b[name])
        for i in range(2):
            joined = np.concatenate([half[i][name] for half in halves])
            np.testing.assert_array_equal(joined, wide[i][name])


def test_the_middle_of_every_image_comes_once_with_its_frame(made):
    batches = list(centre_batches(made.annotations, CenterCrop(96, 120), Rows(4), content=made.content))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    np.testing.assert_array_equal(batches[2]["real"], [True, True, False, False])
    for batch in batches:
        np.testing.assert_array_equal(batch["extent"], np.full((4, 2), 96))
        for row in np.flatnonzero(batch["real"]):
            image = made.annotations.images[batch["index"][row]]
            seen = bounds(batch["images"][row])
            if (seen[:2] > 1).all() and (seen[2:] < 95).all():
                np.testing.assert_allclose(to_image(seen[None], batch["frame"][row]), image.boxes, atol=2)


def test_whole_images_come_once_each_with_their_frame(made):
    batches = list(whole_batches(made.annotations, Resizing((96,), 192), Rows(4), content=made.content))
    index = np.concatenate([batch["index"][batch["real"]] for batch in batches])
    assert sorted(index.tolist()) == list(range(10)) and index.tolist() != list(range(10))
    for batch in batches:
        for row in np.flatnonzero(batch["real"]):
            height, width = batch["extent"][row]
            image = made.annotations.images[batch["index"][row]]
            assert min(height, width) == 96 and not batch["images"][row, height:].any()
            seen = to_image(bounds(batch["images"][row])[None], batch["frame"][row])
            np.testing.assert_allclose(seen, image.boxes, atol=2)


def test_files_are_read_and_cut_at_the_scale_they_need(tmp_path):
    _, pixels = rectangle(0, 400, 500, (100, 80, 300, 280))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    path = tmp_path / "a.jpg"
    path.write_bytes(content.getvalue())
    annotations = Annotations(("c",), (1,), (annotated_image("a", str(path), 500, 400, [(100, 80, 300, 280)], [0]),))
    crop = ScaleCrop(96, 100, 160)
    for batch in training_batches(annotations, crop, 0, Rows(1), 0, 6, least_visible=0.2, flip=True):
        if batch["valid"][0, 0]:
            np.testing.assert_allclose(bounds(batch["images"][0]), batch["boxes"][0, 0], atol=1.5)
    (whole,) = whole_batches(annotations, Resizing((96,), 192), Rows(1))
    assert whole["extent"].tolist() == [[96, 120]]


def test_images_that_are_not_as_annotated_are_named(tmp_path):
    path = tmp_path / "broken.jpg"
    image = annotated_image("broken", str(path), 50, 40, [(1, 1, 9, 9)], [0])
    read = lambda image: next(centre_batches(Annotations(("c",), (1,), (image,)), CenterCrop(32, 32), Rows(1)))
    with pytest.raises(UsageError, match=r"broken.jpg: not a readable image \(No such file"):
        read(image)
    path.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"broken.jpg: not a readable image \(of no known format"):
        read(image)
    Image.new("RGB", (40, 50)).save(path)
    with pytest.raises(UsageError, match="the image is 40 x 50, but its annotation"):
        read(image)
