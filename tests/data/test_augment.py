"""Pixel statistics, crops and flips against plain NumPy, and their randomness against what it should be.

Bounds on chi-square statistics are their 99.99% points; the seeds are fixed, so that nothing here is a matter of luck.
"""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.data import augment

CHI_SQUARE_9999 = {1: 15.14, 8: 31.83, 80: 135.78}  # Degrees of freedom -> 99.99% point.
DRAWS = 10_000


def crops_by_hand(image: np.ndarray, pad: int) -> dict[tuple[bool, int, int], np.ndarray]:
    """All crops of a zero-padded [H, W, C] image and their mirror images, by (mirrored, top, left)."""
    height, width = image.shape[:2]
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = np.zeros_like(image)
            for row in range(height):
                for column in range(width):
                    y, x = row + top - pad, column + left - pad
                    if 0 <= y < height and 0 <= x < width:
                        crop[row, column] = image[y, x]
            crops[False, top, left] = crop
            crops[True, top, left] = np.stack([crop[:, width - 1 - column] for column in range(width)], axis=1)
    return crops


def find(output: np.ndarray, crops: dict[tuple[bool, int, int], np.ndarray]) -> tuple[bool, int, int]:
    """Which of the crops the output is; it must be exactly one."""
    matches = [name for name, crop in crops.items() if np.array_equal(crop, output)]
    assert len(matches) == 1, f"the output is {len(matches)} of the possible crops"
    return matches[0]


def noise(*shape: int) -> np.ndarray:
    """Pixels that are all different from each other and from zero."""
    return np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32) + 1


@functools.partial(jax.jit, static_argnums=(4, 5))
def augmented(seed: int, epoch: np.ndarray, index: np.ndarray, images: np.ndarray, pad: int, flip: bool) -> jax.Array:
    """What training sees of ``images``, which are examples ``index`` in epochs ``epoch`` ([N] each)."""
    return augment.augment(augment.example_keys(jax.random.key(seed), epoch, index), images, pad, flip)


