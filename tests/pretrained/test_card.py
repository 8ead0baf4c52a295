"""The page beside exported weights: true to the file, the run and the code that it shows."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from resnet_jax import UsageError, __version__, create_model
from resnet_jax.config import load_config, validate
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.card import write_card
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.program import save_program
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights
from resnet_jax.run import run_task

ROOT = pathlib.Path(__file__).parents[2]
SIDE = 8


def front_matter(page: str) -> dict[str, str]:
    """The lines between the first two ---, each ``key: value`` as in the simplest YAML."""
    _, front, _ = page.split("---\n", 2)
    return dict(line.split(": ", 1) for line in front.splitlines())


def sections(page: str) -> dict[str, str]:
    """The text below each heading."""
    _, _, body = page.split("---\n", 2)
    headings = re.split(r"^#+ (.*)\n", body, flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(headings[1::2], headings[2::2], strict=True)}


def table(text: str) -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE)
    return dict(rows)


def code(text: str, language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.DOTALL)
    return block


def use(page: pathlib.Path, pixels: np.ndarray) -> np.ndarray:
    """Runs what the page says, and gives the logits that it says it gives."""
    names = {"pixels": pixels, "images": pixels}
    exec(code(sections(page.read_text())["Use"], "python"), names)
    return np.asarray(names["logits"])


def export(source: str | pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """What the command convert does, where the registry has a network of this test's; gives the page."""
    model, weights = read_weights(str(source), None)
    {".safetensors": save_safetensors, ".stablehlo": save_program}[output.suffix](output, model, weights)
    return write_card(output, model, weights, "what is in it")


