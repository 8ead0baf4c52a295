"""Weights come in and go out in a process that can't import torch."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

from flax import traverse_util
import jax
from jax import export, numpy as jnp
from networks_by_hand import STEM, caffe_pool, draw, forward, keras_pool, network_input
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file

from resnet_jax import UsageError, create_model, load_pretrained

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": "/nowhere",
               "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}  # fmt: skip


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    """A CIFAR ResNet-20 in akamaster's names, written out by hand."""
    random, arrays = np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        arrays[name] = random.normal(0, 0.2, shape).astype(np.float32)

    def add_bn(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean"):
            add(f"{name}.{part}", channels)
        arrays[f"{name}.running_var"] = random.uniform(0.5, 2, channels).astype(np.float32)

    add("conv1.weight", 16, 3, 3, 3)
    add_bn("bn1", 16)
    inside = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            for number in (1, 2):
                add(f"layer{stage}.{block}.conv{number}.weight", width, inside, 3, 3)
                add_bn(f"layer{stage}.{block}.bn{number}", width)
                inside = width
    add("linear.weight", 10, 64)
    add("linear.bias", 10)
    return arrays


@pytest.fixture
def file(state_dict, tmp_path) -> pathlib.Path:
    save_file(state_dict, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def python(code: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    forbidding = "import sys; sys.modules['torch'] = None\n"
    return subprocess.run([sys.executable, "-c", forbidding + textwrap.dedent(code)], cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True)  # fmt: skip


def convert(cwd: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    code = f"""
    sys.argv = ["convert", *{arguments!r}]
    from resnet_jax import cli, convert
    cli.run(convert.main, convert.__doc__, needs=["weights", "output"])
    """
    return python(code, cwd)


def test_every_array_comes_to_its_place(state_dict, file):
    module, variables, preprocessing = load_pretrained(str(file), "cifar_resnet20")
    assert (module.shortcut, module.shortcut_zeros) == ("A", "both")
    assert (preprocessing.image_size, preprocessing.mean) == (32, (0.485, 0.456, 0.406))
    params, stats = variables["params"], variables["batch_stats"]
    # A convolution is [O, I, H, W] there and [H, W, I, O] here; a matrix is transposed.
    kernel = params["stage2"]["block1"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 16, 32)
    assert kernel[2, 0, 5, 7] == state_dict["layer2.0.conv1.weight"][7, 5, 2, 0]
    np.testing.assert_array_equal(params["head"]["kernel"], state_dict["linear.weight"].T)
    np.testing.assert_array_equal(params["stage3"]["block2"]["bn2"]["scale"], state_dict["layer3.1.bn2.weight"])
    np.testing.assert_array_equal(stats["stem"]["bn"]["var"], state_dict["bn1.running_var"])
    assert module.apply(variables, jnp.zeros((1, 32, 32, 3))).shape == (1, 10)


def test_conversion_works_and_a_second_one_gives_the_same_bits(file, tmp_path):
    first = convert(tmp_path, "--model=cifar_resnet20", "--weights=net.safetensors", "--output=ours.safetensors")
    assert first.returncode == 0, first.stderr
    assert "akamaster" in first.stdout
    assert "our names, since torchvision has no such network" in first.stdout
    second = convert(tmp_path, "--weights=ours.safetensors", "--output=again.safetensors")  # It knows its network.
    assert second.returncode == 0, second.stderr
    ours, again = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "again.safetensors")
    assert ours.keys() == again.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, again[name])
    module = create_model("cifar_resnet20")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert ours.keys() == traverse_util.flatten_dict(shapes, sep="/").keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=net.pth", "--output=x.safetensors", "--model=resnet18"], "pip install 'resnet_jax[torch]'"),
        (["--weights=nowhere.safetensors", "--output=x.safetensors", "--model=resnet18"], "no such file"),
        (["--weights=net.safetensors", "--output=x.safetensors"], "--model=NAME is needed"),
        (["--weights=net.safetensors", "--output=x.onnx", "--model=cifar_resnet20"], ".safetensors or .stablehlo"),
        (["--weights=net.safetensors", "--output=no/x.safetensors", "--model=cifar_resnet20"], "no folder"),
        (["--weights=net.safetensors", "--output=x.safetensors", "--model=cifar_resnet56"], "holds cifar_resnet20"),
        (["--weights=cut.safetensors", "--output=x.safetensors", "--model=cifar_resnet20"], "not a whole .safetensors"),
        (["--weights=folder", "--output=x.safetensors"], "no work directory of a run"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, file, tmp_path):
    (tmp_path / "net.pth").write_bytes(b"anything")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    result = convert(tmp_path, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_of_ours_says_what_it_is_of(file, tmp_path):
    convert(tmp_path, "--model=cifar_resnet20", "--weights=net.safetensors", "--output=ours.safetensors")
    with pytest.raises(UsageError, match="holds cifar_resnet20, not cifar_resnet32"):
        load_pretrained(str(tmp_path / "ours.safetensors"), "cifar_resnet32")
    header = (tmp_path / "ours.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    assert (metadata["format"], metadata["model"]) == ("resnet_jax", "cifar_resnet20")
    assert json.loads(metadata["settings"]) == {"shortcut": "A", "shortcut_zeros": "both"}
    assert json.loads(metadata["preprocessing"])["image_size"] == 32


def test_a_program_is_written_and_gives_the_logits_of_apply(file, tmp_path):
    result = convert(tmp_path, "--model=cifar_resnet20", "--weights=net.safetensors", "--output=net.stablehlo")
    assert result.returncode == 0, result.stderr
    pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    module, variables, _ = load_pretrained(str(file), "cifar_resnet20", dtype="float32")
    images = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    expected = module.apply(variables, images.astype(np.float32))
    found = export.deserialize((tmp_path / "net.stablehlo").read_bytes()).call(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()), rtol=0)


def test_pictures_are_predicted(file, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    code = """
    sys.argv = ["predict", "--weights=net.safetensors", "--model=cifar_resnet20", "--json", "picture.png"]
    from resnet_jax import cli, predict
    cli.run(predict.main, predict.__doc__, takes_arguments=True)
    """
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    module, variables, _ = load_pretrained(str(file), "cifar_resnet20", dtype="float32")
    images = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    logits = np.asarray(module.apply(variables, images[None].astype(np.float32)))[0].astype(np.float64)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    found = json.loads(result.stdout)["predictions"]
    assert [one["class"] for one in found] == [names[i] for i in np.argsort(-shares)[:5]]
    np.testing.assert_allclose([one["probability"] for one in found], np.sort(shares)[:-6:-1], atol=1e-4)


@pytest.mark.parametrize("kind", ["caffemodel", "h5"])
def test_caffes_and_kerass_files_come_in(kind, tmp_path):
    if kind == "caffemodel":
        import test_caffe

        network, pool, epsilon = draw(50, biased=lambda place: place == STEM), caffe_pool, 1e-5
        test_caffe.write(tmp_path / "net.caffemodel", test_caffe.layers_of(network))
    else:
        pytest.importorskip("h5py")
        import test_keras

        network, pool, epsilon = draw(50, biased=lambda place: True), keras_pool, 1.001e-5
        test_keras.write(tmp_path / "net.h5", test_keras.arrays_of(network))
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = f"""
    import functools
    import jax
    import numpy as np
    from resnet_jax import load_pretrained
    from resnet_jax.models.registry import MODELS
    from resnet_jax.models.resnet import ResNet
    MODELS["tiny"] = functools.partial(ResNet, blocks=(1, 2, 2, 1), widths=(8, 16, 24, 32), stem_width=4,
                                       bottleneck=True)
    module, variables, preprocessing = load_pretrained("net.{kind}", "tiny", dtype="float32")
    np.save("logits.npy", jax.jit(module.apply)(variables, preprocessing.normalise(np.load("images.npy"))))
    """
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    expected = forward(network, network_input(images), epsilon, pool)["logits"]
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=atol)
