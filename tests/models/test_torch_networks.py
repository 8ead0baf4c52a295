"""Our networks against an independent implementation in PyTorch, from the same random weights."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402
from torch_networks import load_variables, random_variables  # noqa: E402

from resnet_jax.models.resnet import ResNet  # noqa: E402
from resnet_jax.models.vgg import VGG  # noqa: E402

torch.set_num_threads(1)

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
    "gated": {"shortcut": "gated", "shortcut_zeros": "end"},
}
# With 64 pixels every strided layer reads an even height and width, with 65 an odd one.
SIZES = {"imagenet": (64, 65), "cifar": (16, 17)}
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def networks(block: str, shortcut: str, stem: str) -> tuple[ResNet, torch_networks.ResNet]:
    """Our network and the torch one, of the same small size."""
    settings = SHORTCUTS[shortcut]
    layers, widths = ((2, 1, 1, 2), (16, 32, 64, 128)) if stem == "imagenet" else ((1, 2, 1), (16, 32, 64))
    ours = ResNet(layers, widths, num_classes=10, stem=stem, stem_width=16, **BLOCKS[block], **settings)
    theirs = torch_networks.ResNet(
        block,
        layers,
        widths,
        classes=10,
        shortcut=settings["shortcut"].replace("none", "plain"),
        zeros=settings.get("shortcut_zeros", "end"),
        stem=stem,
        stem_width=16,
    )
    return ours, theirs


def our_features(model: ResNet, variables, images: np.ndarray, train: bool) -> dict[str, np.ndarray]:
    def apply(variables, images):
        def features(module, images):
            outputs = module.features(images, train)
            return outputs | {"logits": module.classify(outputs[f"stage{len(module.blocks)}"])}

        return model.apply(variables, images, mutable=["batch_stats"], method=features)[0]

    outputs = APPLY(apply)(variables, jnp.asarray(images))
    return {name: np.moveaxis(np.asarray(output), -1, 1) for name, output in outputs.items()}

import os
APPLY = jax.jit if os.environ.get("JIT") else (lambda f: f)

def torch_features(network, images: np.ndarray, train: bool) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = network.train(train).features(torch.tensor(images).permute(0, 3, 1, 2))
        return {name: output.numpy() for name, output in outputs}


def first_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str:
    """The first array, in the torch network's order, that is off by more than the tolerance; empty where none is."""
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            return f"{name}: ours is {ours[name].shape}, torch's {expected.shape}"
        error = np.abs(ours[name] - expected).max() / max(1, np.abs(expected).max())
        print(name, error, np.abs(expected).max(), expected.std())
        if not error <= TOLERANCE:
            return f"{name}: off by {error:.1e}"
    return ""


@pytest.mark.parametrize("train", [False, True], ids=["running statistics", "batch statistics"])
@pytest.mark.parametrize("parity", ["even", "odd"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_stage_is_torchs(block, shortcut, parity, train):
    size = SIZES["imagenet"][parity == "odd"]
    ours, theirs = networks(block, shortcut, "imagenet")
    images = np.random.default_rng(1).standard_normal((4, size, size, 3), np.float32)
    variables = random_variables(ours, images.shape[1:], seed=0)
    load_variables(theirs, variables)
    assert not first_difference(our_features(ours, variables, images, train), torch_features(theirs, images, train))
