"""One device against eight virtual ones: the same losses, the same evaluation."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config
from resnet_jax.distributed import make_mesh, shard_batch
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    """A network that compiles quickly and has what BN does in one with others: a pool, a widening convolution."""
    row = functools.partial(ResNet, blocks=(1,), widths=(8,), bottleneck=True, stem="imagenet", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)


def digits_config(batch_norm: str, dtype: str, accumulate: int = 1):
    config = default_config()
    config.model.name = "tiny"
    config.model.batch_norm = batch_norm
    config.model.dtype = dtype
    config.data.pad = 1
    config.data.flip = True
    config.batch_size = 32
    config.steps = 20
    # At 0.1 so few examples amplify float32's rounding beyond 1e-4.
    config.schedule.learning_rate = 0.1 if dtype == "float64" else 0.01
    config.optimizer.accumulate = accumulate
    config.eval.batch_size = 100
    return config


def train(config, devices: int, steps: int):
    """Losses of ``steps`` steps; the task and the state after them."""
    mesh = make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        state, losses = task.initial_state(), []
        step = jax.jit(task.train_step, donate_argnums=0)
        for _, batch in zip(range(steps), task.batches(0), strict=False):
            state, metrics = step(state, shard_batch(mesh, batch), task.resident)
            losses.append(float(metrics["loss"]))
        return np.array(losses), task, state


@pytest.mark.parametrize(
    ("batch_norm", "dtype", "steps", "tolerance"),
    [
        ("global", "float64", 20, 1e-9),
        pytest.param("group:4", "float64", 20, 1e-9, marks=pytest.mark.slow),  # A device's whole share.
        ("group:8", "float64", 20, 1e-9),  # Two devices' shares.
        ("global", "float32", 10, 1e-4),
        pytest.param("group:4", "float32", 10, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_losses_of_one(batch_norm, dtype, steps, tolerance):
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        config = digits_config(batch_norm, dtype)
        (losses, _, _), (others, _, _) = (train(config, devices, steps) for devices in (1, 8))
    np.testing.assert_allclose(others, losses, rtol=0, atol=tolerance)
    assert np.ptp(losses) > 0.01  # They trained.


@pytest.fixture
def evaluations():
    """The evaluation of the same weights on one device and on eight, in float64."""
    found = []
    with jax.enable_x64(True):
        _, trained, state = train(digits_config("global", "float64"), devices=8, steps=3)
        found.append(trained.evaluate(state, "test", lambda: None))
        mesh = make_mesh(jax.devices()[:1])
        with jax.set_mesh(mesh):
            alone = Classification(digits_config("global", "float64"), mesh)
            state = jax.device_put(jax.tree.map(np.asarray, state), jax.devices()[0])
            found.append(alone.evaluate(state, "test", lambda: None))
    return found


def test_every_example_is_counted_once_on_any_number_of_devices(evaluations):
    eight, one = evaluations
    # 359 test images divide neither over 8 devices nor into batches of 100.
    for evaluation in (eight, one):
        assert evaluation.metrics["examples"] == 359
        np.testing.assert_array_equal(evaluation.predictions["index"], np.arange(359))
    np.testing.assert_array_equal(one.predictions["label"], eight.predictions["label"])
    np.testing.assert_allclose(one.predictions["probabilities"], eight.predictions["probabilities"], atol=1e-12)
    for name in ("top1_error", "top5_error"):
        assert one.metrics[name] == eight.metrics[name]


def test_the_evaluation_s_figures_follow_from_its_predictions(evaluations):
    evaluation = evaluations[0]
    probabilities, labels = evaluation.predictions["probabilities"], evaluation.predictions["label"]
    order = np.argsort(-probabilities, axis=1)
    assert evaluation.metrics["top1_error"] == pytest.approx(100 * np.mean(order[:, 0] != labels))
    assert evaluation.metrics["top5_error"] == pytest.approx(100 * np.mean((order[:, :5] != labels[:, None]).all(1)))
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert evaluation.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)


def test_accumulated_steps_on_eight_devices_keep_the_groups():
    with jax.enable_x64(True):
        whole, _, _ = train(digits_config("group:2", "float64"), devices=1, steps=5)
        parts, _, _ = train(digits_config("group:2", "float64", accumulate=2), devices=8, steps=5)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-9)
