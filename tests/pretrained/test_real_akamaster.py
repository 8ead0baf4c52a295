"""akamaster's public CIFAR-10 networks on all 10,000 test images, from the command line: the printed errors exactly."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
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


PUBLISHED = {20: 8.27, 56: 6.61}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """What one command makes of both, and what it prints."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("akamaster")
    command = [
        sys.executable,
        "benchmarks/akamaster.py",
        f"--weights={WEIGHTS}",
        f"--data={IMAGES}",
        f"--output={folder}",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return folder, result.stdout


@pytest.mark.parametrize("depth", PUBLISHED)
def test_the_published_error_comes_out_exactly(depth, output):
    folder, _ = output
    summary = json.loads((folder / f"akamaster_{depth}" / "summary.json").read_text())
    assert summary["examples"] == 10_000
    assert summary["top1_error"] == pytest.approx(PUBLISHED[depth], abs=1e-9)


def test_their_ensemble_is_better_than_either_and_is_the_mean_of_the_probabilities(output):
    folder, printed = output
    members = [np.load(folder / f"akamaster_{depth}" / "predictions.npz") for depth in PUBLISHED]
    mean = sum(member["probabilities"].astype(np.float64) for member in members) / 2
    error = 100 * np.mean(mean.argmax(-1) != members[0]["label"])
    assert error < min(PUBLISHED.values())
    assert re.search(rf"ensemble of 2 +top1 error +{error:.2f}%", printed)


def test_the_deeper_network_s_layers_respond_less_as_in_figure_7(output):
    folder, _ = output
    found = [json.loads((folder / f"akamaster_{depth}" / "analysis.json").read_text()) for depth in PUBLISHED]
    shallow, deep = (np.array(one["responses"]["deviations"]) for one in found)
    assert (len(shallow), len(deep)) == (19, 55)
    assert deep.mean() < shallow.mean()
    page = (folder / "report.html").read_text()
    assert "8.27 by imported weights" in page
    assert "6.61 by imported weights" in page
