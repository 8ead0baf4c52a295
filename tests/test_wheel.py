"""The wheel brings the configs along, so that --config=cifar_20 works from anywhere."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_a_shipped_config_is_found_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert {path.stem for path in (tmp_path / "site" / "resnet_jax" / "configs").glob("*.py")} == shipped
    code = "from resnet_jax.config import load_config, __file__; print(__file__, load_config('cifar_20').steps)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    where, steps = run.stdout.split()
    assert where.startswith(str(tmp_path)) and steps == "64000"
