"""The authors' files (Caffe): what we make of them computes what Caffe would, and damaged ones are named."""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

from flax import traverse_util
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
import jax
from jax import numpy as jnp
from networks_by_hand import (
    BLOCKS,
    STEM,
    STEM_WIDTH,
    WIDTHS,
    Network,
    Place,
    caffe_pool,
    draw,
    forward,
    network_input,
)
import numpy as np
import pytest

from resnet_jax import UsageError, create_model, load_pretrained
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.formats import recognise
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights

# BVLC's caffe.proto, as far as its files are written here; the reader may skip what it does not want.
PROTO = {
    "BlobShape": "dim 1 int64 packed",
    "BlobProto": "num 1 int32, channels 2 int32, height 3 int32, width 4 int32, data 5 float packed, shape 7 BlobShape",
    "LayerParameter": "name 1 string, type 2 string, bottom 3 string many, top 4 string many, blobs 7 BlobProto many",
    "NetParameter": "name 1 string, input 3 string many, layer 100 LayerParameter many",
}
Layers = dict[str, tuple[str, list[np.ndarray]]]


@functools.cache
def messages() -> dict[str, Any]:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="by_hand.proto", package="by_hand", syntax="proto2")
    for message, text in PROTO.items():
        described = file.message_type.add(name=message)
        for name, number, kind, *many in map(str.split, text.split(", ")):
            field = described.field.add(name=name, number=int(number))
            field.label = field_type.LABEL_REPEATED if many else field_type.LABEL_OPTIONAL
            if kind in PROTO:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".by_hand.{kind}"
            else:
                field.type = getattr(field_type, f"TYPE_{kind.upper()}")
            if many == ["packed"]:
                field.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"by_hand.{name}")) for name in PROTO}


def blob(array: np.ndarray, four_axes: bool) -> Any:
    made = messages()["BlobProto"](data=array.ravel().tolist())
    if four_axes:  # Before BlobShape: what has fewer axes has ones before them.
        made.num, made.channels, made.height, made.width = (1,) * (4 - array.ndim) + array.shape
    else:
        made.shape.dim.extend(array.shape)
    return made


def write(path: pathlib.Path, layers: Layers, four_axes: bool = False) -> pathlib.Path:
    net = messages()["NetParameter"](name="ResNet", input=["data"])
    for name, (kind, arrays) in layers.items():
        net.layer.add(
            name=name, type=kind, bottom=["data"], top=[name], blobs=[blob(array, four_axes) for array in arrays]
        )
    path.write_bytes(net.SerializeToString())
    return path


def letters(stage: int, block: int) -> str:
    return "abcdefgh"[block - 1]


def numbers(stage: int, block: int) -> str:
    return letters(stage, block) if block == 1 or stage in (2, 5) else f"b{block - 1}"


def names_of(place: Place, block_name: Callable[[int, int], str]) -> tuple[str, str, str]:
    """The layers of a convolution, of its statistics and of its scale."""
    if place == STEM:
        return "conv1", "bn_conv1", "scale_conv1"
    stage, block, convolution = place
    rest = f"{stage}{block_name(stage, block)}_branch{('1', '2a', '2b', '2c')[convolution]}"
    return f"res{rest}", f"bn{rest}", f"scale{rest}"


def layers_of(network: Network, block_name: Callable[[int, int], str] = letters) -> Layers:
    """As the authors' files have them, with a divisor of its own in every layer."""
    layers: Layers = {}
    for i, (place, layer) in enumerate(network.layers.items()):
        convolution, norm, scale = names_of(place, block_name)
        divisor = np.array([900 + 12.5 * i], np.float32)
        layers[convolution] = ("Convolution", [layer.kernel] + ([] if layer.bias is None else [layer.bias]))
        layers[norm] = ("BatchNorm", [layer.mean * divisor, layer.var * divisor, divisor])
        layers[scale] = ("Scale", [layer.scale, layer.shift])
        layers[f"{convolution}_relu"] = ("ReLU", [])
    layers["pool5"] = ("Pooling", [])
    layers["fc1000"] = ("InnerProduct", [network.head, network.head_bias])
    return layers


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    row = functools.partial(ResNet, blocks=BLOCKS, widths=WIDTHS, stem_width=STEM_WIDTH, bottleneck=True)
    monkeypatch.setitem(MODELS, "tiny", row)
    monkeypatch.setitem(MODELS, "tiny_v1_5", functools.partial(row, stride_in="middle"))


