"""The stem on blocks of pixels, against the convolution that it stands for."""

from functools import partial

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.registry import create_model
from resnet_jax.models.space_to_depth import conv_on_blocks


@pytest.mark.parametrize(("height", "width"), [(12, 16), (9, 14), (7, 7)])
def test_values_and_gradients_are_the_convolutions(height, width):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, height, width, 3)), random.normal(size=(7, 7, 3, 5))
    plain = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    gradients = lambda convolve: jax.grad(lambda x, kernel: jnp.sin(convolve(x, kernel)).sum(), (0, 1))
    with jax.enable_x64(True):
        for ours, theirs in ((conv_on_blocks, plain), (gradients(conv_on_blocks), gradients(plain))):
            found, expected = ours(jnp.asarray(x), jnp.asarray(kernel)), theirs(jnp.asarray(x), jnp.asarray(kernel))
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), found, expected)


def test_a_network_is_the_same_with_it():
    images = np.random.default_rng(0).normal(size=(2, 33, 40, 3)).astype(np.float32)
    settings = {"width": 0.125, "blocks": (1,), "widths": (8,), "num_classes": 3, "dtype": "float32"}
    plain, ours = (create_model("resnet18", space_to_depth=on, **settings) for on in (False, True))
    variables = plain.init(jax.random.key(0), images)
    np.testing.assert_allclose(ours.apply(variables, images), plain.apply(variables, images), rtol=1e-4, atol=1e-5)
