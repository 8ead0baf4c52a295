"""What a person meets first: --help, the time an import takes, the shipped configs."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from resnet_jax import config as config_lib
from resnet_jax.models.registry import create_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Entry point -> the flags that its --help must name.
ENTRY_POINTS = {
    "resnet_jax.main": ("--config", "--workdir", "--mode", "--seeds", "--config.model.name", "--config.batch_size"),
    "resnet_jax.convert": ("--model", "--weights", "--output"),
    "resnet_jax.ensemble": ("--runs", "--protocol", "--evaluate", "--select", "--output", "--json"),
    "resnet_jax.report": ("--runs", "--output", "--analyze"),
    "resnet_jax.plan": ("--config", "--topology", "--batch_per_chip", "--price", "--scaling", "--json"),
    "resnet_jax.predict": ("--workdir", "--weights", "--model", "--json", "--features", "--heatmap"),
    "resnet_jax.prepare": ("--source", "--data_dir", "--output", "--workers", "--on_error"),
    "resnet_jax.summary": ("--models", "--image_size"),
}
HEAVY = ("tensorflow", "torch")


def python(*arguments, cwd, **variables):
    """Runs this Python with the package on its path, on one CPU device."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def entry_points():
    """The modules that a person starts: those that end by running themselves."""
    files = sorted((ROOT / "resnet_jax").glob("*.py"))
    return [f"resnet_jax.{file.stem}" for file in files if '__name__ == "__main__"' in file.read_text()]


def test_every_entry_point_is_looked_at_here():
    assert set(entry_points()) <= set(ENTRY_POINTS)


@pytest.mark.parametrize("module", entry_points())
def test_help_is_quick_and_names_the_flags(module, tmp_path):
    start = time.monotonic()
    result = python("-m", module, "--help", cwd=tmp_path)
    seconds = time.monotonic() - start
    assert result.returncode == 0
    assert result.stderr == ""
    missing = [flag for flag in ENTRY_POINTS[module] if flag not in result.stdout]
    assert not missing
    assert f"python -m {module}" in result.stdout
    assert seconds < 3
    assert not list(tmp_path.iterdir())


def test_help_describes_every_config_field_with_its_default(tmp_path):
    text = python("-m", "resnet_jax.main", "--help", cwd=tmp_path).stdout
    for field in config_lib.FIELDS:
        assert f"--config.{field.name}={field.default!r}" in text
        assert field.text.split(".")[0] in text


def imported(trace):
    """The top-level packages in what ``-X importtime`` wrote."""
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in trace.splitlines() if line.count("|") == 2}


def test_importing_the_package_is_light(tmp_path):
    result = python("-X", "importtime", "-c", "import resnet_jax", cwd=tmp_path)
    assert result.returncode == 0
    packages = imported(result.stderr)
    assert "resnet_jax" in packages
    assert not packages & {*HEAVY, "jax", "flax"}


def test_the_public_names_need_neither_tensorflow_nor_torch(tmp_path):
    program = "import resnet_jax; [getattr(resnet_jax, name) for name in resnet_jax.__all__]"
    result = python("-X", "importtime", "-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-500:]
    assert not imported(result.stderr) & set(HEAVY)


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_run_imports_neither_tensorflow_nor_torch(tensorboard, tmp_path):
    flags = ["--config=digits_20", "--config.model.name=cifar_resnet8", "--config.steps=2", "--workdir=run"]
    result = python(
        *("-X", "importtime", "-m", "resnet_jax.main", *flags, f"--config.log.tensorboard={tensorboard}"),
        cwd=tmp_path,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # What it computes is not looked at.
    )
    assert result.returncode == 0, result.stderr[-500:]
    packages = imported(result.stderr)
    assert {"jax", "flax", "orbax"} <= packages
    assert ("tensorboardX" in packages) == (tensorboard == "true")
    # A name alone is an import that was refused; a package that was loaded lists its parts.
    assert not re.search(rf"\| +({'|'.join(HEAVY)})\.", result.stderr)
    events = list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert bool(events) == (tensorboard == "true")


@pytest.mark.parametrize("name", sorted(config_lib.shipped_configs()))
def test_a_shipped_config_is_valid_and_says_the_command_that_runs_it(name):
    path = config_lib.shipped_configs()[name]
    config = config_lib.load_config(name)
    config_lib.validate(config)
    assert sorted(config_lib.flatten(config)) == sorted(field.name for field in config_lib.FIELDS)
    create_model(config.model.name, batch_norm=config.model.batch_norm)  # It exists.
    docstring = re.match(r'"""(.+?)"""', path.read_text(), re.DOTALL)[1]
    command = re.search(r"python -m resnet_jax\.main --config=(\S+)", docstring)
    assert command, "its docstring has no command"
    assert config_lib.find_config(command[1]).resolve() == path.resolve()


def test_a_shipped_config_is_found_by_its_bare_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar_20", "configs/cifar_20.py", str(ROOT / "configs" / "cifar_20.py")):
        assert config_lib.load_config(name).model.name == "cifar_resnet20"
