"""akamaster's public CIFAR-10 networks on all 10,000 test images, from the command line: the printed errors exactly."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere")) / "cifar10"
WEIGHTS = pathlib.Path(os.environ.get("RESNET_JAX_WEIGHTS", "nowhere"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(not IMAGES.is_dir(), reason="RESNET_JAX_DATA does not name a folder with cifar10"),
    pytest.mark.skipif(not WEIGHTS.is_dir(), reason="RESNET_JAX_WEIGHTS does not name a folder with akamaster's files"),
]


@pytest.mark.parametrize(("depth", "error"), [(20, 8.27), (56, 6.61)])
def test_the_published_error_comes_out_exactly(depth, error, tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "resnet_jax.main", f"--config=cifar_{depth}", "--mode=eval",
               f"--config.init.weights={WEIGHTS / f'akamaster-cifar10-resnet{depth}.th'}",
               "--config.data.source=image_folder", f"--config.data.dir={IMAGES}",
               f"--config.data.cache_dir={tmp_path.parent / 'cache'}", f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["examples"] == 10_000
    assert summary["top1_error"] == pytest.approx(error, abs=1e-9)
