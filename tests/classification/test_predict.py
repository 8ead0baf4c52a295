"""Predictions of files against the network applied by hand."""

import json
import os
import pathlib
import subprocess
import sys

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest

from resnet_jax import UsageError, create_model
from resnet_jax.classification.predict import class_names, find_images, imagenet_names, predict
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.save import save_safetensors

MODEL, ROOT = "cifar_resnet8", pathlib.Path(__file__).parents[2]
PREPROCESSING = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 32, 36)


def make_weights(classes: int = 4, channels: int = 3, names: tuple[str, ...] | None = tuple("abcd")) -> Pretrained:
    module = create_model(MODEL, classes, "float32")
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, channels)))
    preprocessing = PREPROCESSING if channels == 3 else Preprocessing((0.5,), (0.2,), 32, 36)
    return Pretrained({}, jax.tree.map(np.asarray, variables), preprocessing, names, "a test's")


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    random, paths = np.random.default_rng(0), []
    for i in range(5):
        low = Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8))
        paths.append(str(tmp_path / f"{i}.png"))
        low.resize((48 + i, 40), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def by_hand(weights: Pretrained, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and what the network sees, from Pillow's resize and crop."""
    image = Image.open(path).convert("RGB")
    width, height = (36 if side == min(image.size) else 36 * side // min(image.size) for side in image.size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    pixels = resized[top : top + 32, left : left + 32]
    normalised = ((pixels / 255 - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32)
    module = create_model(MODEL, weights.variables["params"]["head"]["bias"].shape[0], "float32")
    return np.asarray(module.apply(weights.variables, normalised[None]))[0], pixels


@pytest.mark.parametrize("batch", [2, 8])
def test_probabilities_are_those_of_resize_crop_normalise_and_apply(pictures, batch):
    weights = make_weights()
    found = list(predict(MODEL, weights, pictures, batch))
    assert [one.path for one in found] == pictures
    for one in found:
        logits, pixels = by_hand(weights, one.path)
        np.testing.assert_array_equal(one.pixels, pixels)
        np.testing.assert_allclose(one.probabilities, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)
        assert one.probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_the_heatmap_averages_to_the_likeliest_logit(pictures):
    weights = make_weights()
    head = weights.variables["params"]["head"]
    for one in predict(MODEL, weights, pictures[:2]):
        best = one.probabilities.argmax()
        expected = one.features @ head["kernel"][:, best]  # Its logit but for the bias.
        assert one.heatmap.mean() == pytest.approx(expected, abs=1e-4)
        assert one.heatmap.shape == (8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(orientation, tmp_path, pictures):
    upright = Image.open(pictures[0])
    inverse = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
               4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
               7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    turned = upright if inverse is None else upright.transpose(inverse)
    turned.save(tmp_path / "turned.png", exif=exif)
    one, other = predict(MODEL, make_weights(), [pictures[0], str(tmp_path / "turned.png")])
    np.testing.assert_array_equal(one.pixels, other.pixels)


def test_a_network_of_grey_images_sees_grey(pictures):
    (found,) = predict(MODEL, make_weights(channels=1), pictures[:1])
    assert found.pixels.shape == (32, 32, 1)


def test_names_are_the_weights_own_or_imagenets_or_numbers():
    names = imagenet_names()
    assert len(names) == 1000
    assert list(names) == sorted(names)  # torchvision's and Caffe's order.
    for number, name in {0: "tench", 207: "golden retriever", 281: "tabby", 999: "toilet tissue"}.items():
        assert list(names.values())[number] == name
    assert class_names(make_weights()) == tuple("abcd")
    assert class_names(make_weights(names=None)) == tuple("0123")
    assert class_names(make_weights(1000, names=None))[207] == "golden retriever"
    assert class_names(make_weights(2, names=("n01440764", "mine"))) == ("tench", "mine")


def test_files_folders_and_patterns_are_found_in_order_and_nothing_is_a_mistake(pictures, tmp_path):
    folder = tmp_path / "below" / "deeper"
    folder.mkdir(parents=True)
    Image.open(pictures[0]).save(folder / "x.JPG")
    (folder / "notes.txt").write_text("no image")
    found = find_images([pictures[3], str(tmp_path / "below"), str(tmp_path / "[01].png")])
    assert found == [pictures[3], str(folder / "x.JPG"), pictures[0], pictures[1]]
    for nothing in ("nowhere.png", "*.jpeg"):
        with pytest.raises(UsageError, match="no such image"):
            find_images([str(tmp_path / nothing)])


def test_the_command_prints_json_and_writes_features_and_heatmaps(pictures, tmp_path):
    save_safetensors(tmp_path / "net.safetensors", MODEL, make_weights())
    command = [sys.executable, "-m", "resnet_jax.predict", "--weights=net.safetensors", "--json", "--top=2",
               "--features=features.npz", "--heatmap=maps", "--batch=2", *pictures]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": "/nowhere"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == pictures
    best = lines[0]["predictions"]
    assert len(best) == 2
    assert best[0]["class"] in "abcd"
    assert best[0]["probability"] >= best[1]["probability"]
    features = np.load(tmp_path / "features.npz")
    assert features["files"].tolist() == pictures
    assert features["features"].shape == (5, 64)
    assert len(list((tmp_path / "maps").glob("*.png"))) == 5
    # Mistakes are one line.
    result = subprocess.run(
        [*command[:4], "nowhere.png"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "error: nowhere.png: no such image, or folder of images\n"
