"""Which batch fits: the advice of a run that does not, and the search of a plan."""

import re

import jax
from jax import numpy as jnp
import pytest

from resnet_jax.classification.network import check_groups
from resnet_jax.config import default_config
from resnet_jax.planning.memory import (
    GIB,
    Memory,
    advise,
    argument_bytes,
    explain,
    is_out_of_memory,
    largest_that_fits,
    memory_of,
    memory_of_error,
)

OF_THE_TPU_COMPILER = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 27.57G of 15.75G"
    " hbm. Exceeded hbm capacity by 11.82G."
)


def settings(advice: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(optimizer\.accumulate|batch_size)=(\d+)", advice)}


@pytest.mark.parametrize(
    ("total", "batch", "devices", "accumulate", "batch_norm", "expected"),
    [
        # 1 GiB stays, 32 more for 256 images a device: of 15 GiB that are left, 117 images, in whole groups 96.
        (33, 2048, 8, 1, "group:32", {"optimizer.accumulate": 4, "batch_size": 96 * 8}),
        (33, 2048, 8, 1, "group:1", {"optimizer.accumulate": 4, "batch_size": 117 * 8}),
        (33, 2048, 8, 1, "per_device", {"optimizer.accumulate": 4, "batch_size": 117 * 8}),
        # In two parts of 192 images already; 88 would do, in whole groups 64.
        (33, 3072, 8, 2, "group:32", {"optimizer.accumulate": 6, "batch_size": 64 * 2 * 8}),
        # Groups that span two devices: no parts, and an even number of them.
        (33, 64, 8, 1, "group:16", {"batch_size": 16}),
    ],
)
def test_the_advice_fits_and_keeps_the_groups(total, batch, devices, accumulate, batch_norm, expected):
    memory, limit = Memory(1 * GIB, total * GIB), 16 * GIB
    advice = advise(memory, limit, batch, devices, accumulate, batch_norm)
    assert "\n" not in advice
    assert f"{total:.1f} of 16.0 GiB" in advice
    assert settings(advice) == expected
    an_image = (memory.total - memory.fixed) / (batch // (devices * accumulate))
    for name, value in expected.items():
        config = default_config()
        config.model.batch_norm, config.batch_size, config.optimizer.accumulate = batch_norm, batch, accumulate
        if name == "batch_size":
            config.batch_size = value
        else:
            config.optimizer.accumulate = value
        check_groups(config, devices)
        at_once = config.batch_size / devices / config.optimizer.accumulate
        assert at_once.is_integer()
        assert memory.fixed + at_once * an_image <= limit


def test_where_one_group_is_too_much_it_says_so():
    advice = advise(Memory(15 * GIB, 40 * GIB), 16 * GIB, 256, 8, 1, "group:32")
    assert "even a BN group of 32 images on a device is too much" in advice
    advice = advise(Memory(17 * GIB, 40 * GIB), 16 * GIB, 256, 8, 1, "global")  # The parameters alone.
    assert "even one image on a device is too much" in advice


def test_without_figures_half_is_advised():
    assert settings(advise(None, None, 512, 2, 1, "group:32")) == {"optimizer.accumulate": 2, "batch_size": 256}


def test_global_statistics_are_said_to_be_of_a_part():
    assert "over which BN averages" in advise(None, None, 512, 2, 1, "global")
    assert "over which BN averages" not in advise(None, None, 512, 2, 1, "group:32")


OF_TEMPORARIES = (  # libtpu 0.0.42's, of ResNet-50 with 1024 images on a v5e.
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.36G) exceeds"
    " available HBM (15.75G)."
)


@pytest.mark.parametrize(("text", "total"), [(OF_THE_TPU_COMPILER, 27.57), (OF_TEMPORARIES, 16.36 + 1)])
def test_the_compiler_s_message_is_understood(text, total):
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    memory = memory_of_error(error, fixed=GIB)
    assert memory.fixed == GIB
    assert memory.total == pytest.approx(total * GIB, rel=1e-6)


def test_other_errors_are_told_apart():
    assert not is_out_of_memory(RuntimeError("INVALID_ARGUMENT: something else"))
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
    assert is_out_of_memory(error)
    assert memory_of_error(error, 100) is None


def test_a_compiled_step_s_memory_is_its_arguments_and_what_it_makes():
    step = jax.jit(lambda w, x: (w + 1, jnp.sort(x @ x.T, axis=0).sum()), donate_argnums=0)
    arguments = jnp.zeros((100, 100)), jnp.zeros((500, 10))
    memory = memory_of(step.lower(*arguments).compile())
    assert argument_bytes(arguments) == 40_000 + 20_000
    assert memory.fixed == 60_000
    assert 60_000 + 500 * 500 * 4 <= memory.total < 60_000 + 4 * 500 * 500 * 4


def test_a_step_that_died_is_explained_though_its_arguments_are_gone():
    step = jax.jit(lambda w, x: w + (jnp.sort(x @ x.T, axis=0)).sum(), donate_argnums=0)
    arguments = jnp.zeros(1), jnp.zeros((512, 100))
    step(*arguments)
    assert arguments[0].is_deleted()
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1048576 bytes.")
    advice = explain(error, step, arguments, 1_000_000, batch_size=512, devices=1, accumulate=1, batch_norm="group:32")
    assert settings(advice).keys() == {"optimizer.accumulate", "batch_size"}
    advice = explain(RuntimeError(OF_THE_TPU_COMPILER), step, arguments, 16 * GIB, 512, 1, 1, "group:32")
    assert "27.6 of 16.0 GiB" in advice
    assert settings(advice) == {"optimizer.accumulate": 2, "batch_size": 288}


@pytest.mark.parametrize("unit", [1, 32])
@pytest.mark.parametrize("best", [0, 1, 31, 32, 33, 480, 511])
def test_the_largest_batch_is_found_by_halves(best, unit):
    tried = list(largest_that_fits(lambda size: size <= best, 512, unit, tries=9))
    assert max((size for size, fits in tried if fits), default=0) == best // unit * unit
    assert all(size % unit == 0 and fits == (size <= best) for size, fits in tried)
    assert len(tried) <= {1: 9, 32: 4}[unit]


def test_nothing_is_tried_below_one_group():
    assert not list(largest_that_fits(lambda size: False, 32, 32))
    assert not list(largest_that_fits(lambda size: False, 20, 32))
