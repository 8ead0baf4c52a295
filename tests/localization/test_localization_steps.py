"""The steps of localization against their definition in float64 NumPy."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_localizer import CLASSES, RESIDENT, SETTINGS, random_variables, tiny_localizer, training_batch

from resnet_jax.config import default_config
from resnet_jax.detection.average_precision import overlaps
from resnet_jax.distributed import batch_sharding, make_mesh, replicated
from resnet_jax.localization import steps
from resnet_jax.localization.settings import make_settings
from resnet_jax.training.optimizer import make_optimizer

SEED = jax.random.key(7)
NONE = np.zeros((0, 4))


@pytest.fixture(scope="module")
def model():
    return tiny_localizer()


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


@pytest.fixture(scope="module")
def anchors(model):
    return model.anchors(8, 8)


def pixels(batch):
    return (batch["images"].astype(np.float32) / 255 - 0.5) / 0.25


@pytest.fixture(scope="module")
def all_outputs(model, variables):
    """Logits [n, classes, N] and codes [n, classes, N, 4] of all classes, float64."""

    @jax.jit
    def outputs(images):
        features, _ = model.apply(variables, images, method="features")
        return [model.apply(variables, features, None, method=method) for method in ("logits", "codes")]

    return lambda batch: [np.asarray(output, np.float64) for output in outputs(pixels(batch))]


@pytest.fixture(scope="module")
def losses(model, variables):
    """The losses of a batch, and the gradients of their sum."""

    def total(params, batch, settings):
        changed = {**variables, "params": params}
        parts = model.apply(changed, pixels(batch), batch, SEED, settings, method=steps.total_losses)
        return sum(parts.values()), parts

    both = jax.jit(jax.grad(total, has_aux=True), static_argnums=2)
    return lambda batch, settings=SETTINGS: both(variables["params"], batch, settings)[::-1]


def roles_by_hand(anchors: np.ndarray, boxes: np.ndarray, partial: np.ndarray):
    """1, 0 or -1 for each anchor, and the box it overlaps most."""
    ious = overlaps(anchors[:, None], boxes[None])
    best = ious.max(1, initial=0)
    role = np.where(best < 0.3, 0, -1)
    role[(overlaps(anchors[:, None], partial[None]) >= 0.3).any(1)] = -1
    role[(best >= 0.7) | ((ious == ious.max(0, initial=0)) & (ious > 0)).any(1)] = 1
    return role, ious.argmax(1) if len(boxes) else np.zeros(len(anchors), int)


def code_by_hand(box: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    side, anchor_side = box[2:] - box[:2], anchor[2:] - anchor[:2]
    return np.concatenate([((box[2:] + box[:2]) / 2 - (anchor[2:] + anchor[:2]) / 2) / anchor_side,
                           np.log(side / anchor_side)])  # fmt: skip


def draw(anchors, boxes, valid=None, partial=None, seed=0, **changes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    valid = np.ones(len(boxes), bool) if valid is None else np.array(valid)
    partial = np.zeros(len(boxes), bool) if partial is None else np.array(partial)
    settings = make_settings(SETTINGS, **changes)
    return steps.sample_anchors(jax.random.key(seed), anchors, boxes, valid, partial, settings)


def test_eight_anchors_are_drawn_half_of_them_positive(anchors):
    # Each 3 pixels off an anchor of 48 x 48: an IoU of .78 with that one alone.
    boxes = [(32 * i - 5, 59, 32 * i + 43, 107) for i in range(1, 6)]
    role, _ = roles_by_hand(np.asarray(anchors, np.float64), np.array(boxes, np.float64), NONE)
    assert (role == 1).sum() == 5
    for seed in range(5):
        found = draw(anchors, boxes, seed=seed)
        assert found.sampled.all() and len(set(found.indices.tolist())) == 8
        np.testing.assert_array_equal(found.foreground, [True] * 4 + [False] * 4)
        np.testing.assert_array_equal(role[np.asarray(found.indices)], [1] * 4 + [0] * 4)
    different = {tuple(draw(anchors, boxes, seed=seed).indices.tolist()) for seed in range(5)}
    assert len(different) == 5


def test_missing_positives_are_made_up_for_by_negatives(anchors):
    found = draw(anchors, [(6, 6, 30, 28)])  # No anchor overlaps it by .7; one does best.
    role, _ = roles_by_hand(np.asarray(anchors, np.float64), np.array([(6.0, 6, 30, 28)]), NONE)
    assert found.foreground.sum() == (role == 1).sum() < 4 and found.sampled.all()


def test_without_a_box_in_the_crop_all_are_negatives(anchors):
    found = draw(anchors, [(0, 0, 0, 0)], valid=[False])
    assert found.sampled.all() and not found.foreground.any()


def test_what_is_seen_too_little_of_is_neither(anchors):
    box = np.array([(0.0, 40, 50, 90)])
    role, _ = roles_by_hand(np.asarray(anchors, np.float64), NONE, box)
    assert (role == -1).any()
    found = draw(anchors, box, valid=[False], partial=[True], anchors_sampled=len(anchors), anchors_foreground=0.5)
    np.testing.assert_array_equal(np.sort(found.indices[found.sampled]), np.flatnonzero(role == 0))
    assert not found.foreground.any()


def test_targets_are_the_codes_of_the_box_that_is_overlapped_most(anchors):
    boxes = np.array([(20.0, 20, 70, 66), (100, 90, 160, 140)])
    found = draw(anchors, boxes)
    _, box = roles_by_hand(np.asarray(anchors, np.float64), boxes, NONE)
    assert found.foreground.any()
    for index, target in zip(found.indices[found.foreground], found.targets[found.foreground], strict=True):
        expected = code_by_hand(boxes[box[index]], np.asarray(anchors[index], np.float64))
        np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other_classes", [False, True])
def test_the_losses_are_those_of_the_definition(model, losses, all_outputs, other_classes):
    batch = training_batch(3)
    batch["valid"][2] = False
    settings = make_settings(SETTINGS, other_classes=other_classes)
    found, _ = losses(batch, settings)
    logits, codes = all_outputs(batch)
    anchors = np.asarray(model.anchors(3, 3))
    total = {"class_loss": 0.0, "box_loss": 0.0}
    for row, label in enumerate(batch["labels"]):
        key = jax.random.fold_in(jax.random.fold_in(SEED, 0), row)
        boxes = (batch[name][row] for name in ("boxes", "valid", "partial"))
        chosen = jax.device_get(steps.sample_anchors(key, jnp.asarray(anchors), *boxes, settings))
        trained = batch["boxes"][row, batch["valid"][row]].astype(np.float64)
        role, box = roles_by_hand(anchors.astype(np.float64), trained, NONE)
        np.testing.assert_array_equal(role[chosen.indices] == 1, chosen.foreground)
        assert chosen.sampled.all() and chosen.foreground.any() == (row < 2)
        for index in chosen.indices:
            sign = np.where((np.arange(CLASSES) == label) & (role[index] == 1), 1, -1)
            logistic = np.log1p(np.exp(-sign * logits[row, :, index]))
            total["class_loss"] += (logistic.sum() if other_classes else logistic[label]) / 8 / 3
            if role[index] == 1:
                target = code_by_hand(batch["boxes"][row, box[index]].astype(np.float64), anchors[index])
                error = np.abs(codes[row, label, index] - target)
                total["box_loss"] += np.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18).sum() / 8 / 3
    for name, expected in total.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("other_classes", [False, True])
def test_an_image_trains_the_regressors_of_its_own_class_alone(losses, other_classes):
    batch = training_batch(3)
    batch["labels"][:] = 0, 2, 0
    _, grads = losses(batch, make_settings(SETTINGS, other_classes=other_classes))
    touched = {name: np.asarray(grads["rpn"][name]["kernel"]).any((1, 2)).tolist() for name in ("scores", "boxes")}
    assert touched == {"scores": [True, other_classes, True], "boxes": [True, False, True]}


def test_what_is_drawn_follows_from_epoch_and_image_alone(losses):
    batch = training_batch(3)
    together, _ = losses(batch)
    alone = [losses({name: x[[i] * 3] for name, x in batch.items()})[0] for i in range(3)]
    for name in together:
        np.testing.assert_allclose(together[name], np.mean([parts[name] for parts in alone]), rtol=1e-5)
    later, _ = losses({**batch, "epoch": batch["epoch"] + 1})
    assert abs(later["class_loss"] - together["class_loss"]) > 1e-4


def test_inference_gives_the_likeliest_boxes_of_each_class_in_the_image_s_pixels(model, variables, all_outputs):
    batch = training_batch(3)
    classes = np.array([[1, 0], [2, 2], [0, 1]], np.int32)
    frame = np.array([[0.5, 0.25, 10, -4], [2, 2, 0, 0], [1, 1, 0, 0]], np.float32)
    extent = np.full((3, 2), 96, np.int32)
    inputs = {"images": batch["images"], "extent": extent, "frame": frame, "classes": classes}
    found = jax.jit(steps.make_inference_step(model, SETTINGS))(variables, inputs, RESIDENT)
    assert found["boxes"].shape == (3, 2, 6, 4)
    logits, codes = all_outputs(batch)
    anchors = np.asarray(model.anchors(3, 3), np.float64)
    centre, side = (anchors[:, 2:] + anchors[:, :2]) / 2, anchors[:, 2:] - anchors[:, :2]
    for row in range(3):
        for place, label in enumerate(classes[row]):
            best = np.argsort(-logits[row, label])[:6]
            np.testing.assert_allclose(
                found["scores"][row, place], 1 / (1 + np.exp(-logits[row, label, best])), rtol=1e-4
            )
            code = codes[row, label, best]
            middle, half = centre[best] + code[:, :2] * side[best], side[best] * np.exp(code[:, 2:]) / 2
            boxes = np.concatenate([middle - half, middle + half], axis=1).clip(0, 96)
            boxes = (boxes + frame[row, [2, 3, 2, 3]]) / frame[row, [0, 1, 0, 1]]
            np.testing.assert_allclose(found["boxes"][row, place], boxes, rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(found["boxes"][1, 0], found["boxes"][1, 1])


def test_where_there_are_fewer_anchors_than_candidates_the_rest_is_empty(model, variables):
    step = jax.jit(steps.make_inference_step(model, make_settings(SETTINGS, candidates=20)))
    batch = {
        "images": np.full((1, 96, 96, 3), 255, np.uint8),
        "extent": np.array([[32, 96]], np.int32),  # A row of 3 cells: 12 anchors.
        "frame": np.array([[1, 1, 0, 0]], np.float32),
        "classes": np.array([[0]], np.int32),
    }
    found = step(variables, batch, RESIDENT)
    there = np.asarray(found["scores"][0, 0]) > 0
    np.testing.assert_array_equal(there, np.arange(20) < 12)
    boxes = np.asarray(found["boxes"][0, 0])
    assert not boxes[~there].any() and (boxes >= 0).all() and (boxes <= (96, 32, 96, 32)).all()


@pytest.mark.slow
def test_eight_devices_train_as_one_does():
    batch = training_batch(8, size=32)
    with jax.enable_x64(True):
        model = tiny_localizer(jnp.float64, freeze_at=1, batch_norm="global", stages=2)
        config = default_config()
        config.schedule.name, config.schedule.learning_rate, config.data.color_noise = "constant", 0.1, 0.1
        optimizer = make_optimizer(config.optimizer)
        step = steps.make_train_step(model, optimizer, config, SETTINGS, total_steps=10)
        start = jax.device_get(steps.initial_state(model, optimizer, config))
        results = []
        for devices in (1, 8):
            mesh = make_mesh(jax.devices()[:devices])
            with jax.set_mesh(mesh):
                inputs = jax.device_put(batch, batch_sharding(mesh))
                exact = RESIDENT | {name: np.float64(RESIDENT[name]) for name in ("mean", "std")}
                state, resident = jax.device_put((start, exact), replicated(mesh))
                results.append(jax.device_get(jax.jit(step)(state, inputs, resident)))
    (state, metrics), (state_of_eight, metrics_of_eight) = results
    for name in metrics:
        np.testing.assert_allclose(metrics_of_eight[name], metrics[name], rtol=1e-9, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-9), state.params, state_of_eight.params
    )
    assert set(metrics) == {"loss", "class_loss", "box_loss", "learning_rate", "gradient_norm", "weight_norm"}
    jax.tree.map(np.testing.assert_array_equal, state.params["backbone"]["stem"], start.params["backbone"]["stem"])
    assert not np.array_equal(state.params["rpn"]["conv"]["kernel"], start.params["rpn"]["conv"]["kernel"])
