"""Predictions of files against the network applied by hand."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy.io import savemat

from resnet_jax import UsageError, create_model
from resnet_jax.classification.predict import (
    challenge_numbers,
    class_names,
    has_map,
    imagenet_names,
    predict,
)
from resnet_jax.config import load_config, validate
from resnet_jax.data.pictures import find_images
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.card import write_card
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights
from resnet_jax.run import run_task

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


# By hand: what a viewer does to an array of rows to show a picture upright, as TIFF's tag 274 numbers it.
UPRIGHT = {
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.transpose(1, 0, 2),
    6: lambda rows: rows[::-1].transpose(1, 0, 2),
    7: lambda rows: rows[::-1, ::-1].transpose(1, 0, 2),
    8: lambda rows: rows[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["tif", "jpg", "png", "webp"])
def test_a_picture_is_seen_upright_whatever_its_format(orientation, ending, tmp_path):
    stored = np.random.default_rng(orientation).integers(0, 256, (40, 32, 3), np.uint8)
    stored[:20] //= 3  # The top is darker.
    exif = Image.Exif()
    exif[274] = orientation
    path, quality = tmp_path / f"turned.{ending}", {"jpg": {"quality": 95}, "webp": {"lossless": True}}
    Image.fromarray(stored).save(path, exif=exif, **quality.get(ending, {}))
    if ending == "jpg":
        stored = np.asarray(Image.open(path))  # What the loss has left, not turned.
    upright = UPRIGHT[orientation](stored)
    assert upright.shape[:2] == ((40, 32) if orientation < 5 else (32, 40))
    top, left = (upright.shape[0] - 32) // 2, (upright.shape[1] - 32) // 2
    weights = make_weights()
    weights = dataclasses.replace(weights, preprocessing=dataclasses.replace(PREPROCESSING, resize=32))
    (found,) = predict(MODEL, weights, [str(path)])
    np.testing.assert_array_equal(found.pixels, upright[top : top + 32, left : left + 32])


def test_a_network_of_grey_images_sees_grey(pictures):
    weights = make_weights(channels=1)
    (found,) = predict(MODEL, weights, pictures[:1])
    assert found.pixels.shape == (32, 32, 1)
    _, colours = by_hand(make_weights(), pictures[0])
    luma = colours @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2.
    assert np.ptp(luma) > 50
    np.testing.assert_allclose(found.pixels.squeeze(-1), luma, atol=0.51)
    normalised = ((found.pixels / 255 - 0.5) / 0.2).astype(np.float32)
    logits = np.asarray(create_model(MODEL, 4, "float32").apply(weights.variables, normalised[None]))[0]
    np.testing.assert_allclose(found.probabilities, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def test_grey_pictures_are_seen_as_they_are_by_a_network_of_grey_images(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(2, 0).repeat(2, 1)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    weights = make_weights(channels=1)
    weights = dataclasses.replace(weights, preprocessing=dataclasses.replace(weights.preprocessing, resize=None))
    (found,) = predict(MODEL, weights, [str(tmp_path / "levels.png")])
    np.testing.assert_array_equal(found.pixels.squeeze(-1), levels)


# Runs of ours: predict says of the test images what evaluation did.


SIDE = 8
WHOLE = {"data.crop": "whole"}
BICUBIC = {"data.interpolation": "bicubic", "eval.interpolation": "bicubic"}


def trained(folder: pathlib.Path, monkeypatch, **changes) -> tuple[pathlib.Path, list[str]]:
    """A run of a few steps on images of 8x16 and 16x8 pixels, and the files of its test set in their order."""
    random, files = np.random.default_rng(5), []
    for part, count in (("train", 8), ("val", 4)):
        for label in range(3):
            place = folder / "images" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 200, (8, 16, 3) if i % 2 else (16, 8, 3), np.uint8)
                pixels[..., label] += 50
                Image.fromarray(pixels).save(place / f"{i}.png")
                files += [str(place / f"{i}.png")] if part == "val" else []
    config = load_config("finetune_folder")
    settings = {
        "model.name": "tiny", "data.dir": str(folder / "images"), "data.cache_dir": str(folder / "cache"),
        "data.image_size": SIDE, "data.mean": "channel", "data.std": "channel", "data.flip": False, "data.workers": 1,
        "init.head": "keep", "batch_size": 8, "eval.every": 4, "epochs": 0.0, "steps": 4, "log.tensorboard": False,
        "schedule.learning_rate": 0.1, "schedule.warmup_steps": 0, "eval.resize": 10,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(settings | changes)
    validate(config)
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
    assert run_task(config, folder / "run", "train") == 0
    return folder / "run", files


@pytest.mark.parametrize(
    "changes",
    [
        WHOLE,
        WHOLE | BICUBIC,
        WHOLE | {"data.interpolation": "bicubic", "eval.interpolation": "bilinear"},
        WHOLE | {"data.placement": "stream"},
        WHOLE | {"data.placement": "stream", "data.interpolation": "bicubic", "eval.interpolation": "bilinear"},
        {"data.crop": "inception"},
        {"data.crop": "inception"} | BICUBIC,
    ],
    ids=["whole", "bicubic", "train bicubic", "stream", "stream train bicubic", "cut", "cut bicubic"],
)
def test_a_run_predicts_of_its_test_images_what_evaluation_said(changes, tmp_path, monkeypatch):
    run, files = trained(tmp_path, monkeypatch, **changes)
    model, weights = read_weights(str(run), None)
    assert weights.preprocessing.resize == (None if changes["data.crop"] == "whole" else 10)
    found = np.stack([one.probabilities for one in predict(model, weights, files, batch=5)])
    with np.load(run / "predictions.npz") as file:
        expected = file["probabilities"][np.argsort(file["index"])]
    assert np.ptp(expected, axis=0).min() > 1e-3  # The images make a difference.
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    save_safetensors(tmp_path / "net.safetensors", model, weights)
    model, weights = read_weights(str(tmp_path / "net.safetensors"), None)
    again = np.stack([one.probabilities for one in predict(model, weights, files, batch=5)])
    np.testing.assert_array_equal(again, found)
    page = write_card(tmp_path / "net.safetensors", model, weights, "arrays").read_text()
    assert ("the whole image to 8 x 8" in page) == (changes["data.crop"] == "whole")
    assert ("shorter side to 10" in page) == (changes["data.crop"] != "whole")


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
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": "/nowhere",
                   "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}  # fmt: skip
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


def command(folder: pathlib.Path, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    """predict, in a process of its own; or ``code`` that starts it."""
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": "/nowhere",
                   "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}  # fmt: skip
    start = ["-c", code] if code else ["-m", "resnet_jax.predict"]
    return subprocess.run([sys.executable, *start, *arguments], cwd=folder, env=environment, capture_output=True,
                          text=True)  # fmt: skip


def assert_refused(status: int, stdout: str, stderr: str, message: str) -> None:
    """One line, before any prediction."""
    assert status == 2, stderr
    assert stdout == ""
    begun, line = re.fullmatch(r"(\w+, \d+ images\n)?(.*\n)", stderr).groups()
    assert line.startswith("error: "), begun
    assert message in line


MISTAKES = {
    "nowhere.png": "nowhere.png: no such image, or folder of images",
    "--features=no/features.npz 0.png": "--features=no/features.npz: no folder",
    "--features=features.txt 0.png": "ends in .npz",
    "--heatmap=net.safetensors 0.png": "net.safetensors is a file, not a folder",
    "--heatmap=net.safetensors/below 0.png": "net.safetensors is a file, not a folder",
    "--submission=test.csv --devkit=. 0.png": "ends in .txt",
    "--submission=no/test.txt --devkit=. 0.png": "--submission=no/test.txt: no folder",
    "--submission=test.txt 0.png": "needs --devkit=",
    "--submission=test.txt --devkit=nowhere 0.png": "nowhere: no development kit",
    "--submission=test.txt --devkit=0.png 0.png": "0.png: no development kit",
    "--submission=test.txt --devkit=kit.tar.gz 0.png": "the network's 4 classes are not ImageNet's",
}
# Each as if it were a command of its own, without a start of its own.
ONE_BY_ONE = """
import contextlib, io, json, sys
from resnet_jax import cli, predict
said = []
for case in sys.argv[1:]:
    for name in list(predict.FLAGS):
        predict.FLAGS[name].unparse()
    sys.argv = ["predict", "--weights=net.safetensors", *case.split()]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            cli.run(predict.main, predict.__doc__, takes_arguments=True)
        except SystemExit as error:
            status = error.code
    said.append((status, stdout.getvalue(), stderr.getvalue()))
