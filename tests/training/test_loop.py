"""The loop: what it writes does not depend on how many steps the device runs at once."""

import functools
import json

import jax
import numpy as np
import pytest

from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config, flatten
from resnet_jax.distributed import make_mesh
from resnet_jax.errors import UsageError
from resnet_jax.locks import lock
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.run import run_task
from resnet_jax.training.checkpoints import load_run_weights
from resnet_jax.training.dispatch import Dispatch
from resnet_jax.training.loop import Training
from resnet_jax.training.metrics import Console, MetricsWriter
from resnet_jax.training.run import Run
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.workdir import open_workdir

TIMES = ("seconds", "seconds_per_step", "images_per_second")


@pytest.fixture
def tiny_config(monkeypatch):
    row = functools.partial(ResNet, blocks=(1,), widths=(4,), stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    config = default_config()
    config.model.name = "tiny"
    config.data.pad = 1
    config.batch_size = 32
    config.steps = 23
    config.eval.every = 8
    config.log.every = 5
    config.log.tensorboard = False
    return config


def train(config, workdir, steps_per_dispatch):
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        open_workdir(workdir, flatten(config), task.description)
        with StopSignal() as stop:
            assert Training([Run(task, config, workdir, mesh)], mesh, steps_per_dispatch).run(stop) == 0
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((workdir / "summary.json").read_text())
    return records, summary


def test_several_steps_per_dispatch_train_as_single_ones_do(tiny_config, tmp_path):
    one, summary = train(tiny_config, tmp_path / "one", steps_per_dispatch=1)
    many, summary_of_many = train(tiny_config, tmp_path / "many", steps_per_dispatch=4)
    assert [(record["step"], sorted(record)) for record in many] == [(record["step"], sorted(record)) for record in one]
    for a, b in zip(one, many, strict=True):
        for name in a.keys() - set(TIMES):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-3)
    weights = (jax.tree.leaves(load_run_weights(str(tmp_path / name))) for name in ("one", "many"))
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert summary_of_many["step"] == summary["step"] == 23


def test_the_speed_is_known_where_every_dispatch_ends_in_a_log_line_and_an_evaluation(tiny_config, tmp_path):
    tiny_config.steps, tiny_config.eval.every, tiny_config.log.every = 20, 5, 5
    records, summary = train(tiny_config, tmp_path / "run", steps_per_dispatch=5)
    speeds = [record["images_per_second"] for record in records if "train_loss" in record]
    assert speeds[0] == 0 and min(speeds[1:]) > 0  # The first dispatch compiles.
    assert summary["images_per_second"] > 0


def test_a_log_line_is_written_once_the_devices_have_their_next_steps(tiny_config, tmp_path, monkeypatch):
    tiny_config.steps, tiny_config.eval.every, tiny_config.log.every = 12, 8, 3
    told, call, write = [], Dispatch._call, MetricsWriter.write

    def called(self, step, runs, *rest):
        told.append(runs[0].step + 1)
        return call(self, step, runs, *rest)

    def written(self, step, values):
        told.append(f"line {step}" if "train_loss" in values else f"test {step}")
        write(self, step, values)

    monkeypatch.setattr(Dispatch, "_call", called)
    monkeypatch.setattr(MetricsWriter, "write", written)
    train(tiny_config, tmp_path / "run", steps_per_dispatch=1)
    # But what is evaluated, and the end, are of states that are known to be finite.
    assert told == [1, 2, 3, 4, "line 3", 5, 6, 7, "line 6", 8, "test 8", 9, 10, "line 9", 11, 12, "line 12", "test 12"]


