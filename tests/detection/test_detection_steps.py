"""Training and inference of a tiny detector: losses by hand, padding, devices, what is drawn, and what it learns."""

import functools

import boxes_by_hand as by_hand
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_detector import KINDS, RESIDENT, SETTINGS, padded, random_variables, rectangles, tiny_detector

from resnet_jax.config import default_config
from resnet_jax.data.augment import normalise
from resnet_jax.detection import anchors, steps
from resnet_jax.detection.inference import inputs, make_inference_step
from resnet_jax.detection.network import trained
from resnet_jax.detection.settings import make_settings
from resnet_jax.distributed import make_mesh, replicate, shard_batch
from resnet_jax.training.optimizer import make_optimizer

PARTS = ("rpn_objectness_loss", "rpn_box_loss", "class_loss", "box_loss")
SEED = 5
# The sizes of each detector's maps of 64 x 80 pixels, and their strides.
PYRAMIDS = {
    "c4": ([(4, 5)], [16]),
    "vgg": ([(4, 5)], [16]),
    "fpn": ([(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)], [4, 8, 16, 32, 64]),
}
SLOW = pytest.mark.slow
OF_EACH_KIND = pytest.mark.parametrize(
    "kind", [kind if kind == "c4" else pytest.param(kind, marks=SLOW) for kind in KINDS], indirect=True
)


@pytest.fixture(scope="module")
def kind(request):
    return getattr(request, "param", "c4")


@pytest.fixture(scope="module")
def model(kind):
    return tiny_detector(kind)


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


@pytest.fixture(scope="module")
def forward(model):
    """The jitted forward pass in training, and its losses."""

    @jax.jit
    def run(variables, batch):
        images = normalise(batch["images"], RESIDENT["mean"], RESIDENT["std"])
        found, _ = model.apply(variables, images, batch, SEED, SETTINGS, method=steps.forward, mutable=["batch_stats"])
        return found, steps.losses(found, SETTINGS)

    return lambda variables, batch: jax.tree.map(np.asarray, run(variables, batch))


@pytest.fixture(scope="module")
def infer(model):
    step = jax.jit(alone(model, make_settings(SETTINGS, score_threshold=0.2)))
    return lambda variables, batch: jax.tree.map(np.asarray, step(variables, batch, RESIDENT))


def alone(model, settings):
    """The inference step of one detector."""
    step = make_inference_step((model,), settings)
    return lambda variables, batch, resident: step((variables,), inputs(batch), (resident,))


def pictures() -> dict[str, np.ndarray]:
    """Two pictures, the second of which is smaller, has one box and a crowd."""
    batch = rectangles(2)
    batch["extent"][1] = 57, 70
    batch["images"][1, 57:] = batch["images"][1, :, 70:] = 200
    batch["boxes"][1, 1] = np.minimum(batch["boxes"][1, 1], (70, 57, 70, 57))
    batch["boxes"][1, 2] = 20, 25, 60, 57
    batch["valid"][1, 2] = batch["crowd"][1, 2] = True
    return batch


def config_for(rate: float, **optimizer):
    config = default_config()
    config.seed = SEED
    config.schedule.name, config.schedule.learning_rate = "constant", rate
    config.optimizer.update(optimizer)
    return config


def smooth_l1_by_hand(errors: np.ndarray, beta: float) -> float:
    return sum(e * e / (2 * beta) if e < beta else e - beta / 2 for e in np.abs(errors).ravel().tolist())


