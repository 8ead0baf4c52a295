"""BatchNorm's three ways to take statistics, against NumPy."""

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from resnet_jax.distributed import make_mesh
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import BatchNorm

SHAPE = (16, 3, 5, 4)
EPSILON, MOMENTUM = 1e-5, 0.9


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    x = random.normal(size=SHAPE) * random.uniform(0.5, 3, SHAPE[-1]) + random.normal(size=(16, 1, 1, 4))
    return x.astype(np.float32)


def apply(batch_norm: str, x: np.ndarray, devices: int):
    layer = BatchNorm(batch_norm, MOMENTUM)
    mesh = make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        variables = layer.init(jax.random.key(0), jnp.zeros(SHAPE), train=False)
        images = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        step = jax.jit(lambda v, x: layer.apply(v, x, train=True, mutable=["batch_stats"]))
        y, updated = step(variables, images)
    return np.asarray(y), jax.tree.map(np.asarray, updated["batch_stats"])


def expected(x: np.ndarray, groups: int):
    x = x.astype(np.float64)
    outputs = [(part - part.mean((0, 1, 2))) / np.sqrt(part.var((0, 1, 2)) + EPSILON) for part in np.split(x, groups)]
    running = {"mean": (1 - MOMENTUM) * x.mean((0, 1, 2)), "var": MOMENTUM + (1 - MOMENTUM) * x.var((0, 1, 2))}
    return np.concatenate(outputs), running


@pytest.mark.parametrize(
    ("batch_norm", "devices", "groups"),
    [
        ("global", 1, 1),
        ("global", 8, 1),
        ("per_device", 1, 1),
        ("per_device", 8, 8),
        ("per_device", 4, 4),
        ("group:2", 8, 8),
        ("group:4", 1, 4),
        ("group:4", 8, 4),
        ("group:16", 8, 1),
    ],
)
def test_each_group_of_examples_is_normalised_by_its_own_statistics(inputs, batch_norm, devices, groups):
    y, stats = apply(batch_norm, inputs, devices)
    want, running = expected(inputs, groups)
    np.testing.assert_allclose(y, want, atol=2e-5)
    for name in running:  # Of the whole batch, however it was grouped.
        np.testing.assert_allclose(stats[name], running[name], rtol=1e-5, atol=1e-6)


def test_inference_uses_the_running_statistics(inputs):
    layer = BatchNorm()
    variables = {
        "params": {"scale": np.float32([1, 2, 3, 4]), "bias": np.float32([0, 1, 0, -1])},
        "batch_stats": {"mean": np.float32([0.1, 0.2, 0.3, 0.4]), "var": np.float32([1, 4, 9, 16])},
    }
    y = layer.apply(variables, inputs, train=False)
    p, s = variables["params"], variables["batch_stats"]
    np.testing.assert_allclose(
        y, (inputs - s["mean"]) / np.sqrt(s["var"] + EPSILON) * p["scale"] + p["bias"], atol=1e-5
    )


def test_statistics_are_float32_for_bfloat16_activations(inputs):
    layer = BatchNorm(dtype=jnp.bfloat16)
    x = (inputs + 100).astype(jnp.bfloat16)  # In bfloat16 sums this variance would drown.
    variables = layer.init(jax.random.key(0), x, train=False)
    y, updated = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    want = MOMENTUM + (1 - MOMENTUM) * np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["var"], want, rtol=1e-3)


@pytest.mark.parametrize(
    ("batch_norm", "message"),
    [("group:5", "does not divide into groups of 5"), ("batch", "is unknown: global, per_device, group:N"),
     ("group:0", "is unknown"), ("group:", "is unknown")],
)  # fmt: skip
def test_a_wrong_setting_is_one_clear_line(inputs, batch_norm, message):
    with pytest.raises(UsageError, match=message):
        apply(batch_norm, inputs, devices=1)
