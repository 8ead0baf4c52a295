"""BN statistics as averages over the training set, against loops over captured activations in float64."""

import functools
import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file

from resnet_jax import distributed
from resnet_jax.classification.calibrate import average_statistics, make_statistics_step, whole_batches
from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config, validate
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import Conv
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG
from resnet_jax.pretrained.source import load_pretrained
from resnet_jax.run import run_task
from resnet_jax.training.checkpoints import load_run_weights

BATCH = 24
_ROW = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="B", stem="cifar", stem_width=4)


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", _ROW)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """100 training and 12 test images of two very different classes, one class after the other."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 50), ("val", 6)):
        for label, name in enumerate(("dark", "light")):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (8, 8, 3), np.uint8) + np.uint8(180 * label)
                Image.fromarray(pixels).save(place / f"{i:02}.png")
    return folder


def settings(folder: pathlib.Path, **changes):
    config = default_config()
    config.model.name = "tiny"
    config.model.dtype = "float32"
    config.data.source = "image_folder"
    config.data.dir = str(folder)
    config.data.cache_dir = str(folder.parent / "cache")
    config.data.image_size = 8
    config.data.flip = True
    config.batch_size = BATCH
    config.steps = 6
    config.seed = 3
    config.schedule.learning_rate = 0.05
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    return config


def read_images(folder: pathlib.Path) -> np.ndarray:
    files = sorted((folder / "train").rglob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


def statistics_by_hand(variables, images: np.ndarray, order: np.ndarray, group: int) -> dict[str, np.ndarray]:
    """Averages over the examples of ``order``, ``group`` at a time: path of a convolution -> mean, var [2, C], float64.

    A network of global BN sees one group after the other; what comes out of its convolutions is what BN gets.
    """
    model = _ROW(num_classes=2, dtype=jnp.float64)
    mean, std = (f((images / 255), (0, 1, 2)) for f in (np.mean, np.std))
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)

    @jax.jit
    def convolutions(batch):
        is_conv = lambda module, method: isinstance(module, Conv)
        _, found = model.apply(
            variables, batch, train=True, mutable=["intermediates", "batch_stats"], capture_intermediates=is_conv
        )
        return found["intermediates"]

    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for start in range(0, len(order), group):
        batch = (images[order[start : start + group]] / 255 - mean) / std
        for path, leaf in jax.tree_util.tree_leaves_with_path(convolutions(batch)):
            name = "/".join(part.key for part in path if hasattr(part, "key")).removesuffix("/__call__")
            values = np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])
            sums[name] = sums.get(name, 0) + np.stack([values.sum(0), (values**2).sum(0)])
            counts[name] = counts.get(name, 0) + len(values)
    moments = {name: total / counts[name] for name, total in sums.items()}
    return {name: np.stack([mean, square - mean**2]) for name, (mean, square) in moments.items()}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("batch_norm", "group"), [("global", BATCH), ("group:6", 6)])
def test_statistics_are_the_averages_over_the_training_set(folder, devices, batch_norm, group):
    with jax.enable_x64(True):
        config = settings(folder, **{"model.batch_norm": batch_norm, "model.dtype": "float64"})
        mesh = distributed.make_mesh(jax.local_devices()[:devices])
        with jax.set_mesh(mesh):
            task = Classification(config, mesh)
            state = task.initial_state()
            calibrated = task.calibrated(state, lambda: None)
            # Whole batches of training's first epoch: 96 of 100 images.
            batches = [batch["index"] for batch, _ in zip(task.batches(0), range(100 // BATCH), strict=False)]
            assert all(0 < np.mean(batch < 50) < 1 for batch in batches)  # Of both classes, not one after the other.
            variables = jax.device_get(state.variables)
            expected = statistics_by_hand(variables, read_images(folder), np.concatenate(batches), group)
        found = jax.device_get(calibrated.batch_stats)
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        *names, norm, kind = (part.key for part in path)
        layer = "/".join([*names, norm.replace("bn", "conv")])
        seen.add(layer)
        np.testing.assert_allclose(leaf, expected[layer][("mean", "var").index(kind)], rtol=2e-6, atol=2e-6)
        assert kind == "mean" or np.abs(leaf - 1).max() > 1e-2  # No longer what it was.
    assert seen == expected.keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(calibrated.params), variables["params"]))
    assert int(calibrated.step) == int(state.step)


def test_averages_of_batches_are_the_statistics_of_all_their_values():
    random = np.random.default_rng(0)
    batches = [random.normal(i, 1 + i, (10, 3)) for i in range(4)]
    stats = [{"a": {"b": {"mean": batch.mean(0), "var": batch.var(0)}}} for batch in batches]
    found = average_statistics(iter(stats))["a"]["b"]
    whole = np.concatenate(batches)
    np.testing.assert_allclose(found["mean"], whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], whole.var(0), rtol=1e-6)


