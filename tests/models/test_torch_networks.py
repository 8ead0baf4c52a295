"""Our networks against an independent implementation in PyTorch, from the same random weights."""

import functools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch_networks  # noqa: E402
from torch_networks import load_variables, random_variables  # noqa: E402

from resnet_jax.models.normalisation import BatchNorm, GroupNorm  # noqa: E402
from resnet_jax.models.registry import create_model  # noqa: E402
from resnet_jax.models.resnet import ResNet  # noqa: E402
from resnet_jax.models.vgg import VGG  # noqa: E402

torch.set_num_threads(1)

# Largest difference, as a share of the array's largest value where that is above 1.
TOLERANCE = 1e-4
# With 64 pixels every strided layer reads an even height and width, with 65 an odd one.
SIZES = (64, 65)
CIFAR_SIZES = (16, 17)
BLOCKS = {
    "basic": {"bottleneck": False},
    "bottleneck v1": {"bottleneck": True, "stride_in": "first"},
    "bottleneck v1.5": {"bottleneck": True, "stride_in": "middle"},
}
SHORTCUTS = {
    "A, zeros at the end": {"shortcut": "A", "shortcut_zeros": "end"},
    "A, zeros on both sides": {"shortcut": "A", "shortcut_zeros": "both"},
    "B": {"shortcut": "B"},
    "C": {"shortcut": "C"},
    "plain": {"shortcut": "none"},
    "gated": {"shortcut": "gated"},
}
BOTH_MODES = pytest.mark.parametrize("train", [False, True], ids=["running statistics", "batch statistics"])


def random_images(size: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, size, size, 3), np.float32)


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2)


def our_features(model: ResNet, variables: Any, images: np.ndarray, train: bool) -> dict[str, np.ndarray]:
    """Outputs of the stem, the stages and the classifier, channels first."""

    def features(module, images):
        outputs = module.features(images, train)
        return outputs | {"logits": module.classify(outputs[f"stage{len(module.blocks)}"])}

    outputs, _ = model.apply(variables, images, mutable=["batch_stats"], method=features)
    return {name: np.moveaxis(np.asarray(output), -1, 1) for name, output in outputs.items()}


def torch_features(network: torch_networks.ResNet, images: np.ndarray, train: bool) -> dict[str, np.ndarray]:
    """The same of a torch network, from its first layer to its last."""
    with torch.no_grad():
        return {name: output.numpy() for name, output in network.train(train).features(channels_first(images))}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())


def assert_same_features(ours: ResNet, theirs: torch_networks.ResNet, variables: Any, size: int, train: bool):
    """Names the first of stem, stage1, ..., logits that differs."""
    load_variables(theirs, variables)
    images = random_images(size)
    found = our_features(ours, variables, images, train)
    for name, expected in torch_features(theirs, images, train).items():
        assert found[name].shape == expected.shape, name
        off = difference(found[name], expected)
        assert off <= TOLERANCE, f"{name} is the first to differ, by {off:.1e}"


@functools.cache
def imagenet_networks(block: str, shortcut: str) -> tuple[ResNet, torch_networks.ResNet, Any]:
    """Ours, the torch one and random variables; the second block of stage1 leaves the shape as it is."""
    layers, widths = (2, 1, 1), (16, 32, 64)
    settings = SHORTCUTS[shortcut]
    ours = ResNet(layers, widths, num_classes=10, stem_width=16, **BLOCKS[block], **settings)
    option, zeros = settings["shortcut"].replace("none", "plain"), settings.get("shortcut_zeros", "end")
    theirs = torch_networks.ResNet(block, layers, widths, 10, option, zeros, stem_width=16)
    return ours, theirs, random_variables(ours, (64, 64, 3), seed=0)


@BOTH_MODES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_stage_of_an_imagenet_network_is_torchs(block, shortcut, size, train):
    assert_same_features(*imagenet_networks(block, shortcut), size, train)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_last_stage_of_stride_1_is_torchs(block):
    ours, _, variables = imagenet_networks(block, "B")
    theirs = torch_networks.ResNet(block, ours.blocks, ours.widths, 10, "B", stem_width=16)
    for layer in theirs.layer3[0].modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.stride = (1, 1)
    assert_same_features(ours.clone(last_stride=1), theirs, variables, 65, train=False)


