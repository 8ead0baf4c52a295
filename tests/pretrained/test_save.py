"""What we write, read again: bit for bit with all that belongs to it; programs; runs on grey images."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

from flax import traverse_util
import jax
from jax import export, numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file

from resnet_jax import UsageError, create_model, load_pretrained
from resnet_jax.classification.predict import predict
from resnet_jax.config import load_config, validate
from resnet_jax.data.sources import SOURCES, Dataset, Images
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.load import Pretrained, read_pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.program import save_program
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights
from resnet_jax.run import run_task

PREPROCESSING = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 40, 44, "bicubic")


def weights(model: str, **settings) -> Pretrained:
    """Random weights and statistics, of which all arrays differ."""
    size, random = 32 if model.startswith("cifar") else 64, np.random.default_rng(0)
    module = create_model(model, 5, "float32", **settings)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim == 1:
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (random.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return Pretrained(settings, jax.tree.map(draw, shapes), PREPROCESSING, tuple("abcde"), "a test's")


def flat(variables: dict) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(variables, sep="/")


def assert_same_bits(found: dict, expected: dict) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("model", "settings"),
    [("resnet18", {}), ("resnet50", {}), ("resnet50_v1_5", {}), ("resnet34_a", {}), ("cifar_plain20", {}),
     ("cifar_highway20", {}), ("cifar_resnet20", {"shortcut": "A", "shortcut_zeros": "both"})],
)  # fmt: skip
def test_what_is_written_is_read_again_bit_for_bit_with_all_that_belongs_to_it(model, settings, tmp_path):
    ours = weights(model, **settings)
    save_safetensors(tmp_path / "net.safetensors", model, ours)
    name, again = read_pretrained(tmp_path / "net.safetensors", None)  # It knows its network.
    assert name == model
    assert_same_bits(again.variables, ours.variables)
    assert (again.settings, again.preprocessing, again.classes) == (settings, PREPROCESSING, tuple("abcde"))
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


PROGRAM = """
import sys
sys.modules["resnet_jax"] = None  # Whoever imports it fails.
import numpy as np
from jax import export
program = export.deserialize(open("net.stablehlo", "rb").read())
images = np.load("images.npy")
np.savez("logits.npz", all=program.call(images), one=program.call(images[:1]))
"""


def test_a_program_needs_nothing_of_ours_and_equals_apply_for_any_batch(tmp_path):
    ours = weights("cifar_resnet20")
    save_program(tmp_path / "net.stablehlo", "cifar_resnet20", ours)
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    found = np.load(tmp_path / "logits.npz")
    normalised = ((images / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)).astype(np.float32)
    expected = create_model("cifar_resnet20", 5, "float32").apply(ours.variables, normalised)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found["all"], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["one"], expected[:1], atol=1e-4, rtol=0)


# A damaged file of ours.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": None}, "holds an unnamed network, not cifar_resnet8"),
        ({"preprocessing": "{"}, "its metadata is damaged"),
        ({"preprocessing": "[1, 2]"}, "its metadata is damaged"),
        ({"preprocessing": '{"colour": "red"}'}, "its metadata is damaged"),
        ({"settings": "7"}, "its metadata is damaged"),
        ({"classes": "a, b"}, "its metadata is damaged"),
        ({"classes": "7"}, "its metadata is damaged"),
        ({"mean_image": "AAAA"}, "its metadata is damaged"),
        ({"history": "nothing"}, "its metadata is damaged"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["cifar_resnet8", None])
def test_damaged_metadata_are_one_line(change, says, model, tmp_path):
    path = tmp_path / "net.safetensors"
    save_safetensors(path, "cifar_resnet8", weights("cifar_resnet8"))
    arrays, metadata = load_file(path), metadata_of(path)
    assert metadata["format"] == "resnet_jax"
    changed = {name: value for name, value in (metadata | change).items() if value is not None}
    save_file(arrays, path, changed)
    with pytest.raises(UsageError) as error:
        load_pretrained(str(path), model)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    if model or "model" not in change:
        assert says in text
    else:
        assert "None" not in text  # Nobody named a network.


def metadata_of(path: pathlib.Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


# A run on images of one channel.


SIDE = 8


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A run of six steps, and its test images, uint8 [N, 8, 8, 1]."""
    folder, random = tmp_path_factory.mktemp("grey"), np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int32) % 3
    pixels = (random.integers(0, 100, (40, SIDE, SIDE, 1)) + 70 * labels[:, None, None, None]).astype(np.uint8)
    everything = Images(pixels, labels)
    dataset = Dataset(everything.subset(np.arange(30)), everything.subset(np.arange(30, 40)), ("zero", "one", "two"))
    config = load_config("finetune_folder")
    changes = {
        "model.name": "tiny", "data.source": "digits", "data.image_size": SIDE, "data.crop": "whole",
        "data.mean": "pixel", "data.std": "channel", "data.flip": False, "init.head": "keep", "batch_size": 8,
        "eval.every": 6, "epochs": 0.0, "steps": 6, "log.tensorboard": False, "schedule.learning_rate": 0.1,
        "schedule.warmup_steps": 0,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", row)
        patch.setitem(SOURCES, "digits", lambda data: dataset)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        assert run_task(config, folder / "run", "train") == 0
        yield folder / "run", dataset.test.images


@pytest.mark.parametrize("form", ["run", "file", "file of a file"])
def test_a_run_on_grey_images_and_its_file_predict_what_it_predicted(form, grey, tmp_path):
    run, images = grey
    source = run
    for number in range({"run": 0, "file": 1, "file of a file": 2}[form]):
        model, found = read_weights(str(source), None)
        source = tmp_path / f"{number}.safetensors"
        save_safetensors(source, model, found)
    model, found = read_weights(str(source), None)
    assert_same_bits(found.variables, read_weights(str(run), None)[1].variables)
    assert found.variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 1, 4)
    np.testing.assert_array_equal(found.preprocessing.mean_image, np.load(run / "mean.npy"))
    assert found.classes == ("zero", "one", "two")
    with np.load(run / "predictions.npz") as file:
        index, expected = file["index"], file["probabilities"]
    assert np.ptp(expected[:, 0]) > 0.01  # The images make a difference.
    paths = []
    for i in index:
        paths.append(str(tmp_path / f"{i:03}.png"))
        Image.fromarray(images[i].squeeze(-1)).save(paths[-1])
    predictions = list(predict(model, found, paths, batch=4))
    np.testing.assert_array_equal([one.pixels for one in predictions], images[index])
    np.testing.assert_allclose([one.probabilities for one in predictions], expected, atol=1e-5, rtol=0)