@pytest.fixture(scope="module")
def network() -> Network:
    """As ResNet-50: only the first convolution has a bias."""
    return draw(50, biased=lambda place: place == STEM)


@pytest.fixture
def file(network, tmp_path) -> pathlib.Path:
    return write(tmp_path / "net.caffemodel", layers_of(network))


def images_of(side: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), np.uint8)


def compute(source: pathlib.Path, images: np.ndarray, model: str | None = "tiny") -> dict[str, np.ndarray]:
    """Our logits, and the outputs of every stage."""
    module, variables, preprocessing = load_pretrained(str(source), model, dtype="float32")
    inputs = preprocessing.normalise(images)
    outputs = module.apply(variables, inputs, method="features")
    return {**outputs, "logits": module.apply(variables, inputs)}


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Up to the rounding of 32 bits."""
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=2e-5 * np.abs(array).max(), err_msg=name)


# The map that is pooled is 16 pixels wide, whose last window is cut off, and 23, where all windows are whole.
@pytest.mark.parametrize("side", [32, 45])
def test_stages_and_logits_are_those_of_caffe(side, file, network):
    images = images_of(side)
    expected = forward(network, network_input(images), 1e-5, caffe_pool)
    assert expected["stem"].shape[1] == {32: 8, 45: 11}[side]
    assert np.abs(expected["logits"][0] - expected["logits"][1]).max() > 0.01  # The images make a difference.
    assert_same(compute(file, images), expected)


def test_numbered_blocks_and_a_first_convolution_without_a_bias_are_read_too(tmp_path):
    network = draw(101, biased=lambda place: False)
    layers = layers_of(network, numbers)
    assert {"res3b1_branch2a", "bn4b1_branch2c", "res5a_branch1"} <= layers.keys()
    images = images_of(32)
    expected = forward(network, network_input(images), 1e-5, caffe_pool)
    assert_same(compute(write(tmp_path / "net.caffemodel", layers), images), expected)


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_the_authors_names_are_those_of_every_array(depth):
    # What is lettered and how far the numbers go, as deep-residual-networks has it.
    middle = {
        50: ["3a", "3b", "3c", "3d", "4a", "4b", "4c", "4d", "4e", "4f"],
        101: ["3a", *(f"3b{i}" for i in range(1, 4)), "4a", *(f"4b{i}" for i in range(1, 23))],
        152: ["3a", *(f"3b{i}" for i in range(1, 8)), "4a", *(f"4b{i}" for i in range(1, 36))],
    }
    blocks = ["2a", "2b", "2c", *middle[depth], "5a", "5b", "5c"]
    branches = [f"{block}_branch{rest}" for block in blocks for rest in ("2a", "2b", "2c")]
    branches += [f"{block}_branch1" for block in blocks if block.endswith("a")]
    expected = {"conv1.weight", "fc1000.weight", "fc1000.bias"} | {f"res{branch}.weight" for branch in branches}
    for branch in ["_conv1", *branches]:
        expected |= {f"bn{branch}.running_mean", f"bn{branch}.running_var"}
        expected |= {f"scale{branch}.weight", f"scale{branch}.bias"}
    module = create_model(f"resnet{depth}", dtype="float32")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    ours = traverse_util.flatten_dict(shapes, sep="/")
    theirs = [recognise(expected).theirs(name) for name in ours]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) == expected
    last = {50: "res4f_branch2b", 101: "res4b22_branch2b", 152: "res4b35_branch2b"}[depth]
    name = f"params/stage3/block{module.blocks[2]}/conv2/kernel"
    assert recognise(expected).theirs(name) == f"{last}.weight"


def test_arrays_of_four_axes_in_older_files_are_the_same(file, network, tmp_path):
    old = write(tmp_path / "old.caffemodel", layers_of(network), four_axes=True)
    assert old.read_bytes() != file.read_bytes()
    found, expected = (load_pretrained(str(path), "tiny")[1] for path in (old, file))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_statistics_with_divisor_zero_are_zero(network, tmp_path):
    layers = layers_of(network)
    kind, (mean, var, _) = layers["bn3a_branch2a"]
    layers["bn3a_branch2a"] = (kind, [mean, var, np.zeros(1, np.float32)])
    _, variables, _ = load_pretrained(str(write(tmp_path / "net.caffemodel", layers)), "tiny")
    found = variables["batch_stats"]["stage2"]["block1"]["bn1"]
    np.testing.assert_array_equal(found["mean"], np.zeros(WIDTHS[1] // 4))
    np.testing.assert_array_equal(found["var"], np.zeros(WIDTHS[1] // 4))


@pytest.fixture
def mean_image(tmp_path) -> np.ndarray:
    """The authors' mean image beside the weights; [H, W, 3], blue, green, red, 0 to 255."""
    planes = np.random.default_rng(7).uniform(80, 150, (1, 3, 224, 224)).astype(np.float32)
    (tmp_path / "ResNet_mean.binaryproto").write_bytes(blob(planes, four_axes=True).SerializeToString())
    return planes[0].transpose(1, 2, 0)


