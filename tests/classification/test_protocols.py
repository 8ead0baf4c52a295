"""Test protocols on photos of many shapes, against Pillow, NumPy and loops."""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re

import jax
import numpy as np
from PIL import Image
import pytest

from resnet_jax import distributed
from resnet_jax.classification import protocols
from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config, validate
from resnet_jax.data import crops
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.run import run_task

SIZE, RESIZE, SCALES = 32, 36, (32, 48)
CLASSES = ("ant", "bee", "cow")
# (height, width) of the test photos: both orientations, common and odd ratios, a strip, less than the network's input.
SHAPES = ((60, 80), (80, 60), (50, 50), (37, 55), (91, 60), (33, 34), (40, 79), (25, 30), (30, 170), (64, 85), (45, 60))
FEW = ((60, 80), (64, 85), (170, 30), (30, 170), (75, 100))  # Three canvases.
PHOTOS = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere")) / "imagenet100"


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        row = functools.partial(ResNet, blocks=(1, 1), widths=(6, 10), shortcut="B", stem_width=4)
        patch.setitem(MODELS, "tiny", row)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        yield


def draw_photo(random: np.random.Generator, height: int, width: int, label: int) -> Image.Image:
    """Smooth colours with a corner that differs from the others, so that every crop and its mirror image differ."""
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
    pixels[: height // 2, : width // 2, label % 3] //= 2
    return Image.fromarray(pixels)


def write_photos(folder: pathlib.Path, test_shapes=SHAPES) -> pathlib.Path:
    random = np.random.default_rng(0)
    for part, shapes in (("train", SHAPES[:9]), ("val", test_shapes)):
        for i, shape in enumerate(shapes):
            label = i % 3
            place = folder / part / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            suffix, options = (".png", {}) if i % 2 else (".jpg", {"quality": 95})
            draw_photo(random, *shape, label).save(place / f"{i:02}{suffix}", **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def photos_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The test set's files in the order of their index: by class, then by name."""
    return sorted(path for path in (folder / "val").rglob("*") if path.is_file())


def settings(folder: pathlib.Path, **changes):
    config = default_config()
    config.model.name = "tiny"
    config.data.source = "image_folder"
    config.data.dir = str(folder)
    config.data.cache_dir = str(folder.parent / "cache")
    config.data.image_size = SIZE
    config.data.crop = "scale"
    config.data.scales = (36, 48)
    config.data.workers = 2
    config.batch_size = 8
    config.steps = 2
    config.schedule.learning_rate = 0.01
    config.eval.batch_size = 40
    config.eval.resize = RESIZE
    config.eval.scales = SCALES
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    return config


def random_weights(task: Classification) -> dict:
    """Weights and statistics of a network that was never trained, as NumPy arrays."""
    random = np.random.default_rng(1)

    def draw(path, leaf):
        name, fan = path[-1].key, max(1, math.prod(leaf.shape[:-1]))
        return np.float32(
            random.uniform(0.6, 1.5, leaf.shape)
            if name in ("scale", "var")
            else random.normal(0, math.sqrt(2 / fan) if name == "kernel" else 0.5, leaf.shape)
        )

    shapes = jax.eval_shape(task._new_state)
    return jax.tree_util.tree_map_with_path(draw, {"params": shapes.params, "batch_stats": shapes.batch_stats})


# The network and the protocols in NumPy, float64.


def conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    size = kernel.shape[0]
    pad = (size - 1) // 2
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijco->hwo", windows, kernel, optimize=True)


def norm(x: np.ndarray, weights: dict, *path: str) -> np.ndarray:
    params, stats = weights["params"], weights["batch_stats"]
    for name in path:
        params, stats = params[name], stats[name]
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def last_map(weights: dict, x: np.ndarray) -> np.ndarray:
    """The tiny network up to its last stage: one image [H, W, 3] -> [H / 8, W / 8, 10]."""
    params = weights["params"]
    x = np.maximum(norm(conv(x, params["stem"]["conv"]["kernel"], 2), weights, "stem", "bn"), 0)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))[::2, ::2].max((-2, -1))
    for stage, stride in (("stage1", 1), ("stage2", 2)):
        path, block = (stage, "block1"), params[stage]["block1"]
        y = np.maximum(norm(conv(x, block["conv1"]["kernel"], stride), weights, *path, "bn1"), 0)
        y = norm(conv(y, block["conv2"]["kernel"], 1), weights, *path, "bn2")
        shortcut = norm(conv(x, block["shortcut_conv"]["kernel"], stride), weights, *path, "shortcut_bn")
        x = np.maximum(y + shortcut, 0)
    return x


