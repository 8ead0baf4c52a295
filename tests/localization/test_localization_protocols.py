"""Test protocols: which view, which class, which box."""

import jax
import numpy as np
import pytest
from tiny_localizer import RESIDENT, SETTINGS, Made, random_variables, rectangle, tiny_localizer

from resnet_jax.config import default_config
from resnet_jax.errors import UsageError
from resnet_jax.localization import protocols, steps
from resnet_jax.localization.data import Split


def config_for(image_size=96, resize=96, scales=(96,)):
    config = default_config()
    config.data.image_size, config.eval.resize, config.eval.scales = image_size, resize, scales
    config.eval.batch_size = 4
    return config


@pytest.fixture(scope="module")
def split():
    random = np.random.default_rng(0)
    squares = []
    for i in range(5):
        image, pixels = rectangle(i, 96, 96, (10 + i, 20, 60, 70 + i), i % 3)
        squares.append((image, np.maximum(pixels, random.integers(0, 99, pixels.shape).astype(np.uint8))))
    made = Made(*squares)
    return Split(made.annotations, made.content)


@pytest.fixture(scope="module")
def look():
    model = tiny_localizer()
    variables, step = random_variables(model), jax.jit(steps.make_inference_step(model, SETTINGS))

    def look(protocol, split, config):
        """Candidates by index, of each pass."""
        found = []
        for batches in protocols.make_passes(protocol, split, config, (0, 1), 1):
            by_index = {}
            for batch in batches():
                classes = np.tile(np.array([2, 0], np.int32), (len(batch["index"]), 1))
                inputs = {name: batch[name] for name in ("images", "extent", "frame")}
                out = step(variables, inputs | {"classes": classes}, RESIDENT)
                for row in np.flatnonzero(batch["real"]):
                    by_index[int(batch["index"][row])] = {name: np.asarray(x[row]) for name, x in out.items()}
            found.append(by_index)
        return found

    return look


def test_the_whole_image_at_the_training_size_says_what_the_crop_does(split, look):
    config = config_for()
    (centre,), (dense,) = (look(protocol, split, config) for protocol in protocols.PROTOCOLS)
    assert sorted(centre) == sorted(dense) == list(range(5))
    for i in range(5):
        np.testing.assert_allclose(dense[i]["scores"], centre[i]["scores"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(dense[i]["boxes"], centre[i]["boxes"], rtol=0, atol=1e-2)


@pytest.mark.slow
def test_every_scale_is_a_pass_over_every_image(look):
    made = Made(*(rectangle(i, 60 + 30 * i, 100, (5, 5, 50, 50)) for i in range(4)))
    split = Split(made.annotations, made.content)
    found = look("multi_scale", split, config_for(64, 70, (64, 96)))
    assert [sorted(one) for one in found] == [[0, 1, 2, 3]] * 2
    for one in found:
        for i, image in enumerate(made.annotations.images):
            assert (one[i]["boxes"] >= 0).all()
            assert (one[i]["boxes"] <= (image.width + 0.1, image.height + 0.1) * 2).all()
    assert np.abs(found[0][0]["scores"] - found[1][0]["scores"]).max() > 1e-3


def test_the_answer_is_the_best_box_of_all_views():
    boxes = np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4)
    scores = np.array([[[0.1, 0.9, 0.2], [0.5, 0.4, 0.5]], [[0, 0, 0.1], [0.3, 0.2, 0.31]]], np.float32)
    found, score = protocols.best_boxes(boxes, scores, voting_iou=2.0)
    expected = [[boxes[0, 0, 1], boxes[0, 1, 0]], [boxes[1, 0, 2], boxes[1, 1, 2]]]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(score, [[0.9, 0.5], [0.1, 0.31]])


def test_those_that_overlap_the_best_have_a_vote():
    near, far, best = (0, 0, 10, 8), (0, 0, 10, 4.9), (0, 0, 10, 10)
    boxes = np.array([[[near, best, far, (0, 0, 10, 10)]]], np.float32)
    scores = np.array([[[0.2, 0.6, 0.5, 0.0]]], np.float32)  # The last one is none.
    found, score = protocols.best_boxes(boxes, scores, voting_iou=0.5)
    np.testing.assert_allclose(found[0, 0], (0, 0, 10, (0.2 * 8 + 0.6 * 10) / 0.8), rtol=1e-6)
    assert score[0, 0] == np.float32(0.6)


def test_predicted_classes_are_the_five_likeliest_in_order(tmp_path):
    labels = np.array([6, 0], np.int32)
    probabilities = np.array([[0.1, 0.3, 0.05, 0.2, 0.01, 0.15, 0.19], [1, 0, 0, 0, 0, 0, 0]])
    path = tmp_path / "predictions.npz"

    def read(**changes):
        np.savez(path, **({"index": np.arange(2), "label": labels, "probabilities": probabilities} | changes))
        return protocols.predicted_classes(str(path), labels, 7)

    np.testing.assert_array_equal(read(), [[1, 3, 6, 5, 0], [0, 1, 2, 3, 4]])
    with pytest.raises(UsageError, match="of 2 images and 6 classes; the test set has 2 and 7"):
        read(probabilities=probabilities[:, 1:])
    with pytest.raises(UsageError, match="of 1 images"):
        read(index=np.arange(1))
    with pytest.raises(UsageError, match="image 1 is of class 3 there, and of 0 here"):
        read(label=np.array([6, 3]))
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"no predictions.npz of a classification"):
        protocols.predicted_classes(str(path), labels, 7)


def test_protocols_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match=r"eval\.protocol=ten_crop: localization looks at center or multi_scale"):
        protocols.check_protocol("ten_crop", config_for())
    for size in (0, 97):
        with pytest.raises(UsageError, match=f"data.image_size={size}: the side of the crops, above 0 and at most"):
            protocols.check_protocol("center", config_for(size))