def test_the_mean_image_beside_the_weights_is_subtracted(mean_image, file, network, tmp_path):
    _, _, preprocessing = load_pretrained(str(file), "tiny")
    np.testing.assert_allclose(preprocessing.mean_image, mean_image[..., ::-1] / 255, rtol=1e-6)
    assert preprocessing.image_size == 224
    images = images_of(224, count=1)
    expected = forward(network, network_input(images, mean_image), 1e-5, caffe_pool)
    assert_same(compute(file, images), expected)
    # Newer Caffe gives it a shape.
    before = preprocessing.mean_image
    planes = mean_image.transpose(2, 0, 1)[None]
    (tmp_path / "ResNet_mean.binaryproto").write_bytes(blob(planes, four_axes=False).SerializeToString())
    np.testing.assert_array_equal(load_pretrained(str(file), "tiny")[2].mean_image, before)


def test_without_a_mean_image_the_mean_is_a_colour(file):
    _, _, preprocessing = load_pretrained(str(file), "tiny")
    assert preprocessing.mean_image is None
    np.testing.assert_allclose(preprocessing.mean, np.array((123.68, 116.779, 103.939)) / 255)


def test_a_file_of_ours_keeps_the_pooling_and_the_mean_image(mean_image, file, tmp_path):
    images = images_of(224, count=1)
    expected = compute(file, images)
    name, weights = read_weights(str(file), "tiny")
    ours = tmp_path / "ours.safetensors"
    save_safetensors(ours, name, weights)
    (tmp_path / "ResNet_mean.binaryproto").unlink()  # It travels in the file.
    module, _, preprocessing = load_pretrained(str(ours))
    assert module.pool_padding == "end"
    assert preprocessing == weights.preprocessing
    np.testing.assert_array_equal(preprocessing.mean_image, weights.preprocessing.mean_image)
    jax.tree.map(np.testing.assert_array_equal, compute(ours, images, model=None), expected)


def test_weights_with_the_stride_in_the_first_convolution_are_no_v1_5(file):
    with pytest.raises(UsageError, match=r"net\.caffemodel: .* are v1: ask for tiny, not tiny_v1_5$"):
        load_pretrained(str(file), "tiny_v1_5")
    with pytest.raises(UsageError, match=r"net\.caffemodel: holds tiny, not resnet50$"):
        load_pretrained(str(file), "resnet50")


def without(layers: Layers, name: str) -> Layers:
    return {key: layer for key, layer in layers.items() if key != name}


