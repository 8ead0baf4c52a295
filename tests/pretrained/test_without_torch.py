"""Weights come in and go out in a process that can't import torch."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resnet_jax import UsageError, create_model, load_pretrained

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": "/nowhere"}


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
