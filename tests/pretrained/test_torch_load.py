"""Weights in torchvision's, timm's and akamaster's names against PyTorch networks that hold the same arrays."""

import json
import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from safetensors.numpy import save_file as save_arrays  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
import torch_networks  # noqa: E402

import resnet_jax  # noqa: E402
from resnet_jax import UsageError  # noqa: E402
from resnet_jax.pretrained.load import read_pretrained  # noqa: E402

torch.set_num_threads(1)
TOLERANCE = 1e-4  # Absolute, of logits of about unit size.
IMAGENET = {
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50_v1_5": ("bottleneck v1.5", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101_v1_5": ("bottleneck v1.5", (3, 4, 23, 3), (256, 512, 1024, 2048)),
}


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights and random statistics, so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(1, 3, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3, generator=generator)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.0, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(0, float(1 / np.sqrt(tensor[0].numel())), generator=generator)
    return network.eval()


def imagenet(name: str, classes: int = 10) -> torch.nn.Module:
    block, layers, widths = IMAGENET[name]
    return randomise(torch_networks.ResNet(block, layers, widths, classes, "B"))


def cifar(depth: int, zeros: str = "end", shortcut: str = "A") -> torch.nn.Module:
    blocks = ((depth - 2) // 6,) * 3
    widths = (16, 32, 64)
    return randomise(torch_networks.ResNet("basic", blocks, widths, 10, shortcut, zeros, stem="cifar", stem_width=16))


def akamasters(network: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict with that repository's names and wrapping."""
    return {"state_dict": {f"module.{name}".replace("fc.", "linear."): t for name, t in network.state_dict().items()}}


def assert_same_network(network: torch.nn.Module, file, model: str, sizes: tuple[int, ...]) -> None:
    module, variables, _ = resnet_jax.load_pretrained(file, model, dtype="float32")
    ours = jax.jit(lambda v, x: module.apply(v, x, method="features") | {"logits": module.apply(v, x)})
    for size in sizes:
        images = np.random.default_rng(size).standard_normal((2, size, size, 3), np.float32)
        found = ours(variables, images)
        with torch.no_grad():
            for name, expected in network.features(torch.tensor(images).permute(0, 3, 1, 2)):
                array = np.asarray(found[name])
                array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
                np.testing.assert_allclose(array, expected.numpy(), atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    "model",
    [
        "resnet18",
        "resnet50_v1_5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet101_v1_5")),
    ],
)
def test_torchvision_networks_give_the_same_logits_and_features(model, tmp_path):
    network = imagenet(model)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    assert_same_network(network, tmp_path / "net.pth", model, (64, 75))


def torch_blocks(network: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """What leaves every block, [N, H, W, C], by our names."""
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str):
        return lambda module, given, output: outputs.update({name: output.permute(0, 2, 3, 1).numpy()})

    handles = [
        block.register_forward_hook(keep(f"{stage.replace('layer', 'stage')}/block{number}"))
        for stage in network.stages
        for number, block in enumerate(getattr(network, stage), start=1)
    ]
    with torch.no_grad():
        network(torch.tensor(images).permute(0, 3, 1, 2))
    for handle in handles:
        handle.remove()
    return outputs


def our_blocks(module, variables, images: np.ndarray) -> dict[str, np.ndarray]:
    """The same of ours."""
    _, kept = jax.jit(lambda v, x: module.apply(v, x, capture_intermediates=True, mutable=["intermediates"]))(
        variables, images
    )
    return {
        f"{stage}/{block}": np.asarray(inside["__call__"][0])
        for stage, blocks in kept["intermediates"].items() if stage.startswith("stage")
        for block, inside in blocks.items() if block.startswith("block")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "make", "sizes", "blocks"),
    [
        ("resnet18", lambda: imagenet("resnet18"), (64, 75), 8),
        ("resnet50_v1_5", lambda: imagenet("resnet50_v1_5"), (64, 75), 16),
        ("cifar_resnet20", lambda: cifar(20, "end"), (32, 29), 9),
        ("cifar_resnet20", lambda: cifar(20, "both"), (32, 29), 9),
    ],
    ids=["resnet18", "resnet50_v1_5", "cifar zeros end", "cifar zeros both"],
)
def test_every_block_gives_the_same(model, make, sizes, blocks, tmp_path):
    network = make()
    content = akamasters(network) if getattr(network.layer2[0].downsample, "before", 0) else network.state_dict()
    torch.save(content, tmp_path / "net.pth")
    module, variables, _ = resnet_jax.load_pretrained(str(tmp_path / "net.pth"), model, dtype="float32")
    for size in sizes:
        images = np.random.default_rng(size).standard_normal((2, size, size, 3), np.float32)
        expected, found = torch_blocks(network, images), our_blocks(module, variables, images)
        assert len(expected) == blocks
        assert found.keys() == expected.keys()
        for name, array in expected.items():  # In order, so that the first that differs has the mistake.
            assert array.std() > 0.05, name
            np.testing.assert_allclose(found[name], array, atol=TOLERANCE, rtol=0, err_msg=f"{name} at {size}")


