"""Ensembles and several scales: against one detector alone, and against their definitions."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from tiny_detector import RESIDENT, SETTINGS, random_variables, rectangles, tiny_detector

from resnet_jax.data.augment import normalise
from resnet_jax.detection import inference
from resnet_jax.detection.inference import Member, View
from resnet_jax.detection.settings import make_settings

FINDS = make_settings(SETTINGS, score_threshold=0.2)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "context"])
def member(request) -> Member:
    model = tiny_detector(context=request.param)
    return Member(model, random_variables(model))


def other_variables(member: Member):
    return jax.tree.map(lambda x: np.flip(x, -1).copy(), random_variables(member.model))


def view(batch, extent=None) -> View:
    images = normalise(batch["images"], RESIDENT["mean"], RESIDENT["std"])
    return View(images, jnp.asarray(batch["extent"] if extent is None else extent))


def found(members, views=(), settings=FINDS, batch=None):
    """The inference step's objects, image by image."""
    batch = rectangles(2) if batch is None else batch
    step = jax.jit(inference.make_inference_step([m.model for m in members], settings, views))
    out = step([m.variables for m in members], inference.inputs(batch), [RESIDENT] * len(members))
    out = jax.tree.map(np.asarray, out)
    assert out["valid"].sum() > 3
    return [{name: x[row][out["valid"][row]] for name, x in out.items()} for row in range(len(out["valid"]))]


@pytest.mark.slow
def test_a_detector_twice_finds_what_it_finds_alone(member):
    for one, other in zip(found([member]), found([member, member]), strict=True):
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)


@pytest.mark.slow
def test_an_ensemble_looks_at_all_proposals_and_takes_the_mean(member):
    members = [member, Member(member.model, other_variables(member))]
    base = view(rectangles(2))
    together = jax.jit(lambda: inference.infer(members, [base, base], [[], []], SETTINGS))()
    each = []
    for one in members:
        proposals = jax.jit(lambda one=one: inference.proposals_of(one, one.maps(base), SETTINGS))()
        each.append(jax.tree.map(np.asarray, proposals))
    regions = np.concatenate([p.boxes for p in each], axis=1)
    valid = np.concatenate([p.valid for p in each], axis=1)
    assert regions.shape == (2, 2 * SETTINGS.test_after_nms, 4)
    assert not np.array_equal(each[0].boxes, each[1].boxes)
    scores = []
    for one in members:
        maps = one.maps(base)
        logits, _ = one.call("classify", maps.levels, maps.level_extents, jnp.asarray(regions), base.extent)
        logits = np.asarray(logits, np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        scores.append(np.where(valid[..., None], shares[..., 1:], 0))
    np.testing.assert_allclose(together.scores, (scores[0] + scores[1]) / 2, atol=1e-5)
    assert np.abs(scores[0] - scores[1]).max() > 0.05


def test_the_views_of_a_region_are_those_between_which_its_side_is_224():
    random = np.random.default_rng(0)
    extent = np.array([[600, 800], [500, 400]], np.int32)
    views = [np.rint(extent * scale).astype(np.int32) for scale in (1 / 3, 2 / 3, 1, 4 / 3, 5 / 3)]
    corner = random.uniform(0, 300, (2, 50, 2))
    regions = np.concatenate([corner, corner + np.exp(random.uniform(2, 6.5, (2, 50, 2)))], axis=-1).astype(np.float32)
    got = np.asarray(inference.lower_view(jnp.asarray(regions), jnp.asarray(extent), views, 224))
    for row in range(2):
        for box, lower in zip(regions[row], got[row], strict=True):
            side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            at = [side * np.sqrt(v[row].prod() / extent[row].prod()) for v in views]
            between = [i for i in range(4) if at[i] <= 224 <= at[i + 1]]
            expected = between[0] if between else (0 if at[0] > 224 else 3)
            assert lower == expected
    assert set(got.ravel().tolist()) == {0, 1, 2, 3}


def test_views_that_are_the_usual_scale_change_nothing(member):
    base = view(rectangles(2))
    one = jax.jit(lambda: inference.infer([member], [base], [[]], SETTINGS))()
    same = jax.jit(lambda: inference.infer([member], [base], [[base, base, base]], SETTINGS))()
    for mine, theirs in zip(one, same, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.slow
def test_a_region_is_the_maximum_of_what_two_scales_show_of_it(member):
    small, large = rectangles(1, canvas=(64, 96)), rectangles(1, canvas=(128, 192))
    base, views = view(rectangles(1, canvas=(96, 144))), [view(small), view(rectangles(1)), view(large)]
    regions = jnp.array([[[3.0, 4, 99, 93], [10, 10, 26, 24]]])  # Of 92 and 15 pixels: views 0 and 1, 1 and 2.
    extents = [v.extent for v in views]
    assert np.asarray(inference.lower_view(regions, base.extent, extents, 30)).tolist() == [[0, 1]]
    maps = [member.maps(v) for v in views]
    got = inference.region_features(member, regions, member.maps(base), maps, 30)

    def alone(number: int, region: int) -> np.ndarray:
        down, across = np.asarray(views[number].extent[0]) / np.asarray(base.extent[0])
        there = regions[:, region : region + 1] * np.array([across, down, across, down], np.float32)
        levels, level_extents, extent = maps[number]
        pooled = member.call("pool", levels, level_extents, there, extent)
        return np.asarray(member.call("region_features", pooled))[0, 0]

    width = alone(0, 0).shape[0] // (2 if member.model.context else 1)  # Behind them stands the whole image.
    for region, (one, other) in enumerate([(0, 1), (1, 2)]):
        expected = np.maximum(alone(one, region), alone(other, region))[:width]
        np.testing.assert_allclose(got[0, region, :width], expected, atol=1e-5)


@pytest.mark.slow
def test_refinement_of_an_ensemble_pools_each_regions_best_box_again(member):
    members = [member, Member(member.model, other_variables(member))]
    base = view(rectangles(1))
    run = functools.partial(inference.infer, members, [base, base], [[], []])
    once = jax.jit(lambda: run(SETTINGS))()
    twice = jax.jit(lambda: run(make_settings(SETTINGS, refine=True)))()
    regions = once.boxes.shape[1]
    assert twice.boxes.shape[1] == 2 * regions
    for mine, theirs in zip(once, twice, strict=True):
        np.testing.assert_allclose(mine, theirs[:, :regions], atol=1e-5)
