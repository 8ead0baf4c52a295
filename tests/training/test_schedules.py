"""Learning rates at every step that matters, against the paper and examples worked by hand."""

import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import default_config, load_config, validate
from resnet_jax.training import schedules


def settings(**values):
    config = default_config().schedule
    config.update(values)
    return config


def rates(config, steps, total_steps=1000) -> list[float]:
    """The scheduled rate of each of the steps."""
    schedule = jax.vmap(schedules.make_schedule(config, total_steps))
    return np.asarray(schedule(jnp.array(steps, jnp.int32))).tolist()


def test_the_papers_cifar_schedule_drops_at_32k_and_48k():
    # Section 4.2: 0.1, divided by 10 at 32k and 48k iterations, stop at 64k.
    config = load_config("cifar_20")
    assert config.steps == 64_000
    steps = [0, 1, 31_999, 32_000, 32_001, 47_999, 48_000, 63_999]
    expected = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose(rates(config.schedule, steps, config.steps), expected, rtol=1e-6)


def test_steps_multiply_by_the_factor_at_each_boundary_in_whatever_order():
    config = settings(name="steps", learning_rate=0.8, factor=0.5, boundaries=(20, 10, 30))
    np.testing.assert_allclose(rates(config, [9, 10, 19, 20, 29, 30]), [0.8, 0.4, 0.4, 0.2, 0.2, 0.1], rtol=1e-6)


def test_steps_without_boundaries_and_constant_are_constant():
    for name in ("steps", "constant", "plateau"):
        np.testing.assert_allclose(rates(settings(name=name, learning_rate=0.3), [0, 5, 999]), 0.3, rtol=1e-6)


def test_constant_ignores_boundaries():
    config = settings(name="constant", learning_rate=0.3, boundaries=(5,))
    np.testing.assert_allclose(rates(config, [0, 5, 999]), 0.3, rtol=1e-6)


