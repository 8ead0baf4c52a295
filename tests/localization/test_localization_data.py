"""What localization is trained on: images of one class, drawn or chosen."""

import numpy as np
import pytest
from tiny_localizer import Made, rectangle

from resnet_jax.config import default_config, validate
from resnet_jax.data.crops import CenterCrop
from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.detection import sources
from resnet_jax.detection.annotations import Annotations, annotated_image
from resnet_jax.detection.shapes import CLASSES, shapes
from resnet_jax.errors import UsageError
from resnet_jax.localization import data
from resnet_jax.localization.batches import read_content
from resnet_jax.localization.data import Split, channel_statistics, of_one_class
from resnet_jax.localization.settings import make_settings


def test_drawn_pictures_show_the_hindmost_shape_of_detection_s():
    everything, pixels = shapes(24, 3, "test")
    found, drawn = shapes(24, 3, "test", most=1)
    assert found.classes == CLASSES
    alone = 0
    for image, several in zip(found.images, everything.images, strict=True):
        assert (image.id, image.path) == (several.id, several.path)
        assert (image.width, image.height) == (several.width, several.height)
        assert image.labels.tolist() == several.labels[:1].tolist()
        (box,), seen = image.boxes, several.boxes[0]
        assert (box[:2] <= seen[:2]).all() and (seen[2:] <= box[2:]).all()
        if len(several.boxes) == 1:
            alone += 1
            np.testing.assert_array_equal(image.boxes, several.boxes)
            np.testing.assert_array_equal(drawn(image), pixels(several))
    assert 2 <= alone < 24


def test_an_image_has_the_class_of_its_largest_box():
    boxes = [(0, 0, 9, 9), (0, 0, 20, 30), (50, 50, 70, 79.9), (0, 0, 90, 90)]
    crowd = [False, False, False, True]
    images = (
        annotated_image(0, "a", 100, 100, boxes, [2, 1, 0, 2], crowd=crowd),
        annotated_image(1, "b", 100, 100, [], []),
        annotated_image(2, "c", 100, 100, [(0, 0, 9, 9), (5, 5, 14, 14), (3, 3, 12, 12)], [1, 0, 1]),
        annotated_image(3, "d", 100, 100, [(0, 0, 9, 9)], [1], crowd=[True]),
    )
    found = of_one_class(Annotations(("x", "y", "z"), (1, 2, 3), images))
    assert [image.id for image in found.images] == [0, 2]
    assert found.images[0].labels.tolist() == [1] and found.images[0].boxes.tolist() == [[0, 0, 20, 30]]
    assert found.images[1].labels.tolist() == [1, 1] and len(found.images[1].boxes) == 2
    with pytest.raises(UsageError, match="none of 2 images has a box"):
        of_one_class(Annotations(("x", "y", "z"), (1, 2, 3), (images[1], images[3])))


def test_splits_are_detection_s_of_one_class_each_and_shapes_are_single(monkeypatch):
    config = default_config()
    config.data.source, config.data.shapes = "shapes", (3, 2)
    found = data.read_splits(config)
    assert [len(found[name].annotations) for name in ("train", "test")] == [3, 2]
    assert all(len(image.boxes) == 1 for split in found.values() for image in split.annotations.images)
    several, pixels = shapes(12, 0, "train")
    monkeypatch.setattr(
        data,
        "read_detection_splits",
        lambda config: {"train": sources.Split(several), "test": sources.Split(several, pixels)},
    )
    config.data.source = "voc"
    found = data.read_splits(config)
    assert found["train"].content is read_content and found["test"].content is pixels  # Files stay encoded.
    for image, whole in zip(found["test"].annotations.images, several.images, strict=True):
        assert len(set(image.labels.tolist())) == 1 and len(image.boxes) <= len(whole.boxes)


def test_the_mean_is_that_of_the_middles():
    made = Made(rectangle(0, 40, 40, (0, 0, 40, 40)), rectangle(1, 40, 40, (0, 0, 20, 40)))
    split, section = Split(made.annotations, made.content), default_config().data
    mean, std = channel_statistics(section, split, CenterCrop(40, 40))
    np.testing.assert_allclose(mean, [0.75] * 3)
    np.testing.assert_allclose(std, [0.75**0.5 / 2] * 3, rtol=1e-6)
    section.mean, section.std = "imagenet", "none"
    mean, std = channel_statistics(section, split, CenterCrop(40, 40))
    np.testing.assert_allclose((mean, std), (IMAGENET_MEAN, (1, 1, 1)))
    section.mean, section.std = "none", "imagenet"
    np.testing.assert_allclose(channel_statistics(section, split, CenterCrop(40, 40))[1], IMAGENET_STD)
    section.mean = "pixel"
    with pytest.raises(UsageError, match=r"data\.mean=pixel: localization looks at images of several sizes"):
        channel_statistics(section, split, CenterCrop(40, 40))


def test_settings_are_the_config_s_section():
    config = default_config()
    config.localization.anchors_sampled = 16
    settings = make_settings(config.localization, candidates=3)
    assert (settings.anchors_sampled, settings.candidates, settings.anchor_high) == (16, 3, 0.7)
    config.localization.anchor_low, config.steps = 0.8, 1
    with pytest.raises(UsageError, match=r"localization\.anchor_low=0\.8 is above"):
        validate(config)
