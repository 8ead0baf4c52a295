"""Which images make up a detector's batches: each once an epoch, all of a batch on one canvas."""

from collections import Counter
import pickle

import numpy as np
import pytest

from resnet_jax.data import stream
from resnet_jax.data.order import epoch_order
from resnet_jax.data.stream import Rows
from resnet_jax.detection.canvas_order import EvaluationCanvases, Group, Piece, TrainingCanvases, group_by_canvas
from resnet_jax.detection.resize import canvas_of, canvas_sizes, scaled_size

CANVASES = canvas_sizes()


@pytest.fixture(scope="module")
def sizes():
    rng = np.random.default_rng(0)
    photos = [(375, 500)] * 40 + [(333, 500)] * 20 + [(500, 375)] * 12 + [(500, 500)] * 4 + [(281, 500)] * 3
    rng.shuffle(photos)
    return [scaled_size(*photo).size for photo in photos]


def batch(plan, step: int) -> Piece:
    pieces = [plan.piece(step * plan.rows.pieces + k) for k in range(plan.rows.pieces)]
    assert len({piece.canvas for piece in pieces}) == 1
    return Piece(pieces[0].canvas, *(np.concatenate([piece[k] for piece in pieces]) for k in (1, 2)))


def test_few_images_move_to_a_larger_canvas_or_fetch_others_to_theirs():
    small, wide, wider, tall = (608, 672), (608, 800), (608, 1024), (800, 608)
    ten = [(600, 700)] * 10

    def counts(sizes, least):
        groups = group_by_canvas(sizes, CANVASES, least)
        assert sorted(np.concatenate([group.members for group in groups])) == list(range(len(sizes)))
        return {group.canvas: len(group.members) for group in groups}

    assert counts(ten, 4) == {wide: 10}
    assert counts([(600, 600)] * 3 + ten, 4) == {wide: 13}  # Up.
    assert counts([(600, 600)] * 4 + ten, 4) == {small: 4, wide: 10}
    assert counts([*ten, (600, 1000)], 4) == {wide: 7, wider: 4}  # Three are fetched.
    assert counts([*ten, (600, 1000)], 8) == {wider: 11}  # What were left is too little by itself.
    assert counts([(600, 600)] * 3 + ten[:2] + [(600, 1000)], 4) == {wider: 6}
    assert counts([*ten, (700, 600)], 4) == {wide: 10, tall: 1}  # Neither canvas holds the other's.
    assert counts([*ten, (700, 600), (600, 1000)], 1) == {wide: 10, tall: 1, wider: 1}