def seen(images: np.ndarray, pad: int, flip: bool, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """What training sees of examples 0, 1, ... in one epoch."""
    return np.asarray(augmented(seed, np.full(len(images), epoch), np.arange(len(images)), images, pad, flip))


def names_of(outputs: np.ndarray, images: np.ndarray, pad: int) -> list[tuple[bool, int, int]]:
    return [find(output, crops_by_hand(image, pad)) for image, output in zip(images, outputs, strict=True)]


def test_every_crop_is_one_of_the_zero_padded_image_of_its_own_size():
    images = noise(40, 5, 7, 3)  # Not square, so that swapped axes show.
    names = names_of(seen(images, pad=2, flip=False), images, pad=2)
    assert not any(mirrored for mirrored, _, _ in names)
    assert len(set(names)) > 10  # 40 draws out of 25: each image has its own.


def test_every_flip_is_left_to_right_or_none():
    images = noise(40, 5, 7, 3)
    names = names_of(seen(images, pad=0, flip=True), images, pad=0)
    assert 8 < sum(mirrored for mirrored, _, _ in names) < 32  # 20 +- 4 standard deviations.


def test_images_stay_as_they_are_without_crop_and_flip():
    images = noise(40, 5, 7, 3)
    np.testing.assert_array_equal(seen(images, pad=0, flip=False), images)


@pytest.fixture(scope="module", params=["examples", "epochs"])
def draws(request) -> np.ndarray:
    """(mirrored, top, left) of 10,000 augmentations [N, 3], of as many examples or of one in as many epochs."""
    image = noise(6, 6, 1)
    counter, constant = np.arange(DRAWS), np.full(DRAWS, 3)
    epoch, index = (constant, counter) if request.param == "examples" else (counter, constant)
    outputs = np.asarray(augmented(0, epoch, index, np.broadcast_to(image, (DRAWS, *image.shape)), 4, True))
    names = {crop.tobytes(): name for name, crop in crops_by_hand(image, pad=4).items()}
    assert len(names) == 2 * 9 * 9
    return np.array([names[output.tobytes()] for output in outputs])


def chi_square(table: np.ndarray, expected: np.ndarray | float) -> float:
    return float((np.square(table - expected) / expected).sum())


@pytest.mark.parametrize(("axis", "name"), [(1, "top"), (2, "left")])
def test_offsets_are_uniform_over_0_to_twice_the_padding(draws, axis, name):
    counts = np.bincount(draws[:, axis], minlength=9)
    assert len(counts) == 9, f"{name} goes beyond 2 * pad"
    assert chi_square(counts, DRAWS / 9) < CHI_SQUARE_9999[8]


def test_top_and_left_are_independent(draws):
    counts = np.bincount(9 * draws[:, 1] + draws[:, 2], minlength=81)
    assert chi_square(counts, DRAWS / 81) < CHI_SQUARE_9999[80]


def test_half_of_the_images_are_mirrored(draws):
    counts = np.bincount(draws[:, 0], minlength=2)
    assert chi_square(counts, DRAWS / 2) < CHI_SQUARE_9999[1]


def test_crop_and_mirror_are_independent(draws):
    table = np.zeros((2, 81))
    np.add.at(table, (draws[:, 0], 9 * draws[:, 1] + draws[:, 2]), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / DRAWS
    assert chi_square(table, expected) < CHI_SQUARE_9999[80]


def test_neighbouring_draws_are_independent(draws):
    tops = draws[:, 1]
    counts = np.bincount(9 * tops[:-1] + tops[1:], minlength=81)
    assert chi_square(counts, (DRAWS - 1) / 81) < CHI_SQUARE_9999[80]


def test_pixels_do_not_depend_on_the_place_in_the_batch_or_on_its_size():
    images = noise(32, 6, 6, 1)
    whole = seen(images, pad=3, flip=True, epoch=4)
    backwards = augmented(0, np.full(32, 4), np.arange(31, -1, -1), images[::-1], 3, True)
    np.testing.assert_array_equal(backwards, whole[::-1])
    # A batch that runs across an epoch's end: each example has its own epoch.
    mixed = augmented(0, np.array([3, 4, 4]), np.array([7, 2, 9]), images[[7, 2, 9]], 3, True)
    np.testing.assert_array_equal(mixed[1:], whole[[2, 9]])
    np.testing.assert_array_equal(mixed[0], seen(images, pad=3, flip=True, epoch=3)[7])


def test_pixels_depend_on_seed_epoch_and_index():
    images = np.repeat(noise(1, 6, 6, 1), 32, axis=0)

    def views(seed: int, epoch: int) -> list[bytes]:
        return [view.tobytes() for view in seen(images, pad=3, flip=True, seed=seed, epoch=epoch)]

    # Two draws out of 98 views agree by chance once in 98 times; were a number left out, all 32 would.
    base = views(0, 0)
    assert len(set(base)) > 16
    for other in (views(1, 0), views(0, 1)):
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 6
    # Epoch and index are not added up: example 1 in epoch 0 is not example 0 in epoch 1.
    assert sum(a == b for a, b in zip(base[1:], views(0, 1)[:-1], strict=True)) < 6


@pytest.mark.parametrize("mean", ["pixel", "channel"])
def test_padding_is_zero_after_the_mean_is_subtracted(mean):
    # Section 4.2: the mean is subtracted, then zeros are padded: the border has the mean's colour, not black.
    images = np.random.default_rng(0).integers(100, 256, (32, 6, 6, 1), np.uint8)
    centre, scale = augment.pixel_statistics(images, mean, "channel")
    views = seen(np.asarray(augment.normalise(images, centre, scale)), pad=3, flip=True)
    expected = ((images / 255 - centre) / scale).astype(np.float32)
    from_border = 0
    for image, view in zip(expected, views, strict=True):
        crop = min(crops_by_hand(image, pad=3).values(), key=lambda crop: np.abs(crop - view).max())
        np.testing.assert_allclose(view, crop, atol=1e-5)
        assert (view[crop == 0] == 0).all()
        from_border += np.count_nonzero(crop == 0)
    assert from_border > 200  # About 1 pixel in 2 of 1,152.


def by_hand(images: np.ndarray, mean: str, std: str) -> tuple[np.ndarray, np.ndarray]:
    """Statistics from the definitions, in 64 bits."""
    pixels = images.astype(np.float64) / 255
    flat = pixels.reshape(-1, images.shape[-1])
    zeros, ones = np.zeros(images.shape[-1]), np.ones(images.shape[-1])
    return {"pixel": np.mean(pixels, axis=0), "channel": np.mean(flat, axis=0), "none": zeros}[mean], {
        "channel": np.std(flat, axis=0), "none": ones}[std]  # fmt: skip


@pytest.mark.parametrize("std", ["channel", "none"])
@pytest.mark.parametrize("mean", ["pixel", "channel", "none"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 3), (2345, 4, 2, 1)])  # A few (N or N - 1?); more than one part of 1,000.
def test_pixel_statistics_are_those_of_the_definition(shape, mean, std):
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    images[..., 0] //= 3  # Channels that differ.
    images[: shape[0] // 2] //= 2  # Examples that differ.
    centre, scale = augment.pixel_statistics(images, mean, std)
    expected_centre, expected_scale = by_hand(images, mean, std)
    assert centre.dtype == scale.dtype == np.float32
    assert centre.shape == (shape[1:] if mean == "pixel" else shape[3:])
    np.testing.assert_allclose(centre, expected_centre, rtol=1e-6)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)


def test_normalise_makes_each_channel_zero_mean_and_unit_variance():
    images = np.random.default_rng(2).integers(50, 200, (500, 4, 4, 3), np.uint8)
    normal = np.asarray(augment.normalise(images, *augment.pixel_statistics(images, "channel", "channel")))
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-5)


def test_a_channel_that_is_one_colour_throughout_is_not_divided_by_zero():
    images = np.full((5, 4, 4, 1), 200, np.uint8)
    normal = np.asarray(augment.normalise(images, *augment.pixel_statistics(images, "channel", "channel")))
    assert np.isfinite(normal).all()
    assert np.abs(normal).max() < 0.1


def test_both_ways_to_take_windows_are_the_same():
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(40, 9, 8, 3)))
    corners = random.integers(0, (5, 4), (40, 2))
    found = augment.chosen_windows(images, jnp.asarray(corners), (5, 5))
    assert np.array_equal(found, augment.sliced_windows(images, jnp.asarray(corners), (5, 5)))
    for image, window, (top, left) in zip(images, found, corners, strict=True):
        assert np.array_equal(window, image[top : top + 5, left : left + 5])
