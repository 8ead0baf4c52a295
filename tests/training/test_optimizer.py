"""The optimiser against the update rules written out in NumPy."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config import default_config
from resnet_jax.models.stacking import per_block, stack
from resnet_jax.training.optimizer import make_optimizer

# Ten steps, a drop of the rate by ten before the sixth.
RATES = [0.1] * 5 + [0.01] * 5
SHAPES = {("conv", "kernel"): (3, 3, 2, 4), ("bn", "scale"): (4,), ("bn", "bias"): (4,), ("head", "kernel"): (4, 5),
          ("head", "bias"): (5,)}  # fmt: skip
Tree = dict[tuple[str, str], np.ndarray]


def draw(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def nested(tree: Tree) -> dict:
    """The tree as the networks have it: {layer: {parameter: array}}."""
    layers: dict = {}
    for (layer, name), array in tree.items():
        layers.setdefault(layer, {})[name] = jnp.asarray(array)
    return layers


def ours(rates=RATES, **settings) -> list[Tree]:
    """The parameters after each step of the project's optimiser."""
    config = default_config().optimizer
    config.update(settings)
    optimizer = make_optimizer(config)
    params = nested(draw(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, rate):
        updates, state = optimizer.update(grads, state, params, learning_rate=rate)
        return jax.tree.map(jnp.add, params, updates), state

    history = []
    for i, rate in enumerate(rates):
        params, state = step(params, state, nested(draw(i + 1)), jnp.float32(rate))
        history.append({(layer, name): np.asarray(params[layer][name]) for layer, name in SHAPES})
    return history


def by_hand(rule, rates=RATES, weight_decay=0.0, decays=lambda name: True, clip=None) -> list[Tree]:
    """The same with ``rule(velocity, gradient, rate) -> velocity, change`` in 64 bits."""
    weights = {name: array.astype(np.float64) for name, array in draw(0).items()}
    velocity = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for i, rate in enumerate(rates):
        grads = {name: array.astype(np.float64) for name, array in draw(i + 1).items()}
        if clip is not None:
            norm = np.sqrt(sum((array**2).sum() for array in grads.values()))
            grads = {name: array * min(1, clip / norm) for name, array in grads.items()}
        for name in SHAPES:
            gradient = grads[name] + (weight_decay * weights[name] if decays(name) else 0)
            velocity[name], change = rule(velocity[name], gradient, rate)
            weights[name] = weights[name] - change
        history.append({name: array.copy() for name, array in weights.items()})
    return history


def torch_rule(velocity, gradient, rate):
    """Sutskever et al. as torch has it: v <- m v + g; w <- w - rate v."""
    velocity = 0.9 * velocity + gradient
    return velocity, rate * velocity


def caffe_rule(velocity, gradient, rate):
    """Caffe's SGDSolver: v <- m v + rate g; w <- w - v."""
    velocity = 0.9 * velocity + rate * gradient
    return velocity, velocity


def nesterov_rule(velocity, gradient, rate):
    """Nesterov as torch has it: v <- m v + g; w <- w - rate (g + m v)."""
    velocity = 0.9 * velocity + gradient
    return velocity, rate * (gradient + 0.9 * velocity)


def plain_rule(velocity, gradient, rate):
    return velocity, rate * gradient


def assert_same(history: list[Tree], expected: list[Tree]) -> None:
    for step, (left, right) in enumerate(zip(history, expected, strict=True)):
        for name in SHAPES:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, step {step}")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"momentum_style": "torch"}, torch_rule),
        ({"momentum_style": "caffe"}, caffe_rule),
        ({"nesterov": True}, nesterov_rule),
        ({"momentum": 0.0}, plain_rule),
        ({"momentum": 0.0, "momentum_style": "caffe"}, plain_rule),
    ],
    ids=["torch", "caffe", "nesterov", "no momentum", "no momentum, caffe"],
)
def test_updates_are_those_of_the_rule_over_a_drop_of_the_rate(settings, rule):
    assert_same(ours(weight_decay=0.0, **settings), by_hand(rule))