print(json.dumps(said))
"""


def test_mistakes_are_one_line_before_any_prediction_and_leave_nothing(pictures, tmp_path):
    save_safetensors(tmp_path / "net.safetensors", MODEL, make_weights())
    (tmp_path / "kit.tar.gz").write_bytes(kit(WNIDS))
    before = sorted(tmp_path.rglob("*"))
    result = command(tmp_path, *MISTAKES, code=ONE_BY_ONE)
    assert result.returncode == 0, result.stderr
    for said, message in zip(json.loads(result.stdout), MISTAKES.values(), strict=True):
        assert_refused(*said, message)
    assert sorted(tmp_path.rglob("*")) == before


TINY_VGG = """
import functools
from resnet_jax import cli, predict
from resnet_jax.models.registry import MODELS
from resnet_jax.models.vgg import VGG
MODELS["tiny_vgg"] = functools.partial(VGG, blocks=(1,), widths=(2,))
cli.run(predict.main, predict.__doc__, takes_arguments=True)
"""


def test_a_heatmap_of_a_vgg_is_refused_before_any_prediction_and_the_rest_of_it_works(pictures, tmp_path):
    shapes = {"stage1/conv1": (3, 3, 3, 2), "fc6": (7, 7, 2, 4096), "fc7": (1, 1, 4096, 4096), "head": (4096, 4)}
    params: dict = {"stage1": {}}
    for name, shape in shapes.items():
        place = params["stage1"] if "/" in name else params
        place[name.split("/")[-1]] = {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(shape[-1], np.float32)}
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16, 16)
    weights = Pretrained({}, {"params": params}, preprocessing, tuple("abcd"), "a test's")
    save_safetensors(tmp_path / "net.safetensors", "tiny_vgg", weights)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--weights=net.safetensors", "--features=features.npz", "--json", pictures[0]]
    refused = command(tmp_path, "--heatmap=maps", *arguments, code=TINY_VGG)
    assert_refused(refused.returncode, refused.stdout, refused.stderr, "--heatmap: tiny_vgg has no map of classes")
    assert sorted(tmp_path.rglob("*")) == before
    result = command(tmp_path, *arguments, code=TINY_VGG)
    assert result.returncode == 0, result.stderr
    assert [one["probability"] for one in json.loads(result.stdout)["predictions"]] == [0.25] * 4
    assert np.load(tmp_path / "features.npz")["features"].shape == (1, 2)


def test_a_map_is_there_where_the_classifier_reads_an_average():
    assert has_map(MODEL, make_weights())
    head = {"kernel": np.zeros((4096, 7), np.float32), "bias": np.zeros(7, np.float32)}
    assert not has_map("vgg16", Pretrained({}, {"params": {"head": head}}, None, None, "a test's"))


# For ImageNet's test server.


# The challenge's numbers of classes are in another order than their WordNet ids; beyond 1000 are inner nodes.
WNIDS = {"n01440764": 3, "n01443537": 7, "n01484850": 2, "n01491361": 1000, "n01494475": 5, "n01496331": 1,
         "n01498041": 6, "n00001740": 1001, "n00002137": 1860}  # fmt: skip


def kit(numbers: dict[str, int]) -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz, as far as it is read."""
    meta, packed = io.BytesIO(), io.BytesIO()
    rows = [(number, wnid) for wnid, number in numbers.items()]
    savemat(meta, {"synsets": np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object)]).reshape(-1, 1)})
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in (("readme.txt", b"about it"), ("data/meta.mat", meta.getvalue())):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_submission_has_five_of_the_challenges_numbers_a_line_in_order_of_probability(unpacked, pictures, tmp_path):
    classes = tuple(wnid for wnid, number in WNIDS.items() if number <= 1000)[::-1]  # In an order of their own.
    weights = make_weights(len(classes), names=classes)
    save_safetensors(tmp_path / "net.safetensors", MODEL, weights)
    (tmp_path / "kit.tar.gz").write_bytes(kit(WNIDS))
    if unpacked:
        with tarfile.open(tmp_path / "kit.tar.gz") as archive:
            # Python before 3.11.4 knows no filters.
            archive.extractall(tmp_path / "kit", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    devkit = f"--devkit={'kit' if unpacked else 'kit.tar.gz'}"
    order = [pictures[i] for i in (3, 0, 4, 1, 2)]
    result = command(tmp_path, "--weights=net.safetensors", "--submission=test.txt", devkit, "--batch=2", "--top=1",
                     *order)  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = []
    for path in order:
        best = np.argsort(-by_hand(weights, path)[0])[:5]
        expected.append(" ".join(str(WNIDS[classes[i]]) for i in best))
    assert len(set(expected)) > 1  # The images make a difference.
    assert (tmp_path / "test.txt").read_text() == "".join(f"{line}\n" for line in expected)
    assert not list(tmp_path.glob(".*"))


def head_alone(classes: int, names: tuple[str, ...] | None = None) -> Pretrained:
    head = {"kernel": np.zeros((1, classes), np.float32), "bias": np.zeros(classes, np.float32)}
    return Pretrained({}, {"params": {"head": head}}, None, names, "a test's")


def test_numbers_of_unnamed_thousand_classes_are_those_of_the_wordnet_ids_in_their_order(tmp_path):
    wnids = sorted(imagenet_names())
    shuffled = (np.random.default_rng(0).permutation(1000) + 1).tolist()
    (tmp_path / "kit.tar.gz").write_bytes(kit(dict(zip(wnids, shuffled, strict=True)) | {"n00001740": 1001}))
    numbers = challenge_numbers(str(tmp_path / "kit.tar.gz"), head_alone(1000))
    assert numbers == shuffled
    with pytest.raises(UsageError, match="the network's 999 classes are not ImageNet's"):
        challenge_numbers(str(tmp_path / "kit.tar.gz"), head_alone(999))
    for names in (("n01440764", "n00001740"), ("n01440764", "tench")):  # An inner node; no id.
        with pytest.raises(UsageError, match="the network's 2 classes are not ImageNet's"):
            challenge_numbers(str(tmp_path / "kit.tar.gz"), head_alone(2, names))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("damage", ["cut", "other bytes"])
def test_a_damaged_kit_is_one_line(share, damage, tmp_path):
    content = kit({wnid: i for i, wnid in enumerate(imagenet_names(), start=1)})
    at = int(len(content) * share)
    broken = content[:at] if damage == "cut" else content[:at] + bytes(60) + content[at + 60 :]
    (tmp_path / "kit.tar.gz").write_bytes(broken)
    with pytest.raises(UsageError, match=r"kit\.tar\.gz: no development kit of ILSVRC 2012") as error:
        challenge_numbers(str(tmp_path / "kit.tar.gz"), head_alone(1000))
    assert "\n" not in str(error.value)
