"""A detector's batches: boxes against pixels, padding, and the same from any number of workers and hosts."""

import dataclasses
import os
import pathlib

import numpy as np
from PIL import Image
import pytest

from resnet_jax.data.stream import Rows
from resnet_jax.detection.annotations import Annotations, annotated_image, for_training
from resnet_jax.detection.batches import (
    EVALUATION_FIELDS,
    TRAINING_FIELDS,
    Resizing,
    evaluation_batches,
    fit,
    read_pixels,
    room_for_boxes,
    training_batches,
)
from resnet_jax.detection.coco import read_split
from resnet_jax.detection.resize import scale_boxes
from resnet_jax.detection.shapes import shapes
from resnet_jax.detection.voc import read_voc
from resnet_jax.errors import UsageError

DATA = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere"))
SMALL = Resizing((60,), 100)
COLOURS = ((255, 0, 0), (0, 0, 255))  # Of the marked boxes, by label.
SEED = 3


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Annotations:
    """21 grey pictures of several shapes with a red and mostly a blue rectangle, and boxes around them; 2 without."""
    folder, rng, images = tmp_path_factory.mktemp("marked"), np.random.default_rng(0), []
    shapes = [(75, 100)] * 8 + [(100, 75)] * 6 + [(40, 90)] * 3 + [(150, 200), (300, 250), (64, 64), (30, 30)]
    for i, (height, width) in enumerate(shapes):
        pixels, boxes, labels = np.full((height, width, 3), 120, np.uint8), [], []
        for label in range(0 if i in (4, 11) else 1 + (i % 3 > 0)):
            top = int(rng.integers(0, height // 4))
            left = int(rng.integers(0, width // 8)) + label * width // 2
            bottom, right = top + int(rng.integers(height // 3, height // 2)), left + width // 4
            pixels[top:bottom, left:right] = COLOURS[label]
            boxes.append((left, top, right, bottom))
            labels.append(label)
        path = folder / f"{i:02}.png"
        Image.fromarray(pixels).save(path)
        images.append(annotated_image(i, str(path), width, height, boxes, labels, crowd=[i == 7] * len(labels)))
    return Annotations(("red", "blue"), (1, 2), tuple(images))


def train(annotations, rows, first, end, resizing=SMALL, seed=SEED, **options):
    batches = training_batches(annotations, resizing, seed, rows, first, end, **options)
    try:
        return list(batches)
    finally:
        batches.close()


def evaluate(annotations, rows, resizing=SMALL, **options):
    batches = evaluation_batches(annotations, resizing, rows, **options)
    try:
        return list(batches)
    finally:
        batches.close()


def assert_same(ours, theirs):
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def join(parts):
    """Global batches from those of several processes."""
    return [{name: np.concatenate([part[name] for part in same]) for name in same[0]} for same in zip(*parts)]  # noqa: B905


def coloured(pixels: np.ndarray, label: int) -> np.ndarray:
    """(left, top, right, bottom) of a colour; where an edge falls within a pixel, of which it has more than half."""
    y, x = np.nonzero(pixels[..., 2 * label].astype(int) - pixels[..., 1] > 127)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def check_against_pixels(batch, annotations, mirrored=None):
    """Compares boxes with where the colours are; appends to ``mirrored`` whether blue came to the left of red."""
    for row in np.flatnonzero(batch["index"] >= 0):
        image = annotations.images[batch["index"][row]]
        height, width = batch["extent"][row]
        pixels = batch["images"][row]
        assert not pixels[height:].any() and not pixels[:, width:].any() and pixels[:height, :width].any(-1).all()
        assert height == pytest.approx(image.height * batch["scale"][row, 0])
        assert width == pytest.approx(image.width * batch["scale"][row, 1])
        count = len(image.labels)
        assert batch["valid"][row].tolist() == [True] * count + [False] * (batch["valid"].shape[1] - count)
        assert batch["labels"][row, :count].tolist() == image.labels.tolist()
        assert batch["crowd"][row, :count].tolist() == image.crowd.tolist()
        for name in ("boxes", "labels", "crowd"):
            assert not batch[name][row, count:].any()
        for box, label in zip(batch["boxes"][row], image.labels, strict=False):
            np.testing.assert_allclose(coloured(pixels, label), box, atol=0.75)
        if count == 2 and mirrored is not None:
            mirrored[batch["epoch"][row], batch["index"][row]] = batch["boxes"][row, 1, 0] < batch["boxes"][row, 0, 0]


def test_training_batches_show_what_their_boxes_say(marked):
    mirrored = {}
    for batch in train(marked, Rows(4), 0, 40):
        assert tuple(batch) == TRAINING_FIELDS
        canvas = batch["images"].shape[1:3]
        assert canvas in SMALL.canvases
        shapes = {name: (values.shape, values.dtype.name) for name, values in batch.items()}
        assert shapes == {
            "images": ((4, *canvas, 3), "uint8"), "extent": ((4, 2), "int32"), "scale": ((4, 2), "float32"),
            "boxes": ((4, 8, 4), "float32"), "labels": ((4, 8), "int32"), "valid": ((4, 8), "bool"),
            "crowd": ((4, 8), "bool"), "index": ((4,), "int32"), "epoch": ((4,), "int32"),
        }  # fmt: skip
        check_against_pixels(batch, marked, mirrored)
    assert 0.3 < np.mean(list(mirrored.values())) < 0.7
    by_image = {i: {mirrored[key] for key in mirrored if key[1] == i} for _, i in mirrored}
    assert sum(len(ways) == 2 for ways in by_image.values()) > len(by_image) / 2  # Each epoch draws anew.


def test_nothing_is_mirrored_where_not_asked_for_or_in_evaluation(marked):
    mirrored = {}
    for batch in train(marked, Rows(4), 0, 10, flip=False) + evaluate(marked, Rows(4)):
        check_against_pixels(batch, marked, mirrored)
    assert mirrored and not any(mirrored.values())


def test_evaluation_has_each_image_once_and_says_what_fills_up(marked):
    batches = evaluate(marked, Rows(4))
    assert all(tuple(batch) == EVALUATION_FIELDS for batch in batches)
    index, real = (np.concatenate([batch[name] for batch in batches]) for name in ("index", "real"))
    assert sorted(index[real]) == list(range(len(marked))) and (index[~real] == -1).all()
    assert not real.all()
    for batch in batches:
        check_against_pixels(batch, marked)
        for row in np.flatnonzero(~batch["real"]):
            assert not batch["images"][row].any() and not batch["valid"][row].any() and not batch["boxes"][row].any()
            assert tuple(batch["extent"][row]) == batch["images"].shape[1:3] and (batch["scale"][row] == 1).all()


def test_boxes_go_back_to_the_image_by_the_extent(marked):
    for batch in evaluate(marked, Rows(4)):
        for row in np.flatnonzero(batch["real"]):
            image = marked.images[batch["index"][row]]
            back = scale_boxes(batch["boxes"][row], batch["extent"][row], (image.height, image.width))
            np.testing.assert_allclose(back[batch["valid"][row]], image.boxes, rtol=0, atol=1e-4)


def test_several_scales_are_drawn_on_the_same_canvases(marked):
    several = Resizing((40, 50, 60), 100)
    assert several.canvases == SMALL.canvases
    drawn, mirrored, ways, alone = {}, {}, set(), train(marked, Rows(4), 0, 30)
    for batch, other in zip(train(marked, Rows(4), 0, 30, resizing=several), alone, strict=True):
        check_against_pixels(batch, marked, mirrored)
        np.testing.assert_array_equal(batch["index"], other["index"])
        assert batch["images"].shape == other["images"].shape
        for row, i in enumerate(batch["index"]):
            side = int(batch["extent"][row].min())
            drawn.setdefault(int(i), set()).add(side)
            ways.add((side, mirrored.get((batch["epoch"][row], i))))
    assert drawn[0] == {40, 50, 60} and len({frozenset(sides) for sides in drawn.values()}) > 1
    assert {(side, way) for side in (40, 50, 60) for way in (False, True)} <= ways  # They are drawn apart.
    assert_same(evaluate(marked, Rows(4), resizing=several), evaluate(marked, Rows(4)))  # It takes the last.


@pytest.mark.parametrize(("workers", "processes"), [(2, False), (2, True)])
def test_workers_change_nothing(marked, workers, processes):
    options = {"workers": workers, "processes": processes}
    assert_same(train(marked, Rows(4), 0, 8, **options), train(marked, Rows(4), 0, 8))
    if not processes:
        assert_same(evaluate(marked, Rows(4), **options), evaluate(marked, Rows(4)))


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_together_see_what_one_sees(marked, count):
    parts = [Rows(4, process, count) for process in range(count)]
    assert_same(join([train(marked, rows, 0, 8) for rows in parts]), train(marked, Rows(4), 0, 8))
    assert_same(join([evaluate(marked, rows) for rows in parts]), evaluate(marked, Rows(4)))


def test_a_run_goes_on_where_it_stopped_and_a_seed_makes_it_another(marked):
    whole = train(marked, Rows(4), 0, 12)
    assert_same(train(marked, Rows(4), 7, 12), whole[7:])
    other = train(marked, Rows(4), 0, 3, seed=SEED + 1)
    assert any(not np.array_equal(a["index"], b["index"]) for a, b in zip(other, whole[:3], strict=True))


def test_resizing_keeps_places_and_colours():
    """Of a picture whose colours rise evenly, whatever it is resized to, a pixel's colour says where it lies."""
    height, width = 90, 120
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    picture = np.rint(np.stack([2 * x, 2 * y, 0 * x], -1)).astype(np.uint8)
    for size in ((180, 240), (90, 120), (45, 60), (60, 100), (120, 121)):
        for mirrored in (False, True):
            pixels, boxes = fit(picture, np.array([[10, 20, 30, 50]], np.float32), size, mirrored)
            assert pixels.shape == (*size, 3) and boxes.dtype == np.float32
            across, down = size[1] / width, size[0] / height
            rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
            inner = slice(3, -3)
            shown = pixels[:, ::-1] if mirrored else pixels
            np.testing.assert_allclose(shown[10, inner, 0], 2 * columns[inner] / across, atol=1.6)
            np.testing.assert_allclose(shown[inner, 10, 1], 2 * rows[inner] / down, atol=1.6)
            left, right = (size[1] - 30 * across, size[1] - 10 * across) if mirrored else (10 * across, 30 * across)
            np.testing.assert_allclose(boxes, [[left, 20 * down, right, 50 * down]], rtol=1e-5)


def test_room_for_boxes_is_a_multiple_of_eight():
    def annotations(*counts):
        images = [annotated_image(i, "", 9, 9, [(0, 0, 5, 5)] * n, [0] * n) for i, n in enumerate(counts)]
        return Annotations(("a",), (1,), tuple(images))

    assert [room_for_boxes(annotations(*counts)) for counts in ((0,), (1, 3), (8,), (2, 9), ())] == [8, 8, 8, 16, 8]


def test_generated_shapes_go_the_same_way():
    annotations, pixels = shapes(24, seed=0, split="train")
    kept = dataclasses.replace(annotations, images=annotations.images[::2])  # Places in the set change, pixels do not.
    seen = 0
    for batch in evaluate(kept, Rows(4), Resizing((128,), 160), pixels=pixels):
        for row in np.flatnonzero(batch["real"]):
            image = kept.images[batch["index"][row]]
            np.testing.assert_array_equal(batch["images"][row, : image.height, : image.width], pixels(image))
            np.testing.assert_array_equal(batch["boxes"][row, : len(image.boxes)], image.boxes)
            seen += 1
    assert seen == len(kept)


def test_images_that_cannot_be_used_are_named(marked, tmp_path):
    def with_first(**changes):
        first = dataclasses.replace(marked.images[0], **changes)
        return dataclasses.replace(marked, images=(first, *marked.images[1:]))

    broken = tmp_path / "broken.png"
    broken.write_bytes(pathlib.Path(marked.images[0].path).read_bytes()[:80])
    for path, reason in ((broken, ""), (tmp_path / "gone.png", "No such file or directory")):
        with pytest.raises(UsageError, match=rf"^{path}: not a readable image \({reason}"):
            evaluate(with_first(path=str(path)), Rows(4))
    with pytest.raises(UsageError, match=r"00\.png: the image is 100 x 75, but its annotation \(0\) says 101 x 75"):
        train(with_first(width=101), Rows(4), 0, 8, workers=2)
    with pytest.raises(UsageError, match=r"75, but its annotation \(0\) says 75 x 100 \(turned\?"):
        evaluate(with_first(width=75, height=100), Rows(4))


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match=r"shorter sides \(0,\), longer ones up to 100: expected pixels, 1 or more"):
        Resizing((0,), 100)
    with pytest.raises(UsageError, match="expected pixels"):
        Resizing((), 100)
    with pytest.raises(ValueError, match="room for 1 box"):
        evaluate(shapes(20, 0, "test")[0], Rows(4), room=1)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("bccd", lambda folder: read_voc(folder, "test", classes=None)),
        ("voc100", lambda folder: read_voc(folder, "val")),
        ("coco64", lambda folder: read_split(folder, "val2017")),
    ],
)
def test_real_data_comes_whole(name, read):
    if not (DATA / name).is_dir():
        pytest.skip(f"RESNET_JAX_DATA does not name a folder with {name}")
    data = read(str(DATA / name))
    batches = evaluate(data, Rows(8), Resizing((120,), 200))
    real = np.concatenate([batch["index"][batch["real"]] for batch in batches])
    assert sorted(real) == list(range(len(data)))
    for field, expected in (
        ("valid", sum(len(image.boxes) for image in data.images)),
        ("crowd", sum(image.crowd.sum() for image in data.images)),
    ):
        assert sum(batch[field].sum() for batch in batches) == expected
    trained = for_training(data)
    steps = train(trained, Rows(4), 0, 3, Resizing((120,), 200))
    assert all((batch["valid"] & ~batch["crowd"]).any(1).all() for batch in steps)
    assert read_pixels(data.images[0]).shape == (data.images[0].height, data.images[0].width, 3)


def test_views_are_the_same_images_at_other_sizes(marked):
    annotations, pixels = marked, read_pixels
    resizing = Resizing((60,), 100)
    seen = 0
    for batch in evaluation_batches(annotations, resizing, Rows(2), pixels=pixels, views=(30, 100)):
        for row in np.flatnonzero(batch["real"]):
            image, seen = annotations.images[batch["index"][row]], seen + 1
            for side in (30, 100):
                height, width = batch[f"extent_{side}"][row]
                scale = min(side / min(image.height, image.width), side * 100 / 60 / max(image.height, image.width))
                assert abs(height - scale * image.height) <= 0.5 and abs(width - scale * image.width) <= 0.5
                canvas = batch[f"images_{side}"][row]
                assert canvas.shape[0] % 32 == canvas.shape[1] % 32 == 0
                assert not canvas[height:].any() and not canvas[:, width:].any()
                expected, _ = fit(pixels(image), image.boxes, (height, width))
                np.testing.assert_array_equal(canvas[:height, :width], expected)
    assert seen == len(annotations)