def test_torchs_and_caffes_momentum_differ_only_from_the_drop_on():
    torch, caffe = (ours(momentum_style=style) for style in ("torch", "caffe"))
    assert_same(torch[:5], caffe[:5])
    for step in range(5, 10):
        assert np.abs(torch[step]["head", "kernel"] - caffe[step]["head", "kernel"]).max() > 0.01


def test_at_the_drop_caffe_keeps_the_velocity_that_the_old_rate_gave():
    # A gradient of 1, then none: the weight goes on by 0.9 of the last change; in torch's at a tenth of it.
    grads, rates = [1.0, 0.0], [0.1, 0.01]
    changes = {}
    for style in ("torch", "caffe"):
        config = default_config().optimizer
        config.update(weight_decay=0.0, momentum_style=style)
        optimizer = make_optimizer(config)
        params = {"layer": {"kernel": jnp.zeros(1)}}
        state = optimizer.init(params)
        for grad, rate in zip(grads, rates, strict=True):
            grads_tree = {"layer": {"kernel": jnp.full(1, grad)}}
            updates, state = optimizer.update(grads_tree, state, params, learning_rate=jnp.float32(rate))
        changes[style] = float(updates["layer"]["kernel"][0])
    assert changes == {"torch": pytest.approx(-0.009), "caffe": pytest.approx(-0.09)}


@pytest.mark.parametrize(("style", "rule"), [("torch", torch_rule), ("caffe", caffe_rule)])
def test_weight_decay_is_added_to_the_gradient_of_every_parameter(style, rule):
    # Before the momentum, as in Caffe and torch: an L2 penalty, not a decoupled decay.
    assert_same(ours(weight_decay=0.1, momentum_style=style), by_hand(rule, weight_decay=0.1))


def test_weight_decay_of_kernels_leaves_scales_and_biases_alone():
    expected = by_hand(torch_rule, weight_decay=0.1, decays=lambda name: name[1] == "kernel")
    assert_same(ours(weight_decay=0.1, decay="kernels"), expected)


def test_the_gradient_is_clipped_by_the_norm_of_all_parameters_together():
    # Gradients have a norm of about 11 (121 numbers of variance 1).
    assert_same(ours(weight_decay=0.0, clip_norm=2.0), by_hand(torch_rule, clip=2.0))


def test_a_gradient_within_the_norm_is_not_clipped():
    assert_same(ours(weight_decay=0.0, clip_norm=100.0), by_hand(torch_rule))


def test_clipping_comes_before_weight_decay():
    # As with torch's clip_grad_norm_ followed by its SGD.
    assert_same(ours(weight_decay=0.1, clip_norm=2.0), by_hand(torch_rule, weight_decay=0.1, clip=2.0))


LARS = {"name": "lars", "decay": "kernels"}


def lars_by_hand(rates=RATES, trust=0.001, weight_decay=0.0, inside=True) -> list[Tree]:
    """Algorithm 1 of You, Gitman and Ginsburg (2017) for the kernels, momentum SGD for the rest, in 64 bits.

    ``inside``: the rate in the velocity, as there; else outside, as in torch's SGD.
    """
    weights = {name: array.astype(np.float64) for name, array in draw(0).items()}
    velocity = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for i, rate in enumerate(rates):
        for name, gradient in draw(i + 1).items():
            change = gradient.astype(np.float64)
            if name[1] == "kernel":
                size, slope = (np.sqrt(np.square(array).sum()) for array in (weights[name], change))
                change = trust * size / (slope + weight_decay * size) * (change + weight_decay * weights[name])
            velocity[name] = 0.9 * velocity[name] + (rate * change if inside else change)
            weights[name] = weights[name] - velocity[name] * (1 if inside else rate)
        history.append(dict(weights))
    return history