def test_linear_goes_straight_to_the_final_rate_and_stays_there():
    # From 0.9 to 0.1 over 400 steps: 0.002 a step.
    config = settings(name="linear", learning_rate=0.9, end_rate=0.1, end_step=400)
    expected = [0.9, 0.898, 0.7, 0.5, 0.102, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(rates(config, [0, 1, 100, 200, 399, 400, 401, 999]), expected, rtol=1e-5)


def test_linear_ends_with_the_training_unless_told():
    config = settings(name="linear", learning_rate=1.0)
    np.testing.assert_allclose(rates(config, [0, 250, 1000], total_steps=1000), [1, 0.75, 0], atol=1e-6)


def test_cosine_has_its_end_points_its_midpoint_and_its_quarters():
    # (1 + cos(pi / 4)) / 2 = 0.853553...
    config = settings(name="cosine", learning_rate=0.5, end_rate=0.1, end_step=400)
    quarter = (1 + math.sqrt(0.5)) / 2
    expected = [0.5, 0.1 + 0.4 * quarter, 0.3, 0.1 + 0.4 * (1 - quarter), 0.1, 0.1, 0.1]
    np.testing.assert_allclose(rates(config, [0, 100, 200, 300, 400, 401, 999]), expected, rtol=1e-5)


def test_cosine_falls_all_the_way_without_a_jump():
    values = np.array(rates(settings(name="cosine", learning_rate=0.1), list(range(1001))))
    assert (np.diff(values) <= 0).all()
    assert np.abs(np.diff(values)).max() < 0.1 * math.pi / 2 / 1000 * 1.01  # The steepest slope.
    assert values[-1] == pytest.approx(0, abs=1e-8)


def test_polynomial_falls_from_the_end_of_the_warmup_by_its_power():
    # MLPerf's schedule for LARS: 4 steps up to 8, then 8 ((400 - (step - 4)) / 400)^2 for 400 steps.
    config = settings(name="polynomial", learning_rate=8.0, warmup_steps=4, end_step=404)
    expected = [2, 4, 8, 8, 8 * 0.75**2, 8 * 0.5**2, 0, 0]
    np.testing.assert_allclose(rates(config, [0, 1, 3, 4, 104, 204, 404, 999]), expected, rtol=1e-5, atol=1e-6)


def test_polynomial_ends_at_its_rate_and_with_the_training_unless_told():
    config = settings(name="polynomial", learning_rate=1.0, end_rate=0.2, power=3.0)
    expected = [1, 0.2 + 0.8 * 0.5**3, 0.2]
    np.testing.assert_allclose(rates(config, [0, 500, 1000], total_steps=1000), expected, rtol=1e-5)


def test_polynomial_of_power_one_without_warmup_is_linear():
    plain = {"learning_rate": 0.9, "end_rate": 0.1, "end_step": 400}
    steps = [0, 1, 100, 399, 400, 999]
    polynomial = rates(settings(name="polynomial", power=1.0, **plain), steps)
    np.testing.assert_allclose(polynomial, rates(settings(name="linear", **plain), steps), rtol=1e-5)


@pytest.mark.parametrize("name", ["constant", "steps", "linear", "cosine"])
def test_warmup_is_a_share_of_the_scheduled_rate_that_grows_to_one(name):
    plain = settings(name=name, learning_rate=0.4, boundaries=(500,), end_rate=0.04)
    warm = settings(name=name, learning_rate=0.4, boundaries=(500,), end_rate=0.04, warmup_steps=4)
    steps = [0, 1, 2, 3, 4, 5, 499, 500, 999]
    shares = np.array([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(rates(warm, steps), shares * rates(plain, steps), rtol=1e-6)
    assert rates(warm, [3])[0] == pytest.approx(0.4, rel=0.01)


def test_rates_are_float32_scalars_under_jit():
    for name in ("constant", "steps", "linear", "cosine", "polynomial", "plateau"):
        rate = jax.jit(schedules.make_schedule(settings(name=name, boundaries=(3,)), 10))(jnp.int32(3))
        assert (rate.shape, rate.dtype) == ((), jnp.float32)


def plateau(errors, **values) -> list[float]:
    """The factor after each of the evaluated errors."""
    config = settings(name="plateau", **values)
    state, factors = schedules.initial_schedule_state(), []
    for error in errors:
        state = schedules.after_evaluation(config, state, error)
        factors.append(float(schedules.learning_rate(config, jnp.float32(1), state)))
    return factors


def test_plateau_drops_after_patience_evaluations_without_a_better_one():
    # patience 3: best 50, 40; three in a row not below 40 (equal is not better); then below it again; then three more.
    errors = [50, 40, 41, 40, 45, 39.9, 41, 41, 39, 39, 39, 39, 20]
    expected = [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose(plateau(errors, patience=3), expected, rtol=1e-6)


def test_plateau_starts_to_count_anew_after_a_drop():
    np.testing.assert_allclose(plateau([10] * 8, patience=2, factor=0.5), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])


def test_plateau_counts_only_what_is_better_by_more_than_the_threshold():
    # Better is below the best less half a point: below 29.5, which 29.4 is; then below 28.9, which 28.95 is not.
    factors = plateau([30, 29.5, 29.4, 29, 28.95, 28.8], patience=2, threshold=0.5)
    np.testing.assert_allclose(factors, [1, 1, 1, 1, 0.1, 0.1], rtol=1e-6)


def test_plateau_with_patience_one_drops_at_the_first_evaluation_that_is_not_better():
    np.testing.assert_allclose(plateau([9, 9, 8, 8], patience=1), [1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_errors_that_are_no_numbers_are_not_better():
    assert plateau([9, math.nan, math.nan], patience=2) == pytest.approx([1, 1, 0.1])


@pytest.mark.parametrize("name", ["constant", "steps", "linear", "cosine"])
def test_evaluations_change_nothing_without_plateau(name):
    state = schedules.initial_schedule_state()
    for error in (50.0, 50.0, 50.0, 50.0, 50.0):
        state = schedules.after_evaluation(settings(name=name, patience=1), state, error)
    assert float(state.factor) == 1


def warmup(errors, **values) -> list[float]:
    """The rate of each step, where step i ends with a training error of errors[i]."""
    config = settings(name="constant", learning_rate=0.1, **values)
    state, used = schedules.initial_schedule_state(), []
    step = jax.jit(lambda state, error: schedules.after_step(config, state, error))
    for error in errors:
        used.append(float(schedules.learning_rate(config, jnp.float32(0.1), state)))
        state = step(state, jnp.float32(error))
    return used


def test_the_papers_warmup_ends_once_the_running_error_is_below_80_percent():
    # The running error keeps 0.95 of its past, from 100: with batches at 60% it is 60 + 40 * 0.95^k after k
    # steps; 60 + 40 * 0.95^13 = 80.53, 60 + 40 * 0.95^14 = 79.51: steps 0 to 13 at 0.01, step 14 and on at 0.1.
    used = warmup([60] * 20, warmup_error=80.0, warmup_rate=0.01)
    np.testing.assert_allclose(used, [0.01] * 14 + [0.1] * 6, rtol=1e-6)


def test_the_warmup_ends_for_good_even_if_the_error_rises_again():
    # 95, 90.25, 85.74, 81.45, 77.38: below 80% after five steps without an error; back above it one step later.
    used = warmup([0] * 5 + [100] * 30, warmup_error=80.0, warmup_rate=0.01)
    np.testing.assert_allclose(used, [0.01] * 5 + [0.1] * 30, rtol=1e-6)


def test_one_lucky_batch_does_not_end_the_warmup():
    np.testing.assert_allclose(warmup([90] * 10 + [0] + [90] * 10, warmup_error=80.0), 0.01, rtol=1e-6)


def test_without_a_warmup_error_the_rate_is_the_scheduled_one_from_the_start():
    np.testing.assert_allclose(warmup([100] * 3, warmup_error=0.0, warmup_rate=0.01), 0.1, rtol=1e-6)


def test_the_warmup_rate_holds_whatever_the_schedule_says_and_then_the_schedule_has_not_waited():
    # As in the paper: the drop at 32k counts iterations from the first, warm-up included.
    config = settings(name="steps", learning_rate=0.1, boundaries=(3,), warmup_error=80.0, warmup_rate=0.02)
    schedule, state, used = schedules.make_schedule(config, 10), schedules.initial_schedule_state(), []
    for step in range(8):
        used.append(float(schedules.learning_rate(config, schedule(jnp.int32(step)), state)))
        state = schedules.after_step(config, state, jnp.float32(0))
    np.testing.assert_allclose(used, [0.02] * 5 + [0.01] * 3, rtol=1e-6)


def test_the_110_layer_recipe_is_held_at_001_until_80_percent():
    config = load_config("cifar_110")
    validate(config)
    assert (config.schedule.warmup_rate, config.schedule.warmup_error) == (0.01, 80.0)
    state = schedules.initial_schedule_state()
    assert float(schedules.learning_rate(config.schedule, jnp.float32(0.1), state)) == pytest.approx(0.01)
