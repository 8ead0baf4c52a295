"""Fine-tuning: what is frozen stays as it came, the head is new, and training stops when it gets no better."""

import functools
import json
import pathlib
import shutil

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest

from resnet_jax import create_model
from resnet_jax.classification.predict import predict
from resnet_jax.config import load_config, validate
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.save import save_safetensors
from resnet_jax.pretrained.source import read_weights
from resnet_jax.run import run_task
from resnet_jax.training.checkpoints import load_run_weights
from resnet_jax.training.optimizer import make_optimizer

SIDE = 8
CONSTANT = {"schedule.name": "constant"}  # So that a run may go on longer.


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    monkeypatch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    patch(monkeypatch)


def write_images(folder: pathlib.Path, classes: int) -> pathlib.Path:
    random = np.random.default_rng(classes)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(classes):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (SIDE, SIDE, 3), np.uint8)
                pixels[..., label % 3] += 100 + 50 * (label // 3)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def settings(folder: pathlib.Path, weights: pathlib.Path | str, **changes):
    config = load_config("finetune_folder")
    config.model.name = "tiny"
    config.data.dir = str(folder)
    config.data.cache_dir = str(folder.parent / "cache")
    config.data.image_size = SIDE
    config.data.crop = "whole"
    config.init.weights = str(weights)
    config.batch_size = 8
    config.eval.every = 3
    config.epochs = 0.0
    config.steps = 6
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    validate(config)
    return config


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> pathlib.Path:
    """A folder with images of three classes, and a run on them, with a mean image of its own."""
    root = tmp_path_factory.mktemp("once")
    folder = write_images(root / "three", 3)
    config = settings(
        folder, "", **{"init.head": "keep", "data.mean": "pixel", "data.std": "channel", "data.flip": False}
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        assert run_task(config, root / "pretrained", "train") == 0
    return root


@pytest.fixture
def pretrained(trained_once, tmp_path) -> pathlib.Path:
    """That run, and its images in ``three`` beside it, for this test alone."""
    for part in ("three", "pretrained"):
        shutil.copytree(trained_once / part, tmp_path / part)
    return tmp_path / "pretrained"


def weights(run: pathlib.Path) -> dict[str, np.ndarray]:
    flat = jax.tree.leaves_with_path(load_run_weights(str(run)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in flat}


def test_frozen_stages_keep_weights_and_statistics_and_the_rest_learns(pretrained, tmp_path, capsys):
    folder = write_images(tmp_path / "five", 5)
    assert run_task(settings(folder, pretrained, **{"model.freeze_at": 2}), tmp_path / "run", "train") == 0
    assert "a new head for 5 classes (class0, class1, class2, class3, class4)" in capsys.readouterr().out
    before, after = weights(pretrained), weights(tmp_path / "run")
    assert after["params/head/kernel"].shape == (8, 5)
    for name, array in after.items():
        if "/head/" not in name:
            frozen = name.split("/")[1] in ("stem", "stage1")
            assert np.array_equal(array, before[name]) == frozen, name


def test_frozen_statistics_stay_while_weights_learn(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    config = settings(folder, pretrained, **{"model.batch_norm": "frozen"})
    assert run_task(config, tmp_path / "run", "train") == 0
    before, after = weights(pretrained), weights(tmp_path / "run")
    for name, array in after.items():
        if "/head/" not in name:
            assert np.array_equal(array, before[name]) == name.startswith("batch_stats"), name


@pytest.mark.slow
def test_a_fine_tuned_run_has_the_preprocessing_of_its_weights_also_when_it_goes_on(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    for steps in (3, 6):
        assert run_task(settings(folder, pretrained, steps=steps, **CONSTANT), tmp_path / "run", "train") == 0
    theirs, ours = (json.loads((run / "data.json").read_text()) for run in (pretrained, tmp_path / "run"))
    assert ours["preprocessing"] == theirs["preprocessing"]
    np.testing.assert_array_equal(np.load(tmp_path / "run/mean.npy"), np.load(pretrained / "mean.npy"))
    assert ours["classes"] == [f"class{i}" for i in range(5)]
    # What the command line sets is the user's.
    config = settings(folder, pretrained, **{"data.mean": "imagenet", "data.std": "imagenet"})
    assert run_task(config, tmp_path / "other", "train", explicit=["data.mean"]) == 0
    other = json.loads((tmp_path / "other" / "data.json").read_text())
    np.testing.assert_allclose(other["preprocessing"]["mean"], [0.485, 0.456, 0.406])


def test_other_classes_need_a_new_head_and_a_new_head_needs_weights(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    with pytest.raises(UsageError, match=r"has 3 classes and the data have 5; --config\.init\.head=replace"):
        run_task(settings(folder, pretrained, **{"init.head": "keep"}), tmp_path / "run", "train")
    with pytest.raises(UsageError, match=r"init\.head=replace goes with init\.weights"):
        run_task(settings(folder, ""), tmp_path / "run", "train")
    with pytest.raises(UsageError, match="freeze_at=4: tiny has 3 parts: stem, stage1, stage2"):
        run_task(settings(folder, pretrained, **{"model.freeze_at": 4}), tmp_path / "run", "train")
    assert not (tmp_path / "run").exists()


def test_training_stops_after_so_many_evaluations_that_are_no_better_and_stays_stopped(pretrained, tmp_path, capsys):
    folder = write_images(tmp_path / "five", 5)
    # A rate too small to change a prediction: the first evaluation stays the best.
    changes = {"schedule.learning_rate": 1e-12, "model.batch_norm": "frozen", "eval.patience": 2, "steps": 60}
    config = settings(folder, pretrained, **changes)
    assert run_task(config, tmp_path / "run", "train") == 0
    assert "stopping early: 2 evaluations no better than" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 9
    assert run_task(config, tmp_path / "run", "train") == 0
    assert "is finished" in capsys.readouterr().out


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def preprocessing(run: pathlib.Path) -> dict:
    return json.loads((run / "data.json").read_text())["preprocessing"]


@pytest.mark.slow
@pytest.mark.parametrize("explicit", ["data.mean", "data.std", "data.mean_image"])
def test_what_the_command_line_says_of_mean_or_deviation_leaves_the_other_one_the_weights(
    explicit, pretrained, tmp_path
):
    folder, theirs = write_images(tmp_path / "five", 5), preprocessing(pretrained)
    own = np.random.default_rng(1).uniform(0, 1, (SIDE, SIDE, 3)).astype(np.float32)
    np.save(tmp_path / "own.npy", own)
    changes = {"data.mean": "imagenet", "data.std": "imagenet"}
    if explicit == "data.mean_image":
        changes |= {"data.mean_image": str(tmp_path / "own.npy"), "data.mean": "pixel"}
    for steps, named in ((3, [explicit]), (6, [])):  # What goes on has what it was trained with.
        config = settings(folder, pretrained, steps=steps, **changes, **CONSTANT)
        assert run_task(config, tmp_path / "run", "train", named) == 0
        found = preprocessing(tmp_path / "run")
        if explicit == "data.std":
            np.testing.assert_allclose(found["std"], IMAGENET[1], rtol=1e-6)
            assert found["mean"] == theirs["mean"]
            np.testing.assert_array_equal(np.load(tmp_path / "run/mean.npy"), np.load(pretrained / "mean.npy"))
            continue
        assert found["std"] == theirs["std"]
        if explicit == "data.mean":
            np.testing.assert_allclose(found["mean"], IMAGENET[0], rtol=1e-6)
            assert not (tmp_path / "run/mean.npy").exists()
        else:
            np.testing.assert_allclose(np.load(tmp_path / "run/mean.npy"), own, rtol=1e-6)


def random_weights(mean: tuple, std: tuple, size: int, resize: int | None, classes=None, **more) -> Pretrained:
    module = create_model("tiny", 5, "float32")
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(3), jnp.zeros((1, SIDE, SIDE, 3))))
    return Pretrained({}, variables, Preprocessing(mean, std, size, resize, **more), classes, "a test's")


@pytest.fixture
def bicubic(tmp_path) -> pathlib.Path:
    """A file of five classes whose images had 8 pixels of 11, which no default is."""
    weights = random_weights((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SIDE, 11, interpolation="bicubic")
    save_safetensors(tmp_path / "bicubic.safetensors", "tiny", weights)
    return tmp_path / "bicubic.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("explicit", "expected"),
    [
        ({}, (8, 11, "bicubic")),
        ({"eval.interpolation": "bilinear"}, (8, 11, "bilinear")),
        ({"eval.resize": 13}, (8, 13, "bicubic")),
        ({"data.image_size": 10}, (10, 11, "bicubic")),
    ],
    ids=str,
)
def test_cut_images_get_the_view_of_the_weights_but_for_what_the_command_line_says(
    explicit, expected, bicubic, tmp_path
):
    changes = {"data.crop": "inception", "data.image_size": 16, "eval.resize": 20, "data.workers": 1, "steps": 1}
    config = settings(write_images(tmp_path / "five", 5), bicubic, **(changes | explicit))
    assert run_task(config, tmp_path / "run", "train", list(explicit)) == 0
    found = preprocessing(tmp_path / "run")
    assert (found["image_size"], found["resize"], found["interpolation"]) == expected
    np.testing.assert_allclose((found["mean"], found["std"]), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), rtol=1e-6)


def test_weights_that_saw_whole_images_cut_as_much_as_they_see(tmp_path):
    weights = random_weights((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SIDE, None)
    save_safetensors(tmp_path / "net.safetensors", "tiny", weights)
    changes = {"data.crop": "inception", "data.image_size": 16, "eval.resize": 20, "data.workers": 1, "steps": 1}
    config = settings(write_images(tmp_path / "five", 5), tmp_path / "net.safetensors", **changes)
    assert run_task(config, tmp_path / "run", "train") == 0
    found = preprocessing(tmp_path / "run")
    assert (found["image_size"], found["resize"]) == (SIDE, SIDE)


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_whole_images_are_resized_as_the_weights_say(placement, bicubic, tmp_path):
    folder, random = tmp_path / "wide", np.random.default_rng(0)
    for part, label, i in ((part, label, i) for part in ("train", "val") for label in range(5) for i in range(2)):
        (folder / part / f"class{label}").mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (11, 19, 3), np.uint8)
        Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{i}.png")
    config = settings(folder, bicubic, **{"init.head": "keep", "data.placement": placement, "data.workers": 1})
    assert run_task(config, tmp_path / "run", "eval") == 0
    _, weights = read_weights(str(bicubic), None)
    files = [str(folder / "val" / f"class{label}" / f"{i}.png") for label in range(5) for i in range(2)]
    by_hand = [np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for path in files]
    images = (np.stack(by_hand) / 255 - np.array((0.1, 0.2, 0.3))) / np.array((0.4, 0.5, 0.6))
    logits = np.asarray(create_model("tiny", 5, "float32").apply(weights.variables, images.astype(np.float32)))
    powers = np.exp(logits)
    with np.load(tmp_path / "run/predictions.npz") as file:
        found = file["probabilities"][np.argsort(file["index"])]
    np.testing.assert_allclose(found, powers / powers.sum(1, keepdims=True), atol=1e-5, rtol=0)


def test_the_head_learns_ten_times_as_fast_and_the_rest_as_it_did(pretrained, tmp_path):
    folder, after = write_images(tmp_path / "five", 5), {}
    for rate in (1.0, 10.0):
        changes = {"optimizer.head_rate": rate, "steps": 1, "schedule.warmup_steps": 0, **CONSTANT}
        config = settings(folder, pretrained, **changes)
        assert run_task(config, tmp_path / f"run{rate}", "train") == 0
        after[rate] = weights(tmp_path / f"run{rate}")
    changed = {name for name, array in after[1.0].items() if not np.array_equal(array, after[10.0][name])}
    assert changed == {"params/head/kernel", "params/head/bias"}
    # The new bias began as zero: it is the update.
    once, tenfold = (after[rate]["params/head/bias"] for rate in (1.0, 10.0))
    assert np.abs(once).min() > 1e-6
    np.testing.assert_array_equal(tenfold, np.float32(10) * once)


@pytest.mark.parametrize("style", ["torch", "caffe"])
def test_updates_of_the_head_are_ten_times_those_without_a_rate_of_its_own_at_every_step(style):
    config = load_config("finetune_folder").optimizer
    config.momentum_style = style
    assert (config.momentum, config.weight_decay) > (0, 0)
    random = np.random.default_rng(0)
    shapes = {"stem": (3, 4), "head": (4, 5)}
    params = {name: {"kernel": random.standard_normal(shape, np.float32)} for name, shape in shapes.items()}
    rules = [make_optimizer(config, factors) for factors in (None, {"head": 10.0})]
    states = [rule.init(params) for rule in rules]
    for step in range(3):
        gradient = jax.tree.map(lambda array: random.standard_normal(array.shape, np.float32), params)
        rate, updates = jnp.float32(0.1 / (step + 1)), []
        for i, rule in enumerate(rules):
            update, states[i] = rule.update(gradient, states[i], params, learning_rate=rate)
            updates.append(update)
        plain, ours = updates
        np.testing.assert_array_equal(ours["stem"]["kernel"], plain["stem"]["kernel"])
        np.testing.assert_array_equal(ours["head"]["kernel"], np.float32(10) * plain["head"]["kernel"])


def test_a_new_head_can_not_be_evaluated(pretrained, tmp_path):
    folder = write_images(tmp_path / "five", 5)
    for mode in ("eval", "calibrate"):
        with pytest.raises(UsageError, match=rf"^--mode={mode}: .*--config\.init\.head=keep") as error:
            run_task(settings(folder, pretrained), tmp_path / "run", mode)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


def evaluated(folder: pathlib.Path, source: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """A folder in which others' weights were evaluated."""
    assert run_task(settings(folder, source, **{"init.head": "keep"}), workdir, "eval") == 0
    return workdir


def test_a_folder_that_was_only_evaluated_predicts_and_can_be_started_again(pretrained, tmp_path):
    three = tmp_path / "three"
    run = evaluated(three, pretrained, tmp_path / "evaluated")
    files = [str(path) for path in sorted((three / "val").rglob("*.png"), key=lambda path: (path.parent, path.name))]
    model, found = read_weights(str(run), None)
    assert model == "tiny"
    assert found.classes == ("class0", "class1", "class2")
    with np.load(run / "predictions.npz") as file:
        expected = file["probabilities"][np.argsort(file["index"])]
    predictions = [one.probabilities for one in predict(model, found, files)]
    np.testing.assert_allclose(predictions, expected, atol=1e-5, rtol=0)
    save_safetensors(tmp_path / "net.safetensors", model, found)
    assert read_weights(str(tmp_path / "net.safetensors"), None)[0] == "tiny"
    # Another recipe: nothing was trained that would be lost.
    five = write_images(tmp_path / "five", 5)
    config = settings(five, pretrained, **{"schedule.learning_rate": 0.02, "seed": 7})
    assert run_task(config, run, "train") == 0
    assert weights(run)["params/head/bias"].shape == (5,)
    # Now there is.
    with pytest.raises(UsageError, match="holds a run of another recipe"):
        run_task(settings(five, pretrained, **{"schedule.learning_rate": 0.03, "seed": 7}), run, "train")


def test_a_folder_says_no_more_than_was_said_when_its_weights_are_gone(pretrained, tmp_path):
    run = evaluated(tmp_path / "three", pretrained, tmp_path / "evaluated")
    shutil.rmtree(pretrained)
    with pytest.raises(UsageError, match="pretrained: no such file or folder"):
        read_weights(str(run), None)


def test_a_mean_image_of_earlier_weights_does_not_stay(pretrained, tmp_path):
    three = tmp_path / "three"
    run = evaluated(three, pretrained, tmp_path / "evaluated")
    np.testing.assert_array_equal(np.load(run / "mean.npy"), np.load(pretrained / "mean.npy"))
    model, found = read_weights(str(pretrained), None)
    plain = Pretrained({}, found.variables, Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SIDE, None),
                       found.classes, "a test's")  # fmt: skip
    save_safetensors(tmp_path / "plain.safetensors", model, plain)
    evaluated(three, tmp_path / "plain.safetensors", run)
    assert not (run / "mean.npy").exists()
    np.testing.assert_allclose(preprocessing(run)["mean"], (0.1, 0.2, 0.3), rtol=1e-6)
    assert read_weights(str(run), None)[1].preprocessing.mean_image is None


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (None, None),
        (("class0", "class1", "class2", "class3", "class4"), None),
        (("class0", "class2", "class1", "class3", "class4"), "('class2', 'class1', ...)"),
        (("airplane", "automobile", "bird", "cat", "deer"), "('airplane', 'class0', ...)"),
    ],
    ids=["unknown", "the same", "another order", "others"],
)
def test_class_names_that_differ_are_warned_of_by_the_first(classes, named, tmp_path, capsys):
    weights = random_weights((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SIDE, None, classes)
    save_safetensors(tmp_path / "net.safetensors", "tiny", weights)
    folder = write_images(tmp_path / "five", 5)
    evaluated(folder, tmp_path / "net.safetensors", tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "classes" in line]
    if not named:
        assert not lines
        return
    (line,) = lines
    assert line.startswith("warning: ")
    assert named in line


def test_a_new_head_is_not_warned_of_other_class_names(pretrained, tmp_path, capsys):
    five = write_images(tmp_path / "five", 5)
    (five / "train" / "class0").rename(five / "train" / "another")
    (five / "val" / "class0").rename(five / "val" / "another")
    assert run_task(settings(five, pretrained, steps=1), tmp_path / "new", "train") == 0
    assert "warning" not in capsys.readouterr().err
