"""What a file's names, and timm's config beside it, say of the network: with arrays made here, without torch."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from resnet_jax import UsageError, load_pretrained
from resnet_jax.classification.predict import class_names
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.source import read_weights

Arrays = dict[str, np.ndarray]


def cifar(blocks: int, projected: bool = False, head: str = "fc") -> Arrays:
    """A CIFAR network with so many blocks in each of three stages, in PyTorch's names."""
    random, arrays = np.random.default_rng(blocks), {}

    def add(convolution: str, bn: str, *shape: int) -> None:
        arrays[f"{convolution}.weight"] = random.normal(0, 0.1, shape).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{bn}.{part}"] = random.uniform(0.5, 1.5, shape[0]).astype(np.float32)

    add("conv1", "bn1", 16, 3, 3, 3)
    inside = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            place = f"layer{stage}.{block}"
            if projected and inside != width:
                add(f"{place}.downsample.0", f"{place}.downsample.1", width, inside, 1, 1)
            add(f"{place}.conv1", f"{place}.bn1", width, inside, 3, 3)
            add(f"{place}.conv2", f"{place}.bn2", width, width, 3, 3)
            inside = width
    arrays[f"{head}.weight"] = random.normal(0, 0.1, (10, 64)).astype(np.float32)
    arrays[f"{head}.bias"] = random.normal(0, 0.1, 10).astype(np.float32)
    return arrays


def imagenet_names(blocks: tuple[int, ...], bottleneck: bool, projected: str) -> Arrays:
    """torchvision's names of the convolutions and the classifier, each with a single number: names come first."""
    names = ["conv1.weight", "fc.weight", "fc.bias"]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            names += [f"layer{stage}.{block}.conv{i}.weight" for i in range(1, 4 if bottleneck else 3)]
            names += [f"layer{stage}.{block}.bn{i}.weight" for i in range(1, 4 if bottleneck else 3)]
            first = block == 0 and (bottleneck or stage > 1)
            if projected == "all" or (projected == "first" and first):
                names.append(f"layer{stage}.{block}.downsample.0.weight")
    return {name: np.zeros(1, np.float32) for name in names}


def refused(path: pathlib.Path, arrays: Arrays, model: str | None) -> str:
    """The one line that a file of these arrays gives."""
    save_file(arrays, path)
    with pytest.raises(UsageError) as error:
        load_pretrained(str(path), model)
    text = str(error.value)
    assert text.startswith(f"{path.parent}")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [
        ("cifar_highway20", "cifar_resnet20"),
        ("cifar_highway32", "cifar_resnet20"),
        ("cifar_resnet32", "cifar_resnet20"),
        ("cifar_plain32", "cifar_plain20"),
    ],
)
@pytest.mark.parametrize("head", ["fc", "linear"])
def test_another_cifar_network_is_suggested_by_its_name(asked, suggested, head, tmp_path):
    text = refused(tmp_path / "net.safetensors", cifar(3, head=head), asked)
    assert text.endswith(f"holds {suggested}, not {asked}")
    load_pretrained(str(tmp_path / "net.safetensors"), suggested)  # Whoever does as it says gets it.


def test_a_plain_imagenet_network_is_suggested_for_plain(tmp_path):
    plain18 = imagenet_names((2, 2, 2, 2), bottleneck=False, projected="none")
    text = refused(tmp_path / "net.safetensors", plain18, "plain34")
    assert text.endswith("holds plain18, not plain34")


