"""What we write against PyTorch that reads it."""

import dataclasses
import pathlib

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
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


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


class TorchvisionsVGG(torch.nn.Module):
    """VGG-16's layers under torchvision's names, of which the table of its paper says the widths."""

    def __init__(self, normalised: bool, classes: int):
        super().__init__()
        layers, inside = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                convolution = torch.nn.Conv2d(inside, width, 3, padding=1)
                layers += [convolution, *([torch.nn.BatchNorm2d(width)] if normalised else []), torch.nn.ReLU()]
                inside = width
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers)
        first, second = torch.nn.Linear(512 * 7 * 7, 4096), torch.nn.Linear(4096, 4096)
        rest = (torch.nn.ReLU(), torch.nn.Dropout(), second, torch.nn.ReLU(), torch.nn.Dropout())
        self.classifier = torch.nn.Sequential(first, *rest, torch.nn.Linear(4096, classes))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "normalised"), [("vgg16", False), ("vgg16_bn", True)])
def test_a_vgg_loads_strictly_in_pytorch_and_each_array_is_where_it_belongs(model, normalised, tmp_path):
    module = create_model(model, 5, "float32")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), shapes)
    save_safetensors(
        tmp_path / "vgg.safetensors", model, Pretrained({}, variables, PREPROCESSING, tuple("abcde"), "a test's")
    )
    with torch.device("meta"):  # Its own weights are not wanted.
        network = TorchvisionsVGG(normalised, classes=5)
    network.load_state_dict(load_file(tmp_path / "vgg.safetensors"), strict=True, assign=True)
    network.requires_grad_(False)
    params = variables["params"]
    convolutions = [part for part in network.features if isinstance(part, torch.nn.Conv2d)]
    ours = [params[f"stage{s}"][f"conv{c}"] for s, n in enumerate((2, 2, 3, 3, 3), 1) for c in range(1, n + 1)]
    for theirs, own in zip(convolutions, ours, strict=True):
        np.testing.assert_array_equal(theirs.weight.numpy(), own["kernel"].transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(theirs.bias.numpy(), own["bias"])
    norms = [part for part in network.features if isinstance(part, torch.nn.BatchNorm2d)]
    assert len(norms) == (13 if normalised else 0)
    if normalised:
        np.testing.assert_array_equal(norms[-1].running_var.numpy(), variables["batch_stats"]["stage5"]["bn3"]["var"])
        np.testing.assert_array_equal(norms[2].weight.numpy(), params["stage2"]["bn1"]["scale"])
    # Channel by channel: torch flattens [C, H, W].
    fc6 = network.classifier[0].weight.numpy().reshape(4096, 512, 7, 7)
    kernel = params["fc6"]["kernel"]
    for outside, inside, row, column in random.integers(0, (4096, 512, 7, 7), (50, 4)):
        assert fc6[outside, inside, row, column] == kernel[row, column, inside, outside]
    np.testing.assert_array_equal(network.classifier[3].weight.numpy(), params["fc7"]["kernel"].squeeze((0, 1)).T)
    np.testing.assert_array_equal(network.classifier[6].weight.numpy(), params["head"]["kernel"].T)
    np.testing.assert_array_equal(network.classifier[6].bias.numpy(), params["head"]["bias"])
