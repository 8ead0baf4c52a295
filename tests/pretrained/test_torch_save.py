"""What we write against PyTorch that reads it, and against ourselves."""

import dataclasses
import pathlib
import subprocess
import sys

from flax import traverse_util
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from safetensors.torch import load_file  # noqa: E402
import torch_networks  # noqa: E402
from torch_networks import random_variables  # noqa: E402

from resnet_jax import create_model  # noqa: E402
from resnet_jax.pretrained.load import Pretrained, read_pretrained  # noqa: E402
from resnet_jax.pretrained.preprocessing import Preprocessing  # noqa: E402
from resnet_jax.pretrained.program import save_program  # noqa: E402
from resnet_jax.pretrained.save import save_safetensors  # noqa: E402

PREPROCESSING = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 40, 44, "bicubic")


def weights(model: str, **settings) -> Pretrained:
    size = 32 if model.startswith("cifar") else 64
    variables = jax.tree.map(
        np.asarray, random_variables(create_model(model, 5, "float32", **settings), (size, size, 3), 0)
    )
    return Pretrained(settings, variables, PREPROCESSING, tuple("abcde"), "a test's")


TWINS = {
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet50_v1_5": ("bottleneck v1.5", (3, 4, 6, 3), (256, 512, 1024, 2048)),
}


def assert_torch_gives_the_same(file: pathlib.Path, model: str, ours: Pretrained) -> None:
    """A PyTorch network takes the file strictly, and has our logits."""
    block, layers, widths = TWINS[model]
    network = torch_networks.ResNet(block, layers, widths, 5, "B")
    network.load_state_dict(load_file(file), strict=True)
    images = np.random.default_rng(0).standard_normal((2, 65, 65, 3), np.float32)
    with torch.no_grad():
        expected = network.eval()(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    logits = jax.jit(create_model(model, 5, "float32").apply)(ours.variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", TWINS)
def test_torchvisions_networks_load_strictly_and_give_the_same_logits(model, tmp_path):
    ours = weights(model)
    save_safetensors(tmp_path / "net.safetensors", model, ours)
    assert_torch_gives_the_same(tmp_path / "net.safetensors", model, ours)


def test_a_mean_image_is_in_the_file_and_not_in_torchs_way(tmp_path):
    image = np.random.default_rng(0).uniform(0, 1, (40, 40, 3)).astype(np.float32)
    ours = weights("resnet18")
    ours = dataclasses.replace(ours, preprocessing=dataclasses.replace(PREPROCESSING, mean_image=image))
    save_safetensors(tmp_path / "net.safetensors", "resnet18", ours)
    assert_torch_gives_the_same(tmp_path / "net.safetensors", "resnet18", ours)
    again = read_pretrained(tmp_path / "net.safetensors", "resnet18")[1].preprocessing
    np.testing.assert_array_equal(again.mean_image, image)
    assert again.mean_image.dtype == np.float32
    assert again == PREPROCESSING  # But for the image, which a comparison leaves out.
    pixels = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), np.uint8)
    expected = (pixels / 255 - image) / np.array(PREPROCESSING.std)
    np.testing.assert_allclose(again.normalise(pixels), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "settings"),
    [("resnet18", {}), ("resnet50", {}), ("resnet50_v1_5", {}), ("resnet34_a", {}), ("cifar_plain20", {}),
     ("cifar_highway20", {}), ("cifar_resnet20", {"shortcut": "A", "shortcut_zeros": "both"})],
)  # fmt: skip
def test_what_is_written_is_read_again_bit_for_bit_with_all_that_belongs_to_it(model, settings, tmp_path):
    ours = weights(model, **settings)
    save_safetensors(tmp_path / "net.safetensors", model, ours)
    again = read_pretrained(tmp_path / "net.safetensors", model)[1]
    flat, expected = (traverse_util.flatten_dict(tree.variables, sep="/") for tree in (again, ours))
    assert flat.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(flat[name], array)
    assert (again.settings, again.preprocessing, again.classes) == (settings, PREPROCESSING, tuple("abcde"))
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_program_needs_nothing_of_ours_and_equals_apply_for_any_batch(tmp_path):
    ours = weights("cifar_resnet20")
    save_program(tmp_path / "net.stablehlo", "cifar_resnet20", ours)
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = """
import sys
sys.modules["resnet_jax"] = None  # Whoever imports it fails.
import numpy as np
from jax import export
program = export.deserialize(open("net.stablehlo", "rb").read())
images = np.load("images.npy")
np.savez("logits.npz", all=program.call(images), one=program.call(images[:1]))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    found = np.load(tmp_path / "logits.npz")
    normalised = ((images / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)).astype(np.float32)
    expected = create_model("cifar_resnet20", 5, "float32").apply(ours.variables, normalised)
    np.testing.assert_allclose(found["all"], expected, atol=1e-4)
    np.testing.assert_allclose(found["one"], expected[:1], atol=1e-4)
