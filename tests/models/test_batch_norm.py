"""BatchNorm's three ways to take statistics, and positions that have no part in them, against NumPy."""

import functools

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from resnet_jax.distributed import make_mesh
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import MaxPool
from resnet_jax.models.normalisation import BatchNorm
from resnet_jax.models.padding import masked_padding
from resnet_jax.models.resnet import ResNet

SHAPE = (16, 3, 5, 4)
EPSILON, MOMENTUM = 1e-5, 0.9
QUICK = {"xla_backend_optimization_level": 0}  # For whoever spends most of the time in XLA.


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


def masked(x: np.ndarray, extents: np.ndarray) -> np.ma.MaskedArray:
    """What of [N, H, W, C] lies beyond the images is masked."""
    own = np.zeros(x.shape, bool)
    for row, (height, width) in enumerate(extents):
        own[row, :height, :width] = True
    return np.ma.masked_array(x.astype(np.float64), ~own)


@pytest.mark.parametrize(("batch_norm", "groups"), [("global", 1), ("group:2", 8), ("group:4", 4)])
def test_what_is_not_counted_has_no_part_in_statistics(inputs, batch_norm, groups):
    random = np.random.default_rng(1)
    extents = random.integers(1, SHAPE[1:3], (16, 2), endpoint=True)
    extents[4] = 0  # A row without an image.
    own = masked(inputs, extents)
    layer = BatchNorm(batch_norm, MOMENTUM)
    variables = layer.init(jax.random.key(0), inputs, train=False)
    counted = jnp.asarray(~own.mask[..., 0])
    y, updated = layer.apply(variables, inputs, train=True, counted=counted, mutable=["batch_stats"])
    parts = np.split(own.data, groups), np.split(own.mask, groups)
    parts = [np.ma.masked_array(x, mask) for x, mask in zip(*parts, strict=True)]
    want = np.ma.concatenate([(x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + EPSILON) for x in parts])
    np.testing.assert_allclose(np.where(own.mask, 0, y), want.filled(0), atol=2e-5)
    running = {"mean": (1 - MOMENTUM) * own.mean((0, 1, 2)), "var": MOMENTUM + (1 - MOMENTUM) * own.var((0, 1, 2))}
    for name in running:  # Each counted position as much as any other, whichever group it is in.
        np.testing.assert_allclose(updated["batch_stats"][name], running[name], rtol=1e-5, atol=1e-6)
    inference = layer.apply(variables, inputs, train=False, counted=counted)
    np.testing.assert_array_equal(inference, layer.apply(variables, inputs, train=False))


def test_a_group_of_rows_without_images_is_nothing_and_not_nan(inputs):
    layer = BatchNorm("group:4", MOMENTUM)
    variables = layer.init(jax.random.key(0), inputs, train=False)
    keywords = {"train": True, "mutable": ["batch_stats"]}

    @jax.grad
    def gradient(x):
        y, _ = layer.apply(variables, x, counted=counted, **keywords)
        return jnp.where(counted[..., None], y**3, 0).sum()

    counted = jnp.ones(SHAPE[:3], bool).at[4:8].set(False)
    _, found = layer.apply(variables, inputs, counted=counted, **keywords)
    _, expected = layer.apply(variables, np.delete(inputs, range(4, 8), axis=0), **keywords)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    slope = gradient(inputs)
    assert jnp.isfinite(slope).all() and (slope[4:8] == 0).all()


@pytest.mark.parametrize(
    "settings", [{"blocks": (1, 1)}, {"blocks": (1, 9), "stacked": True, "scan": True, "remat": True}]
)
def test_a_network_is_trained_as_if_its_canvases_had_no_padding(settings):
    settings = {
        "widths": (4, 8),
        "num_classes": 3,
        "stem": "cifar",
        "stem_width": 4,
        "batch_norm": "group:2",
        **settings,
    }
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 9, 13, 3))
    canvas = np.full((4, 16, 16, 3), 9.0)  # The last two rows hold no image.
    canvas[:2, :9, :13] = images
    extents = np.array([[9, 13], [9, 13], [0, 0], [0, 0]])
    with jax.enable_x64(True):
        network = ResNet(**settings, dtype=jnp.float64)
        shapes = jax.eval_shape(network.init, jax.random.key(0), images)
        variables = jax.tree.map(lambda leaf: random.uniform(-0.5, 1, leaf.shape), shapes)

        def loss(params, images):
            keywords = {"train": True, "method": "features", "mutable": ["batch_stats"]}
            features, updated = network.apply(variables | {"params": params}, images, **keywords)
            return jnp.sin(features["stage2"][:2, :5, :7]).sum(), updated

        def masked_loss(params, images):
            with masked_padding(images.shape[1:3], extents):
                return loss(params, images)

        found, expected = (
            jax.jit(jax.value_and_grad(function, has_aux=True), compiler_options=QUICK)(variables["params"], x)
            for function, x in ((masked_loss, canvas), (loss, images))
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected)


@pytest.mark.parametrize(
    ("batch_norm", "message"),
    [("group:5", "does not divide into groups of 5"), ("batch", "is unknown: global, per_device, group:N"),
     ("group:0", "is unknown"), ("group:", "is unknown")],
)  # fmt: skip
def test_a_wrong_setting_is_one_clear_line(inputs, batch_norm, message):
    with pytest.raises(UsageError, match=message):
        apply(batch_norm, inputs, devices=1)


@pytest.mark.parametrize("batch_norm", ["global", "group:4"])
def test_with_a_pool_it_is_followed_by_relu_and_pool(batch_norm, inputs):
    layer = BatchNorm(batch_norm, MOMENTUM)
    pool = lambda x: MaxPool(window=3, stride=2, padding=1).apply({}, x)
    variables = layer.init(jax.random.key(0), inputs, train=False)
    params = {"scale": jnp.array([1.5, -0.7, 0.0, -2.0]), "bias": jnp.array([0.1, -0.2, 0.3, 0.4])}

    def run(x, params, given: bool):
        variables_ = variables | {"params": params}
        if given:
            y, updated = layer.apply(variables_, x, True, pool=pool, mutable=["batch_stats"])
        else:
            y, updated = layer.apply(variables_, x, True, mutable=["batch_stats"])
            y = pool(jax.nn.relu(y))
        return jnp.sin(y).sum(), (y, updated)

    run = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
    found, plain = run(inputs, params, True), run(inputs, params, False)
    assert found[1][0].shape == (16, 2, 3, 4)
    # With a scale of zero all of a window are alike, and which of them has the gradient is open.
    pick = lambda tree: (jax.tree.map(lambda gradient: gradient[..., [0, 1, 3]], tree[0]), tree[1])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, pick(found), pick(plain))


def test_a_batch_of_which_nothing_counts_leaves_the_running_statistics(inputs):
    layer = BatchNorm("group:8", MOMENTUM)
    variables = layer.init(jax.random.key(0), inputs, train=False)
    counted = np.zeros(SHAPE[:3], bool)
    y, updated = layer.apply(variables, inputs, True, counted=counted, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
