"""The per-class RPN's outputs: whose they are, and where."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_localizer import CLASSES, SETTINGS, random_variables, tiny_localizer

from resnet_jax.detection.network import trained
from resnet_jax.errors import UsageError
from resnet_jax.localization.network import PerClass, create_localizer, initialise
from resnet_jax.localization.settings import make_settings

PER_CELL = 4


@pytest.fixture(scope="module")
def model():
    return tiny_localizer()


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


def test_each_image_gets_the_outputs_of_the_classes_it_asks_for():
    random = np.random.default_rng(1)
    layer = PerClass(CLASSES, 5, jnp.float32)
    params = {"kernel": random.normal(size=(CLASSES, 7, 5)), "bias": random.normal(size=(CLASSES, 5))}
    x, classes = random.normal(size=(2, 3, 4, 7)), np.array([[2, 0], [1, 1]], np.int32)
    found = layer.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x), classes)
    everything = layer.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x), None)
    assert found.shape == (2, 2, 3, 4, 5) and everything.shape == (2, CLASSES, 3, 4, 5)
    for image in range(2):
        for place, label in enumerate(classes[image]):
            expected = x[image] @ params["kernel"][label] + params["bias"][label]
            np.testing.assert_allclose(found[image, place], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(everything[image, label], expected, rtol=1e-4, atol=1e-5)


def test_outputs_lie_in_the_order_of_the_anchors(model, variables):
    features = np.zeros((1, 2, 3, SETTINGS.rpn_width), np.float32)
    features[0, 1, 2, 5] = 1  # Cell (1, 2) alone.
    params = variables["params"]["rpn"]
    silent = {
        "params": {"rpn": {**params, **{n: {**params[n], "bias": 0 * params[n]["bias"]} for n in ("scores", "boxes")}}}
    }
    logits = model.apply(silent, features, np.array([[2]]), method="logits")
    codes = model.apply(silent, features, np.array([[2]]), method="codes")
    assert logits.shape == (1, 1, 6 * PER_CELL) and codes.shape == (1, 1, 6 * PER_CELL, 4)
    cell = slice(5 * PER_CELL, 6 * PER_CELL)
    np.testing.assert_allclose(logits[0, 0, cell], params["scores"]["kernel"][2, 5], rtol=1e-5)
    np.testing.assert_allclose(codes[0, 0, cell], params["boxes"]["kernel"][2, 5].reshape(PER_CELL, 4), rtol=1e-5)
    assert not np.delete(logits[0, 0], np.r_[cell]).any() and not np.delete(codes[0, 0], np.r_[cell], axis=0).any()


def test_anchors_are_centred_in_their_cells(model):
    anchors = np.asarray(model.anchors(2, 3))
    assert model.stride == 32 and anchors.shape == (24, 4) and anchors.dtype == np.float32
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    np.testing.assert_allclose(centres[::PER_CELL], [(16, 16), (48, 16), (80, 16), (16, 48), (48, 48), (80, 48)])
    sides = anchors[4:8, 2:] - anchors[4:8, :2]
    np.testing.assert_allclose(sides.prod(1), [24**2, 24**2, 48**2, 48**2], rtol=1e-5)
    np.testing.assert_allclose(sides[:, 1] / sides[:, 0], [0.5, 1, 0.5, 1], rtol=1e-5)


def test_what_is_beyond_an_image_on_its_canvas_changes_nothing(model, variables):
    random = np.random.default_rng(2)
    images = random.normal(size=(2, 64, 96, 3)).astype(np.float32)
    larger = np.full((2, 128, 160, 3), 9, np.float32)
    larger[:, :64, :96] = images
    classes = np.array([[0, 1], [2, 0]])

    @jax.jit
    def outputs(images, extent):
        features, cells = model.apply(variables, images, extent, method="features")
        logits, codes = (model.apply(variables, features, classes, method=m) for m in ("logits", "codes"))
        shape = (2, 2, *features.shape[1:3], PER_CELL)
        return logits.reshape(shape), codes.reshape(*shape, 4), cells

    whole = jax.jit(lambda images: model.apply(variables, images, classes))(images)
    for canvas in (images, larger):
        logits, codes, cells = outputs(canvas, np.array([[64, 96]] * 2, np.int32))
        np.testing.assert_array_equal(cells, [[2, 3]] * 2)
        np.testing.assert_allclose(logits[:, :, :2, :3].reshape(whole[0].shape), whole[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(codes[:, :, :2, :3].reshape(whole[1].shape), whole[1], rtol=0, atol=1e-4)


def test_the_paper_s_network_has_1000_outputs_and_4000_for_each_anchor():
    model = create_localizer("resnet101", 1000, make_settings())
    shapes = jax.eval_shape(lambda key: initialise(model, key), jax.random.key(0))["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(shapes["backbone"]) == 44_549_160 - (2048 * 1000 + 1000)  # torchvision's, less its classifier.
    assert model.stride == 32 and model.anchors_per_cell == 9
    assert count(shapes["rpn"]["conv"]) == 9 * 2048 * 512 + 512
    assert count(shapes["rpn"]["scores"]) == 1000 * 9 * (512 + 1)
    assert count(shapes["rpn"]["boxes"]) == 4000 * 9 * (512 + 1)


def test_frozen_parts_are_not_trained():
    model = tiny_localizer(freeze_at=2)
    flags = trained(model, jax.eval_shape(lambda key: initialise(model, key), jax.random.key(0))["params"])
    assert not any(jax.tree.leaves([flags["backbone"][part] for part in ("stem", "stage1")]))
    block = flags["backbone"]["stage2"]["block1"]
    assert all(jax.tree.leaves(flags["rpn"])) and block["conv1"]["kernel"] and not block["bn1"]["scale"]
    free = tiny_localizer(batch_norm="global")
    shapes = jax.eval_shape(lambda key: initialise(free, key), jax.random.key(0))
    assert all(jax.tree.leaves(trained(free, shapes["params"])))


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="'vgg16' cannot localize: a ResNet can"):
        create_localizer("vgg16", 3, make_settings())
    with pytest.raises(UsageError, match="freeze_at=6: resnet18 has 5 parts"):
        create_localizer("resnet18", 3, make_settings(), freeze_at=6)
