"""Fine-tuning: what is frozen stays as it came, the head is new, and training stops when it gets no better."""

import functools
import json
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from resnet_jax.config import load_config, validate
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.run import run_classification
from resnet_jax.training.checkpoints import load_run_weights

SIDE = 8
CONSTANT = {"schedule.name": "constant"}  # So that a run may go on longer.


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])


def write_images(folder: pathlib.Path, classes: int) -> pathlib.Path:
    random = np.random.default_rng(classes)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(classes):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (SIDE, SIDE, 3), np.uint8)
                pixels[..., label % 3] += 100 + 50 * (label // 3)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def settings(folder: pathlib.Path, weights: pathlib.Path | str, **changes):
    config = load_config("finetune_folder")
    config.model.name = "tiny"
    config.data.dir = str(folder)
    config.data.cache_dir = str(folder.parent / "cache")
    config.data.image_size = SIDE
    config.data.crop = "whole"
    config.init.weights = str(weights)
    config.batch_size = 8
    config.eval.every = 3
    config.epochs = 0.0
    config.steps = 6
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    return config


@pytest.fixture
def pretrained(tmp_path) -> pathlib.Path:
    """A run of three classes, with a mean image of its own."""
    folder = write_images(tmp_path / "three", 3)
    config = settings(
        folder, "", **{"init.head": "keep", "data.mean": "pixel", "data.std": "channel", "data.flip": False}
    )
    assert run_classification(config, tmp_path / "pretrained", "train") == 0
    return tmp_path / "pretrained"


def weights(run: pathlib.Path) -> dict[str, np.ndarray]:
    flat = jax.tree.leaves_with_path(load_run_weights(str(run)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in flat}


def test_frozen_stages_keep_weights_and_statistics_and_the_rest_learns(pretrained, tmp_path, capsys):
    folder = write_images(tmp_path / "five", 5)
    assert run_classification(settings(folder, pretrained, **{"model.freeze_at": 2}), tmp_path / "run", "train") == 0
    assert "a new head for 5 classes (class0, class1, class2, class3, class4)" in capsys.readouterr().out
    before, after = weights(pretrained), weights(tmp_path / "run")
    assert after["params/head/kernel"].shape == (8, 5)
    for name, array in after.items():
        if "/head/" not in name:
            frozen = name.split("/")[1] in ("stem", "stage1")
            assert np.array_equal(array, before[name]) == frozen, name


def test_frozen_statistics_stay_while_weights_learn(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    config = settings(folder, pretrained, **{"model.batch_norm": "frozen"})
    assert run_classification(config, tmp_path / "run", "train") == 0
    before, after = weights(pretrained), weights(tmp_path / "run")
    for name, array in after.items():
        if "/head/" not in name:
            assert np.array_equal(array, before[name]) == name.startswith("batch_stats"), name


def test_a_fine_tuned_run_has_the_preprocessing_of_its_weights_also_when_it_goes_on(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    for steps in (3, 6):
        assert run_classification(settings(folder, pretrained, steps=steps, **CONSTANT), tmp_path / "run", "train") == 0
    theirs, ours = (json.loads((run / "data.json").read_text()) for run in (pretrained, tmp_path / "run"))
    assert ours["preprocessing"] == theirs["preprocessing"]
    np.testing.assert_array_equal(np.load(tmp_path / "run/mean.npy"), np.load(pretrained / "mean.npy"))
    assert ours["classes"] == [f"class{i}" for i in range(5)]
    # What the command line sets is the user's.
    config = settings(folder, pretrained, **{"data.mean": "imagenet", "data.std": "imagenet"})
    assert run_classification(config, tmp_path / "other", "train", explicit=["data.mean"]) == 0
    other = json.loads((tmp_path / "other" / "data.json").read_text())
    np.testing.assert_allclose(other["preprocessing"]["mean"], [0.485, 0.456, 0.406])


def test_other_classes_need_a_new_head_and_a_new_head_needs_weights(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    with pytest.raises(UsageError, match=r"has 3 classes and the data have 5; --config\.init\.head=replace"):
        run_classification(settings(folder, pretrained, **{"init.head": "keep"}), tmp_path / "run", "train")
    with pytest.raises(UsageError, match=r"init\.head=replace goes with init\.weights"):
        run_classification(settings(folder, ""), tmp_path / "run", "train")
    with pytest.raises(UsageError, match="freeze_at=4: tiny has a stem and 2 stages"):
        run_classification(settings(folder, pretrained, **{"model.freeze_at": 4}), tmp_path / "run", "train")
    assert not (tmp_path / "run").exists()


def test_training_stops_after_so_many_evaluations_that_are_no_better_and_stays_stopped(pretrained, tmp_path, capsys):
    folder = write_images(tmp_path / "five", 5)
    # A rate too small to change a prediction: the first evaluation stays the best.
    changes = {"schedule.learning_rate": 1e-12, "model.batch_norm": "frozen", "eval.patience": 2, "steps": 60}
    config = settings(folder, pretrained, **changes)
    assert run_classification(config, tmp_path / "run", "train") == 0
    assert "stopping early: 2 evaluations without less than" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 9
    assert run_classification(config, tmp_path / "run", "train") == 0
    assert "is finished" in capsys.readouterr().out
