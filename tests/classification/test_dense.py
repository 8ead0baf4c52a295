"""Dense scores of images that share a canvas, against the network applied to each of them alone and loops."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.classification.dense import dense_scores, mirror
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

SIDE, CLASSES = 32, 5
CANVAS = (61, 64)
SHAPES = ((32, 47), (61, 33), (45, 64), (32, 32))  # Odd and even, the whole canvas' height and width, the smallest.

_residual = functools.partial(ResNet, blocks=(1, 1, 1), widths=(8, 16, 16), num_classes=CLASSES, stem_width=4)
NETWORKS = {
    "A": _residual(shortcut="A", blocks=(1, 2, 1)),
    "B": _residual(shortcut="B"),
    "C": _residual(shortcut="C"),
    "plain": _residual(shortcut="none"),
    "gated": _residual(shortcut="gated"),
    "v1": _residual(bottleneck=True, stride_in="first"),
    "v1.5": _residual(bottleneck=True, stride_in="middle", shortcut="C"),
    "pool_end": _residual(pool_padding="end"),
    "cifar": _residual(stem="cifar", shortcut="A"),
}


def random_variables(model, side: int):
    """Random weights and statistics, so that no layer is an identity and zeros don't stay zeros."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))

    def draw(path, leaf):
        name, fan = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
        if path[1].key == "head":  # No class is certain.
            return jnp.asarray(random.normal(0, 0.5 / np.sqrt(fan), leaf.shape), jnp.float32)
        drawn = {
            "kernel": lambda: random.normal(0, np.sqrt(2 / fan), leaf.shape),
            "scale": lambda: random.uniform(0.7, 1.3, leaf.shape),
            "var": lambda: random.uniform(0.5, 2, leaf.shape),
        }.get(name, lambda: random.normal(0, 0.5, leaf.shape))
        return jnp.asarray(drawn(), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def window_of(model, side: int) -> int:
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    features = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, method="features")[0], images)
    return features[f"stage{len(model.blocks)}"].shape[1]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def classify(model, params, part: np.ndarray) -> np.ndarray:
    """Logits of a window's worth [window, window, C] of the last map, by hand."""
    if isinstance(model, VGG):
        hidden = part.reshape(-1)
        for name in ("fc6", "fc7"):
            kernel = params[name]["kernel"]
            hidden = np.maximum(hidden @ kernel.reshape(-1, kernel.shape[-1]) + params[name]["bias"], 0)
    else:
        hidden = part.mean((0, 1))
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def slow_scores(model, variables, image: np.ndarray, window: int) -> np.ndarray:
    """Of one image without any padding: loops over its mirror image and all positions."""
    pair = np.stack([image, image[:, ::-1]])
    features = jax.jit(functools.partial(model.apply, method="features"))(variables, pair)
    maps, scores = np.asarray(features[f"stage{len(model.blocks)}"], np.float64), []
    params = {name: part for name, part in variables["params"].items() if not name.startswith(("stem", "stage"))}
    params = jax.tree.map(np.asarray, params)
    for found in maps:
        for top in range(found.shape[0] - window + 1):
            for left in range(found.shape[1] - window + 1):
                part = found[top : top + window, left : left + window]
                scores.append(softmax(classify(model, params, part)))
    return np.mean(scores, axis=0)


def on_canvas(images: list[np.ndarray], canvas: tuple[int, int]) -> np.ndarray:
    """Images in the upper left of canvases, and beyond them what must not be noticed."""
    garbage = np.random.default_rng(1).normal(50, 100, (len(images), *canvas, 3)).astype(np.float32)
    for place, image in zip(garbage, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return garbage


def compare(model, side: int, canvas: tuple[int, int], shapes) -> np.ndarray:
    """Asserts that dense scores are the slow ones; returns them."""
    random, variables, window = np.random.default_rng(2), random_variables(model, side), window_of(model, side)
    images = [(random.normal(0, 1, (*shape, 3)) + random.normal(0, 1, 3)).astype(np.float32) for shape in shapes]
    step = jax.jit(functools.partial(dense_scores, model, window=window))
    found = np.asarray(step(variables, on_canvas(images, canvas), np.array(shapes, np.int32)))
    expected = np.stack([slow_scores(model, variables, image, window) for image in images])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # Images differ, and no score is certain: else little would be compared.
    assert np.ptp(expected, axis=0).max() > 2e-3
    assert expected.max() < 0.99
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_those_of_each_image_alone_whatever_lies_beyond_it(name):
    compare(NETWORKS[name], SIDE, CANVAS, SHAPES)


@pytest.mark.parametrize("normalise", [False, True])
def test_scores_of_a_vgg_are_those_of_each_image_alone(normalise):
    small = VGG(blocks=(1, 1, 1, 1, 1), widths=(4, 4, 8, 8, 4), num_classes=CLASSES, normalise=normalise)
    compare(small, 224, (235, 290), ((224, 224), (235, 257)) if normalise else ((224, 290), (230, 256)))


@pytest.mark.parametrize("name", ["B", "v1.5", "pool_end", "cifar"])
def test_at_the_size_of_training_they_are_the_ordinary_network_s(name):
    model = NETWORKS[name]
    variables, window = random_variables(model, SIDE), window_of(model, SIDE)
    images = np.random.default_rng(3).normal(0, 1, (3, SIDE, SIDE, 3)).astype(np.float32)
    found = jax.jit(functools.partial(dense_scores, model, window=window))(variables, images, np.full((3, 2), SIDE))
    logits = np.asarray(jax.jit(model.apply)(variables, np.concatenate([images, images[:, :, ::-1]])))
    scores = np.stack([softmax(one) for one in logits])
    np.testing.assert_allclose(found, (scores[:3] + scores[3:]) / 2, rtol=0, atol=1e-6)


def test_a_row_that_holds_no_image_changes_no_other_and_is_finite():
    model = NETWORKS["B"]
    variables, window = random_variables(model, SIDE), window_of(model, SIDE)
    images = np.random.default_rng(4).normal(0, 1, (2, *CANVAS, 3)).astype(np.float32)
    step = jax.jit(functools.partial(dense_scores, model, window=window))
    with_nothing, both = (
        np.asarray(step(variables, images, np.array(s))) for s in ([(40, 50), (0, 0)], [(40, 50)] * 2)
    )
    np.testing.assert_allclose(with_nothing[0], both[0], rtol=0, atol=1e-7)
    assert np.isfinite(with_nothing).all()


def test_an_image_is_mirrored_within_its_own_width():
    images = on_canvas([np.random.default_rng(5).normal(0, 1, (*shape, 3)) for shape in SHAPES], CANVAS)
    mirrored = np.asarray(mirror(jnp.asarray(images), jnp.array(SHAPES)))
    for image, found, (height, width) in zip(images, mirrored, SHAPES, strict=True):
        np.testing.assert_array_equal(found[:height, :width], image[:height, :width][:, ::-1])
