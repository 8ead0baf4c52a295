"""Keras's HDF5 files: what we make of them computes what Keras would, and damaged ones are named."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

from networks_by_hand import (
    BLOCKS,
    STEM,
    STEM_WIDTH,
    WIDTHS,
    Network,
    Place,
    draw,
    forward,
    keras_pool,
    network_input,
)
import numpy as np
import pytest

from resnet_jax import UsageError, load_pretrained
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.source import read_weights

h5py = pytest.importorskip("h5py")

ROOT = pathlib.Path(__file__).parents[2]
EPSILON = 1.001e-5  # In keras.applications' resnet.py.


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    row = functools.partial(ResNet, blocks=BLOCKS, widths=WIDTHS, stem_width=STEM_WIDTH, bottleneck=True)
    monkeypatch.setitem(MODELS, "tiny", row)
    monkeypatch.setitem(MODELS, "tiny_v1_5", functools.partial(row, stride_in="middle"))


def name_of(place: Place) -> str:
    return "conv1" if place == STEM else "conv{}_block{}_{}".format(*place)


def arrays_of(network: Network, head: str = "predictions") -> dict[str, np.ndarray]:
    """As Keras's published files have them: every convolution has a bias, and a layer's name stands there twice."""
    arrays: dict[str, np.ndarray] = {}

    def add(layer: str, **parts: np.ndarray) -> None:
        arrays.update({f"{layer}/{layer}/{name}:0": array for name, array in parts.items()})

    for place, layer in network.layers.items():
        add(f"{name_of(place)}_conv", kernel=layer.kernel.transpose(2, 3, 1, 0), bias=layer.bias)
        add(f"{name_of(place)}_bn", gamma=layer.scale, beta=layer.shift,
            moving_mean=layer.mean, moving_variance=layer.var)  # fmt: skip
    add(head, kernel=network.head.T, bias=network.head_bias)
    return arrays


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    with h5py.File(path, "w") as file:
        layers = ["input_1", "conv1_pad", *dict.fromkeys(name.split("/")[0] for name in arrays), "avg_pool"]
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"] = b"tensorflow"
        for layer in layers:  # Those without weights have an empty group.
            own = [name.removeprefix(f"{layer}/") for name in arrays if name.startswith(f"{layer}/")]
            file.create_group(layer).attrs["weight_names"] = [name.encode() for name in own]
        for name, array in arrays.items():
            file[name] = array
    return path


@pytest.fixture(scope="module")
def network() -> Network:
    return draw(50, biased=lambda place: True)


@pytest.fixture
def file(network, tmp_path) -> pathlib.Path:
    return write(tmp_path / "net.h5", arrays_of(network))


def assert_computes(file: pathlib.Path, network: Network, side: int) -> None:
    """Our stages and logits are those of the network by hand, up to the rounding of 32 bits."""
    images = np.random.default_rng(side).integers(0, 256, (2, side, side, 3), np.uint8)
    module, variables, preprocessing = load_pretrained(str(file), "tiny", dtype="float32")
    inputs = preprocessing.normalise(images)
    ours = {**module.apply(variables, inputs, method="features"), "logits": module.apply(variables, inputs)}
    expected = forward(network, network_input(images), EPSILON, keras_pool)
    assert np.abs(expected["logits"][0] - expected["logits"][1]).max() > 0.01  # The images make a difference.
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=2e-5 * np.abs(array).max(), err_msg=name)


# The padded map is 18 pixels wide, of which the pool leaves the last away, and 25.
@pytest.mark.parametrize("side", [32, 45])
def test_stages_and_logits_are_those_of_keras(side, file, network):
    assert_computes(file, network, side)


def test_the_published_files_call_the_head_probs(network, tmp_path):
    # keras-applications 1.0.8, resnet_common.py: Dense(..., name='probs'); Keras still downloads those files.
    assert_computes(write(tmp_path / "net.h5", arrays_of(network, head="probs")), network, 32)


def test_weights_with_the_stride_in_the_first_convolution_are_no_v1_5(file):
    with pytest.raises(UsageError, match=r"net\.h5: .* are v1: ask for tiny, not tiny_v1_5$"):
        load_pretrained(str(file), "tiny_v1_5")
    with pytest.raises(UsageError, match=r"net\.h5: holds tiny, not resnet50$"):
        load_pretrained(str(file), "resnet50")


def without(arrays: dict[str, np.ndarray], layer: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if not name.startswith(f"{layer}/")}


def with_array(arrays: dict[str, np.ndarray], layer: str, part: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return arrays | {f"{layer}/{layer}/{part}:0": array.astype(np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: without(arrays, "conv3_block2_2_bn"), "conv3_block2_2_bn/.* is missing"),
        (lambda arrays: without(arrays, "conv5_block1_0_conv"), "conv5_block1_0_conv/kernel is missing"),
        (lambda arrays: without(arrays, "predictions"), "predictions/.* is missing"),
        (lambda arrays: {name: array for name, array in arrays.items() if "block2" not in name},
         "holds a network of 1, 1, 1, 1 bottleneck blocks, not tiny"),
        (lambda arrays: with_array(arrays, "dense", "kernel", np.ones((2, 2))), "dense/kernel is no part of tiny"),
        (lambda arrays: with_array(arrays, "conv4_block1_0_bn", "gamma", np.ones(3)), r"block1_0_bn/gamma .*\(3,\)"),
        (lambda arrays: with_array(arrays, "conv4_block1_1_conv", "kernel", np.ones((6, 16, 1, 1))),
         r"conv4_block1_1_conv/kernel .*\(6, 16, 1, 1\)"),
        (lambda arrays: with_array(arrays, "conv1_bn", "moving_variance", np.full(4, np.nan)),
         "conv1_bn/moving_variance has values that are not finite"),
        (lambda arrays: {}, "names of no known format"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(change, message, network, tmp_path):
    assert_named(write(tmp_path / "net.h5", change(arrays_of(network))), message)


@pytest.mark.parametrize("size", [1, WIDTHS[0] + 1])
def test_a_bias_of_another_shape_is_named_in_one_line(size, network, tmp_path):
    arrays = with_array(arrays_of(network), "conv2_block1_3_conv", "bias", np.ones(size))
    assert_named(write(tmp_path / "net.h5", arrays), rf"conv2_block1_3_conv/bias has shape \({size},\)")


@pytest.mark.parametrize("array", ["conv2_block1_1_conv/kernel", "conv3_block1_2_bn/gamma", "predictions/bias"])
def test_an_array_that_is_there_twice_in_different_groups_is_named_in_one_line(array, network, tmp_path):
    arrays = arrays_of(network)
    layer = array.split("/")[0]
    file = write(tmp_path / "net.h5", arrays | {f"resnet/{array}:0": arrays[f"{layer}/{array}:0"] + 1})
    assert_named(file, f"has {array} twice")


def write_counted(path: pathlib.Path, network: Network, **again: str) -> pathlib.Path:
    """As Keras 3's .weights.h5: groups by kind and number, whose arrays are counted; ``again`` writes layers twice."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in arrays_of(network).items():
        layer, _, part = name.split("/")
        layers.setdefault(layer, {})[part] = value
    names = [*layers, *again.values()]
    with h5py.File(path, "w") as file:
        for number, name in enumerate(names):
            group = file.create_group(f"layers/{'conv2d' if 'conv' in name else 'layer'}_{number}/vars")
            group.attrs["name"] = name
            for i, value in enumerate(layers[name].values()):
                group[str(i)] = value + (number >= len(layers))
    return path


