"""BN folded into convolutions: the same outputs as of the network that it is made of."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UsageError
from resnet_jax.models.fold import fold
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

SMALL = {"num_classes": 5, "stem_width": 8}
BASIC = {"blocks": (2, 2), "widths": (8, 12), **SMALL}
BOTTLENECK = {"blocks": (2, 1), "widths": (16, 24), "bottleneck": True, **SMALL}
NETWORKS = {
    "resnet18": (ResNet, BASIC),
    "resnet50": (ResNet, BOTTLENECK),
    "resnet50_v1_5": (ResNet, BOTTLENECK | {"stride_in": "middle", "zero_init_last": True}),
    "option A": (ResNet, BASIC | {"shortcut": "A", "stem": "cifar"}),
    "option C": (ResNet, BOTTLENECK | {"shortcut": "C"}),
    "plain": (ResNet, BASIC | {"shortcut": "none"}),
    "highway": (ResNet, BASIC | {"shortcut": "gated", "stem": "cifar"}),
    "stacked": (ResNet, BASIC | {"blocks": (1, 9), "stacked": True, "scan": True}),
    "frozen": (ResNet, BASIC | {"batch_norm": "frozen", "freeze_at": 1}),
    "vgg16_bn": (VGG, {"blocks": (1, 2, 1), "widths": (8, 8, 12), "num_classes": 5, "normalise": True, "fc_width": 16}),
}


def random_variables(model, size: int):
    """Random weights and statistics, as of a trained network: no bias is 0 and no scale 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return random.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)
        fan = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 4
        return (random.normal(size=leaf.shape) * np.sqrt(2 / fan)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def both_ways(kind, settings, dtype, asarray=np.asarray):
    """(logits of the network itself, of the folded one, the folded one and its variables)."""
    model, size = kind(**settings, dtype=dtype), 60 if kind is VGG else 33  # Of which VGG's three stages leave 7.
    variables = random_variables(model, size)
    folded = fold(model, jax.tree.map(asarray, variables))
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(dtype)
    logits = jax.jit(lambda: [net.apply(tree, images) for net, tree in ((model, variables), folded)])()
    return *logits, *folded


@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_network_says_the_same(name):
    expected, found, model, variables = both_ways(*NETWORKS[name], jnp.float32)
    assert float(jnp.std(expected)) > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    assert model.batch_norm == "folded" and set(variables) == {"params"}
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 60, 60, 3)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn"])
def test_in_float64_to_its_rounding_for_numpy_s_arrays_and_jax_s(name):
    with jax.enable_x64(True):
        for asarray in (np.asarray, jnp.asarray):
            expected, found, _, _ = both_ways(*NETWORKS[name], jnp.float64, asarray)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * float(jnp.abs(expected).max()))


def test_kernels_are_scaled_in_float32_whatever_is_computed_in():
    kinds = [fold(model, random_variables(model, 33))[1] for dtype in (jnp.float32, jnp.bfloat16)
             for model in [ResNet(**BASIC, dtype=dtype)]]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *kinds)
    assert {leaf.dtype for leaf in jax.tree.leaves(kinds[1])} == {np.dtype(np.float32)}


def test_stacked_blocks_are_folded_one_by_one():
    model = ResNet(**BASIC)
    trees = [random_variables(model, 33) for _ in range(3)]
    for i, tree in enumerate(trees):
        tree["params"] = jax.tree.map(lambda x, i=i: x * (i + 1), tree["params"])
        tree["batch_stats"] = jax.tree.map(lambda x, i=i: x + i, tree["batch_stats"])
    _, together = fold(model, jax.tree.map(lambda *leaves: np.stack(leaves), *trees))
    apart = [fold(model, tree)[1] for tree in trees]
    jax.tree.map(np.testing.assert_array_equal, together, jax.tree.map(lambda *leaves: np.stack(leaves), *apart))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ResNet, BASIC | {"batch_norm": "group_norm"}),
        (VGG, NETWORKS["vgg16_bn"][1] | {"normalise": False}),
    ],
)
def test_without_running_statistics_nothing_changes(kind, settings):
    model = kind(**settings)
    variables = random_variables(model, 60)
    assert fold(model, variables) == (model, variables)


def test_folding_twice_is_folding_once():
    model = ResNet(**BASIC)
    once = fold(model, random_variables(model, 33))
    twice = fold(*once)
    assert twice[0] == once[0]
    assert twice[1] is once[1]


def test_it_is_for_inference_alone():
    model = ResNet(**BASIC, batch_norm="folded")
    with pytest.raises(UsageError, match="batch_norm=folded is for inference"):
        jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), jnp.zeros((1, 33, 33, 3)))