def code_by_hand(box: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    side, anchor_side = box[2:] - box[:2], anchor[2:] - anchor[:2]
    return np.concatenate([((box + box[[2, 3, 0, 1]]) / 2 - (anchor + anchor[[2, 3, 0, 1]]) / 2)[:2] / anchor_side,
                           np.log(side / anchor_side)])  # fmt: skip


@OF_EACH_KIND
def test_each_part_of_the_loss_is_that_of_the_definition(kind, variables, forward):
    batch = pictures()
    found, parts = forward(variables, batch)
    sizes = KINDS[kind]["anchor_sizes"]
    sizes = [[size] for size in sizes] if kind == "fpn" else [sizes]
    all_anchors = np.concatenate(anchors.make_pyramid_anchors(*PYRAMIDS[kind], sizes, (0.5, 1, 2))).astype(np.float64)
    total = dict.fromkeys(PARTS, 0.0)
    for row in range(2):
        truth = batch["valid"][row] & ~batch["crowd"][row]
        boxes, labels = batch["boxes"][row, truth].astype(np.float64), batch["labels"][row, truth]
        sampled = found.anchors.sampled[row]
        indices = found.anchors.indices[row, sampled]
        overlaps = by_hand.ious(all_anchors, boxes)
        height, width = batch["extent"][row]
        within = (all_anchors[:, :2] >= 0).all(1) & (all_anchors[:, 2] <= width) & (all_anchors[:, 3] <= height)
        assert within[indices].all() and len(set(indices.tolist())) == len(indices)
        overlaps[~within] = 0
        foreground = (overlaps >= 0.7).any(1) | ((overlaps == overlaps.max(0)) & (overlaps > 0)).any(1)
        assert foreground[indices].any() and not foreground[indices].all()
        for anchor in indices:
            assert foreground[anchor] or overlaps[anchor].max() < 0.3
            logit = np.float64(found.rpn_logits[row, anchor])
            total["rpn_objectness_loss"] += np.log1p(np.exp(-logit if foreground[anchor] else logit)) / len(indices) / 2
            if foreground[anchor]:
                target = code_by_hand(boxes[overlaps[anchor].argmax()], all_anchors[anchor])
                error = found.rpn_codes[row, anchor] - target
                total["rpn_box_loss"] += smooth_l1_by_hand(error, 1 / 9) / len(indices) / 2

        sampled = found.rois.sampled[row]
        rois = found.rois.boxes[row].astype(np.float64)
        for place in np.flatnonzero(sampled):
            overlap = by_hand.ious(rois[place][None], boxes)[0]
            label = 1 + labels[overlap.argmax()] if overlap.max() >= 0.5 else 0
            logits = found.logits[row, place].astype(np.float64)
            total["class_loss"] += (np.log(np.exp(logits).sum()) - logits[label]) / sampled.sum() / 2
            if label:
                target = code_by_hand(boxes[overlap.argmax()], rois[place]) / (0.1, 0.1, 0.2, 0.2)
                error = found.codes[row, place, label - 1] - target
                total["box_loss"] += smooth_l1_by_hand(error, 1) / sampled.sum() / 2
        labels_found = found.rois.labels[row, sampled]
        assert 1 <= (labels_found > 0).sum() <= 4 and (labels_found == 0).any()  # A quarter of 16 at most.
    for name in PARTS:
        np.testing.assert_allclose(parts[name], total[name], rtol=2e-4, err_msg=name)


def test_annotated_boxes_are_regions_too_and_crowds_are_not(variables, forward):
    batch = pictures()
    found, _ = forward(variables, batch)
    boxes = {tuple(box) for box in found.rois.boxes[1][found.rois.sampled[1]].tolist()}
    assert tuple(batch["boxes"][1, 0].tolist()) in boxes
    for box in found.rois.boxes[1][found.rois.sampled[1] & (found.rois.labels[1] == 0)]:
        assert by_hand.shared_area(box, batch["boxes"][1, 2]) / by_hand.area(box) < 0.7


@OF_EACH_KIND
def test_what_is_drawn_does_not_depend_on_the_other_images(variables, forward):
    batch, other = pictures(), rectangles(3)
    swapped = {name: np.stack([x[1], other[name][2]]) for name, x in batch.items()}
    found, again = forward(variables, batch)[0], forward(variables, swapped)[0]
    np.testing.assert_array_equal(again.anchors.indices[0], found.anchors.indices[1])
    np.testing.assert_array_equal(again.rois.boxes[0], found.rois.boxes[1])
    np.testing.assert_allclose(again.logits[0], found.logits[1], rtol=1e-5, atol=1e-5)
    later = {**batch, "epoch": batch["epoch"] + 1}
    assert (forward(variables, later)[0].anchors.indices != found.anchors.indices).any()


@pytest.mark.parametrize("kind", ["c4", pytest.param("vgg", marks=SLOW)], indirect=True)
def test_dropout_is_drawn_anew_for_each_image_and_each_epoch(kind, variables, forward):
    first = {name: x[:1] for name, x in pictures().items()}
    batch = {name: np.concatenate([x, x, x]) for name, x in first.items()}
    batch["index"][1] += 1
    batch["epoch"][2] += 1
    found, _ = forward(variables, batch)
    logits = []
    for row in range(3):
        (place,) = np.flatnonzero((found.rois.boxes[row] == first["boxes"][0, 0]).all(1) & found.rois.sampled[row])
        logits.append(found.logits[row, place])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.allclose(logits[one], logits[other], atol=1e-4) == (kind != "vgg")


@OF_EACH_KIND
def test_padding_the_canvas_the_boxes_and_the_batch_changes_no_loss(variables, forward):
    batch = pictures()
    larger = padded(batch, down=32, right=48, boxes=3)
    (found, parts), (found_padded, parts_padded) = forward(variables, batch), forward(variables, larger)
    for name in PARTS:
        np.testing.assert_allclose(parts_padded[name], parts[name], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found_padded.rois.boxes, found.rois.boxes, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(found_padded.rois.labels, found.rois.labels)
    single = {name: x[:1] for name, x in batch.items()}
    assert jax.tree.map(np.shape, forward(variables, single)[1]) == dict.fromkeys(PARTS, ())
    np.testing.assert_allclose(forward(variables, single)[0].logits[0], found.logits[0], rtol=0, atol=1e-5)


@OF_EACH_KIND
def test_padding_changes_no_detection(variables, infer):
    batch = pictures()
    found = infer(variables, batch)
    assert found["valid"][:, :2].all() and found["boxes"].shape == (2, 8, 4)
    for row in range(2):
        height, width = batch["extent"][row]
        assert (found["boxes"][row] >= 0).all() and (found["boxes"][row] <= (width, height, width, height)).all()
    larger = infer(variables, padded(batch, down=32, right=48, boxes=3, rows=1))
    for name in ("scores", "labels", "valid"):
        np.testing.assert_allclose(larger[name][:2], found[name], rtol=0, atol=1e-5, err_msg=name)
    # Pixels; 1e-5 of the canvas.
    np.testing.assert_allclose(larger["boxes"][:2], found["boxes"], rtol=0, atol=1e-3)


def test_boxes_come_back_in_the_image_s_own_pixels(variables, infer):
    batch = pictures()
    found = infer(variables, batch)
    scale = np.array([[2.0, 4.0], [0.5, 1.0]], np.float32)
    scaled = infer(variables, {**batch, "scale": scale})
    by = scale[:, [1, 0, 1, 0]][:, None]
    np.testing.assert_allclose(scaled["boxes"] * by, found["boxes"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["scores"], found["scores"])


@functools.cache
def on_one_device_and_on_eight(kind: str, what: str):
    """What a step starts from, and what comes of it: (model, start, [of one device, of eight])."""
    batch = rectangles(8)
    with jax.enable_x64(True):
        model = tiny_detector(kind, dtype=jnp.float64)
        variables = random_variables(model)
        resident = RESIDENT | {name: np.float64(RESIDENT[name]) for name in ("mean", "std")}
        if what == "training":
            config = config_for(0.1, weight_decay=5e-4)
            optimizer = make_optimizer(config.optimizer)
            step = steps.make_train_step(model, optimizer, config, SETTINGS, total_steps=10)
            start = steps.initial_state(model, optimizer, config)
            start = start.replace(params=variables["params"], batch_stats=variables.get("batch_stats", {}))
        else:
            step, start = alone(model, make_settings(SETTINGS, refine=True)), variables
        results = []
        for devices in (1, 8):
            mesh = make_mesh(jax.devices()[:devices])
            with jax.set_mesh(mesh):
                placed = replicate(mesh, start), shard_batch(mesh, batch), replicate(mesh, resident)
                results.append(jax.tree.map(np.asarray, jax.jit(lambda *x: step(*x))(*placed)))
    return model, start, results


@SLOW
@pytest.mark.parametrize(
    ("kind", "what"),
    [("c4", "training"), ("vgg", "training"), ("fpn", "training"), ("c4", "inference"), ("fpn", "inference")],
)
def test_eight_devices_do_what_one_does(kind, what):
    _, _, results = on_one_device_and_on_eight(kind, what)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), *results)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_all_but_what_is_frozen(kind):
    model, start, ((state, _), _) = on_one_device_and_on_eight(kind, "training")
    same = jax.tree.map(lambda old, new: bool((old == new).all()), start.params, state.params)
    assert same == jax.tree.map(lambda changes: not changes, trained(model, start.params))


@SLOW
def test_a_detector_learns_its_picture_and_what_is_frozen_stays(model):
    config = config_for(0.03, weight_decay=5e-4)
    config.schedule.name = "linear"
    optimizer = make_optimizer(config.optimizer)
    step = jax.jit(steps.make_train_step(model, optimizer, config, SETTINGS, total_steps=250))
    start = state = steps.initial_state(model, optimizer, config)
    batch = rectangles(1)
    history = []
    for number in range(250):
        state, metrics = step(state, {**batch, "epoch": np.array([number], np.int32)}, RESIDENT)
        history.append(metrics)
    assert set(metrics) == {"loss", *PARTS, "learning_rate", "gradient_norm", "weight_norm"}
    history = {name: np.array([metrics[name] for metrics in history]) for name in metrics}
    np.testing.assert_allclose(history["loss"], sum(history[name] for name in PARTS), rtol=1e-5)
    assert history["loss"][-10:].mean() < 0.1 * history["loss"][:10].mean()

    found = jax.jit(alone(model, SETTINGS))(state.variables, batch, RESIDENT)
    found = jax.tree.map(lambda x: np.asarray(x[0]), found)
    for box, label in zip(batch["boxes"][0, :2], batch["labels"][0, :2], strict=True):
        overlaps = by_hand.ious(found["boxes"][:2], box[None])[:, 0]
        assert overlaps.max() > 0.7 and found["labels"][overlaps.argmax()] == label
        assert found["scores"][overlaps.argmax()] > 0.8
    assert not (found["scores"][2:] > 0.5).any()

    before, after = jax.tree_util.tree_flatten_with_path(start.params)[0], jax.tree.leaves(state.params)
    for (path, old), new in zip(before, after, strict=True):
        names = [part.key for part in path]
        fixed = names[1] == "stem" or (names[0] == "backbone" and "bn" in names[-2])
        assert (old == new).all() == fixed, names
    jax.tree.map(np.testing.assert_array_equal, start.batch_stats, state.batch_stats)
    assert state.step == 250


def test_statistics_that_are_not_frozen_follow_the_batch_where_training_reaches():
    model = tiny_detector(batch_norm="global", freeze_at=2)
    variables, batch = random_variables(model), rectangles(1)
    images = normalise(batch["images"], RESIDENT["mean"], RESIDENT["std"])
    keywords = {"method": steps.forward, "mutable": ["batch_stats"]}
    _, updated = jax.jit(lambda: model.apply(variables, images, batch, SEED, SETTINGS, **keywords))()
    before, after = (tree["batch_stats"]["backbone"] for tree in (variables, updated))
    for part in before:
        same = jax.tree.map(lambda old, new: bool((old == new).all()), before[part], after[part])
        assert set(jax.tree.leaves(same)) == {part in ("stem", "stage1")}, part


def test_in_bfloat16_weights_losses_and_boxes_stay_float32():
    model, config = tiny_detector(dtype=jnp.bfloat16), config_for(0.1)
    optimizer, batch = make_optimizer(config.optimizer), rectangles(2)
    start = jax.eval_shape(lambda: steps.initial_state(model, optimizer, config))
    train = steps.make_train_step(model, optimizer, config, SETTINGS, total_steps=10)
    state, metrics = jax.eval_shape(train, start, batch, RESIDENT)
    found = jax.eval_shape(alone(model, SETTINGS), start.variables, batch, RESIDENT)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, start)
    arrays = [*jax.tree.leaves(state.params), *metrics.values(), found["boxes"], found["scores"]]
    assert {x.dtype for x in arrays} == {jnp.dtype(jnp.float32)}