def test_a_program_of_a_run_on_grey_images_predicts_what_it_predicted(grey, tmp_path):
    run, images = grey
    model, found = read_weights(str(run), None)
    save_safetensors(tmp_path / "net.safetensors", model, found)
    save_program(tmp_path / "net.stablehlo", *read_weights(str(tmp_path / "net.safetensors"), None))
    logits = np.asarray(export.deserialize((tmp_path / "net.stablehlo").read_bytes()).call(images))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    with np.load(run / "predictions.npz") as file:
        expected = file["probabilities"][np.argsort(file["index"])]
    np.testing.assert_allclose(powers / powers.sum(1, keepdims=True), expected, atol=1e-5, rtol=0)


def test_a_mean_image_of_an_image_of_ours_is_in_the_metadata_and_comes_again(tmp_path):
    image = np.random.default_rng(0).uniform(0, 1, (40, 40, 3)).astype(np.float32)
    ours = weights("cifar_resnet8")
    ours = dataclasses.replace(ours, preprocessing=dataclasses.replace(PREPROCESSING, mean_image=image))
    save_safetensors(tmp_path / "net.safetensors", "cifar_resnet8", ours)
    assert load_file(tmp_path / "net.safetensors").keys() == flat(ours.variables).keys()
    again = read_pretrained(tmp_path / "net.safetensors", None)[1].preprocessing
    np.testing.assert_array_equal(again.mean_image, image)
    assert again.mean_image.dtype == np.float32
