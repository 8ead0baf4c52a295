"""Blocks that are stored together and scanned, against the same network block by block."""

from functools import partial

import jax
from jax import numpy as jnp
from jax.extend.core import jaxprs_in_params
import numpy as np
import pytest

from resnet_jax.models import stacking
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet

IMAGES = (4, 8, 8, 3)


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def network(**settings) -> ResNet:
    return ResNet((9, 1, 3), (4, 8, 8), 5, shortcut="A", stem="cifar", stem_width=4, dtype=jnp.float64, **settings)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(network(stacked=True).init)(jax.random.key(0), jnp.zeros(IMAGES))


def trained(model: ResNet, variables):
    """Loss, gradients and running statistics of a step, each block's under its own name."""

    def loss(params):
        images = jax.random.normal(jax.random.key(1), IMAGES)
        logits, updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].mean(), updated["batch_stats"]

    (value, stats), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return jax.device_get({"loss": value} | stacking.per_block({"gradients": gradients, "stats": stats}))


def test_long_runs_of_blocks_are_stored_together_and_short_ones_are_not(variables):
    params = variables["params"]
    assert sorted(params["stage1"]) == ["block1", "block2_to_9"]
    assert sorted(params["stage3"]) == ["block1", "block2", "block3"]
    assert params["stage1"]["block2_to_9"]["conv2"]["kernel"].shape == (8, 3, 3, 4, 4)
    kernels = np.asarray(params["stage1"]["block2_to_9"]["conv2"]["kernel"])
    assert len({kernel.tobytes() for kernel in kernels}) == 8, "each block begins with weights of its own"


def test_names_of_blocks_come_and_go_without_a_loss(variables):
    apart = stacking.per_block(jax.device_get(variables))
    plain = jax.eval_shape(network().init, jax.random.key(0), jnp.zeros(IMAGES))
    assert jax.tree.map(jnp.shape, apart) == jax.tree.map(jnp.shape, plain)
    again = stacking.stack(apart, variables)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(variables))


def test_weights_that_lack_a_part_are_stacked_as_far_as_they_go(variables):
    apart = stacking.per_block(jax.device_get(variables["params"]))
    del apart["head"], apart["stage2"]
    found = stacking.stack(apart, variables["params"])
    assert sorted(found) == ["stage1", "stage3", "stem"]
    assert sorted(found["stage1"]) == ["block1", "block2_to_9"]


@pytest.fixture(scope="module")
def block_by_block(variables):
    return trained(network(), stacking.per_block(jax.device_get(variables)))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "recomputed"])
def test_loss_gradients_and_statistics_are_those_of_the_blocks_one_by_one(scan, remat, variables, block_by_block):
    found = trained(network(stacked=True, scan=scan, remat=remat), variables)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, found, block_by_block)


def count(jaxpr) -> int:
    return sum(1 + sum(map(count, jaxprs_in_params(equation.params))) for equation in jaxpr.eqns)


def test_a_network_of_1202_layers_is_as_long_a_program_as_one_of_56():
    def length(depth: int) -> int:
        model = create_model(f"cifar_resnet{depth}", dtype="float32", stacked=True, scan=True)
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        step = jax.grad(lambda params, rest, x: model.apply(rest | {"params": params}, x, train=True,
                                                            mutable=["batch_stats"])[0].sum())  # fmt: skip
        rest = {"batch_stats": variables["batch_stats"]}
        return count(jax.make_jaxpr(step)(variables["params"], rest, images).jaxpr)

    assert length(1202) == length(56)


def test_a_loop_keeps_less_than_everything_for_its_backward_pass(variables, monkeypatch):
    def step_memory() -> int:
        model = network(stacked=True, scan=True)
        images = jnp.zeros((16, 32, 32, 3))
        step = jax.jit(jax.grad(lambda params: model.apply(variables | {"params": params}, images, train=True,
                                                           mutable=["batch_stats"])[0].sum()))  # fmt: skip
        return step.lower(variables["params"]).compile().memory_analysis().temp_size_in_bytes

    found = step_memory()
    monkeypatch.setattr("resnet_jax.models.resnet.keep_linear", lambda *unused, **parameters: True)
    assert found < 0.7 * step_memory()
