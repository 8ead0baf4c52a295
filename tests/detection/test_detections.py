"""From the head's outputs to detections, against loops: decoding, suppression, refinement and voting."""

import functools

import boxes_by_hand as by_hand
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_detector import CLASSES, RESIDENT, SETTINGS, random_variables, rectangles, tiny_detector

from resnet_jax.data.augment import normalise
from resnet_jax.detection import detections, inference
from resnet_jax.detection.settings import make_settings

HEIGHT, WIDTH, REGIONS = 90, 120, 30


def some_outputs():
    random = np.random.default_rng(0)
    rois = by_hand.random_boxes(random, REGIONS, 80, objects=3).clip(0, 85)
    logits = random.normal(0, 1.5, (REGIONS, 1 + CLASSES)).astype(np.float32)
    codes = random.normal(0, 1, (REGIONS, CLASSES, 4)).astype(np.float32)
    return logits, codes, rois, np.arange(REGIONS) < REGIONS - 4, np.array([HEIGHT, WIDTH], np.int32)


def test_predictions_are_decoded_with_the_stds_and_clipped():
    logits, codes, rois, valid, extent = some_outputs()
    found = jax.jit(functools.partial(detections.predict, settings=make_settings()))(logits, codes, rois, valid, extent)
    for region in range(REGIONS):
        left, top, right, bottom = rois[region].astype(np.float64)
        powers = np.exp(logits[region].astype(np.float64))
        expected = powers[1:] / powers.sum() if valid[region] else np.zeros(CLASSES)
        np.testing.assert_allclose(found.scores[region], expected, rtol=1e-5)
        for label in range(CLASSES):
            dx, dy, dw, dh = codes[region, label] * np.array([0.1, 0.1, 0.2, 0.2])
            x, y = (left + right) / 2 + dx * (right - left), (top + bottom) / 2 + dy * (bottom - top)
            w, h = (right - left) * np.exp(dw), (bottom - top) * np.exp(dh)
            box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]).clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
            np.testing.assert_allclose(found.boxes[region, label], box, atol=1e-4)


@pytest.mark.parametrize("refine", [False, True])
def test_detections_are_those_of_greedy_suppression_and_voting(refine):
    settings = make_settings(detections=12, score_threshold=0.1, refine=refine)
    predictions = detections.predict(*some_outputs(), settings)
    found = jax.jit(functools.partial(detections.detect, settings=settings))(predictions)
    boxes, scores = np.asarray(predictions.boxes), np.asarray(predictions.scores)
    flat = [(float(scores[r, c]), r, c) for r in range(REGIONS) for c in range(CLASSES) if scores[r, c] >= 0.1]
    kept = []
    for score, region, label in sorted(flat, reverse=True):
        rivals = [boxes[r, c] for _, r, c in kept if c == label]
        if all(by_hand.iou(boxes[region, label], rival) <= 0.3 for rival in rivals):
            kept.append((score, region, label))
    kept = kept[:12]
    assert len(kept) > 4 and len({label for *_, label in kept}) == CLASSES
    assert np.asarray(found.valid).tolist() == [i < len(kept) for i in range(12)]
    for place, (score, region, label) in enumerate(kept):
        box = boxes[region, label].astype(np.float64)
        if refine:
            voters = [(s, boxes[r, c]) for s, r, c in flat if c == label and by_hand.iou(boxes[r, c], box) >= 0.5]
            box = sum(s * voter for s, voter in voters) / sum(s for s, _ in voters)
        np.testing.assert_allclose(found.scores[place], score, rtol=1e-6)
        assert found.labels[place] == label
        np.testing.assert_allclose(found.boxes[place], box, atol=1e-3)
    empty = np.asarray(found.boxes)[len(kept) :]
    assert (empty == 0).all()


def test_refinement_classifies_the_best_class_s_box_of_each_region_once_more():
    model = tiny_detector()
    variables, batch = random_variables(model), rectangles(2)
    images = normalise(batch["images"], RESIDENT["mean"], RESIDENT["std"])
    members = [inference.Member(model, variables)]
    views = [inference.View(images, jnp.asarray(batch["extent"]))]
    infer = jax.jit(
        lambda refine: inference.infer(members, views, [[]], make_settings(SETTINGS, refine=refine)), static_argnums=0
    )
    once, twice = infer(False), infer(True)
    assert once.boxes.shape == (2, 16, CLASSES, 4) and twice.boxes.shape == (2, 32, CLASSES, 4)
    np.testing.assert_allclose(twice.scores[:, :16], once.scores, atol=1e-6)
    best = np.asarray(once.scores).argmax(-1)
    moved = np.take_along_axis(np.asarray(once.boxes), best[..., None, None], axis=2)[:, :, 0]

    def again(network):
        features, cells = network.features(images, batch["extent"])
        return network.classify(features, cells, moved, batch["extent"])

    logits = jax.jit(lambda: model.apply(variables, method=again))()[0]
    valid = np.asarray(once.scores).any(-1, keepdims=True)
    np.testing.assert_allclose(twice.scores[:, 16:], jax.nn.softmax(logits)[..., 1:] * valid, atol=1e-5)