def scores_of(weights: dict, features: np.ndarray) -> np.ndarray:
    head = weights["params"]["head"]
    logits = features.mean((0, 1)) @ np.float64(head["kernel"]) + head["bias"]
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def resize(file: pathlib.Path, shorter: int) -> np.ndarray:
    """The photo with its shorter side resized and its ratio kept, uint8."""
    with Image.open(file) as image:
        image = image.convert("RGB")
        short, long = min(image.size), max(image.size)
        longer = shorter * long // short
        size = (shorter, longer) if image.width < image.height else (longer, shorter)
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def ten_crop_by_hand(weights: dict, file: pathlib.Path, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    pixels = resize(file, RESIZE)
    bottom, right = pixels.shape[0] - SIZE, pixels.shape[1] - SIZE
    scores = []
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))):
        crop = (pixels[top : top + SIZE, left : left + SIZE] / 255 - mean) / std
        scores += [scores_of(weights, last_map(weights, view)) for view in (crop, crop[:, ::-1])]
    assert len(scores) == 10
    return np.mean(scores, axis=0)


def multi_scale_by_hand(
    weights: dict, file: pathlib.Path, mean: np.ndarray, std: np.ndarray, scales=SCALES, window: int = SIZE // 8
) -> np.ndarray:
    scales_scores = []
    for scale in scales:
        image, scores = (resize(file, scale) / 255 - mean) / std, []
        for view in (image, image[:, ::-1]):
            found = last_map(weights, view)
            for top in range(found.shape[0] - window + 1):
                for left in range(found.shape[1] - window + 1):
                    scores.append(scores_of(weights, found[top : top + window, left : left + window]))
        scales_scores.append(np.mean(scores, axis=0))
    return np.mean(scales_scores, axis=0)


