"""GroupNorm: what it normalises by, its groups, its names, and images that fill a part of their canvas."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UsageError
from resnet_jax.models.normalisation import GroupNorm, count_channel_groups, count_groups
from resnet_jax.models.padding import inside, masked_padding
from resnet_jax.models.registry import create_model
from resnet_jax.models.resnet import ResNet

EPSILON = 1e-5


def test_each_image_s_groups_of_channels_are_normalised_by_their_own_positions():
    random = np.random.default_rng(0)
    x = random.normal(3, 2, (2, 5, 6, 8)).astype(np.float32)
    extents = np.array([[5, 6], [3, 4]], np.int32)
    scale, bias = random.normal(size=(2, 8)).astype(np.float32)
    layer = functools.partial(GroupNorm("group_norm:4").apply, {"params": {"scale": scale, "bias": bias}})
    found = layer(x, counted=inside((5, 6), extents))
    for row, (height, width) in enumerate(extents):
        for group in range(4):
            channels = slice(2 * group, 2 * group + 2)
            own = x[row, :height, :width, channels].astype(np.float64)
            expected = (own - own.mean()) / np.sqrt(own.var() + EPSILON) * scale[channels] + bias[channels]
            np.testing.assert_allclose(found[row, :height, :width, channels], expected, atol=1e-5)
    np.testing.assert_array_equal(found[:1], layer(x[:1]))


def test_statistics_are_float32_for_bfloat16_activations():
    x = (np.random.default_rng(0).normal(size=(2, 30, 30, 4)) + 100).astype(jnp.bfloat16)
    y, _ = GroupNorm("group_norm:2", dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64).reshape(2, -1, 2, 2).std((1, 3)), 1, rtol=1e-2)


@pytest.mark.parametrize(
    ("batch_norm", "channels", "groups"),
    [
        ("group_norm", 64, 32),
        ("group_norm", 2048, 32),
        ("group_norm", 16, 8),
        ("group_norm", 48, 24),
        ("group_norm", 9, 3),
        ("group_norm", 7, 1),
        ("group_norm", 1, 1),
        ("group_norm:16", 16, 16),
        ("group_norm:8", 64, 8),
    ],
)
def test_groups_are_32_or_as_many_as_leave_each_two_channels(batch_norm, channels, groups):
    assert count_channel_groups(batch_norm, channels) == groups


def test_names_are_bn_s_without_running_statistics():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def shapes(**settings):
        return jax.eval_shape(create_model("cifar_resnet8", **settings).init, jax.random.key(0), images)

    found, with_bn = shapes(batch_norm="group_norm"), shapes()
    assert set(found) == {"params"}
    assert found["params"] == with_bn["params"]


def test_an_image_is_normalised_as_if_it_had_no_padding():
    network = ResNet((1, 1), (8, 16), num_classes=3, stem_width=8, batch_norm="group_norm")
    image = np.random.default_rng(0).normal(size=(1, 37, 50, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), image)
    canvas = np.full((1, 64, 64, 3), 9, np.float32)
    canvas[:, :37, :50] = image

    @jax.jit
    def features(images, extents):
        with masked_padding(images.shape[1:3], extents):
            return network.apply(variables, images, method="features")

    found = features(canvas, np.array([[37, 50]]))
    for name, expected in network.apply(variables, image, method="features").items():
        _, height, width, _ = expected.shape
        np.testing.assert_allclose(found[name][:, :height, :width], expected, atol=1e-5, err_msg=name)


def test_it_takes_nothing_of_the_batch():
    assert count_groups("group_norm", 7) == count_groups("group_norm:8", 7) == 1


@pytest.mark.parametrize(
    ("batch_norm", "message"),
    [
        ("group_norm:32", "batch_norm=group_norm:32: 16 channels do not divide into 32 groups; model.batch_norm=group"),
        ("group_norm:0", "is unknown: .* group_norm:N"),
        ("group_norm:", "is unknown"),
        ("groupnorm", "is unknown"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(batch_norm, message):
    model = create_model("cifar_resnet8", batch_norm=batch_norm)
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=True))
