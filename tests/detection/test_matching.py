"""Matching against loops from the definition; counts and fairness of the sampling.

Bounds on chi-square statistics are their 99.99% points; the seeds are fixed, so that nothing here is a matter of luck.
"""

import functools

import boxes_by_hand as by_hand
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from scipy import stats

from resnet_jax.detection import anchors, matching


def match_by_hand(ious, valid, high, low, best_for_each, lowest=0.0, candidates=None, ignored=None):
    count, box_count = ious.shape
    taking_part = [candidates is None or candidates[i] for i in range(count)]
    boxes, roles = [], []
    for i in range(count):
        best, best_box = 0.0, 0
        for j in range(box_count):
            if taking_part[i] and valid[j] and ious[i, j] > best:
                best, best_box = ious[i, j], j
        role = -1
        if lowest <= best < low and not (ignored is not None and ignored[i]):
            role = 0
        if best >= high:
            role = 1
        if best_for_each:
            for j in range(box_count):
                rivals = [ious[k, j] for k in range(count) if taking_part[k]]
                if taking_part[i] and valid[j] and ious[i, j] > 0 and ious[i, j] >= max(rivals):
                    role = 1
        boxes.append(best_box)
        roles.append(role if taking_part[i] else -1)
    return boxes, roles


RPN = {"high": 0.7, "low": 0.3, "best_for_each": True}
VOC_HEAD = {"high": 0.5, "low": 0.5, "best_for_each": False, "lowest": 0.1}


@pytest.mark.parametrize("rule", [RPN, VOC_HEAD], ids=["rpn", "head"])
def test_matches_are_those_of_the_definition(rule):
    match = jax.jit(functools.partial(matching.match, **rule))
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # Small whole boxes: many overlaps tie, exactly.
        boxes = by_hand.random_boxes(rng, 5, size=8)
        ious = by_hand.ious(by_hand.random_boxes(rng, 40, size=8), boxes).astype(np.float32)
        valid = rng.uniform(size=5) < (0 if seed == 0 else 0.7)
        masks = {"candidates": rng.uniform(size=40) < 0.8, "ignored": rng.uniform(size=40) < 0.2}
        box, role = match(ious, valid, **masks)
        expected_box, expected_role = match_by_hand(ious, valid, **rule, **masks)
        np.testing.assert_array_equal(role, expected_role)
        np.testing.assert_array_equal(box, expected_box)
        seen |= set(expected_role)
    assert seen == {-1, 0, 1}


def test_all_anchors_that_tie_for_a_box_are_foreground():
    ious = np.array([[0.4, 0.0], [0.4, 0.0], [0.2, 0.0], [0.0, 0.0]], np.float32)
    _, role = matching.match(ious, np.array([True, True]), **RPN)
    np.testing.assert_array_equal(role, [1, 1, 0, 0])  # And the box that none touches makes none foreground.


def test_the_thresholds_belong_to_the_upper_side():
    ious = np.array([[0.7], [0.3], [0.29], [0.69], [0.9]], np.float32)
    _, role = matching.match(ious, np.array([True]), **RPN)
    np.testing.assert_array_equal(role, [1, -1, 0, -1, 1])
    _, role = matching.match(np.array([[0.5], [0.49], [0.1], [0.09]], np.float32), np.array([True]), **VOC_HEAD)
    np.testing.assert_array_equal(role, [1, 0, 0, -1])


def test_without_boxes_all_is_background():
    for ious in (np.zeros((4, 0), np.float32), np.full((4, 2), 0.9, np.float32)):
        box, role = matching.match(ious, np.zeros(ious.shape[1], bool), **RPN)
        np.testing.assert_array_equal(box, np.zeros(4))
        np.testing.assert_array_equal(role, np.zeros(4))


def test_padding_by_boxes_and_anchors_changes_no_match():
    rng = np.random.default_rng(3)
    ious = rng.uniform(size=(30, 4)).astype(np.float32)
    padded = np.pad(ious, ((0, 10), (0, 3)), constant_values=1)
    match = jax.jit(functools.partial(matching.match, **RPN))
    plain = match(ious, np.ones(4, bool))
    found = match(padded, np.arange(7) < 4, candidates=np.arange(40) < 30)
    for first, second in zip(plain, found, strict=True):
        np.testing.assert_array_equal(first, second[:30])
    np.testing.assert_array_equal(found[1][30:], -np.ones(10))