@pytest.mark.parametrize(
    ("arrays", "model"),
    [
        (imagenet_names((2, 2, 2, 2), False, "first"), "resnet18"),
        (imagenet_names((3, 4, 6, 3), False, "first"), "resnet34"),
        (imagenet_names((3, 4, 6, 3), True, "first"), "resnet50_v1_5"),
        (imagenet_names((3, 4, 23, 3), True, "first"), "resnet101_v1_5"),
        (imagenet_names((3, 8, 36, 3), True, "first"), "resnet152_v1_5"),
        ({f"features.{i}.weight": np.zeros(1) for i in (0, 2)} | {"classifier.0.weight": np.zeros(1)}, "vgg16"),
        ({f"features.1.{part}": np.zeros(1) for part in ("weight", "running_mean")}
         | {"classifier.0.weight": np.zeros(1)}, "vgg16_bn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_arrays_that_only_one_network_has_need_no_name(arrays, model, tmp_path):
    # It knows which network they are no weights of.
    text = refused(tmp_path / "net.safetensors", arrays, None)
    assert f"{model} needs" in text
    assert "--model" not in text


@pytest.mark.parametrize(
    "arrays",
    [
        imagenet_names((2, 2, 2, 2), False, "none"),  # plain18, or option A.
        imagenet_names((3, 4, 6, 3), False, "none"),
        imagenet_names((2, 2, 2, 2), False, "all"),  # Option C.
        imagenet_names((2, 3, 2, 2), False, "first"),  # None of ours.
        cifar(3),
        cifar(3, projected=True),
        cifar(3, head="linear"),
    ],
    ids=["plain18", "plain34", "option C", "another", "cifar", "cifar B", "akamaster"],
)
def test_arrays_that_several_networks_or_none_have_need_a_name(arrays, tmp_path):
    text = refused(tmp_path / "net.safetensors", arrays, None)
    assert text.endswith("does not say which network it is of: --model=NAME is needed")


def test_a_name_that_is_there_twice_but_for_module_is_named(tmp_path):
    arrays = cifar(1, head="linear")
    path = tmp_path / "net.safetensors"
    twice = arrays | {"module.linear.bias": arrays["linear.bias"] + 1}
    assert "module.linear.bias is no part of cifar_resnet8" in refused(path, twice, "cifar_resnet8")
    wrapped = {f"module.{name}": array for name, array in arrays.items()}
    text = refused(path, wrapped | {"linear.bias": arrays["linear.bias"]}, "cifar_resnet8")
    assert "linear.bias" in text or "no known format" in text
    # All of them wrapped is DataParallel's way.
    save_file(wrapped, path)
    _, variables, _ = load_pretrained(str(path), "cifar_resnet8")
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], arrays["linear.bias"])


def test_a_value_that_float32_can_not_hold_is_named(tmp_path):
    arrays = {name: array.astype(np.float64) for name, array in cifar(1).items()}
    arrays["layer2.0.bn1.weight"][5] = 1e300
    text = refused(tmp_path / "net.safetensors", arrays, "cifar_resnet8")
    assert "layer2.0.bn1.weight has values that are not finite" in text


# timm's config beside the weights.


TIMM = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "input_size": [3, 64, 64], "interpolation": "bicubic"}


def resnet18(classes: int) -> Arrays:
    """All of torchvision's arrays."""
    arrays = {"fc.weight": np.zeros((classes, 512), np.float32), "fc.bias": np.zeros(classes, np.float32)}

    def add(convolution: str, bn: str, *shape: int) -> None:
        arrays[f"{convolution}.weight"] = np.zeros(shape, np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{bn}.{part}"] = np.ones(shape[0], np.float32)

    add("conv1", "bn1", 64, 3, 7, 7)
    inside = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            place = f"layer{stage}.{block}"
            if inside != width:
                add(f"{place}.downsample.0", f"{place}.downsample.1", width, inside, 1, 1)
            add(f"{place}.conv1", f"{place}.bn1", width, inside, 3, 3)
            add(f"{place}.conv2", f"{place}.bn2", width, width, 3, 3)
            inside = width
    return arrays


def write_timm(folder: pathlib.Path, pretrained: dict | None = None, **values) -> pathlib.Path:
    config = {"architecture": "resnet18", "pretrained_cfg": TIMM | (pretrained or {})} | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"interpolation": "lanczos"}, "interpolation lanczos"),
        ({"crop_mode": "squash"}, "crop_mode squash"),
        ({"crop_mode": "border"}, "crop_mode border"),
        ({"interpolation": ["bicubic"]}, "config.json"),
        ({"input_size": 64}, "no config of timm's"),
        ({"input_size": []}, "no config of timm's"),
        ({"crop_pct": 0}, "no config of timm's"),
        ({"crop_pct": None}, "no config of timm's"),
    ],
    ids=str,
)
def test_a_view_of_timms_that_we_have_not_is_one_line(changes, says, tmp_path):
    path = write_timm(tmp_path, changes)
    text = refused(path, imagenet_names((2, 2, 2, 2), False, "first"), "resnet18")
    assert text.startswith(f"{tmp_path / 'config.json'}: ")
    assert says in text


@pytest.mark.parametrize("content", ["[]", "7", '"resnet18"', "{", '{"pretrained_cfg": []}', "null"])
def test_a_config_that_is_no_object_is_one_line_or_somebody_elses(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    arrays = imagenet_names((2, 2, 2, 2), False, "first")
    text = refused(tmp_path / "model.safetensors", arrays, "resnet18")
    assert "no config of timm's" in text or "model.safetensors: layer1.0.bn1.running_mean is missing" in text


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_timms_names_of_the_classes_become_ours(where, tmp_path):
    names = ["tench, Tinca tinca", "n01443537", "third"]
    path = write_timm(tmp_path, {"label_names": names} if where == "inside" else None,
                      **({"label_names": names} if where == "beside" else {}))  # fmt: skip
    save_file(resnet18(3), path)
    name, found = read_weights(str(path), None)
    assert name == "resnet18"
    assert found.classes == tuple(names)
    assert class_names(found) == ("tench, Tinca tinca", "goldfish", "third")
    assert found.preprocessing == Preprocessing((0.5, 0.4, 0.3), (0.3, 0.2, 0.1), 64, 73, "bicubic")


def test_names_of_another_number_of_classes_are_not_the_networks(tmp_path):
    path = write_timm(tmp_path, label_names=["one", "two"])
    save_file(resnet18(3), path)
    assert read_weights(str(path), None)[1].classes is None
