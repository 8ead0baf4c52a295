"""Feature pyramids against NumPy, VGG's regions against its classifier, and dropout."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_detector import random_variables, rectangles, tiny_detector

from resnet_jax.detection import necks, roi
from resnet_jax.detection.faster_rcnn import drop_for_each_image
from resnet_jax.models.vgg import VGG

HEIGHT, WIDTH = 75, 107
MAPS = [(19, 27), (10, 14), (5, 7), (3, 4), (2, 2)]  # P2 to P6 of such an image.


def convolve_by_hand(x: np.ndarray, layer) -> np.ndarray:
    """A convolution of [n, h, w, C] of stride 1 that keeps the size."""
    kernel = np.asarray(layer["kernel"], np.float64)
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    y = np.zeros((*x.shape[:3], kernel.shape[-1])) + layer["bias"]
    for i, j in np.ndindex(kernel.shape[:2]):
        y += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
    return y


@pytest.fixture(scope="module")
def pyramid():
    """A detector with FPN, its variables, and the maps of two random images."""
    model = tiny_detector("fpn")
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(2, HEIGHT, WIDTH, 3)).astype(np.float32)
    extent = np.full((2, 2), (HEIGHT, WIDTH), np.int32)
    found = jax.jit(functools.partial(model.apply, method="features"))(variables, images, extent)
    return model, variables, images, extent, found


def test_the_top_down_path_is_that_of_the_definition_at_odd_sizes(pyramid):
    model, variables, images, _, (maps, map_extents) = pyramid
    backbone = {kind: tree["backbone"] for kind, tree in variables.items()}
    stages = jax.jit(functools.partial(model.backbone.apply, method="features"))(backbone, images)
    layers, coarser, expected = variables["params"]["fpn"], None, {}
    for level in (5, 4, 3, 2):
        x = convolve_by_hand(np.asarray(stages[f"stage{level - 1}"], np.float64), layers[f"lateral{level}"])
        if coarser is not None:
            for row, column in np.ndindex(x.shape[1:3]):
                x[:, row, column] += coarser[:, row // 2, column // 2]
        expected[level] = convolve_by_hand(x, layers[f"output{level}"])
        coarser = x
    expected[6] = expected[5][:, ::2, ::2]
    for features, own, size, level in zip(maps, map_extents, MAPS, range(2, 7), strict=True):
        assert features.shape[1:3] == size and (np.asarray(own) == size).all()
        np.testing.assert_allclose(features, expected[level], rtol=1e-4, atol=1e-4, err_msg=f"P{level}")


def test_regions_go_to_the_levels_of_the_formula():
    sides = np.concatenate([np.arange(1, 1500), [0.5, 111.99, 223.99, 447.99]]).astype(np.float32)
    boxes = np.stack([np.full_like(sides, 3), np.full_like(sides, 7), 3 + sides, 7 + sides], axis=1)
    expected = np.clip(np.floor(4 + np.log2((boxes[:, 2] - 3.0) / 224)), 2, 5) - 2
    np.testing.assert_array_equal(necks.level_of(boxes), expected)
    boundaries = np.array([[0, 0, 112, 112], [0, 0, 56, 224], [9, 9, 233, 233], [0, 0, 448, 448], [4, 4, 4, 9]])
    assert necks.level_of(boundaries).tolist() == [1, 1, 2, 3, 0]
    assert necks.level_of(boundaries.reshape(1, 5, 4)).shape == (1, 5)


@pytest.mark.parametrize("kind", ["pool", "align"])
def test_each_region_is_pooled_from_its_own_level(kind):
    model, random = tiny_detector("fpn", roi=kind), np.random.default_rng(0)
    sizes = [(128, 160), (64, 80), (32, 40), (16, 20), (8, 10)]
    maps = tuple(random.normal(size=(1, *size, 2)).astype(np.float32) for size in sizes)
    map_extents = tuple(np.array([size]) for size in sizes)
    rois = np.array([[5, 9, 50, 40], [8, 0, 160, 200], [0, 10, 300, 290], [0, 0, 640, 512], [50, 50, 162, 162]])
    rois = rois.astype(np.float32)
    extent = np.array([[512, 640]], np.int32)
    found = jax.jit(functools.partial(model.apply, {}, method="pool"))(maps, map_extents, rois[None], extent)
    function = {"pool": roi.roi_pool, "align": roi.roi_align}[kind]
    for number, level in enumerate((0, 1, 2, 3, 1)):
        features, box = jnp.asarray(maps[level][0]), rois[number : number + 1]
        expected = function(features, box, 7, 1 / (4 * 2**level))
        np.testing.assert_allclose(found[0, number], expected[0], atol=1e-5)


def test_region_layers_are_two_matrix_products_with_relu():
    model = tiny_detector("fpn")
    variables = random_variables(model)
    pooled = np.random.default_rng(0).normal(size=(2, 3, 7, 7, 8)).astype(np.float32)
    found = model.apply(variables, pooled, method="region_features")
    x = pooled.reshape(2, 3, -1)
    for layer in (variables["params"]["box"][name] for name in ("fc1", "fc2")):
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


def test_vgg_s_regions_are_what_its_classifier_sees_of_an_image():
    model = tiny_detector("vgg")
    variables = random_variables(model)
    pooled = np.random.default_rng(0).normal(size=(2, 3, 7, 7, 16)).astype(np.float32)
    found = model.apply(variables, pooled, method="region_features")
    assert found.shape == (2, 3, 24)
    backbone = model.backbone.clone()
    head = backbone.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]["head"]
    logits = backbone.apply(
        {"params": variables["params"]["backbone"] | {"head": head}}, pooled.reshape(6, 7, 7, 16), method="classify"
    )
    np.testing.assert_allclose(found.reshape(6, 24) @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-4)


def test_vgg_s_shared_maps_are_those_before_the_last_pooling():
    network = VGG((1, 1, 2), (4, 4, 6), num_classes=2, fc_width=8)
    images = np.random.default_rng(0).normal(size=(2, 60, 64, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    pooled = network.apply(variables, images, method="features")
    shared = network.apply(variables, images, last_pool=False, method="features")
    np.testing.assert_array_equal(shared["stage2"], pooled["stage2"])
    windows = np.asarray(shared["stage3"])[:, :14].reshape(2, 7, 2, 8, 2, 6)
    np.testing.assert_array_equal(windows.max((2, 4)), pooled["stage3"])


def test_dropout_follows_from_each_image_s_key_and_the_layer_and_scales_what_stays():
    keys = jax.random.split(jax.random.key(0), 3)
    x = np.random.default_rng(0).uniform(1, 2, (3 * 10, 1, 1, 200)).astype(np.float32)
    drop = jax.jit(functools.partial(drop_for_each_image, rate=0.5), static_argnames="number")
    found = np.asarray(drop(x, keys=keys, number=6))
    kept = found != 0
    np.testing.assert_allclose(found, np.where(kept, 2 * x, 0))
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(kept.size)
    images = kept.reshape(3, -1)
    for one, other in (
        (images[0], images[1]),
        (images[0], images[2]),
        (kept, np.asarray(drop(x, keys=keys, number=7)) != 0),
    ):
        assert 0.4 < (one == other).mean() < 0.6
    np.testing.assert_array_equal(drop(x[10:], keys=keys[1:], number=6), found[10:])


def test_vgg_drops_in_training_alone_half_of_both_layers():
    model = tiny_detector("vgg")
    variables = random_variables(model)
    layers = variables["params"]["backbone"]
    for name in ("fc6", "fc7"):
        layers[name] = {"kernel": np.zeros_like(layers[name]["kernel"]), "bias": np.ones(24, np.float32)}
    layers["fc7"]["kernel"] += 1 / 24
    pooled = np.ones((2, 50, 7, 7, 16), np.float32)
    describe = functools.partial(model.apply, variables, pooled, method="region_features")
    np.testing.assert_allclose(describe(), 2, rtol=1e-6)
    found = np.asarray(describe(train=True, keys=jax.random.split(jax.random.key(0))))
    assert 0.45 < (found == 0).mean() < 0.55
    kept = found[found != 0]
    # fc7's outputs are 1 and the mean of fc6's, of which half are 0 and the others 2; then twice that.
    assert abs(kept.mean() - 4) < 0.1 and 0.3 < kept.std() < 0.5


def test_the_steps_from_regions_to_outputs_make_up_classify():
    model = tiny_detector("fpn", context=True)
    variables, batch = random_variables(model), rectangles(2)
    rois = batch["boxes"]

    def both_ways(network):
        maps, map_extents = network.features(batch["images"] / 255, batch["extent"])
        pooled = network.pool(maps, map_extents, rois, batch["extent"])
        vectors = network.region_features(pooled)
        assert pooled.shape == (2, 5, 7, 7, 8) and vectors.shape == (2, 4, 48)
        # As at two scales of the same image (appendix B): the larger of each number.
        larger = jnp.maximum(vectors, network.region_features(network.pool(maps, map_extents, rois, batch["extent"])))
        return network.head(larger), network.classify(maps, map_extents, rois, batch["extent"])

    apart, together = jax.jit(lambda: model.apply(variables, method=both_ways))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), apart, together)
