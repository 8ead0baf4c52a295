"""Several seeds in one program: each is trained as it would be alone."""

import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.seeds import run_seeds
from resnet_jax.training.checkpoints import load_run_weights
from resnet_jax.training.loop import Training
from resnet_jax.training.members import places
from resnet_jax.training.metrics import Console
from resnet_jax.training.signals import EXIT_PREEMPTED

TIMES = {"seconds", "seconds_per_step", "images_per_second"}
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True, scope="module")
def exact():
    """Float64: nothing but rounding in its last digits may tell the ways apart."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        row = functools.partial(ResNet, blocks=(1,), widths=(4,), shortcut="A", stem="cifar", stem_width=4)
        patch.setitem(MODELS, "tiny", row)
        yield
    jax.config.update("jax_enable_x64", False)  # A run of float64 sets it for its process.


def use_devices(monkeypatch, count):
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:count])


def settings(**changes):
    config = default_config()
    config.model.name, config.model.dtype = "tiny", "float64"
    config.data.pad, config.data.flip = 1, True
    config.batch_size, config.steps = 32, 11
    config.optimizer.accumulate = 2
    config.log.every, config.eval.every, config.checkpoint.every = 3, 4, 4
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def train(workdir, seeds=SEEDS, at_once=1, **changes):
    return run_seeds(settings(**changes), workdir, "train", seeds, (), at_once)


def found_in(workdir):
    """What a run has left: its weights, records and summary without what is of the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((workdir / "summary.json").read_text())
    records = [{name: value for name, value in line.items() if name not in TIMES} for line in [*lines, summary]]
    return jax.tree.map(np.asarray, load_run_weights(str(workdir))), records


def near(value):
    if isinstance(value, dict):
        return {name: near(part) for name, part in value.items()}
    return pytest.approx(value, rel=1e-8) if isinstance(value, float) else value


def assert_same(workdir, other):
    weights, records = found_in(workdir)
    others, expected = found_in(other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), weights, others)
    assert len(records) == len(expected)
    for record, like in zip(records, expected, strict=True):
        assert record == near(like)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The three seeds, one after another, on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        assert train(workdir) == 0
    return workdir


def test_seeds_trained_at_once_are_those_trained_alone(alone, tmp_path, monkeypatch, capsys):
    # Three members take four places on two devices, here with several steps at once; below they are on one device.
    use_devices(monkeypatch, 2)
    monkeypatch.setattr("resnet_jax.run.Training", functools.partial(Training, steps_per_dispatch=3))
    assert train(tmp_path, at_once=3) == 0
    for seed in SEEDS:
        assert_same(tmp_path / f"seed_{seed}", alone / f"seed_{seed}")
    first, second = (found_in(tmp_path / f"seed_{seed}")[0] for seed in (0, 1))
    assert not np.allclose(first["params"]["head"]["kernel"], second["params"]["head"]["kernel"])
    said = capsys.readouterr().out
    assert "seed 0: training 3 runs of tiny at once" in said
    assert all(f"seed {seed}: step 8  test: " in said for seed in SEEDS)
    assert "seed 1: step 3/11" not in said  # One shows how it goes on.
    found, expected = (json.loads((workdir / "seeds.json").read_text()) for workdir in (tmp_path, alone))
    assert found == near(expected)
    # The same call again finds all of them finished.
    assert train(tmp_path, at_once=3) == 0
    assert capsys.readouterr().out.count("is finished: step 11") == 3


def test_who_is_behind_catches_up(alone, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    for seed in SEEDS:
        shutil.copytree(alone / f"seed_{seed}", tmp_path / f"seed_{seed}")
    # One is finished, one was never begun, and one stopped between two saves at step 8.
    shutil.rmtree(tmp_path / "seed_1")
    (tmp_path / "seed_2" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "seed_2" / "checkpoints" / "11")
    assert train(tmp_path, at_once=3) == 0
    said = capsys.readouterr().out
    assert "seed_0 is finished: step 11" in said
    assert "seed 2: resuming from step 8" in said
    assert "seed 1: step 3/11" in said  # It shows how they go on.
    for seed in SEEDS:
        assert_same(tmp_path / f"seed_{seed}", alone / f"seed_{seed}")


def test_one_that_diverges_leaves_the_others_as_they_are(alone, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    initial = Classification.initial_state

    def spoilt(task):
        state = initial(task)
        if task.resident["seed"] != 1:
            return state
        return state.replace(params=jax.tree.map(lambda x: x.at[...].set(np.nan), state.params))

    monkeypatch.setattr(Classification, "initial_state", spoilt)
    advance = Console.advance

    def stopped(console, step):
        if step == 5:
            monkeypatch.setattr(Console, "advance", advance)
            os.kill(os.getpid(), signal.SIGTERM)
        advance(console, step)

    monkeypatch.setattr(Console, "advance", stopped)
    assert train(tmp_path, at_once=3) == EXIT_PREEMPTED  # Two can go on.
    said = capsys.readouterr().out
    assert "seed 1: stopped: diverged at step 1: loss nan" in said
    for seed in (0, 2):
        assert f"seed {seed}: stopped by SIGTERM and saved at step 5; the same command resumes" in said
    assert train(tmp_path, at_once=3) == 1
    assert not (tmp_path / "seed_1" / "summary.json").exists()
    for seed in (0, 2):
        assert_same(tmp_path / f"seed_{seed}", alone / f"seed_{seed}")


def test_every_device_has_as_many_places():
    assert places(3, 1) == [0, 1, 2]
    assert places(3, 2) == [0, 1, 2, 0]
    assert places(5, 4) == [0, 1, 2, 3, 4, 0, 1, 2]
    assert places(2, 8) == [0, 1] * 4


def test_it_is_for_training_on_data_that_lies_on_the_devices(tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    with pytest.raises(UsageError, match=r"^--seeds_at_once=2 is for --mode=train, not for eval; without it one"):
        run_seeds(settings(), tmp_path, "eval", SEEDS, (), 2)
    for changes in ({"data.placement": "stream"}, {"task": "detection"}):
        with pytest.raises(UsageError, match="is for small images that lie on the devices, not for those"):
            train(tmp_path, at_once=2, **changes)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="is for one process"):
        train(tmp_path, at_once=2)
    assert not any(tmp_path.iterdir())
