"""The detector's network: its names, its shapes, what it does not see, and C4's parts applied by hand."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_detector import CLASSES, random_variables, tiny_detector

from resnet_jax.detection import roi
from resnet_jax.detection.network import create_detector, initialise, trained
from resnet_jax.detection.settings import make_settings
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import create_model

HEIGHT, WIDTH = 50, 71
ROIS = np.array([[[0, 0, 71, 50], [10, 5, 40, 33], [30, 20, 64, 48]]] * 2, np.float32)


def names_and_shapes(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part.key for part in path): leaf.shape for path, leaf in flat}


def some_images():
    return np.random.default_rng(0).normal(size=(2, HEIGHT, WIDTH, 3)).astype(np.float32)


FPN_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
RPN_512 = {
    "rpn/conv/kernel": (3, 3, 512, 512),
    "rpn/objectness/kernel": (1, 1, 512, 9),
    "rpn/boxes/kernel": (1, 1, 512, 36),
}
BESIDE_THE_BACKBONE = {
    "resnet50-c4": RPN_512 | {
        "rpn/conv/kernel": (3, 3, 1024, 512),
        "head/classes/kernel": (2048, 21),
        "head/boxes/kernel": (2048, 80),
    },
    "vgg16-c4": RPN_512 | {"head/classes/kernel": (4096, 21), "head/boxes/kernel": (4096, 80)},
    "resnet18-fpn": {
        "rpn/conv/kernel": (3, 3, 256, 512),
        "rpn/objectness/kernel": (1, 1, 512, 3),
        "rpn/boxes/kernel": (1, 1, 512, 12),
        **{f"fpn/lateral{level}/kernel": (1, 1, 32 * 2 ** (level - 1), 256) for level in range(2, 6)},
        **{f"fpn/output{level}/kernel": (3, 3, 256, 256) for level in range(2, 6)},
        "box/fc1/kernel": (7 * 7 * 256, 1024),
        "box/fc2/kernel": (1024, 1024),
        "head/classes/kernel": (1024, 21),
        "head/boxes/kernel": (1024, 80),
    },
}  # fmt: skip


@pytest.mark.parametrize("which", BESIDE_THE_BACKBONE)
def test_classification_weights_fit_by_name_and_the_rest_is_named_plainly(which):
    name, neck = which.split("-")
    settings = make_settings(neck=neck, **({"anchor_sizes": FPN_SIZES} if neck == "fpn" else {}))
    detector = create_detector(name, 20, settings)
    found = jax.eval_shape(functools.partial(initialise, detector), jax.random.key(0))
    network = create_model(name)
    whole = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    del whole["params"]["head"]
    params = names_and_shapes(found["params"])
    backbone = {name.removeprefix("backbone/"): s for name, s in params.items() if name.startswith("backbone/")}
    assert backbone == names_and_shapes(whole["params"])
    if "batch_stats" in whole:
        assert names_and_shapes(found["batch_stats"]["backbone"]) == names_and_shapes(whole["batch_stats"])
    beside = {name: s for name, s in params.items() if not name.startswith("backbone/") and name.endswith("kernel")}
    assert beside == BESIDE_THE_BACKBONE[which]
    assert detector.strides == ((4, 8, 16, 32, 64) if neck == "fpn" else (16,))
    assert detector.pooled == (14 if which == "resnet50-c4" else 7)


def test_layers_begin_as_in_faster_rcnn():
    params = jax.jit(functools.partial(initialise, tiny_detector()))(jax.random.key(0))["params"]
    expected = {("rpn", "conv"): 0.01, ("rpn", "objectness"): 0.01, ("rpn", "boxes"): 0.01}
    expected |= {("head", "classes"): 0.01, ("head", "boxes"): 0.001}
    for (part, layer), deviation in expected.items():
        kernel, bias = params[part][layer]["kernel"], params[part][layer]["bias"]
        assert abs(float(kernel.std()) / deviation - 1) < 4 / np.sqrt(kernel.size)
        assert (bias == 0).all()


@pytest.mark.parametrize(
    ("pooling", "context", "size", "left"),
    [("pool", False, 6, 3), ("align", True, 6, 3), ("pool", True, 14, 7), ("align", False, 7, 7)],
)
def test_outputs_of_c4_are_those_of_the_parts_applied_by_hand(pooling, context, size, left):
    model = tiny_detector(roi=pooling, context=context, pooled=size, last_stride=size // left)
    variables = random_variables(model)
    extent = np.full((2, 2), (HEIGHT, WIDTH), np.int32)
    apply = jax.jit(functools.partial(model.apply))
    ((logits,), (codes,)), (classes, boxes) = apply(variables, some_images(), extent, ROIS)

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
        pooled = jnp.concatenate([function(f, b, size, 1 / 16) for f, b in zip(features, boxes, strict=True)])
        x = network.apply(backbone, pooled, 4, method="stage")
        assert x.shape[1:3] == (left, left)
        return np.asarray(x.mean((1, 2))).reshape(2, -1, 16)

    x = pooled_means(ROIS)
    if context:
        whole = pooled_means(np.array([[[0, 0, WIDTH, HEIGHT]]] * 2, np.float32))
        x = np.concatenate([x, np.repeat(whole, 3, axis=1)], axis=-1)
    head = variables["params"]["head"]
    np.testing.assert_allclose(classes, x @ head["classes"]["kernel"] + head["classes"]["bias"], atol=1e-4)
    expected = (x @ head["boxes"]["kernel"] + head["boxes"]["bias"]).reshape(2, 3, CLASSES, 4)
    np.testing.assert_allclose(boxes, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "batch_norm"),
    [("c4", "frozen"), ("vgg", "frozen"), ("fpn", "frozen"), ("c4", "group_norm"), ("fpn", "group_norm")],
)
def test_nothing_beyond_the_image_is_seen(kind, batch_norm):
    model = tiny_detector(kind, context=True, batch_norm=batch_norm)
    variables, apply = random_variables(model), jax.jit(model.apply)
    extent = np.full((2, 2), (HEIGHT, WIDTH), np.int32)
    canvas = np.full((2, 96, 112, 3), 77, np.float32)
    canvas[:, :HEIGHT, :WIDTH] = some_images()
    shapes = [
        [
            x.shape[1:3]
            for x in jax.eval_shape(functools.partial(model.apply, method="features"), variables, x, extent)[0]
        ]
        for x in (some_images(), canvas)
    ]
    (logits, codes), head = apply(variables, some_images(), extent, ROIS)
    (padded_logits, padded_codes), padded_head = apply(variables, canvas, extent, ROIS)
    for own, larger, *outputs in zip(*shapes, logits, codes, padded_logits, padded_codes, strict=True):
        for found, expected in ((outputs[2], outputs[0]), (outputs[3], outputs[1])):
            cells = found.reshape(2, *larger, -1)[:, : own[0], : own[1]]
            np.testing.assert_allclose(cells.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    for found, expected in zip(padded_head, head, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_with_trained_bn_padding_changes_no_output_statistic_or_gradient(kind):
    images, down, right = some_images(), 46, 57
    canvas = np.pad(images, ((0, 0), (0, down), (0, right), (0, 0)), constant_values=77)
    extent = np.full((2, 2), (HEIGHT, WIDTH), np.int32)
    with jax.enable_x64(True):
        model = tiny_detector(kind, jnp.float64, freeze_at=0, batch_norm="global", context=True)
        variables = random_variables(model)

        def both(network, images):
            maps, map_extents = network.features(images, extent, train=True)
            return maps, network.classify(maps, map_extents, ROIS, extent, train=True)

        @jax.jit
        def learn(images):
            def loss(params):
                given = {**variables, "params": params}
                (maps, outputs), updated = model.apply(given, images, method=both, mutable=["batch_stats"])
                # Of the shared maps and of the regions: what is beyond the images is 0 in the maps, and adds nothing.
                total = sum(jnp.sin(x).sum() for x in (*maps, *outputs))
                return total, (outputs, updated["batch_stats"])

            return jax.value_and_grad(loss, has_aux=True)(variables["params"])

        found, expected = learn(canvas), learn(images)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8), found, expected)
        statistics = expected[0][1][1]["backbone"]
        assert not any((old == new).all() for old, new in zip(*map(jax.tree.leaves, (
            variables["batch_stats"]["backbone"], statistics)), strict=True))  # fmt: skip


def test_regions_that_only_fill_up_are_not_counted_by_trained_bn():
    model = tiny_detector(batch_norm="global", freeze_at=0, context=True)
    variables, random = random_variables(model), np.random.default_rng(1)
    pooled = random.normal(size=(2, 4, 6, 6, 16)).astype(np.float32)  # The last of each image's is the whole image.
    counted = np.array([[True, True, False], [True, False, False]])

    @jax.jit
    def look(pooled, counted):
        return model.apply(variables, pooled, True, counted=counted, method="region_features", mutable=["batch_stats"])

    features, stats = look(pooled, counted)
    own = np.append(counted, [[True]] * 2, axis=1)[..., None, None, None]
    filled = np.where(own, pooled, np.float32(7))
    again, stats_again = look(filled, counted)
    np.testing.assert_allclose(again[counted], features[counted], rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), stats_again, stats)
    assert not np.allclose(look(filled, np.ones_like(counted))[0][counted], features[counted], rtol=1e-3)


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


def test_of_vgg_whole_stages_stay():
    model = tiny_detector("vgg", freeze_at=2)
    params = jax.eval_shape(functools.partial(initialise, model), jax.random.key(0))["params"]
    changes = trained(model, params)
    for part, tree in changes["backbone"].items():
        assert set(jax.tree.leaves(tree)) == {part not in ("stage1", "stage2")}, part
    assert all(jax.tree.leaves({name: tree for name, tree in changes.items() if name != "backbone"}))


def test_cifar_nets_are_backbones_too_and_with_group_norm_all_of_one_is_trained():
    model = create_detector("cifar_resnet8", 3, make_settings(), batch_norm="group_norm", freeze_at=0)
    assert model.strides == (2,)
    variables = jax.eval_shape(functools.partial(initialise, model), jax.random.key(0))
    assert set(variables) == {"params"}
    assert all(jax.tree.leaves(trained(model, variables["params"])))


@pytest.mark.parametrize(
    ("name", "settings", "freeze_at", "message"),
    [
        ("resnet18", {}, 6, "model.freeze_at=6: resnet18 has 5 parts, stem, stage1, stage2, stage3, stage4"),
        ("vgg16", {}, 6, "model.freeze_at=6: vgg16 has 5 parts, stage1, stage2, stage3, stage4, stage5"),
        ("resnet18", {"roi": "crop"}, 2, "detection.roi=crop is unknown: pool, align"),
        ("resnet18", {"neck": "c5"}, 2, "detection.neck=c5 is unknown: c4, fpn"),
        ("vgg16", {"pooled": 14}, 2, "detection.pooled=14: the fc6 of model.name=vgg16 looks at 7; 0 is that"),
        ("vgg16", {"neck": "fpn"}, 2, "detection.neck=fpn goes with .*, not with model.name=vgg16"),
        ("cifar_resnet20", {"neck": "fpn"}, 2, "detection.neck=fpn goes with .*, not with model.name=cifar_resnet20"),
        ("resnet18", {"neck": "fpn"}, 2, r"detection.anchor_sizes=\(128, 256, 512\): detection.neck=fpn takes one for"),
    ],
)
def test_mistakes_are_named(name, settings, freeze_at, message):
    with pytest.raises(UsageError, match=message):
        create_detector(name, 3, make_settings(**settings), freeze_at=freeze_at)
