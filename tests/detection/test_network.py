"""The detector's network: its names, its shapes, and its parts against the backbone applied by hand."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_detector import CLASSES, random_variables, tiny_detector

from resnet_jax.detection import roi
from resnet_jax.detection.network import create_detector, initialise, trained
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEIGHT, WIDTH = 50, 71
ROIS = np.array([[[0, 0, 71, 50], [10, 5, 40, 33], [30, 20, 64, 48]]] * 2, np.float32)


def names_and_shapes(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part.key for part in path): leaf.shape for path, leaf in flat}


def some_images():
    return np.random.default_rng(0).normal(size=(2, HEIGHT, WIDTH, 3)).astype(np.float32)


def test_classification_weights_fit_by_name_and_the_rest_is_named_plainly():
    detector = create_detector("resnet50", 20)
    found = jax.eval_shape(functools.partial(initialise, detector), jax.random.key(0))
    network = create_model("resnet50")
    whole = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    del whole["params"]["head"]
    params = names_and_shapes(found["params"])
    backbone = {name.removeprefix("backbone/"): s for name, s in params.items() if name.startswith("backbone/")}
    assert backbone == names_and_shapes(whole["params"])
    assert names_and_shapes(found["batch_stats"]["backbone"]) == names_and_shapes(whole["batch_stats"])
    assert {name: s for name, s in params.items() if not name.startswith("backbone/") and name.endswith("kernel")} == {
        "rpn/conv/kernel": (3, 3, 1024, 512),
        "rpn/objectness/kernel": (1, 1, 512, 9),
        "rpn/boxes/kernel": (1, 1, 512, 36),
        "head/classes/kernel": (2048, 21),
        "head/boxes/kernel": (2048, 80),
    }
    assert detector.stride == 16


def test_layers_begin_as_in_faster_rcnn():
    params = jax.jit(functools.partial(initialise, tiny_detector(rpn_width=128)))(jax.random.key(0))["params"]
    expected = {("rpn", "conv"): 0.01, ("rpn", "objectness"): 0.01, ("rpn", "boxes"): 0.01}
    expected |= {("head", "classes"): 0.01, ("head", "boxes"): 0.001}
    for (part, layer), deviation in expected.items():
        kernel, bias = params[part][layer]["kernel"], params[part][layer]["bias"]
        assert abs(float(kernel.std()) / deviation - 1) < 4 / np.sqrt(kernel.size)
        assert (bias == 0).all()


@pytest.mark.parametrize("pooling", ["pool", "align"])
@pytest.mark.parametrize("context", [False, True])
def test_outputs_are_those_of_the_parts_applied_by_hand(pooling, context):
    model = tiny_detector(roi=pooling, global_context=context)
    variables = random_variables(model)
    extent = np.full((2, 2), (HEIGHT, WIDTH), np.int32)
    apply = jax.jit(functools.partial(model.apply))
    (logits, codes), (classes, boxes) = apply(variables, some_images(), extent, ROIS)

    backbone = {kind: tree["backbone"] for kind, tree in variables.items()}
    network = model.backbone
    features = jax.jit(functools.partial(network.apply, method="features"))(backbone, some_images())["stage3"]
    assert features.shape == (2, 4, 5, 16)
    assert logits.shape == (2, 4 * 5 * 6) and codes.shape == (2, 4 * 5 * 6, 4)
    rpn = variables["params"]["rpn"]
    window = np.pad(np.asarray(features), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for row, column in ((0, 0), (2, 3), (3, 4)):
        patch = window[:, row : row + 3, column : column + 3].reshape(2, -1)
        x = np.maximum(patch @ rpn["conv"]["kernel"].reshape(-1, 16) + rpn["conv"]["bias"], 0)
        place = 6 * (5 * row + column)
        for name, output in (("objectness", logits), ("boxes", codes)):
            expected = x @ rpn[name]["kernel"][0, 0] + rpn[name]["bias"]
            np.testing.assert_allclose(output[:, place : place + 6].reshape(2, -1), expected, atol=1e-4)

    def pooled_means(boxes):
        function = {"pool": roi.roi_pool, "align": roi.roi_align}[pooling]
        pooled = jnp.concatenate([function(f, b, 6, 1 / 16) for f, b in zip(features, boxes, strict=True)])
        x = network.apply(backbone, pooled, 4, method="stage")
        assert x.shape[1:3] == (3, 3)
        return np.asarray(x.mean((1, 2))).reshape(2, -1, 16)

    x = pooled_means(ROIS)
    if context:
        whole = pooled_means(np.array([[[0, 0, WIDTH, HEIGHT]]] * 2, np.float32))
        x = np.concatenate([x, np.repeat(whole, 3, axis=1)], axis=-1)
    head = variables["params"]["head"]
    np.testing.assert_allclose(classes, x @ head["classes"]["kernel"] + head["classes"]["bias"], atol=1e-4)
    expected = (x @ head["boxes"]["kernel"] + head["boxes"]["bias"]).reshape(2, 3, CLASSES, 4)
    np.testing.assert_allclose(boxes, expected, atol=1e-4)


def test_nothing_beyond_the_image_is_seen():
    model = tiny_detector(global_context=True)
    variables, apply = random_variables(model), jax.jit(model.apply)
    extent = np.full((2, 2), (HEIGHT, WIDTH), np.int32)
    canvas = np.full((2, 96, 112, 3), 77, np.float32)
    canvas[:, :HEIGHT, :WIDTH] = some_images()
    (logits, codes), head = apply(variables, some_images(), extent, ROIS)
    (padded_logits, padded_codes), padded_head = apply(variables, canvas, extent, ROIS)
    own = padded_logits.reshape(2, 6, 7, 6)[:, :4, :5], padded_codes.reshape(2, 6, 7, 24)[:, :4, :5]
    np.testing.assert_allclose(own[0].reshape(2, -1), logits, atol=1e-5)
    np.testing.assert_allclose(own[1].reshape(2, -1, 4), codes, atol=1e-5)
    for found, expected in zip(padded_head, head, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_training_leaves_as_it_is():
    def fixed(**settings):
        params = jax.eval_shape(functools.partial(initialise, model := tiny_detector(**settings)), jax.random.key(0))
        flat = jax.tree_util.tree_flatten_with_path(trained(model, params["params"]))[0]
        return {"/".join(part.key for part in path) for path, changes in flat if not changes}

    assert fixed(freeze_at=0, batch_norm="global") == set()
    norms = {name for name in fixed(freeze_at=0) if not name.endswith(("scale", "bias"))}
    assert not norms
    assert {"backbone/stem/bn/scale", "backbone/stage4/block1/shortcut_bn/bias"} <= fixed(freeze_at=0)
    frozen = fixed(freeze_at=2, batch_norm="global")
    assert {name.split("/")[1] for name in frozen} == {"stem", "stage1"}
    assert "backbone/stem/conv/kernel" in frozen
    assert "backbone/stage4/block1/conv1/kernel" in fixed(freeze_at=5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vgg16", {}, "cannot be a detector's backbone"),
        ("resnet18", {"freeze_at": 6}, "freeze_at=6"),
        ("resnet18", {"roi": "crop"}, "roi 'crop' is unknown: pool, align"),
    ],
)
def test_mistakes_are_named(name, settings, message):
    with pytest.raises(UsageError, match=message):
        initialise_shapes = functools.partial(initialise, create_detector(name, 3, **settings))
        jax.eval_shape(initialise_shapes, jax.random.key(0))