@pytest.mark.parametrize("style", ["caffe", "torch"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_lars_is_the_algorithm_of_its_paper(style, weight_decay):
    expected = lars_by_hand(trust=0.02, weight_decay=weight_decay, inside=style == "caffe")
    assert_same(ours(trust=0.02, weight_decay=weight_decay, momentum_style=style, **LARS), expected)


def test_lars_without_decay_is_optaxs():
    # With it optax divides by the norm of the sum, not by the sum of the norms; its rate is inside the velocity.
    kernels = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
    theirs = optax.inject_hyperparams(optax.lars, static_args=("trust_ratio_mask",))(
        learning_rate=0.0, trust_coefficient=0.001, trust_ratio_mask=kernels, momentum=0.9
    )
    params = nested(draw(0))
    state, expected = theirs.init(params), []
    for i, rate in enumerate(RATES):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = theirs.update(nested(draw(i + 1)), state, params)
        params = optax.apply_updates(params, updates)
        expected.append({(layer, name): np.asarray(params[layer][name]) for layer, name in SHAPES})
    assert_same(ours(trust=0.001, weight_decay=0.0, momentum_style="caffe", **LARS), expected)


def test_lars_moves_a_kernel_by_its_own_size_whatever_the_gradients():
    config = default_config().optimizer
    config.update(momentum=0.0, weight_decay=0.0, trust=0.1, **LARS)
    optimizer = make_optimizer(config)
    params = {"layer": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([3.0, 4.0])}}
    for scale in (1e-6, 1.0, 1e6):
        grads = jax.tree.map(lambda array, scale=scale: scale * array[::-1], params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params, learning_rate=jnp.float32(2))
        assert float(jnp.linalg.norm(updates["layer"]["kernel"])) == pytest.approx(2 * 0.1 * 5)
        np.testing.assert_allclose(updates["layer"]["bias"], [-8 * scale, -6 * scale], rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_leaves_a_kernel_or_gradient_of_zero_as_sgd_has_it(weight_decay):
    config = default_config().optimizer
    config.update(momentum=0.0, weight_decay=weight_decay, **LARS)
    optimizer = make_optimizer(config)
    for kernel, grad in (([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, 0.0])):
        params, grads = ({"layer": {"kernel": jnp.array(array)}} for array in (kernel, grad))
        updates, _ = optimizer.update(grads, optimizer.init(params), params, learning_rate=jnp.float32(1))
        expected = -(np.array(grad) + weight_decay * np.array(kernel))
        np.testing.assert_allclose(updates["layer"]["kernel"], expected, rtol=1e-6)


def test_lars_of_blocks_that_are_stored_together_is_that_of_each():
    config = default_config().optimizer
    config.update(momentum=0.0, weight_decay=0.1, **LARS)
    optimizer, random = make_optimizer(config), np.random.default_rng(0)
    like = {"stage1": {"block1": 0, "block2_to_9": 0}}
    apart = [
        {"stage1": {f"block{i}": {"kernel": i * random.normal(size=(1, 1, 2, 3))} for i in range(1, 10)}}
        for _ in range(2)
    ]

    def update(params, grads):
        return optimizer.update(grads, optimizer.init(params), params, learning_rate=jnp.float32(1))[0]

    together = update(*(stack(tree, like) for tree in apart))
    assert together["stage1"]["block2_to_9"]["kernel"].shape == (8, 1, 1, 2, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), per_block(together), update(*apart))


@pytest.mark.parametrize("settings", [{}, LARS], ids=["sgd", "lars"])
def test_parameters_keep_their_dtype(settings):
    config = default_config().optimizer
    config.update(settings)
    params = {"layer": {"kernel": jnp.ones(3, jnp.bfloat16)}}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(params, optimizer.init(params), params, learning_rate=jnp.float32(0.1))
    assert updates["layer"]["kernel"].dtype == jnp.bfloat16