def test_counted_arrays_are_the_same_and_a_layer_that_is_there_twice_is_named(network, file, tmp_path):
    counted = write_counted(tmp_path / "net.weights.h5", network)
    _, found = read_weights(str(counted), "tiny")
    _, expected = read_weights(str(file), "tiny")
    assert_equal = np.testing.assert_array_equal
    assert_equal(found.variables["params"]["head"]["kernel"], expected.variables["params"]["head"]["kernel"])
    assert_computes(counted, network, 32)
    write_counted(counted, network, again="conv3_block1_2_bn")
    assert_named(counted, "has conv3_block1_2_bn/gamma twice")


def test_arrays_that_only_one_network_has_need_no_name(file):
    assert read_weights(str(file), None)[0] == "tiny"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_ends_too_early_is_named_in_one_line(share, file):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert_named(file, "not a whole HDF5 file")


def assert_named(file: pathlib.Path, message: str) -> None:
    """Reading the file says in one line what is wrong with it."""
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(str(file), "tiny")
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def python(code: str, folder: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment | variables,
                          capture_output=True, text=True)  # fmt: skip


WITHOUT_H5PY = """
import sys
sys.modules["h5py"] = None
from resnet_jax import UsageError, load_pretrained
try:
    load_pretrained("net.h5", "resnet50")
except UsageError as error:
    print(error)
"""


def test_without_h5py_the_extra_that_brings_it_is_named(file, tmp_path):
    result = python(WITHOUT_H5PY, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "net.h5: Keras's files need h5py: pip install 'resnet_jax[keras]'\n"


KERAS = """
import h5py, keras, numpy as np
from keras.src.legacy.saving import legacy_h5_format
keras.utils.set_random_seed(3)
random = np.random.default_rng(3)
model = keras.applications.ResNet50(weights=None, classes=7, classifier_activation=None)
for layer in model.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        size = layer.gamma.shape
        layer.set_weights([random.uniform(0.5, 1.5, size), random.normal(0, 0.3, size), random.normal(0, 0.3, size),
                           random.uniform(0.5, 2, size)])
    elif layer.get_weights():
        kernel, bias = layer.get_weights()
        layer.set_weights([kernel, random.normal(0, 0.3, bias.shape)])
model.save("whole.h5")
model.save_weights("some.weights.h5")
with h5py.File("layers.h5", "w") as file:
    legacy_h5_format.save_weights_to_hdf5_group(file, model)
images = random.integers(0, 256, (2, 224, 224, 3), np.uint8)
inputs = keras.applications.resnet.preprocess_input(images.astype(np.float32))
np.savez("computed.npz", images=images, logits=model.predict(inputs, verbose=0))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs keras")
def test_what_keras_saves_computes_what_keras_does(tmp_path):
    result = python(KERAS, tmp_path, KERAS_BACKEND="jax")  # In a process of its own, so that its backend is ours.
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "computed.npz") as file:
        images, logits = file["images"], file["logits"]
    assert logits.shape == (2, 7)
    largest = np.abs(logits).max()
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 * largest
    for name in ("whole.h5", "some.weights.h5", "layers.h5"):
        module, variables, preprocessing = load_pretrained(str(tmp_path / name), "resnet50", dtype="float32")
        ours = module.apply(variables, preprocessing.normalise(images))
        np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4 * largest, err_msg=name)
