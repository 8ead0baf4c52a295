"""The real CIFAR-10, as a folder of PNGs, against what is published of it. Reads 60,000 files: half a minute."""

import os
import pathlib

import numpy as np
from PIL import Image
import pytest

from resnet_jax.config import default_config
from resnet_jax.data.augment import pixel_statistics
from resnet_jax.data.sources import Dataset, load_dataset

DATA = os.environ.get("RESNET_JAX_DATA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DATA or not pathlib.Path(DATA, "cifar10", "train").is_dir(),
        reason="RESNET_JAX_DATA names no folder with cifar10/train/<class>/*.png",
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


def load(cache: pathlib.Path) -> Dataset:
    config = default_config()
    config.data.source = "image_folder"
    config.data.dir = str(pathlib.Path(DATA, "cifar10"))
    config.data.cache_dir = str(cache)
    return load_dataset(config.data)


@pytest.fixture(scope="module")
def cifar10(cache) -> Dataset:
    return load(cache)


def test_cifar10_has_50000_and_10000_images_of_ten_classes_in_equal_parts(cifar10):
    assert cifar10.train.images.shape == (50_000, 32, 32, 3)
    assert cifar10.test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert cifar10.classes == names


def test_cifar10_has_the_published_channel_means_and_deviations(cifar10):
    mean, std = pixel_statistics(cifar10.train.images, "channel", "channel")
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=0.5e-4)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), atol=0.5e-4)


def test_every_image_keeps_the_class_of_its_folder(cifar10):
    # The files decoded one by one, in the order of their sorted paths.
    folder = pathlib.Path(DATA, "cifar10", "train")
    files = [file for name in sorted(os.listdir(folder)) for file in sorted((folder / name).iterdir())]
    for i in (0, 4_999, 5_000, 31_415, 49_999):
        with Image.open(files[i]) as image:
            np.testing.assert_array_equal(cifar10.train.images[i], np.asarray(image))
        assert cifar10.classes[cifar10.train.labels[i]] == files[i].parent.name


def test_the_second_start_reads_the_cache_alone(cifar10, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image file was opened")

    monkeypatch.setattr(Image, "open", refuse)
    again = load(cache)
    np.testing.assert_array_equal(again.train.images, cifar10.train.images)
    np.testing.assert_array_equal(again.train.labels, cifar10.train.labels)
    np.testing.assert_array_equal(again.test.images, cifar10.test.images)
    np.testing.assert_array_equal(again.test.labels, cifar10.test.labels)
