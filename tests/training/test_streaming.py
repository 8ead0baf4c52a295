"""Training from files that are read as it goes, against training from arrays and against itself."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config, validate
from resnet_jax.distributed import make_mesh
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.run import run_task
from resnet_jax.training.checkpoints import latest_step, load_run_weights

CLASSES, EACH, SIDE = ("ant", "bee", "cow"), 13, 12


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    row = functools.partial(ResNet, blocks=(1,), widths=(4,), stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """39 training and 15 test images of three classes, 12x12."""
    random = np.random.default_rng(0)
    for part, count in (("train", EACH), ("val", 5)):
        for label, name in enumerate(CLASSES):
            place = tmp_path / "data" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (SIDE, SIDE, 3), np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(place / f"{i:02}.png")
    return tmp_path / "data"


def settings(folder: pathlib.Path, **changes):
    config = default_config()
    config.model.name = "tiny"
    config.data.source = "image_folder"
    config.data.dir = str(folder)
    config.data.cache_dir = str(folder.parent / "cache")
    config.data.image_size = SIDE
    config.data.placement = "stream"
    config.data.pad = 2
    config.data.flip = True
    config.batch_size = 16
    config.steps = 8
    config.eval.every = 4
    config.eval.batch_size = 4
    config.log.every = 4
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    return config


def train(config, workdir: pathlib.Path) -> tuple[list[dict], dict]:
    assert run_task(config, workdir, "train") == 0
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return records, json.loads((workdir / "summary.json").read_text())


def assert_same_weights(one: pathlib.Path, other: pathlib.Path) -> None:
    for a, b in zip(*(jax.tree.leaves(load_run_weights(str(run))) for run in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_streamed_images_train_the_same_network_as_resident_ones_bit_for_bit(folder, tmp_path):
    _, summary = train(settings(folder), tmp_path / "stream")
    _, resident = train(settings(folder, **{"data.placement": "device"}), tmp_path / "device")
    assert_same_weights(tmp_path / "stream", tmp_path / "device")
    same = ("top1_error", "loss", "examples", "train_top1_error", "step", "epoch")
    assert {name: summary[name] for name in same} == {name: resident[name] for name in same}
    assert summary["examples"] == 15
    predictions, expected = (np.load(tmp_path / run / "predictions.npz") for run in ("stream", "device"))
    for name in ("index", "label", "probabilities"):
        np.testing.assert_array_equal(predictions[name], expected[name])


def test_scale_crops_train_the_same_whatever_reads_them_and_after_a_stop(folder, tmp_path):
    recipe = {"data.crop": "scale", "data.image_size": 8, "data.scales": (9, 14), "eval.resize": 10,
              "data.color_noise": 0.1, "data.mean": "pixel"}  # fmt: skip
    train(settings(folder, **recipe, **{"data.workers": 0}), tmp_path / "none")
    cached = {"data.workers": 2, "data.cache": "memory", "data.prefetch": 3, "checkpoint.every": 3}
    train(settings(folder, **recipe, **cached, steps=3), tmp_path / "cached")
    records, _ = train(settings(folder, **recipe, **cached), tmp_path / "cached")  # Goes on from step 3.
    assert_same_weights(tmp_path / "none", tmp_path / "cached")
    logged = [record for record in records if "data_wait_percent" in record]
    assert [record["step"] for record in logged] == [3, 4, 8]
    assert all(0 <= record["data_wait_percent"] <= 100 for record in logged)


def test_a_broken_image_stops_the_run_names_the_file_and_keeps_what_was_learnt(folder, tmp_path, capsys):
    config = settings(folder)
    order = list(Classification(config, make_mesh(jax.devices()[:1])).batches(0))
    first_batch = set(order[0]["index"].tolist())
    broken = next(i for i in order[2]["index"].tolist() if i not in first_batch | set(order[1]["index"].tolist()))
    file = folder / "train" / CLASSES[broken // EACH] / f"{broken % EACH:02}.png"
    statistics = settings(folder, **{"data.mean": "none", "data.std": "none"})
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UsageError, match=f"{file}: not a readable image"):
        run_task(statistics, tmp_path / "run", "train")
    assert latest_step(tmp_path / "run") == 2
    assert "saved at step 2" in capsys.readouterr().out
    # Skipping it is no other recipe: the same run goes on.
    skip = settings(folder, **{"data.mean": "none", "data.std": "none", "data.on_error": "skip"})
    records, summary = train(skip, tmp_path / "run")
    assert "resuming from step 2" in capsys.readouterr().out
    assert summary["step"] == 8
    assert summary["broken_images"] == 1
    assert records[-2]["broken_images"] == 1


def test_an_image_that_vanished_is_left_out_of_the_evaluation_and_counted(folder, tmp_path):
    config = settings(folder, **{"data.on_error": "skip", "data.mean": "none", "data.std": "none"})
    with jax.set_mesh(make_mesh()):
        task = Classification(config, make_mesh())
        (folder / "val" / "bee" / "02.png").unlink()
        evaluation = task.evaluate(task.initial_state(), "test", lambda: None)
    assert evaluation.metrics["examples"] == 14
    assert evaluation.predictions["index"].tolist() == [i for i in range(15) if i != 7]
    assert evaluation.predictions["label"].tolist() == [0] * 5 + [1] * 4 + [2] * 5
    assert len(task.broken) == 1
    assert "bee/02.png" in next(iter(task.broken))


def test_data_of_other_classes_are_refused_by_name_in_training_and_evaluation(folder, tmp_path):
    train(settings(folder), tmp_path / "run")
    for part in ("train", "val"):
        shutil.move(folder / part / "bee", folder / part / "elk")
    for mode in ("train", "eval"):
        with pytest.raises(
            UsageError, match="trained on 3 classes and the data have 3; class 1 was 'bee' and is 'cow'"
        ):
            run_task(settings(folder), tmp_path / "run", mode)


def test_another_number_of_training_images_is_refused(folder, tmp_path):
    train(settings(folder), tmp_path / "run")
    (folder / "train" / "bee" / "02.png").unlink()
    with pytest.raises(UsageError, match="trained on 39 training images and the data have 38"):
        run_task(settings(folder, steps=9), tmp_path / "run", "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": 0}, "data.image_size must be set"),
        ({"data.crop": "scale", "data.image_size": 224, "data.scales": (200, 300)}, r"data.scales=\(200, 300\)"),
        ({"data.crop": "scale", "data.scales": (256,)}, r"data.scales=\(256,\): expected the least and the largest"),
        ({"data.crop": "inception", "data.image_size": 300}, "eval.resize=256 is less than data.image_size=300"),
        ({"data.crop": "scale", "data.placement": "device"}, "data.crop=scale goes with data.placement=stream"),
        (
            {"data.cache": "memory", "data.worker_type": "process"},
            "data.cache=memory goes with data.worker_type=thread",
        ),
        ({"data.source": "digits"}, "data.source=digits lies in memory"),
        ({"data.mean_image": "nowhere.npy"}, "data.mean_image=nowhere.npy: not a readable .npy file"),
        ({"data.source": "tfds"}, "needs data.name"),
        ({"data.source": "array_record"}, "no folder that python -m resnet_jax.prepare wrote"),
        ({"data.source": "ilsvrc"}, "no ILSVRC2012_img_train.tar in it"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(changes, message, folder, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_task(settings(folder, **changes), tmp_path / "run", "train")
    assert not (tmp_path / "run").exists()


def test_a_given_mean_image_is_subtracted_and_one_of_another_size_or_scale_refused(folder, tmp_path):
    np.save(tmp_path / "mean.npy", np.full((SIDE, SIDE, 3), 0.25))
    config = settings(folder, **{"data.mean_image": str(tmp_path / "mean.npy"), "data.std": "none"})
    task = Classification(config, make_mesh())
    np.testing.assert_array_equal(task.resident["mean"], np.full((SIDE, SIDE, 3), 0.25))
    np.testing.assert_array_equal(task.resident["std"], np.ones(3))
    for wrong in (np.full((SIDE, SIDE, 3), 63.0), np.full((4, 4, 3), 0.25)):
        np.save(tmp_path / "mean.npy", wrong)
        with pytest.raises(UsageError, match=r"mean.npy: expected \(12, 12, 3\) or \(3,\) numbers from 0 to 1"):
            Classification(config, make_mesh())


def test_imagenet_statistics_are_the_usual_constants(folder):
    task = Classification(settings(folder, **{"data.mean": "imagenet", "data.std": "imagenet"}), make_mesh())
    np.testing.assert_allclose(task.resident["mean"], [0.485, 0.456, 0.406])
    np.testing.assert_allclose(task.resident["std"], [0.229, 0.224, 0.225])


def test_eight_devices_train_on_the_same_stream_as_one(folder, tmp_path, monkeypatch):
    recipe = {"data.crop": "inception", "data.image_size": 8, "eval.resize": 10, "model.dtype": "float32",
              "schedule.learning_rate": 0.01}  # fmt: skip
    _, one = train(settings(folder, **recipe), tmp_path / "one")
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", jax.local_devices)
    _, eight = train(settings(folder, **recipe), tmp_path / "eight")
    assert eight["examples"] == one["examples"] == 15
    # Rounding alone: sums over the batch are taken in another order.
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-4)
