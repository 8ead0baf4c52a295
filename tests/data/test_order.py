"""The order of the examples: a documented function of (seed, step) and of nothing else."""

import numpy as np
import pytest

from resnet_jax.data.order import Order, epoch_order, holdout_split


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 in plain integers, after Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""
    mask = 2**64 - 1
    words, key = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(b >> 64) ^ words[1] ^ key[0], b & mask, (a >> 64) ^ words[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return words


def test_the_plain_philox_gives_the_published_known_answer():
    # Random123's kat_vectors: philox4x64 10, counter and key zero.
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox(key=(0, 0), counter=0) == known


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 0), (3, 163)])
def test_the_order_sorts_raw_philox_bits_under_the_key_seed_epoch(seed, epoch):
    # NumPy counts blocks of four words from 1.
    bits = [word for counter in range(1, 8) for word in philox((seed, epoch), counter)][:25]
    expected = sorted(range(25), key=bits.__getitem__)
    order = epoch_order(seed, epoch, 25)
    assert order.tolist() == expected
    assert order.dtype == np.int32


def test_the_order_never_changes_between_releases():
    assert epoch_order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert epoch_order(1, 0, 10).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]


def positions(order: Order, steps: range, size: int) -> list[tuple[int, int]]:
    """(epoch, index) of every example of the steps, in the order they are seen."""
    batches = [order.batch(step, size) for step in steps]
    return [pair for b in batches for pair in zip(b["epoch"].tolist(), b["index"].tolist(), strict=True)]


@pytest.mark.parametrize("size", [1, 4, 7, 10, 13, 35])  # Dividing 10 examples, not dividing them, more than all.
def test_every_epoch_has_each_example_once_and_batches_run_on_across_epoch_ends(size):
    seen = positions(Order(seed=5, examples=10), range(70), size)
    epochs = len(seen) // 10
    expected = [(epoch, int(index)) for epoch in range(epochs + 1) for index in epoch_order(5, epoch, 10)]
    assert seen == expected[: len(seen)]
    for epoch in range(epochs):
        assert sorted(index for e, index in seen if e == epoch) == list(range(10))


@pytest.mark.parametrize("size", [4, 10, 23])
def test_any_starting_step_sees_the_same_batches(size):
    whole = positions(Order(seed=1, examples=10), range(30), size)
    for first in (1, 2, 3, 17, 29):
        assert positions(Order(seed=1, examples=10), range(first, 30), size) == whole[first * size :]


def test_steps_may_be_asked_for_in_any_order():
    order = Order(seed=1, examples=10)
    forwards = [order.batch(step, 7)["index"].tolist() for step in range(12)]
    backwards = [order.batch(step, 7)["index"].tolist() for step in reversed(range(12))]
    assert backwards[::-1] == forwards


def test_late_steps_of_long_runs_do_not_overflow():
    # Step 10 million of 1024 images is position 1.024e10, beyond 32 bits: epoch 1.024e10 // 1,281,167 = 7992.
    batch = Order(seed=0, examples=1_281_167).batch(10_000_000, 1024)
    assert set(batch["epoch"].tolist()) == {7992}
    start = 10_240_000_000 - 7992 * 1_281_167
    np.testing.assert_array_equal(batch["index"], epoch_order(0, 7992, 1_281_167)[start : start + 1024])


def test_index_and_epoch_are_int32_arrays_of_the_batch():
    batch = Order(seed=0, examples=10).batch(2, 7)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "index": (np.int32, (7,)),
        "epoch": (np.int32, (7,)),
    }


def test_seeds_and_epochs_give_different_orders():
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(set(orders.values())) == 25  # Also (1, 0) against (0, 1): seed and epoch are not added up.


def test_an_order_shows_no_trace_of_the_original_one():
    # The mean distance of a place from its example is (N^2 - 1) / 3N, 1/3 of N; sd of the estimate is 0.24 / sqrt(N).
    distance = np.abs(epoch_order(0, 0, 10_000) - np.arange(10_000)).mean() / 10_000
    assert abs(distance - 1 / 3) < 4 * 0.0024


def test_the_holdout_is_fixed_disjoint_and_complete():
    kept, held_out = holdout_split(50_000, 5_000)
    assert (len(kept), len(held_out)) == (45_000, 5_000)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(50_000))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held_out) > 0).all()
    again = holdout_split(50_000, 5_000)
    np.testing.assert_array_equal(again[1], held_out)
    assert holdout_split(10, 3)[1].tolist() == [0, 4, 8]


def test_the_holdout_comes_from_all_over_the_training_set():
    # CIFAR's five files of 10,000: 1,000 +- 26.8 (hypergeometric sd) of 5,000 from each; 4 sd is 107.
    _, held_out = holdout_split(50_000, 5_000)
    counts = np.bincount(held_out // 10_000, minlength=5)
    assert np.abs(counts - 1000).max() < 107