def test_a_run_that_diverges_makes_no_more_steps_than_the_devices_were_given(tiny_config, tmp_path, monkeypatch):
    tiny_config.steps, tiny_config.eval.every, tiny_config.log.every = 40, 0, 4
    tiny_config.schedule.learning_rate = 1e30
    shown, advance = [], Console.advance
    monkeypatch.setattr(Console, "advance", lambda self, step: (shown.append(step), advance(self, step)))
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh), StopSignal() as stop:
        task = Classification(tiny_config, mesh)
        open_workdir(tmp_path, flatten(tiny_config), task.description)
        assert Training([Run(task, tiny_config, tmp_path, mesh)], mesh, 1).run(stop) == 1
    assert shown == [1, 2, 3, 4, 5]  # The line of step 4 tells, while the devices are at step 5.


def test_a_second_training_in_the_same_folder_is_refused(tmp_path):
    held = functools.partial(lock, tmp_path / ".lock", "another process is training there")
    with held(), pytest.raises(UsageError, match="another process is training there"), held():
        pytest.fail("two hold the lock at once")


def test_evaluation_leaves_the_run_s_settings_and_takes_the_checkpoint_s_figures(tiny_config, tmp_path):
    tiny_config.steps = 8
    run = tmp_path / "run"
    _, trained = train(tiny_config, run, steps_per_dispatch=1)
    config_file = (run / "config.json").read_text()
    (run / "summary.json").write_text(json.dumps(trained | {"step": 4, "epoch": 0.1}))  # Of an earlier evaluation.
    tiny_config.log.every = 7
    assert run_task(tiny_config, run, "eval") == 0
    assert (run / "config.json").read_text() == config_file
    summary = json.loads((run / "summary.json").read_text())
    for name in ("step", "epoch", "top1_error", "examples", "best_step"):
        assert summary[name] == trained[name]


def test_the_logs_hold_every_window_and_evaluation_once(tiny_config, tmp_path):
    records, summary = train(tiny_config, tmp_path / "run", steps_per_dispatch=1)
    assert [record["step"] for record in records if "train_loss" in record] == [5, 10, 15, 20, 23]
    assert [record["step"] for record in records if "test_loss" in record] == [8, 16, 23]
    evaluations = [record["test_top1_error"] for record in records if "test_loss" in record]
    assert summary["top1_error"] == evaluations[-1]
    assert summary["best_top1_error"] == min(evaluations)
    for name in ("model", "params", "epoch", "train_top1_error", "top5_error", "loss", "examples", "protocol"):
        assert summary[name] is not None
    assert summary["examples"] == 359
    predictions = np.load(tmp_path / "run" / "predictions.npz")
    errors = predictions["probabilities"].argmax(1) != predictions["label"]
    assert summary["top1_error"] == pytest.approx(100 * errors.mean())


def test_with_a_hold_out_the_test_set_is_evaluated_once_at_the_end(tiny_config, tmp_path):
    tiny_config.data.holdout = 200
    records, summary = train(tiny_config, tmp_path / "run", steps_per_dispatch=1)
    assert [record["holdout_examples"] for record in records if "holdout_loss" in record] == [200, 200, 200]
    assert not any("test_loss" in record for record in records)
    assert summary["examples"] == 359
    assert summary["best_top1_error"] == min(record.get("holdout_top1_error", 100) for record in records)


def test_the_best_and_the_latest_checkpoint_stay(tiny_config, tmp_path):
    tiny_config.checkpoint.every = 4
    _, summary = train(tiny_config, tmp_path / "run", steps_per_dispatch=1)
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({summary["best_step"], 20, 23})


@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_a_run_that_the_memory_is_too_small_for_says_what_would_fit(
    tiny_config, tmp_path, monkeypatch, steps_per_dispatch
):
    def exhausted(*unused):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 24.00G of 16.00G hbm.")

    monkeypatch.setattr("resnet_jax.training.record.Window.add", exhausted)
    tiny_config.model.batch_norm = "group:8"
    with pytest.raises(UsageError, match=r"^out of memory: 32 images .*; would fit: optimizer.accumulate=2 .*") as said:
        train(tiny_config, tmp_path, steps_per_dispatch)
    assert "batch_size=" in str(said.value)
    assert not (tmp_path / "summary.json").exists()