def test_the_order_is_random_of_whole_batches_and_follows_from_the_seed():
    order = whole_batches(100, 24, seed=0)
    assert len(order) == len(set(order.tolist())) == 96
    assert set(order.tolist()) < set(range(100))
    assert np.mean(np.diff(order) == 1) < 0.2
    np.testing.assert_array_equal(order, whole_batches(100, 24, seed=0))
    assert not np.array_equal(order, whole_batches(100, 24, seed=1))
    assert len(whole_batches(96, 24, 0)) == 96
    assert len(whole_batches(23, 24, 0)) == 0


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory) -> pathlib.Path:
    """A run with averaged weights, and what calibration makes of it."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = settings(folder, **{"optimizer.ema": 0.9})
    assert run_task(config, workdir, "train") == 0
    before = {name: (workdir / name).read_bytes() for name in ("summary.json", "predictions.npz", "config.json")}
    assert run_task(config, workdir, "calibrate") == 0
    assert {name: (workdir / name).read_bytes() for name in before} == before
    return workdir


def test_the_calibrated_network_is_evaluated_and_written_beside_the_run_s_own(calibrated):
    summary = json.loads((calibrated / "eval/calibrated/summary.json").read_text())
    predictions = np.load(calibrated / "eval/calibrated/predictions.npz")
    wrong = predictions["probabilities"].argmax(1) != predictions["label"]
    assert summary["top1_error"] == pytest.approx(100 * wrong.mean())
    assert (summary["examples"], summary["step"]) == (12, 6)
    assert np.abs(predictions["probabilities"] - np.load(calibrated / "predictions.npz")["probabilities"]).max() > 1e-5


def test_calibrated_weights_give_the_probabilities_that_were_evaluated(calibrated, folder):
    model, variables, preprocessing = load_pretrained(str(calibrated / "calibrated.safetensors"), "tiny")
    files = sorted((folder / "val").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
    images = (images - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    logits = np.asarray(model.apply(variables, jnp.asarray(images, jnp.float32)), np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    predictions = np.load(calibrated / "eval/calibrated/predictions.npz")
    expected = powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(predictions["probabilities"], expected, rtol=0, atol=1e-5)


def test_what_is_calibrated_are_the_averaged_weights(calibrated, folder):
    averaged = load_run_weights(str(calibrated))  # What is evaluated of a run.
    _, variables, _ = load_pretrained(str(calibrated / "calibrated.safetensors"), "tiny")
    for one, other in zip(*(jax.tree.leaves(x["params"]) for x in (averaged, variables)), strict=True):
        np.testing.assert_array_equal(one, other)
    plain = calibrated.parent / "plain"  # The same training; its weights are not averaged.
    assert run_task(settings(folder), plain, "train") == 0
    last = load_run_weights(str(plain))["params"]["head"]["kernel"]
    assert np.abs(last - variables["params"]["head"]["kernel"]).max() > 1e-4
    order = whole_batches(100, BATCH, 3)
    with jax.enable_x64(True):
        expected = statistics_by_hand(averaged, read_images(folder), order, BATCH)
    found = variables["batch_stats"]
    for kind, row in (("mean", 0), ("var", 1)):
        np.testing.assert_allclose(found["stem"]["bn"][kind], expected["stem/conv"][row], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found["stage2"]["block1"]["bn2"][kind], expected["stage2/block1/conv2"][row], rtol=1e-4, atol=1e-5
        )
    assert load_file(calibrated / "calibrated.safetensors")


def test_imported_weights_are_calibrated_too(calibrated, folder):
    config = settings(folder, **{"init.weights": str(calibrated / "calibrated.safetensors")})
    again = calibrated.parent / "again"
    assert run_task(config, again, "calibrate") == 0
    # Of the same weights and images in the same order.
    one, other = (load_pretrained(str(run / "calibrated.safetensors"), "tiny")[1] for run in (calibrated, again))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_training_set_smaller_than_a_batch_is_refused(calibrated, folder, tmp_path):
    changes = {"batch_size": 104, "init.weights": str(calibrated / "calibrated.safetensors")}
    with pytest.raises(UsageError, match=r"100 training images don't fill a batch_size of 104") as caught:
        run_task(settings(folder, **changes), tmp_path / "run", "calibrate")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "calibrated.safetensors").exists()


def test_a_vgg_s_statistics_are_averaged_like_any_other_s():
    """It has dropout besides, after the last of its norms."""
    model = VGG(blocks=(1, 1, 1, 1, 1), widths=(4, 4, 4, 4, 4), num_classes=3, normalise=True)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    batch = {"images": images, "labels": jax.ShapeDtypeStruct((2,), jnp.int32)}
    resident = {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}
    found = jax.eval_shape(make_statistics_step(model), variables, batch, resident)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables["batch_stats"])