# Of weights from elsewhere, by the command.


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> pathlib.Path:
    """A CIFAR ResNet-8 in akamaster's names, converted to both kinds of file."""
    folder, random, arrays = tmp_path_factory.mktemp("converted"), np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        arrays[name] = random.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 4:
            for part in ("weight", "bias", "running_mean", "running_var"):
                bn = name.replace("conv", "bn").replace("weight", part)
                arrays[bn] = random.uniform(0.5, 2, shape[0]).astype(np.float32)

    add("conv1.weight", 16, 3, 3, 3)
    for stage, (inside, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
        add(f"layer{stage}.0.conv1.weight", width, inside, 3, 3)
        add(f"layer{stage}.0.conv2.weight", width, width, 3, 3)
    add("linear.weight", 10, 64)
    add("linear.bias", 10)
    save_file(arrays, folder / "aka.safetensors")
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": "/nowhere",
                   "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}  # fmt: skip
    for output in ("net.safetensors", "net.stablehlo"):
        command = [sys.executable, "-m", "resnet_jax.convert", "--model=cifar_resnet8", "--weights=aka.safetensors",
                   f"--output={output}"]  # fmt: skip
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert f"{output}.md: what it is and how to use it" in result.stdout
    return folder


@pytest.mark.parametrize("file", ["net.safetensors", "net.stablehlo"])
def test_the_code_on_the_page_runs_and_gives_the_logits_of_apply(file, converted, monkeypatch):
    monkeypatch.chdir(converted)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    _, weights = read_weights("aka.safetensors", "cifar_resnet8")
    module = create_model("cifar_resnet8", 10, "float32", shortcut="A", shortcut_zeros="both")
    images = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    expected = module.apply(weights.variables, images.astype(np.float32))
    np.testing.assert_allclose(use(converted / f"{file}.md", pixels), expected, atol=1e-3)
    assert "uint8" in sections((converted / f"{file}.md").read_text())["Use"]
    assert "[N, 32, 32, 3]" in sections((converted / f"{file}.md").read_text())["Use"]


@pytest.mark.parametrize("file", ["net.safetensors", "net.stablehlo"])
def test_the_page_of_a_strangers_weights_says_what_is_known_and_no_more(file, converted):
    page = (converted / f"{file}.md").read_text()
    found = sections(page)
    assert next(iter(found)) == file
    # By hand: three convolutions and a matrix with biases; each BN has a scale and a shift.
    convolutions = 27 * 16 + 9 * (16 * 16 * 2 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    parameters = convolutions + 2 * (16 * 3 + 32 * 2 + 64 * 2) + 64 * 10 + 10
    assert f"cifar_resnet8 with {parameters:,} parameters, 10 classes." in found[file]
    origin = table(found[file])
    assert origin["source"] == "aka.safetensors (akamaster's CIFAR ResNets)"
    assert json.loads(origin["settings"]) == {"shortcut": "A", "shortcut_zeros": "both"}
    assert origin["resnet_jax"] == __version__
    assert origin["jax, flax, numpy"].startswith(f"{jax.__version__}, ")
    assert origin["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert table(found["Preprocessing"]) == {
        "resize": "the whole image to 32 x 32, bilinear",
        "mean, of values from 0 to 1": "0.485, 0.456, 0.406",
        "deviation": "0.229, 0.224, 0.225",
    }
    assert found["Metrics"] == "None were measured with these weights here."
    assert found["Classes"] == "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
    assert "Config" not in found


def test_the_front_matter_has_what_the_hub_reads(converted):
    page = (converted / "net.safetensors.md").read_text()
    assert page.startswith("---\n")
    front = front_matter(page)
    # https://huggingface.co/docs/hub/model-cards: which package reads it, what it is for, what it is found by.
    assert front["library_name"] == "resnet_jax"
    assert front["pipeline_tag"] == "image-classification"
    assert front["tags"].strip("[]").split(", ") == ["resnet", "jax", "flax"]
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(page.split("---\n")[1])["tags"] == ["resnet", "jax", "flax"]


# Of a run of ours.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps of a tiny network on images of three classes, with a per-pixel mean."""
    folder, random = tmp_path_factory.mktemp("run"), np.random.default_rng(3)
    for part, count in (("train", 12), ("val", 7)):
        for label in range(3):
            place = folder / "images" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 200, (SIDE, SIDE, 3), np.uint8)
                pixels[..., label] += 50
                Image.fromarray(pixels).save(place / f"{i}.png")
    config = load_config("finetune_folder")
    changes = {
        "model.name": "tiny", "data.dir": str(folder / "images"), "data.cache_dir": str(folder / "cache"),
        "data.image_size": SIDE, "data.crop": "whole", "data.mean": "pixel", "data.std": "channel",
        "data.flip": False, "init.head": "keep", "init.weights": "", "batch_size": 8, "eval.every": 3, "epochs": 0.0,
        "steps": 6, "log.tensorboard": False,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", row)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        assert run_task(config, folder / "mine", "train") == 0
        yield folder / "mine"


def test_the_page_of_a_run_has_its_config_and_its_figures(run, tmp_path):
    found = sections(export(run, tmp_path / "net.safetensors").read_text())
    assert json.loads(code(found["Config"], "json")) == json.loads((run / "config.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    said = table(found["Metrics"])
    assert float(said["top-1 error, %"]) == pytest.approx(summary["top1_error"], rel=1e-3)
    assert float(said["loss"]) == pytest.approx(summary["loss"], rel=1e-3)
    assert said["images evaluated"] == "21"
    assert said["protocol"] == summary["protocol"]
    assert said["steps"] == "6"
    assert found["Classes"] == "class0, class1, class2"
    assert table(found["net.safetensors"])["source"] == "mine (a run of ours)"
    assert "3 classes" in found["net.safetensors"]
    assert table(found["Preprocessing"])["mean, of values from 0 to 1"] == "the per-pixel mean image in the file"


@pytest.mark.parametrize("file", ["net.safetensors", "net.stablehlo"])
def test_the_code_on_a_runs_page_gives_the_logits_of_its_weights(file, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = export(run, tmp_path / file)
    pixels = np.random.default_rng(2).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    _, weights = read_weights(str(run), None)
    mean = np.load(run / "mean.npy")
    assert mean.shape == (SIDE, SIDE, 3)
    images = (pixels / 255 - mean) / np.array(json.loads((run / "data.json").read_text())["preprocessing"]["std"])
    expected = create_model("tiny", 3, "float32").apply(weights.variables, images.astype(np.float32))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(use(page, pixels), expected, atol=1e-4)


def test_history_goes_from_a_run_through_one_file_into_the_next(run, tmp_path):
    export(run, tmp_path / "first.safetensors")
    export(tmp_path / "first.safetensors", tmp_path / "second.safetensors")
    export(tmp_path / "second.safetensors", tmp_path / "third.stablehlo")
    first, second, third = (sections((tmp_path / f"{name}.md").read_text()) for name in
                            ("first.safetensors", "second.safetensors", "third.stablehlo"))  # fmt: skip
    for later in (second, third):
        for title in ("Metrics", "Config", "Classes", "Preprocessing"):
            assert later[title] == first[title]
    assert table(second["second.safetensors"])["source"] == "mine (a run of ours)"
    assert table(third["third.stablehlo"])["source"] == "mine (a run of ours)"


# Of whatever else there may be to say.


def weights(**changes) -> Pretrained:
    module = create_model("cifar_resnet8", 5, "float32")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    known = {"settings": {}, "variables": jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes),
             "preprocessing": None, "classes": None, "title": "a test's"}  # fmt: skip
    return Pretrained(**known | changes)


def test_what_is_not_known_is_said_so(tmp_path):
    found = sections(write_card(tmp_path / "net.safetensors", "cifar_resnet8", weights(), "arrays").read_text())
    assert table(found["net.safetensors"])["source"] == "not known"
    assert "settings" not in table(found["net.safetensors"])
    assert found["Preprocessing"] == "Not known."
    assert found["Classes"] == "Their names are not known."
    assert "preprocessing.normalise" not in found["Use"]  # There is none.


def test_a_centre_crop_and_grey_images_are_on_the_page(tmp_path):
    grey = Preprocessing((0.25,), (0.5,), 40, 44, "bicubic")
    page = write_card(tmp_path / "net.stablehlo", "cifar_resnet8", weights(preprocessing=grey), "program").read_text()
    assert table(sections(page)["Preprocessing"]) == {
        "resize": "shorter side to 44, bicubic, then the middle 40 x 40",
        "mean, of values from 0 to 1": "0.25",
        "deviation": "0.5",
    }
    assert "[N, 40, 40, 1]" in sections(page)["Use"]


def test_a_page_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "net.safetensors.md").mkdir()
    with pytest.raises(UsageError, match=r"net\.safetensors\.md: can't be written"):
        write_card(tmp_path / "net.safetensors", "cifar_resnet8", weights(), "arrays")
