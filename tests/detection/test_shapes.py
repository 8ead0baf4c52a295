"""The generated data set: what is drawn, and the boxes around it, against geometry computed another way."""

import numpy as np
import pytest

from resnet_jax.detection.annotations import box_fault, for_training
from resnet_jax.detection.resize import canvas_of, canvas_sizes, scaled_size
from resnet_jax.detection.shapes import CLASSES, LONGER, SHORTER, draw_picture, shapes
from resnet_jax.errors import UsageError


@pytest.fixture(scope="module")
def drawn():
    return shapes(80, seed=0, split="train")


def covers(shape, height: int, width: int) -> np.ndarray:
    """Which pixels' centres lie within a shape, bool [height, width]: by half-planes in its own turned coordinates."""
    down, across = np.mgrid[:height, :width] + 0.5
    turned = ((across - shape.centre[0]) + 1j * (down - shape.centre[1])) * np.exp(-1j * shape.rotation)
    x, y, r = turned.real, turned.imag, shape.radius
    match CLASSES[shape.label]:
        case "circle":
            return x**2 + y**2 < r**2
        case "square":  # Its corners lie on the axes.
            return abs(x) + abs(y) < r
        case "triangle":
            return np.all([(turned * np.exp(-1j * (np.pi / 3 + k * 2 * np.pi / 3))).real < r / 2 for k in range(3)], 0)
        case "cross":
            long, short = r * 3 / np.sqrt(10), r / np.sqrt(10)
            return ((abs(x) < long) & (abs(y) < short)) | ((abs(x) < short) & (abs(y) < long))
        case "star":  # Folded into one half of a ray, where a single edge is left.
            angle = np.abs((np.angle(turned) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            folded = np.abs(turned) * np.exp(1j * angle)
            tip, dent = r, 0.42 * r * np.exp(1j * np.pi / 5)
            return ((dent - tip) * np.conj(folded - tip)).imag < 0


def test_boxes_are_exactly_around_the_pixels_that_are_to_be_seen(drawn):
    annotations, _ = drawn
    seen_classes = set()
    for index, image in enumerate(annotations.images):
        _, placed, owner = draw_picture(0, "train", index)
        masks = [covers(shape, image.height, image.width) for shape in placed]
        assert image.labels.tolist() == [shape.label for shape in placed]
        for i, mask in enumerate(masks):
            visible = mask & ~np.any([np.zeros_like(mask), *masks[i + 1 :]], axis=0)
            np.testing.assert_array_equal(visible, owner == i)
            y, x = np.nonzero(visible)
            assert image.boxes[i].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert visible.sum() >= 0.75 * mask.sum()
            seen_classes.add(placed[i].label)
    assert seen_classes == set(range(len(CLASSES)))


def test_boxes_are_around_what_the_pixels_show(drawn):
    annotations, pixels = drawn
    alone = [image for image in annotations.images if len(image.labels) == 1]
    assert len(alone) > 10
    for image in alone:
        chroma = np.ptp(pixels(image).astype(int), axis=2)  # The ground is dull, at most 255 * 0.85 * 0.35.
        y, x = np.nonzero(chroma > 80)
        found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        inset = (found - image.boxes[0]) * [1, 1, -1, -1]
        assert inset.min() >= -1 and inset.max() <= 6  # A tip has no more than the darker rim.


def test_a_picture_follows_from_seed_split_and_index(drawn):
    annotations, pixels = drawn
    fewer, their_pixels = shapes(3, seed=0, split="train")
    for image, same in zip(annotations.images[:3], fewer.images, strict=True):
        assert (image.id, image.width, image.height) == (same.id, same.width, same.height)
        np.testing.assert_array_equal(image.boxes, same.boxes)
        np.testing.assert_array_equal(pixels(image), their_pixels(same))
    for seed, split in ((1, "train"), (0, "test")):
        other, other_pixels = shapes(3, seed, split)
        for image, differs in zip(fewer.images, other.images, strict=True):
            assert not np.array_equal(their_pixels(image), other_pixels(differs))
    # As on every other machine.
    assert fewer.images[1].labels.tolist() == [1, 0, 3, 3]
    assert fewer.images[1].boxes.astype(int).tolist() == [
        [72, 54, 122, 106],
        [52, 70, 80, 98],
        [53, 25, 100, 74],
        [18, 51, 66, 97],
    ]


def test_the_set_is_what_the_quick_start_needs(drawn):
    annotations, pixels = drawn
    canvases = canvas_sizes(SHORTER, LONGER)
    used, counts = set(), []
    for index, image in enumerate(annotations.images):
        shown = pixels(image)
        assert image.id == f"train/{index}" and shown.dtype == np.uint8
        assert shown.shape == (image.height, image.width, 3)
        # No picture is resized, and two canvases do.
        assert scaled_size(image.height, image.width, SHORTER, LONGER) == (image.height, image.width, 1)
        used.add(canvases[canvas_of((image.height, image.width), canvases)])
        counts.append(len(image.labels))
        assert not any(box_fault(box, image.width, image.height) for box in image.boxes.tolist())
        assert np.sqrt(image.area.min()) > 15
    assert used == {(128, 160), (160, 128)}
    assert set(counts) == {1, 2, 3, 4}
    assert len(for_training(annotations)) == len(annotations)


def test_mistakes_are_named():
    with pytest.raises(UsageError, match=r"split 'tset' of shapes is unknown; did you mean 'test'\? \(train, test\)"):
        shapes(3, 0, "tset")
    with pytest.raises(UsageError, match="0 pictures of shapes: expected at least one"):
        shapes(0, 0, "train")