def test_anchors_in_a_crowd():
    crowds = np.array([[0.0, 0, 100, 100], [200, 0, 300, 100]], np.float32)
    boxes = np.array([[10, 10, 20, 20], [95, 0, 105, 10], [90, 0, 103, 10], [210, 0, 220, 9], [5, 5, 5, 5]], np.float32)
    valid = np.array([True, False])
    found = jax.jit(matching.in_crowd)(boxes, crowds, valid, 0.7)
    np.testing.assert_array_equal(found, [True, False, True, False, False])
    assert not matching.in_crowd(boxes, crowds[:0], valid[:0], 0.7).any()


@functools.partial(jax.jit, static_argnums=(2, 3))
def sample(key, roles, count, share, identities=None):
    return matching.sample(key, roles, count, share, identities)


@pytest.mark.parametrize("positives", [0, 5, 8, 30])
@pytest.mark.parametrize("negatives", [0, 10, 60])
def test_a_sample_has_its_counts_and_nothing_twice(positives, negatives):
    rng = np.random.default_rng(positives + negatives)
    roles = np.full(100, -1)
    roles[:positives], roles[positives : positives + negatives] = 1, 0
    roles = rng.permutation(roles)
    indices, chosen = (np.asarray(x) for x in sample(jax.random.key(positives), roles, 32, 0.25))
    assert indices.shape == chosen.shape == (32,)
    drawn = indices[chosen]
    assert len(set(drawn.tolist())) == len(drawn) and (roles[drawn] >= 0).all()
    expected_positives = min(positives, 8)
    assert (roles[drawn] == 1).sum() == expected_positives
    assert (roles[drawn] == 0).sum() == min(negatives, 32 - expected_positives)
    assert (np.diff(roles[drawn]) <= 0).all() and (indices[~chosen] == 0).all()
    assert (np.diff(chosen.astype(int)) <= 0).all()


def test_more_may_be_asked_for_than_there_are():
    indices, chosen = sample(jax.random.key(0), np.array([0, 1, -1]), 8, 0.5)
    np.testing.assert_array_equal(indices, [1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(chosen, [True, True] + [False] * 6)


def test_the_share_is_rounded_down_but_not_by_floating_point():
    assert 0.29 * 100 < 29
    for share, expected in ((0.29, 29), (0.299, 29)):
        assert sample(jax.random.key(0), np.ones(100, np.int32), 100, share)[1].sum() == expected


def test_each_candidate_is_equally_likely_and_the_key_decides():
    roles = np.array([1] * 20 + [0] * 50 + [-1] * 10)
    draws = 4000
    draw = jax.jit(jax.vmap(lambda key: matching.sample(key, jnp.asarray(roles), 16, 0.5)))
    indices, chosen = draw(jax.random.split(jax.random.key(5), draws))
    assert chosen.all()
    for role in (1, 0):
        counts = np.bincount(np.asarray(indices).ravel(), minlength=80)[roles == role]
        candidates, share = len(counts), 8 / len(counts)
        # Draws without replacement: the counts' deviations are correlated by -1 / (candidates - 1).
        spread = draws * share * (1 - share) * candidates / (candidates - 1)
        assert counts.sum() == 8 * draws
        assert ((counts - draws * share) ** 2).sum() / spread < stats.chi2.ppf(0.9999, candidates - 1)
    # Two neighbours come together as often as two strangers: 8 * 7 / (50 * 49) of all draws.
    both = ((indices == 20).any(1) & (indices == 21).any(1)).sum()
    expected = draws * 8 * 7 / (50 * 49)
    assert abs(both - expected) < 4 * np.sqrt(expected)
    again, _ = draw(jax.random.split(jax.random.key(5), draws))
    np.testing.assert_array_equal(again, indices)
    assert len({tuple(row) for row in np.asarray(indices)[:, 8:].tolist()}) > 0.99 * draws


def test_a_padded_map_draws_the_same_anchors():
    rng = np.random.default_rng(6)
    roles = rng.integers(-1, 2, (4, 5, 3))
    padded = np.pad(roles, ((0, 3), (0, 2), (0, 0)), constant_values=-1)
    key = jax.random.key(7)
    small, _ = sample(key, roles.reshape(-1), 16, 0.5, anchors.identities(4, 5, 3))
    large, _ = sample(key, padded.reshape(-1), 16, 0.5, anchors.identities(7, 7, 3))
    np.testing.assert_array_equal(
        np.stack(np.unravel_index(small, roles.shape)), np.stack(np.unravel_index(large, padded.shape))
    )