@pytest.mark.parametrize("size", [1, 2, 3, 8, 32, 200])
def test_every_image_comes_once_with_every_epoch_and_a_batch_has_one_canvas(sizes, size):
    groups = group_by_canvas(sizes, CANVASES, size)
    plan = TrainingCanvases(5, groups, Rows(size))
    epochs = 4
    seen, begun = Counter(), []
    for step in range(-(-(epochs + 1) * len(sizes) // size) + 64):
        canvas, index, epoch = batch(plan, step)
        assert index.dtype == epoch.dtype == np.int32 and index.shape == (size,)
        assert all(sizes[i][0] <= canvas[0] and sizes[i][1] <= canvas[1] for i in index)
        seen.update(zip(epoch.tolist(), index.tolist(), strict=True))
        begun.append(step * size // len(sizes) - epoch)
    assert set(seen.values()) == {1}
    complete = {(epoch, i) for epoch in range(epochs) for i in range(len(sizes))}
    assert complete <= set(seen)
    if size < 10:  # An image is late by what its canvas had left: never an epoch, if an epoch fills its batches.
        assert np.abs(begun).max() <= 1


@pytest.mark.parametrize("size", [1, 5, 8])
def test_steps_are_what_dealing_out_one_image_after_another_gives(sizes, size):
    groups = group_by_canvas(sizes, CANVASES, size)
    group_of = {int(i): number for number, group in enumerate(groups) for i in group.members}
    heaps, dealt = [[] for _ in groups], []
    for epoch in range(5):
        for i in epoch_order(9, epoch, len(sizes)).tolist():
            heap = heaps[group_of[i]]
            heap.append((i, epoch))
            if len(heap) == size:
                dealt.append((groups[group_of[i]].canvas, list(heap)))
                heap.clear()
    plan = TrainingCanvases(9, groups, Rows(size))
    for step, expected in enumerate(dealt):
        canvas, index, epoch = batch(plan, step)
        assert (canvas, list(zip(index.tolist(), epoch.tolist(), strict=True))) == expected


def test_the_order_follows_from_seed_and_step_alone(sizes):
    groups = group_by_canvas(sizes, CANVASES, 8)
    plan = TrainingCanvases(5, groups, Rows(8))
    forward = [batch(plan, step) for step in range(60)]
    fresh = pickle.loads(pickle.dumps(TrainingCanvases(5, groups, Rows(8))))
    for step in reversed(range(60)):
        ours = batch(fresh, step)
        assert ours.canvas == forward[step].canvas
        np.testing.assert_array_equal(ours.index, forward[step].index)
        np.testing.assert_array_equal(ours.epoch, forward[step].epoch)
    other = TrainingCanvases(6, groups, Rows(8))
    assert any(not np.array_equal(batch(other, step).index, forward[step].index) for step in range(3))
    # Epochs differ, and canvases come in no fixed order.
    canvases = [one.canvas for one in forward]
    assert canvases[:9] != canvases[9:18] and len(set(canvases[:9])) > 1


def test_far_steps_are_found_without_counting_from_the_first(sizes):
    plan = TrainingCanvases(5, group_by_canvas(sizes, CANVASES, 8), Rows(8))
    step = 10**7
    _, index, epoch = batch(plan, step)
    assert len(set(index.tolist())) == 8 and abs(int(epoch[0]) - step * 8 / len(sizes)) < 2


def test_a_batch_larger_than_the_set_repeats_it():
    plan = TrainingCanvases(0, (Group((64, 64), np.arange(3, dtype=np.int32)),), Rows(8))
    steps = [batch(plan, step) for step in range(3)]
    seen = Counter(zip(*(np.concatenate([one[k] for one in steps]).tolist() for k in (2, 1)), strict=True))
    assert seen == Counter({(epoch, i): 1 for epoch in range(8) for i in range(3)})


@pytest.mark.parametrize("size", [1, 4, 8, 100])
def test_evaluation_has_every_image_once_and_fills_up(sizes, size):
    plan = EvaluationCanvases(group_by_canvas(sizes, CANVASES, size), Rows(size))
    seen = []
    for step in range(plan.batches):
        canvas, index, epoch = batch(plan, step)
        real = index[index >= 0]
        assert index.shape == (size,) and (index[len(real) :] == -1).all() and len(real) and not epoch.any()
        assert all(sizes[i][0] <= canvas[0] and sizes[i][1] <= canvas[1] for i in real)
        seen += real.tolist()
    assert sorted(seen) == list(range(len(sizes)))
    with pytest.raises(IndexError):
        plan.piece(plan.batches * plan.rows.pieces)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_and_pieces_share_out_the_same_batches(sizes, processes, monkeypatch):
    groups = group_by_canvas(sizes, CANVASES, 8)
    for make in (lambda rows: TrainingCanvases(1, groups, rows), lambda rows: EvaluationCanvases(groups, rows)):
        whole = [batch(make(Rows(8)), step) for step in range(9)]
        with monkeypatch.context() as patch:
            patch.setattr(stream, "_PIECE", 3)
            plans = [make(Rows(8, process, processes)) for process in range(processes)]
            for step, expected in enumerate(whole):
                parts = [batch(plan, step) for plan in plans]
                assert {part.canvas for part in parts} == {expected.canvas}
                np.testing.assert_array_equal(np.concatenate([part.index for part in parts]), expected.index)
                np.testing.assert_array_equal(np.concatenate([part.epoch for part in parts]), expected.epoch)


def test_without_a_least_number_each_image_has_its_smallest_canvas(sizes):
    for canvas, members in group_by_canvas(sizes, CANVASES):
        assert all(CANVASES[canvas_of(sizes[i], CANVASES)] == canvas for i in members)