@pytest.mark.parametrize(
    ("model", "make"),
    [
        ("resnet18", lambda: imagenet("resnet18")),
        ("resnet50_v1_5", lambda: imagenet("resnet50_v1_5")),
        ("cifar_resnet20", lambda: cifar(20)),
    ],
    ids=["resnet18", "resnet50_v1_5", "cifar_resnet20"],
)
def test_biases_of_convolutions_before_bn_go_into_its_mean(model, make, tmp_path):
    network = make()
    without = network(torch.zeros(1, 3, 32, 32)).detach()
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.bias = torch.nn.Parameter(torch.zeros(part.out_channels))
    randomise(network)
    state = network.state_dict()
    assert "conv1.bias" in state
    assert "layer1.0.conv1.bias" in state
    assert ("layer2.0.downsample.0.bias" in state) == model.startswith("resnet")
    assert not torch.allclose(network(torch.zeros(1, 3, 32, 32)), without, atol=0.01)
    save_file(state, tmp_path / "net.safetensors")
    assert_same_network(network, tmp_path / "net.safetensors", model, (33,))


@pytest.mark.parametrize("depth", [20, pytest.param(56, marks=pytest.mark.slow)])
@pytest.mark.parametrize("zeros", ["end", "both"])
def test_cifar_networks_give_the_same_logits_with_either_padding(depth, zeros, tmp_path):
    network = cifar(depth, zeros)
    content = akamasters(network) if zeros == "both" else network.state_dict()
    torch.save(content, tmp_path / "net.th", _use_new_zipfile_serialization=zeros == "end")
    assert_same_network(network, tmp_path / "net.th", f"cifar_resnet{depth}", (32, 29))


def test_plain_cifar_networks_come_in_as_well(tmp_path):
    network = cifar(20, shortcut="plain")
    torch.save(network.state_dict(), tmp_path / "net.pt")
    assert_same_network(network, tmp_path / "net.pt", "cifar_plain20", (32,))


@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_projections_of_a_cifar_network_are_seen_in_its_names(shortcut, tmp_path):
    network = cifar(20, shortcut=shortcut)
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    assert_same_network(network, tmp_path / "net.safetensors", "cifar_resnet20", (32,))


def test_safetensors_and_pth_give_the_same_bits_and_timms_config_the_preprocessing(tmp_path):
    network = imagenet("resnet18")
    torch.save({"model": network.state_dict()}, tmp_path / "net.pth")
    _, pth, preprocessing = resnet_jax.load_pretrained(str(tmp_path / "net.pth"), "resnet18")
    assert (preprocessing.mean, preprocessing.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (preprocessing.image_size, preprocessing.resize, preprocessing.interpolation) == (224, 256, "bilinear")
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "input_size": [3, 288, 288], "crop_pct": 0.95,
              "interpolation": "bicubic"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": config}))
    _, tensors, preprocessing = resnet_jax.load_pretrained(str(tmp_path / "model.safetensors"), "resnet18")
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    assert (preprocessing.image_size, preprocessing.resize, preprocessing.interpolation) == (288, 303, "bicubic")
    jax.tree.map(np.testing.assert_array_equal, pth, tensors)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "resnetaa50"}, "config.json: is of timm's resnetaa50, which is no network here"),
        ({"architecture": "resnet34"}, "holds resnet34 (says config.json beside it), not resnet18"),
        ({"architecture": "resnet50"}, "holds resnet50_v1_5 (says config.json beside it), not resnet18"),
        ({"pretrained_cfg": {"mean": [0, 0, 0]}}, "config.json: no config of timm's"),
        ({"pretrained_cfg": None}, "config.json: no config of timm's"),
    ],
)
def test_timms_config_of_another_network_is_named(config, says, tmp_path):
    whole = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "input_size": [3, 64, 64], "interpolation": "bicubic"}
    values = {"architecture": "resnet18", "pretrained_cfg": whole} | config
    (tmp_path / "config.json").write_text(json.dumps(values))
    state = imagenet("resnet18").state_dict()
    assert says in refused(tmp_path / "model.pth", state, "resnet18", names=tmp_path)


