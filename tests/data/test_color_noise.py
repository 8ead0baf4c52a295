"""The colour noise of training (section 3.4, AlexNet's) against its covariance as PAPER's sources state it."""

import jax
import numpy as np
import pytest

from resnet_jax.data import augment

DRAWS = 10_000
# fb.resnet.torch and AlexNet: deviations along the components for RGB in [0, 1], and the components as columns.
DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
COVARIANCE = COMPONENTS @ np.diag((0.1 * DEVIATIONS) ** 2) @ COMPONENTS.T


@pytest.fixture(scope="module")
def colors() -> np.ndarray:
    """[DRAWS, 3], what is added to images whose channels were divided by one."""
    keys = augment.example_keys(jax.random.key(0), np.zeros(DRAWS, np.int32), np.arange(DRAWS, dtype=np.int32))
    zeros = np.zeros((DRAWS, 2, 2, 3), np.float32)
    noisy = np.asarray(jax.jit(lambda k, x: augment.augment(k, x, 0, False, 0.1))(keys, zeros))
    assert (noisy == noisy[:, :1, :1]).all(), "one colour is added to a whole image"
    return noisy[:, 0, 0].astype(np.float64)


def test_colors_have_mean_zero(colors):
    # Five standard errors; each channel's deviation is about 0.0125.
    assert (np.abs(colors.mean(0)) < 5 * np.sqrt(np.diag(COVARIANCE) / DRAWS)).all()


def test_deviations_along_the_components_are_a_tenth_of_theirs(colors):
    along = (colors @ np.linalg.inv(COMPONENTS).T).std(0)
    # The standard error of a deviation is 1 / sqrt(2 n) of it: 0.7%. Rows instead of columns would be off by half.
    np.testing.assert_allclose(along, 0.1 * DEVIATIONS, rtol=0.035)


def test_covariance_is_the_stated_one(colors):
    # In units of the largest entry; five standard errors are 0.07.
    np.testing.assert_allclose(np.cov(colors.T) / COVARIANCE.max(), COVARIANCE / COVARIANCE.max(), atol=0.07)
    # The first component is grey: channels move together.
    assert np.corrcoef(colors.T).min() > 0.97


def test_noise_is_normal(colors):
    first = colors @ np.linalg.inv(COMPONENTS).T[:, 0] / (0.1 * DEVIATIONS[0])
    # Five standard errors of a normal sample's kurtosis (sqrt(24 / n)) and of the share beyond two deviations.
    assert abs((first**4).mean() - 3) < 5 * np.sqrt(24 / DRAWS) * 2
    assert abs((np.abs(first) > 2).mean() - 0.0455) < 5 * np.sqrt(0.0455 / DRAWS)


def test_noise_is_divided_as_the_images_are_and_drawn_apart_from_crop_and_mirror():
    keys = augment.example_keys(jax.random.key(1), np.zeros(64, np.int32), np.arange(64, dtype=np.int32))
    images = np.random.default_rng(0).normal(size=(64, 4, 4, 3)).astype(np.float32)
    std = np.array([0.5, 0.25, 0.125], np.float32)
    plain = np.asarray(augment.augment(keys, images, 1, True))
    noisy = np.asarray(augment.augment(keys, images, 1, True, 0.1, std))
    added = (noisy - plain) * std
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    expected = np.asarray(augment.augment(keys, np.zeros((64, 1, 1, 3), np.float32), 0, False, 0.1))
    np.testing.assert_allclose(added[:, :1, :1], expected, atol=1e-6)
