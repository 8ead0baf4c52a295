"""A deep net is stored in one way and run in two; whoever reads its weights finds each block under its own name."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from resnet_jax import load_pretrained
from resnet_jax.classification.network import make_model
from resnet_jax.config import load_config, validate
from resnet_jax.data import digits
from resnet_jax.errors import UsageError
from resnet_jax.models import resnet
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.paper.analysis import analyse
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights
from resnet_jax.run import run_task
from resnet_jax.training.checkpoints import load_run_weights

DEEP = functools.partial(ResNet, blocks=(9, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)


def settings(**changes):
    config = load_config("digits_20")
    config.model.name = "deep"
    config.batch_size = 64
    config.epochs, config.steps = 0.0, 4
    config.eval.every = config.checkpoint.every = 2
    config.log.every = 1
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict({"schedule.name": "constant"} | changes)
    validate(config)
    return config


@pytest.fixture(scope="module", autouse=True)
def deep():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(MODELS, "deep", DEEP)
        monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        yield


@pytest.fixture(scope="module")
def runs(deep, tmp_path_factory) -> dict[str, pathlib.Path]:
    """A run that is unrolled throughout, and one that is scanned to step 2 and then goes on unrolled."""
    root = tmp_path_factory.mktemp("runs")
    found = {"unrolled": root / "unrolled", "changed": root / "changed"}
    assert run_task(settings(**{"model.scan": "false"}), found["unrolled"], "train") == 0
    assert run_task(settings(steps=2, **{"model.scan": "true", "model.remat": True}), found["changed"], "train") == 0
    assert run_task(settings(**{"model.scan": "false"}), found["changed"], "train") == 0
    return found


def losses(run: pathlib.Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


def test_a_run_goes_on_whether_it_was_scanned_or_not(runs):
    unrolled, changed = losses(runs["unrolled"]), losses(runs["changed"])
    assert len(unrolled) == 4
    np.testing.assert_allclose(changed, unrolled, rtol=1e-4)


def test_weights_of_a_run_are_read_block_by_block(runs):
    weights = load_run_weights(str(runs["unrolled"]))
    assert sorted(weights["params"]["stage1"]) == [f"block{i}" for i in range(1, 10)]
    model, variables, preprocessing = load_pretrained(str(runs["unrolled"]), dtype="float32")
    with np.load(runs["unrolled"] / "predictions.npz") as found:
        index, probabilities = found["index"][:8], found["probabilities"][:8]
    images = digits.load().test.images[index]
    logits = model.apply(variables, preprocessing.normalise(images))
    np.testing.assert_allclose(jax.nn.softmax(logits), probabilities, atol=1e-5)


def test_a_run_starts_from_an_exported_file(runs, tmp_path):
    name, weights = read_weights(str(runs["unrolled"]), None)
    save_safetensors(tmp_path / "deep.safetensors", name, weights)
    config = settings(**{"init.weights": str(tmp_path / "deep.safetensors")})
    assert run_task(config, tmp_path / "eval", "eval") == 0
    before, after = (json.loads((run / "summary.json").read_text()) for run in (runs["unrolled"], tmp_path / "eval"))
    assert after["top1_error"] == before["top1_error"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_weights_that_lack_a_block_are_refused_by_its_name(runs, tmp_path):
    name, weights = read_weights(str(runs["unrolled"]), None)
    del weights.variables["params"]["stage1"]["block5"]
    save_safetensors(tmp_path / "deep.safetensors", name, Pretrained(**vars(weights)))
    with pytest.raises(UsageError, match="stage1/block5/bn1/bias is missing"):
        run_task(settings(**{"init.weights": str(tmp_path / "deep.safetensors")}), tmp_path / "eval", "eval")


def test_each_block_of_a_run_can_be_looked_at(runs):
    analyse(runs["unrolled"], ["responses", "removal"], 50)
    found = json.loads((runs["unrolled"] / "analysis.json").read_text())
    assert found["removal"]["blocks"] == [f"stage1/block{i}" for i in range(1, 10)] + ["stage2/block1"]
    assert len(found["responses"]["layers"]) == 21  # The stem's and two of each block.


@pytest.mark.parametrize(
    ("name", "where", "loops"),
    [("cifar_resnet56", "cpu", False), ("cifar_resnet56", "tpu", True), ("cifar_resnet56", "gpu", True),
     ("resnet152", "tpu", False)],
)  # fmt: skip
def test_blocks_run_as_a_loop_where_that_gains(name, where, loops, monkeypatch):
    monkeypatch.setattr("resnet_jax.classification.network.platform", lambda: where)
    for scan, expected in (("auto", loops), ("true", True), ("false", False)):
        model = make_model(settings(**{"model.name": name, "model.scan": scan}), 10)
        assert (model.stacked, model.scan) == (True, expected)


def test_nets_without_residual_blocks_can_not_be_scanned(tmp_path):
    with pytest.raises(UsageError, match=r"model\.scan: vgg16 has no residual blocks"):
        run_task(settings(**{"model.name": "vgg16", "model.scan": "true"}), tmp_path / "run", "train")


def test_a_run_of_before_blocks_were_stored_together_says_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(resnet, "SHORTEST_RUN", 99)
        assert run_task(settings(steps=2), tmp_path / "run", "train") == 0
    with pytest.raises(UsageError, match=r"of an older version, .* --config\.init\.weights to this run's folder"):
        run_task(settings(), tmp_path / "run", "train")
