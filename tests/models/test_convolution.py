"""Convolutions on CPUs against those that differentiate by themselves."""

from functools import partial

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from resnet_jax.distributed import BATCH_AXIS, batch_sharding, make_mesh, replicated
from resnet_jax.models.convolution import convolve, from_stored


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.enable_x64(True):
        yield


def plain(x, kernel, stride, pad):
    pads = ((pad, pad), (pad, pad))
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def arrays(size, channels=(3, 5)):
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 9, 7, channels[0])), rng.normal(size=(size, size, *channels))


def assert_close(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), found, expected)


def loss(function, x, kernel):
    return jnp.sin(function(jnp.tanh(x), kernel)).sum()


CASES = [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (1, 2, 0), (1, 1, 1), (7, 2, 3)]


@pytest.mark.parametrize(("size", "stride", "pad"), CASES)
def test_values_and_gradients(size, stride, pad):
    given = arrays(size)
    ours, expected = (
        jax.jit(jax.value_and_grad(partial(loss, partial(function, stride=stride, pad=pad)), (0, 1)))(*given)
        for function in (convolve, plain)
    )
    assert_close(ours, expected)


def rerun(function):
    return jax.checkpoint(function)


def batched(function):
    return lambda x, kernel: jax.vmap(function)(jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel + 1]))


def looped(function):
    def body(carry, scale):
        y = function(scale * carry[0], carry[1])
        return carry, y

    return lambda x, kernel: jax.lax.scan(body, (x, kernel), jnp.array([1.0, 0.5]))[1]


@pytest.mark.parametrize("way", [rerun, batched, looped])
def test_gradients_through_what_networks_do_with_it(way):
    given = arrays(3)
    ours, expected = (
        jax.jit(jax.grad(partial(loss, way(partial(function, stride=2, pad=1))), (0, 1)))(*given)
        for function in (convolve, plain)
    )
    assert_close(ours, expected)


def test_second_derivatives():
    def penalty(function, x, kernel):
        return sum(jnp.square(part).sum() for part in jax.grad(partial(loss, function), (0, 1))(x, kernel))

    ours, expected = (
        jax.jit(jax.grad(partial(penalty, partial(function, stride=1, pad=1)), (0, 1)))(*arrays(3))
        for function in (convolve, plain)
    )
    assert_close(ours, expected)


def test_devices_keep_their_own_images():
    x, kernel = arrays(3)
    expected = jax.grad(partial(loss, partial(plain, stride=1, pad=1)), (0, 1))(x, kernel)
    mesh = make_mesh(jax.devices()[:4])
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(partial(loss, partial(convolve, stride=1, pad=1)), (0, 1)))
        given = jax.device_put(x, batch_sharding(mesh)), jax.device_put(kernel, replicated(mesh))
        compiled = step.lower(*given).compile()
        found = compiled(*given)
    assert_close(found, expected)
    assert found[0].sharding.spec == PartitionSpec(BATCH_AXIS)
    assert "all-gather" not in compiled.as_text()


def test_gradients_are_of_arrays_that_are_not_computed_in_place():
    x, kernel = arrays(3)
    for function, right in (
        (partial(convolve, stride=1, pad=1), kernel),
        (partial(from_stored, jnp.matmul), kernel[0, 0]),
    ):
        text = jax.jit(jax.grad(partial(loss, function), (0, 1))).lower(x, right).compile().as_text()
        calls = [line for line in text.splitlines() if " call(" in line and 'inlineable="false"' in line]
        assert len(calls) == 2  # The output's gradient, and the input.


def test_it_is_for_reverse_mode():
    x, kernel = arrays(3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: convolve(x, kernel, 1, 1), (x,), (x,))