def with_blobs(layers: Layers, name: str, *arrays: np.ndarray, kind: str | None = None) -> Layers:
    return layers | {name: (kind or layers[name][0], [array.astype(np.float32) for array in arrays])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: with_blobs(layers, "slopes", np.ones(4), kind="PReLU"), r"slopes \(PReLU"),
        (lambda layers: with_blobs(layers, "res3a_branch1", *[np.ones(1)] * 3), r"res3a_branch1 \(Convolution, 3"),
        (lambda layers: without(layers, "bn2a_branch2b"), "bn2a_branch2b.running_.* is missing"),
        (lambda layers: without(layers, "scale5a_branch1"), "scale5a_branch1.* is missing"),
        (lambda layers: without(layers, "fc1000"), "fc1000.* is missing"),
        (lambda layers: without(layers, "res3b_branch2a"), "res3b_branch2a.weight is missing"),
        (lambda layers: with_blobs(layers, "fc7", np.ones((2, 2)), kind="InnerProduct"), "fc7.weight is no part"),
        (lambda layers: {name: layer for name, layer in layers.items() if "3b" not in name},
         "holds a network of 1, 1, 2, 1 bottleneck blocks, not tiny"),
        (lambda layers: with_blobs(layers, "res4b_branch2b", np.ones((6, 6, 1, 1))), r"res4b_branch2b.*6, 1, 1\)"),
        (lambda layers: with_blobs(layers, "scale4a_branch1", np.ones(3), np.ones(3)), r"scale4a_branch1.* \(3,\)"),
        (lambda layers: with_blobs(layers, "res5a_branch2c", np.full((32, 8, 1, 1), np.nan)),
         "res5a_branch2c.weight has values that are not finite"),
        (lambda layers: with_blobs(layers, "bn_conv1", np.ones(4), np.full(4, np.inf), np.ones(1)),
         "bn_conv1.running_var has values that are not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(change, message, network, tmp_path):
    file = write(tmp_path / "net.caffemodel", change(layers_of(network)))
    assert_named(file, message, file)


@pytest.mark.parametrize("size", [1, STEM_WIDTH + 1])
def test_a_bias_of_another_shape_is_named_in_one_line(size, network, tmp_path):
    layers = layers_of(network)
    layers = with_blobs(layers, "conv1", layers["conv1"][1][0], np.ones(size))
    file = write(tmp_path / "net.caffemodel", layers)
    assert_named(file, rf"conv1\.bias has shape \({size},\)", file)


def assert_named(file: pathlib.Path, message: str, damaged: pathlib.Path) -> None:
    """Reading the weights in ``file`` says in one line what is wrong with ``damaged``."""
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(str(file), "tiny")
    assert str(caught.value).startswith(f"{damaged}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["conv1", "bn4b_branch2b", "scale2a_branch1", "fc1000"])
def test_a_layer_that_is_there_twice_is_named_in_one_line(name, network, tmp_path):
    layers = layers_of(network)
    kind, arrays = layers[name]
    once = write(tmp_path / "once.caffemodel", layers).read_bytes()
    again = write(tmp_path / "again.caffemodel", {name: (kind, [array + 1 for array in arrays])}).read_bytes()
    file = tmp_path / "net.caffemodel"
    file.write_bytes(once + again)  # Protobuf's messages one after another are merged: lists are joined.
    assert_named(file, rf"layer {name} is there twice", file)


def test_arrays_that_only_one_network_has_need_no_name(file):
    name, weights = read_weights(str(file), None)
    assert name == "tiny"
    expected = read_weights(str(file), "tiny")[1]
    jax.tree.map(np.testing.assert_array_equal, weights.variables, expected.variables)


def values_cut_off(layers: Layers) -> bytes:
    net = messages()["NetParameter"]()
    made = net.layer.add(name="conv1", type="Convolution").blobs.add(data=[1.0] * 7)
    made.shape.dim.extend((4, 3, 7, 7))
    return net.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-50], "not a whole Caffe file"),
        (lambda content: content[: len(content) // 2], "not a whole Caffe file"),
        (lambda content: b"<html>", "not a whole Caffe file"),
        (lambda content: b"", "holds no layers with weights"),
        (values_cut_off, r"conv1 has 7 values, and its shape \(4, 3, 7, 7\)"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(change, message, file):
    file.write_bytes(change(file.read_bytes()))
    assert_named(file, message, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"\x2a\xff", "not a whole Caffe file"),
        (lambda: blob(np.ones((1, 1, 8, 8)), four_axes=True).SerializeToString(), r"it is \(1, 1, 8, 8\)"),
    ],
)
def test_a_damaged_mean_image_is_named_in_one_line(content, message, file):
    mean = file.with_name("ResNet_mean.binaryproto")
    mean.write_bytes(content())
    assert_named(file, message, mean)