class Attack:
    """What a stranger's pickle may hold."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('attacked').touch()",))


def refused(path: pathlib.Path, content, model: str = "resnet18", names: pathlib.Path | None = None) -> str:
    """The one line that a file gives, which names it (or ``names``)."""
    torch.save(content, path)
    with pytest.raises(UsageError) as error:
        resnet_jax.load_pretrained(str(path), model)
    text = str(error.value)
    assert "\n" not in text
    assert str(names or path) in text
    return text


def test_a_pickle_that_executes_code_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused(tmp_path / "net.pth", {"conv1.weight": Attack()})
    assert "not a whole torch file of weights alone" in text
    assert not (tmp_path / "attacked").exists()


def test_a_truncated_file_is_named(tmp_path):
    torch.save(imagenet("resnet18").state_dict(), tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes((tmp_path / "net.pth").read_bytes()[:-1000])
    with pytest.raises(UsageError, match="not a whole torch file"):
        resnet_jax.load_pretrained(str(tmp_path / "net.pth"), "resnet18")


def test_every_array_is_used_or_named(tmp_path):
    path, state = tmp_path / "net.pth", imagenet("resnet18").state_dict()
    name = "layer3.1.bn2.running_var"
    missing = {key: value for key, value in state.items() if key != name}
    assert f"{name} is missing" in refused(path, missing)
    assert "extra.weight is no part of resnet18" in refused(path, state | {"extra.weight": torch.zeros(3)})
    text = refused(path, state | {name: torch.zeros(7)})
    assert f"{name} has shape (7,), and resnet18 needs (256,)" in text
    broken = state[name].clone()
    broken[3] = float("nan")
    assert f"{name} has values that are not finite" in refused(path, state | {name: broken})
    assert "holds no state dict" in refused(path, [1, 2, 3])
    assert "names of no known format" in refused(path, {"a": torch.zeros(1)})


def test_parameters_are_arrays_too(tmp_path):
    network = imagenet("resnet18")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    assert isinstance(state["fc.weight"], torch.nn.Parameter)
    assert state["fc.weight"].requires_grad
    torch.save(state, tmp_path / "net.pth")
    found, expected = (resnet_jax.load_pretrained(str(tmp_path / name), "resnet18")[1] for name in
                       ("net.pth", "plain.pth"))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of what is to go.
@pytest.mark.parametrize("change", [
    lambda state: state | {7: torch.zeros(3)},
    lambda state: state | {("fc", "weight"): torch.zeros(3)},
    lambda state: state | {"fc.bias": torch.ones(10).to_sparse()},
    lambda state: state | {"fc.weight": state["fc.weight"].to_sparse_csr()},
    lambda state: state | {"fc.bias": torch.quantize_per_tensor(torch.ones(10), 0.1, 0, torch.qint8)},
    lambda state: state | {"fc.bias": [0.0] * 10},
    lambda state: {"state_dict": state | {None: torch.zeros(1)}},
], ids=["number", "tuple", "sparse", "sparse rows", "quantised", "list", "none"])  # fmt: skip
def test_what_is_no_plain_array_with_a_name_is_one_line(change, tmp_path):
    text = refused(tmp_path / "net.pth", change(imagenet("resnet18").state_dict()))
    # Some are refused by torch's own reader.
    assert "holds no state dict (names with plain arrays)" in text or "not a whole torch file of weights alone" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_other_precisions_come_in_as_the_same_values_in_float32(dtype, suffix, tmp_path):
    path, state = tmp_path / f"net{suffix}", imagenet("resnet18").state_dict()
    cast = {name: array.to(dtype) if array.is_floating_point() else array for name, array in state.items()}
    (torch.save if suffix == ".pth" else save_file)(cast, path)
    _, variables, _ = resnet_jax.load_pretrained(str(path), "resnet18")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    params, stats = variables["params"], variables["batch_stats"]
    expected = {name: array.float().numpy() for name, array in cast.items()}
    np.testing.assert_array_equal(params["head"]["kernel"], expected["fc.weight"].T)
    kernel = expected["layer3.0.conv1.weight"]
    np.testing.assert_array_equal(params["stage3"]["block1"]["conv1"]["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(stats["stage1"]["block2"]["bn2"]["var"], expected["layer1.1.bn2.running_var"])


def test_a_value_that_float32_can_not_hold_is_named(tmp_path):
    state = {name: array.double() for name, array in imagenet("resnet18").state_dict().items()}
    state["layer2.0.bn1.weight"][5] = 1e300
    assert "layer2.0.bn1.weight has values that are not finite" in refused(tmp_path / "net.pth", state)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match=r"layer2\.0\.bn1\.weight has values that are not finite"):
        resnet_jax.load_pretrained(str(tmp_path / "net.safetensors"), "resnet18")


def test_another_depth_or_stride_than_the_file_s_is_named(tmp_path):
    path = tmp_path / "net.pth"
    assert "holds resnet18, not resnet34" in refused(path, imagenet("resnet18").state_dict(), "resnet34")
    text = refused(path, imagenet("resnet50_v1_5").state_dict(), "resnet50")
    assert "v1.5: ask for resnet50_v1_5, not resnet50" in text
    text = refused(path, imagenet("resnet50_v1_5").state_dict(), "resnet101_v1_5")
    assert "holds resnet50_v1_5, not resnet101_v1_5" in text
    assert "holds cifar_resnet20, not cifar_resnet32" in refused(path, cifar(20).state_dict(), "cifar_resnet32")


class TorchvisionsVGG(torch.nn.Module):
    """VGG-16 with torchvision's names: numbered layers in ``features`` and ``classifier``."""

    def __init__(self, normalised: bool, classes: int):
        super().__init__()
        layers, channels = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1)]
                layers += [torch.nn.BatchNorm2d(width)] if normalised else []
                layers += [torch.nn.ReLU()]
                channels = width
            layers += [torch.nn.MaxPool2d(2, 2)]
        self.features = torch.nn.Sequential(*layers)
        sizes, dropped = (512 * 7 * 7, 4096, 4096), []
        for inside, outside in zip(sizes, (4096, 4096), strict=False):
            dropped += [torch.nn.Linear(inside, outside), torch.nn.ReLU(), torch.nn.Dropout()]
        self.classifier = torch.nn.Sequential(*dropped, torch.nn.Linear(4096, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(images), 1))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "normalised"), [("vgg16", False), ("vgg16_bn", True)])
