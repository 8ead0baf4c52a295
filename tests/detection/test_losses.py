"""The losses of Faster R-CNN against loops from the definitions, and their gradients against finite differences."""

import math

import boxes_by_hand as by_hand
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import losses

SAMPLES, CLASSES = 12, 3


def smooth_l1_by_hand(x: float, beta: float) -> float:
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1_is_the_definition(beta):
    errors = np.array([-3, -1, -1 / 9, -0.05, 0, 1e-3, 1 / 9, 0.5, 1, 2, 1e30], np.float32)
    expected = [smooth_l1_by_hand(float(x), beta) for x in errors]
    np.testing.assert_allclose(losses.smooth_l1(errors, beta), expected, rtol=1e-5, atol=1e-9)
    gradient = jax.jit(jax.grad(lambda x: losses.smooth_l1(x, beta).sum()))(errors)
    np.testing.assert_allclose(gradient, np.clip(errors / beta, -1, 1) if beta else np.sign(errors), rtol=1e-5)


def rpn_case():
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=SAMPLES),
        "codes": rng.normal(size=(SAMPLES, 4)),
        "foreground": rng.uniform(size=SAMPLES) < 0.5,
        "targets": rng.normal(size=(SAMPLES, 4)),
        "sampled": rng.uniform(size=SAMPLES) < 0.7,
    }


def rpn_by_hand(logits, codes, foreground, targets, sampled, beta):
    objectness, box = 0.0, 0.0
    for i in range(len(logits)):
        if sampled[i]:
            probability = 1 / (1 + math.exp(-logits[i]))
            objectness -= math.log(probability if foreground[i] else 1 - probability)
            if foreground[i]:
                box += sum(smooth_l1_by_hand(codes[i][k] - targets[i][k], beta) for k in range(4))
    count = max(sum(sampled), 1)
    return objectness / count, box / count


def head_case(boxes_per_roi: int = CLASSES):
    rng = np.random.default_rng(1)
    return {
        "logits": rng.normal(size=(SAMPLES, 1 + CLASSES)),
        "codes": rng.normal(size=(SAMPLES, boxes_per_roi, 4)),
        "labels": rng.integers(1 + CLASSES, size=SAMPLES),
        "targets": rng.normal(size=(SAMPLES, 4)),
        "sampled": rng.uniform(size=SAMPLES) < 0.7,
    }


def head_by_hand(logits, codes, labels, targets, sampled, beta):
    classes, box = 0.0, 0.0
    for i in range(len(logits)):
        if sampled[i]:
            classes -= logits[i][labels[i]] - math.log(sum(math.exp(x) for x in logits[i]))
            if labels[i] > 0:
                own = codes[i][labels[i] - 1 if len(codes[i]) > 1 else 0]
                box += sum(smooth_l1_by_hand(own[k] - targets[i][k], beta) for k in range(4))
    count = max(sum(sampled), 1)
    return classes / count, box / count


KINDS = {
    "rpn": (jax.jit(losses.rpn_losses, static_argnames="beta"), rpn_by_hand, rpn_case),
    "head": (jax.jit(losses.head_losses, static_argnames="beta"), head_by_hand, head_case),
    "head, one box for all classes": (
        jax.jit(losses.head_losses, static_argnames="beta"),
        head_by_hand,
        lambda: head_case(1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_definition_and_padding_counts_for_nothing(kind):
    function, expected, make_case = KINDS[kind]
    case = make_case()
    assert 0 < sum(case["sampled"]) < SAMPLES
    np.testing.assert_allclose(function(**case, beta=1 / 9), expected(**case, beta=1 / 9), rtol=1e-5)
    # What is not sampled may be anything.
    broken = case | {name: case[name].copy() for name in ("logits", "codes", "targets")}
    for name in ("logits", "codes", "targets"):
        broken[name][~case["sampled"]] = np.nan

    def total(logits, codes):
        return sum(function(**(broken | {"logits": logits, "codes": codes}), beta=1 / 9))

    np.testing.assert_allclose(total(broken["logits"], broken["codes"]), sum(expected(**case, beta=1 / 9)), rtol=1e-5)
    for gradient in jax.grad(total, argnums=(0, 1))(broken["logits"], broken["codes"]):
        assert np.isfinite(gradient).all() and (gradient[~case["sampled"]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_sampled_is_no_loss(kind):
    function, _, make_case = KINDS[kind]
    case = make_case() | {"sampled": np.zeros(SAMPLES, bool)}
    assert function(**case, beta=1 / 9) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    function, _, make_case = KINDS[kind]
    with jax.enable_x64(True):
        case = make_case()
        for name in ("logits", "codes"):
            total = lambda x, name=name: sum(function(**(case | {name: x}), beta=1 / 9))
            gradient = jax.grad(total)(case[name])
            assert gradient.dtype == np.float64
            np.testing.assert_allclose(gradient, by_hand.numeric_gradient(total, case[name]), rtol=1e-5, atol=1e-8)


def test_one_logit_is_the_softmax_over_two():
    rng = np.random.default_rng(2)
    pairs, foreground = rng.normal(size=(9, 2)).astype(np.float32), rng.uniform(size=9) < 0.5
    two = jax.jit(losses.class_losses)(pairs, foreground.astype(np.int32))
    one = jax.jit(losses.objectness_losses)(pairs[:, 1] - pairs[:, 0], foreground)
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_bfloat16_predictions_are_computed_in_float32():
    case = {name: jnp.asarray(x, jnp.bfloat16) if x.dtype == float else x for name, x in head_case().items()}
    for loss in jax.eval_shape(lambda: losses.head_losses(**case, beta=1.0)):
        assert loss.dtype == jnp.float32
