"""Our Linen modules under flax.nnx: the same logits, statistics and gradients as with Linen's own apply and init."""

from flax import nnx, traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import create_model

IMAGES = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([0, 3, 1, 2])
SETTINGS = {"num_classes": 4, "dtype": "float32"}


def variables_of(module) -> dict:
    """Initial weights of another key than nnx draws, and statistics that are not the initial ones."""
    variables = module.init(jax.random.key(7), IMAGES)
    random = np.random.default_rng(1)
    stats = jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype),
                         variables["batch_stats"])  # fmt: skip
    return {"params": variables["params"], "batch_stats": stats}


@pytest.fixture
def nets():
    """A module, its variables, and the same network under nnx."""
    module = create_model("cifar_resnet8", **SETTINGS)
    variables = variables_of(module)
    net = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(IMAGES)
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(variables).items():
        setattr(net, name, value)
    return module, variables, net


def flat(net: nnx.Module, kind: type[nnx.Variable]) -> dict[str, np.ndarray]:
    """A net's arrays of one kind by their names, as stage1/block1/conv1/kernel."""
    arrays = nnx.to_pure_dict(nnx.state(net, kind))
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(arrays, sep="/").items()}


def assert_same(found: dict[str, np.ndarray], expected: dict, tolerance: float = 1e-5) -> None:
    flattened = traverse_util.flatten_dict(expected, sep="/")
    assert found.keys() == flattened.keys()
    for name, array in flattened.items():
        np.testing.assert_allclose(found[name], array, atol=tolerance, rtol=1e-3, err_msg=name)


def loss_of(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def test_weights_that_are_set_give_the_same_logits(nets):
    module, variables, net = nets
    expected = module.apply(variables, IMAGES)
    np.testing.assert_allclose(net(IMAGES), expected, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda net, images: net(images))(net, IMAGES), expected, atol=1e-5)
    assert_same(flat(net, nnx.Param), variables["params"], 0)
    assert_same(flat(net, nnx.BatchStat), variables["batch_stats"], 0)


def test_a_net_whose_weights_are_set_needs_no_initialisation(nets):
    module, variables, _ = nets
    net = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(variables).items():
        setattr(net, name, value)
    np.testing.assert_allclose(net(IMAGES), module.apply(variables, IMAGES), atol=1e-5)
    net(IMAGES, train=True, mutable=["batch_stats"])
    assert_same(flat(net, nnx.Param), variables["params"], 0)


def test_training_moves_the_running_statistics_as_linen_does(nets):
    module, variables, net = nets
    expected, changed = module.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    logits = net(IMAGES, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert_same(flat(net, nnx.BatchStat), changed["batch_stats"])
    before = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    for name, array in flat(net, nnx.BatchStat).items():
        assert not np.array_equal(array, before[name]), name
    net(IMAGES)  # Evaluation leaves them as they are.
    assert_same(flat(net, nnx.BatchStat), changed["batch_stats"])


def test_gradients_are_those_of_linen(nets):
    module, variables, net = nets

    def linen_loss(params: dict) -> jax.Array:
        logits, _ = module.apply(variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"])
        return loss_of(logits)

    gradient = nnx.grad(lambda net: loss_of(net(IMAGES, train=True, mutable=["batch_stats"])))(net)
    expected = jax.grad(linen_loss)(variables["params"])
    assert np.abs(expected["head"]["kernel"]).max() > 1e-3
    assert_same(flat_gradient(gradient), expected, 1e-4)


def flat_gradient(gradient: nnx.State) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(nnx.to_pure_dict(gradient), sep="/").items()
    }


def test_optax_steps_through_nnx_equal_linens_and_lower_the_loss(nets):
    module, variables, net = nets
    rule = optax.sgd(0.01, momentum=0.9)
    optimizer = nnx.Optimizer(net, rule, wrt=nnx.Param)

    @nnx.jit
    def step(net: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradient = nnx.value_and_grad(
            lambda net: loss_of(net(IMAGES, train=True, mutable=["batch_stats"]))
        )(net)  # fmt: skip
        optimizer.update(net, gradient)
        return loss

    @jax.jit
    def linen_step(params, stats, state):
        def loss(params):
            logits, changed = module.apply(
                {"params": params, "batch_stats": stats}, IMAGES, train=True, mutable=["batch_stats"]
            )
            return loss_of(logits), changed["batch_stats"]

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = rule.update(gradient, state)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats = variables["params"], variables["batch_stats"]
    state, losses, expected = rule.init(params), [], []
    for _ in range(5):
        losses.append(float(step(net, optimizer)))
        params, stats, state, value = linen_step(params, stats, state)
        expected.append(float(value))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-4)