def test_vgg_16_gives_the_same_logits(model, normalised, tmp_path):
    network = randomise(TorchvisionsVGG(normalised, classes=7))
    save_file(network.state_dict(), tmp_path / "vgg.safetensors")
    module, variables, _ = resnet_jax.load_pretrained(str(tmp_path / "vgg.safetensors"), model, dtype="float32")
    images = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
    with torch.no_grad():
        expected = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images), expected, atol=TOLERANCE, rtol=0)


def vgg_state(normalised: bool, names: str, classes: int = 7) -> dict[str, np.ndarray]:
    """Random arrays of VGG-16 as torchvision has them, or the same ones as timm has them."""
    state = {
        name: tensor.numpy() for name, tensor in randomise(TorchvisionsVGG(normalised, classes)).state_dict().items()
    }
    if names == "torchvision":
        return state
    modules = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    # timm reads the map with a convolution of its size; a linear layer reads it channel by channel.
    shapes = {"pre_logits.fc1.weight": (4096, 512, 7, 7), "pre_logits.fc2.weight": (4096, 4096, 1, 1)}
    renamed = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".")
        timms = f"{modules.get(module, module)}.{leaf}"
        renamed[timms] = array.reshape(shapes.get(timms, array.shape))
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize(("model", "normalised"), [("vgg16", False), ("vgg16_bn", True)])
def test_timms_vgg_is_torchvisions_under_other_names(model, normalised, tmp_path):
    found = {}
    for names in ("torchvision", "timm"):
        state = vgg_state(normalised, names)
        save_arrays(state, tmp_path / f"{names}.safetensors")
        del state
        found[names] = read_pretrained(tmp_path / f"{names}.safetensors", model)[1]
    assert (found["torchvision"].num_classes, found["timm"].num_classes) == (7, 7)
    assert "timm" in found["timm"].title
    jax.tree.map(np.testing.assert_array_equal, found["timm"].variables, found["torchvision"].variables)


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (("features.0.weight", "classifier.0.weight"), "vgg16"),
        (("features.0.weight", "features.1.running_mean", "classifier.0.weight"), "vgg16_bn"),
        (("features.0.weight", "pre_logits.fc1.weight"), "vgg16"),
        (("features.0.weight", "features.1.running_mean", "pre_logits.fc1.weight"), "vgg16_bn"),
    ],
)
def test_a_vgg_is_seen_by_its_names_whatever_was_asked_for(names, held, tmp_path):
    # Names come before shapes, so that these need not be half a gigabyte.
    state = {name: torch.zeros(1) for name in names}
    assert f"holds {held}, not resnet50" in refused(tmp_path / "net.pth", state, "resnet50")
    other = {"vgg16": "vgg16_bn", "vgg16_bn": "vgg16"}[held]
    assert f"holds {held}, not {other}" in refused(tmp_path / "net.pth", state, other)


def test_a_resnet_asked_for_as_a_vgg_is_named(tmp_path):
    path = tmp_path / "net.pth"
    assert "holds resnet18, not vgg16" in refused(path, imagenet("resnet18").state_dict(), "vgg16")
    assert "holds resnet50_v1_5, not vgg16_bn" in refused(path, imagenet("resnet50_v1_5").state_dict(), "vgg16_bn")
    assert "holds cifar_resnet20, not vgg16" in refused(path, akamasters(cifar(20)), "vgg16")
