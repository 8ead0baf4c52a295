"""The all-reduce on paper, against sums by hand."""

import math

import pytest

from resnet_jax.planning.chips import CHIPS, chip_of
from resnet_jax.planning.links import HOP, NETWORK_DELAY, all_reduce_seconds, scaling_table, slice_shape

GB = 1e9


def test_one_chip_exchanges_nothing():
    assert all_reduce_seconds(CHIPS["v5e"], (1, 1), 1 * GB) == 0


@pytest.mark.parametrize(
    ("chip", "shape", "lanes", "hops"),
    [
        ("v5e", (16, 16), 4, 60),  # Both axes close to rings: two links each.
        ("v5e", (4, 16), 3, 36),  # One does.
        ("v5e", (2, 2), 2, 4),
        ("v4", (4, 4, 4), 6, 18),
        ("v4", (2, 2, 1), 2, 4),  # An axis of one chip has no neighbour.
        ("v3", (16, 16), 2, 60),
    ],
)
def test_bytes_go_twice_round_over_all_links(chip, shape, lanes, hops):
    row, chips = CHIPS[chip], math.prod(shape)
    expected = 2 * (chips - 1) / chips * 3 * GB / (lanes * row.link) + 2 * hops * HOP
    assert all_reduce_seconds(row, shape, 3 * GB, collectives=2) == pytest.approx(expected)


def test_slices_are_joined_by_the_network():
    chip = CHIPS["v5e"]
    inside = all_reduce_seconds(chip, (16, 16), 1 * GB)
    # 6.4 Tbit/s are 800 GB/s for a pod; of 1 GB each pod sends 2 x 3/4.
    expected = inside + 1.5 / 800 + 2 * 3 * NETWORK_DELAY
    assert all_reduce_seconds(chip, (16, 16), 1 * GB, slices=4) == pytest.approx(expected)
    assert math.isinf(all_reduce_seconds(CHIPS["v6e"], (16, 16), 1 * GB, slices=2))


def test_a_pod_s_all_reduce_is_as_fast_as_its_maker_says():
    # 51.2 TB/s for 256 v5e chips, which is 200 GB/s out of each; the bytes leave it twice.
    size = 10 * GB
    seconds = all_reduce_seconds(CHIPS["v5e"], (16, 16), size)
    assert 256 * 2 * size / seconds == pytest.approx(51.2e12, rel=0.01)


@pytest.mark.parametrize(
    ("chip", "chips", "shape"),
    [("v5e", 8, (2, 4)), ("v5e", 256, (16, 16)), ("v4", 8, (2, 2, 2)), ("v4", 2048, (8, 16, 16))],
)
def test_slices_are_as_compact_as_can_be(chip, chips, shape):
    assert slice_shape(CHIPS[chip], chips) == shape


def test_the_table_has_both_ends_of_what_overlapping_can_do():
    rows = scaling_table(CHIPS["v5e"], compute_seconds=0.07, images=128, size=0.1 * GB, collectives=2)
    assert [row.chips for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert rows[-1].shape == "8 of 16x16"
    for row in rows:
        ideal = row.chips * 128 / 0.07
        assert row.images_per_second == pytest.approx(row.efficiency * ideal)
        assert row.efficiency == pytest.approx(0.07 / (0.07 + row.all_reduce_seconds))
        assert row.overlapped_images_per_second == pytest.approx(ideal)  # Computing is the longer of the two.
        assert row.overlapped_efficiency == 1


def test_what_is_not_published_is_left_open():
    rows = scaling_table(CHIPS["v3"], compute_seconds=0.07, images=256, size=0.1 * GB, collectives=2)
    assert [row.chips for row in rows if row.efficiency is None] == [2048]  # More than the largest pod.


@pytest.mark.parametrize("name", CHIPS)
def test_the_table_of_chips_agrees_with_itself(name):
    chip = CHIPS[name]
    assert chip_of(chip.kind) is chip
    assert chip.example.startswith(f"{name}:")
    assert chip.example.count("x") + 1 == chip.axes
    # Matrix units of 128x128 (v6e: 256x256) do two operations a place and cycle; there are a power of two of them.
    units = chip.peak / chip.clock / (2 * 128 * 128)
    assert units == pytest.approx(2 ** round(math.log2(units)), rel=0.01)