@BOTH_MODES
@pytest.mark.parametrize("size", CIFAR_SIZES)
@pytest.mark.parametrize(
    ("name", "shortcut"), [("cifar_resnet8", "A"), ("cifar_plain8", "plain"), ("cifar_highway8", "gated")]
)
def test_every_stage_of_a_cifar_network_is_torchs(name, shortcut, size, train):
    ours = create_model(name, dtype="float32")
    theirs = torch_networks.ResNet("basic", (1, 1, 1), (16, 32, 64), 10, shortcut, stem="cifar", stem_width=16)
    assert_same_features(ours, theirs, random_variables(ours, (size, size, 3), seed=0), size, train)


@BOTH_MODES
def test_batch_norm_of_variances_near_epsilon_is_torchs(train):
    rng = np.random.default_rng(0)
    deviation = np.float32([1e-4, 1e-3, 3e-3, 1e-2, 0.1, 1])
    x = deviation * rng.standard_normal((8, 3, 3, 6), np.float32)
    scale, bias = rng.standard_normal((2, 6), np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": deviation, "var": np.square(deviation)},
    }
    norm = torch.nn.BatchNorm2d(6).train(train)
    norm.load_state_dict(
        {
            "weight": torch.tensor(scale),
            "bias": torch.tensor(bias),
            "running_mean": torch.tensor(deviation),
            "running_var": torch.tensor(np.square(deviation)),
            "num_batches_tracked": torch.tensor(0),
        }
    )
    ours, _ = BatchNorm().apply(variables, x, train, mutable=["batch_stats"])
    theirs = norm(channels_first(x)).permute(0, 2, 3, 1).detach().numpy()
    assert difference(np.asarray(ours), theirs) <= TOLERANCE


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm_is_torchs(groups):
    rng = np.random.default_rng(0)
    x = (10 * rng.standard_normal((3, 5, 7, 12)) + rng.uniform(-50, 50, 12)).astype(np.float32)
    scale, bias = rng.standard_normal((2, 12), np.float32)
    theirs = torch.nn.functional.group_norm(channels_first(x), groups, torch.tensor(scale), torch.tensor(bias))
    for train in (False, True):
        ours = GroupNorm(f"group_norm:{groups}").apply({"params": {"scale": scale, "bias": bias}}, x, train)
        assert difference(np.asarray(ours), theirs.permute(0, 2, 3, 1).numpy()) <= TOLERANCE


@functools.cache
def vgg_networks(normalise: bool) -> tuple[VGG, torch_networks.VGG, Any]:
    """VGG nets of two narrow stages, for images of 28 pixels and up."""
    layers, widths = (1, 2), (4, 8)
    ours = VGG(layers, widths, num_classes=10, normalise=normalise)
    theirs = torch_networks.VGG(layers, widths, classes=10, batch_norm=normalise).eval()
    variables = random_variables(ours, (28, 28, 3), seed=0)
    load_variables(theirs, variables)
    return ours, theirs, variables


@pytest.mark.parametrize("normalise", [False, True], ids=["vgg", "vgg with batch normalisation"])
def test_vgg_is_torchs(normalise):
    ours, theirs, variables = vgg_networks(normalise)
    images = random_images(28)
    features = ours.apply(variables, images, method="features")
    with torch.no_grad():
        for name, expected in theirs.features(channels_first(images)).items():
            assert difference(np.moveaxis(np.asarray(features[name]), -1, 1), expected.numpy()) <= TOLERANCE, name
        logits = theirs(channels_first(images)).numpy()
    assert difference(np.asarray(ours.apply(variables, images)), logits) <= TOLERANCE


def test_vgg_averages_torchs_logits_over_all_windows_of_a_larger_image():
    ours, theirs, variables = vgg_networks(normalise=False)
    images = random_images(37)
    with torch.no_grad():
        features = theirs.features(channels_first(images))["stage2"]
        assert features.shape[2:] == (9, 9)
        windows = [features[:, :, top : top + 7, left : left + 7] for top in range(3) for left in range(3)]
        expected = torch.stack([theirs.classify(window) for window in windows]).mean(0).numpy()
    assert difference(np.asarray(ours.apply(variables, images)), expected) <= TOLERANCE