def training_statistics(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean image, mean and deviation of the channels, of what evaluation would see of the training photos."""
    views = []
    for file in sorted(path for path in (folder / "train").rglob("*") if path.is_file()):
        pixels = resize(file, RESIZE)
        top, left = (round((side - SIZE) / 2) for side in pixels.shape[:2])
        views.append(pixels[top : top + SIZE, left : left + SIZE] / 255)
    views = np.array(views)
    return views.mean(0), views.mean((0, 1, 2)), views.std((0, 1, 2))


def evaluate(config, devices: int, protocol: str):
    """The task's evaluation of random weights; the weights."""
    mesh = distributed.make_mesh(jax.local_devices()[:devices])
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        weights = random_weights(task)
        state = task.initial_state().replace(**distributed.replicate(mesh, weights))
        return task.evaluate(state, "test", lambda: None, protocol), weights


def assert_scores(evaluation, expected: np.ndarray, labels: list[int]) -> None:
    predictions = evaluation.predictions
    np.testing.assert_array_equal(predictions["index"], np.arange(len(labels)))
    np.testing.assert_array_equal(predictions["label"], labels)
    np.testing.assert_allclose(predictions["probabilities"], expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.01  # Photos differ.
    chosen = expected[np.arange(len(labels)), labels]
    assert evaluation.metrics["examples"] == len(labels)
    assert evaluation.metrics["top1_error"] == pytest.approx(100 * np.mean(expected.argmax(1) != labels))
    assert evaluation.metrics["loss"] == pytest.approx(-np.log(chosen).mean(), abs=1e-4)


def labels_of(folder: pathlib.Path) -> list[int]:
    return [CLASSES.index(file.parent.name) for file in photos_of(folder)]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("mean", ["channel", "pixel"])
def test_ten_crop_is_the_mean_softmax_of_ten_crops_cut_by_hand(folder, devices, mean):
    evaluation, weights = evaluate(settings(folder, **{"data.mean": mean}), devices, "ten_crop")
    mean_image, channels, std = training_statistics(folder)
    subtracted = mean_image if mean == "pixel" else channels
    expected = np.array([ten_crop_by_hand(weights, file, subtracted, std) for file in photos_of(folder)])
    assert_scores(evaluation, expected, labels_of(folder))


@pytest.mark.parametrize(
    ("devices", "mean", "shapes"),
    [
        pytest.param(1, "channel", SHAPES, marks=pytest.mark.slow, id="one device"),
        pytest.param(8, "channel", SHAPES, marks=pytest.mark.slow, id="eight devices, many canvases"),
        pytest.param(8, "channel", FEW, id="eight devices"),
        pytest.param(1, "pixel", FEW, id="a mean image"),
    ],
)
def test_multi_scale_is_the_mean_over_positions_mirror_images_and_scales(tmp_path, devices, mean, shapes, capsys):
    folder = write_photos(tmp_path / "photos", shapes)
    evaluation, weights = evaluate(settings(folder, **{"data.mean": mean}), devices, "multi_scale")
    # A mean image has one size alone: its mean colour is subtracted at others.
    _, channels, std = training_statistics(folder)
    expected = np.array([multi_scale_by_hand(weights, file, channels, std) for file in photos_of(folder)])
    assert_scores(evaluation, expected, labels_of(folder))
    said = re.search(r"multi_scale: (\d+) images at (\d+) scales have (\d+) shapes to compile", capsys.readouterr().out)
    # SHAPES: ratios up to 1.34, 1.51, 2 and 8, lying and standing where both occur: six canvases at each of two scales.
    assert said.groups() == (str(len(shapes)), "2", str(2 * len({canvas_by_hand(*shape) for shape in shapes})))


def canvas_by_hand(height: int, width: int) -> tuple[bool, float]:
    """What images that share a canvas have in common: orientation, and the limit that their ratio is below."""
    limit = next(one for one in (1.34, 1.51, 2.0, 4.0, 8.0) if max(height, width) / min(height, width) <= one)
    return height <= width, limit


@pytest.mark.parametrize("devices", [1, 8])
def test_passes_show_each_example_once_a_scale_on_a_canvas_that_holds_it(folder, devices):
    config = settings(folder)
    mesh = distributed.make_mesh(jax.local_devices()[:devices])
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        feed = task._feeds["test"]
        variables = jax.eval_shape(task._new_state).variables
        passes = protocols.make_passes("multi_scale", task.model, variables, feed, config, devices)
        seen = collections.Counter()
        for one in passes:
            for batch in one.batches():
                assert len(batch["images"]) % devices == 0
                for image, shape, index, label, valid in zip(
                    *(batch[name] for name in ("images", "shapes", "index", "labels", "valid")), strict=True
                ):
                    if not valid:
                        assert tuple(shape) == (0, 0)
                        continue
                    file = photos_of(folder)[index]
                    expected = resize(file, min(shape))
                    assert tuple(shape) == expected.shape[:2]
                    np.testing.assert_array_equal(image[: shape[0], : shape[1]], expected)
                    assert label == CLASSES.index(file.parent.name)
                    seen[int(index), int(min(shape))] += 1
    assert seen == {(index, scale): 1 for index in range(len(SHAPES)) for scale in SCALES}


def test_a_canvas_holds_its_images_keeps_their_orientation_and_there_are_few():
    random = np.random.default_rng(0)
    sides = np.concatenate([random.integers(1, 800, (2000, 2)), [(600, 800), (500, 375), (333, 500), (1, 700), (9, 9)]])
    for scale in (224, 256, 640):
        canvases = set()
        for height, width in sides.tolist():
            canvas = protocols.canvas_of(height, width, scale)
            short, long = min(height, width), max(height, width)
            longer = scale * long // short
            resized = (scale, longer) if height <= width else (longer, scale)
            assert all(room >= side for room, side in zip(canvas, resized, strict=True)), (height, width)
            assert min(canvas) == scale
            assert protocols.canvas_of(width, height, scale) == (canvas if height == width else canvas[::-1])
            assert max(canvas) <= max(1.34 * scale + 1, 2 * longer)  # No more than half of it is in vain.
            canvases.add(canvas)
        assert len(canvases) <= 2 * (3 + math.ceil(math.log2(800)))
        common = {protocols.canvas_of(*shape, scale) for shape in ((375, 500), (480, 640), (374, 500), (300, 301))}
        assert len(common) == 1


# What is written, and where.


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> pathlib.Path:
    """A run whose own evaluation is the single view, and whose config asks for ten crops besides."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert run_task(settings(folder, **{"eval.protocol": "ten_crop"}), workdir, "train") == 0
    return workdir


def files_of(workdir: pathlib.Path) -> dict[str, bytes]:
    return {name: (workdir / name).read_bytes() for name in ("summary.json", "predictions.npz", "config.json")}


def test_training_with_a_protocol_writes_its_evaluation_beside_the_run_s_own(trained):
    own, other = (json.loads((trained / place / "summary.json").read_text()) for place in (".", "eval/ten_crop"))
    assert (own["protocol"], other["protocol"]) == ("center", "ten_crop")
    assert {name: own[name] for name in ("step", "params", "examples")} == {
        name: other[name] for name in ("step", "params", "examples")
    }
    single, ten = (np.load(trained / place / "predictions.npz") for place in (".", "eval/ten_crop"))
    np.testing.assert_array_equal(single["index"], ten["index"])
    np.testing.assert_array_equal(single["label"], ten["label"])
    assert np.abs(single["probabilities"] - ten["probabilities"]).max() > 1e-4
    for predictions, summary in ((single, own), (ten, other)):
        wrong = predictions["probabilities"].argmax(1) != predictions["label"]
        assert summary["top1_error"] == pytest.approx(100 * wrong.mean())


def test_evaluating_by_a_protocol_leaves_the_run_s_own_files(trained, folder):
    before = files_of(trained)
    assert run_task(settings(folder, **{"eval.protocol": "multi_scale", "eval.scales": (32,)}), trained, "eval") == 0
    assert files_of(trained) == before
    summary = json.loads((trained / "eval/multi_scale/summary.json").read_text())
    predictions = np.load(trained / "eval/multi_scale/predictions.npz")
    assert (summary["protocol"], summary["examples"], summary["step"]) == ("multi_scale", len(SHAPES), 2)
    wrong = predictions["probabilities"].argmax(1) != predictions["label"]
    assert summary["top1_error"] == pytest.approx(100 * wrong.mean())


def test_the_single_view_s_evaluation_is_the_run_s_own(trained, folder):
    before = np.load(trained / "predictions.npz")["probabilities"]
    assert run_task(settings(folder), trained, "eval") == 0
    np.testing.assert_array_equal(np.load(trained / "predictions.npz")["probabilities"], before)


# Images that can't be read, and what does not go together.


@pytest.mark.parametrize(
    ("protocol", "damage"),
    [("center", "cut"), ("ten_crop", "cut"), ("multi_scale", "cut"), ("ten_crop", "empty"), ("multi_scale", "empty")],
)
def test_an_unreadable_photo_is_left_out_of_every_pass_or_named(tmp_path, capsys, protocol, damage):
    folder = write_photos(tmp_path / "photos", FEW)
    broken, labels = photos_of(folder)[1], labels_of(folder)
    # Cut in its pixels, it still has a header that says its shape.
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2] if damage == "cut" else b"")
    changes = {"eval.scales": (32,), "data.mean": "imagenet", "data.std": "imagenet"}
    with pytest.raises(UsageError, match=f"{broken}: not a readable image"):
        evaluate(settings(folder, **changes), 1, protocol)
    evaluation, _ = evaluate(settings(folder, **changes, **{"data.on_error": "skip"}), 1, protocol)
    kept = [0, 2, 3, 4]
    assert evaluation.predictions["index"].tolist() == kept
    assert evaluation.predictions["label"].tolist() == [labels[i] for i in kept]
    assert evaluation.metrics["examples"] == 4
    np.testing.assert_allclose(evaluation.predictions["probabilities"].sum(1), 1, atol=1e-5)
    assert f"left out {broken}" in capsys.readouterr().err


def test_a_photo_that_only_some_scales_could_read_is_left_out(tmp_path, monkeypatch):
    """A disk that fails in between: an average over fewer scales is no score of this protocol."""
    folder, whole = write_photos(tmp_path / "photos", FEW), crops.Fit.__call__

    def fails_once(self, image, uniforms):
        if self.shorter_side == SCALES[1] and self.canvas[1] > 2 * self.canvas[0]:
            raise OSError("gone")
        return whole(self, image, uniforms)

    monkeypatch.setattr(crops.Fit, "__call__", fails_once)
    evaluation, _ = evaluate(settings(folder, **{"data.on_error": "skip"}), 1, "multi_scale")
    strip = next(i for i, file in enumerate(photos_of(folder)) if Image.open(file).size == (170, 30))
    assert evaluation.predictions["index"].tolist() == [i for i in range(len(FEW)) if i != strip]


@pytest.mark.parametrize(("protocol", "placement"), [("ten_crop", "device"), ("multi_scale", "stream")])
def test_protocols_need_images_larger_than_the_network_s_input(folder, tmp_path, protocol, placement):
    config = settings(folder, **{"data.crop": "whole", "data.placement": placement, "eval.protocol": protocol})
    said = rf"eval\.protocol={protocol} looks at parts of images.*data\.crop=whole"
    with pytest.raises(UsageError, match=said) as caught:
        evaluate(config, 1, protocol)
    assert "\n" not in str(caught.value)
    # Training is not the way to find out.
    with pytest.raises(UsageError, match=said):
        run_task(config, tmp_path / "run", "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scales", [(), (31, 48)])
def test_scales_below_the_network_s_input_are_refused(folder, scales):
    with pytest.raises(UsageError, match=r"eval\.scales=.*at least data\.image_size=32") as caught:
        evaluate(settings(folder, **{"eval.scales": scales}), 1, "multi_scale")
    assert "\n" not in str(caught.value)


# Real photos.


@dataclasses.dataclass
class _Real:
    folder: pathlib.Path
    count: int


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> _Real:
    if not PHOTOS.is_dir():
        pytest.skip("RESNET_JAX_DATA does not name a folder with imagenet100")
    folder = tmp_path_factory.mktemp("real")
    chosen: dict[float, pathlib.Path] = {}
    for file in sorted(PHOTOS.rglob("*.JPEG")):  # One of each aspect ratio, as long as there are few.
        with Image.open(file) as image:
            chosen.setdefault(round(image.width / image.height, 1), file)
    files = sorted(chosen.values())[:6]
    for i, file in enumerate(files):
        for part in ("train", "val"):
            place = folder / part / CLASSES[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.JPEG").symlink_to(file)
    return _Real(folder, len(files))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_real_photos_have_the_scores_of_the_slow_computation(real, devices, monkeypatch):
    monkeypatch.setitem(globals(), "SIZE", 64)
    monkeypatch.setitem(globals(), "RESIZE", 80)
    scales = (64, 96, 112)
    changes = {"data.image_size": 64, "data.scales": (80, 90), "eval.resize": 80, "eval.scales": scales}
    config = settings(real.folder, **changes, **{"data.mean": "imagenet", "data.std": "imagenet"})
    files = photos_of(real.folder)
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    evaluation, weights = evaluate(config, devices, "ten_crop")
    found = evaluation.predictions["probabilities"]
    expected = np.array([ten_crop_by_hand(weights, file, mean, std) for file in files])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    evaluation, weights = evaluate(config, devices, "multi_scale")
    found = evaluation.predictions["probabilities"]
    expected = np.array([multi_scale_by_hand(weights, file, mean, std, scales, window=8) for file in files])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert len(found) == real.count
