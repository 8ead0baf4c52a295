"""A mistake ends in one line that says what, where and what would be right; nothing is half-written."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest

from resnet_jax import config as config_lib
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import create_model
from resnet_jax.run import run_task

ROOT = pathlib.Path(__file__).resolve().parents[1]


def snapshot(folder):
    """Every file below ``folder`` with its bytes and time of change; None where there is nothing."""
    if not folder.exists():
        return None
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """What is not refused fails, rather than train."""

    def begin(*unused):
        raise AssertionError("not refused")

    monkeypatch.setattr("resnet_jax.run.Training", begin)


def run_refused(workdir, *overrides, mode="train"):
    """Does what main does, in this process; returns the line of the UsageError, ``workdir`` being as it was."""
    before = snapshot(workdir)
    with pytest.raises(UsageError) as caught:
        config = config_lib.load_config("digits_20")
        for name, value in (override.split("=", 1) for override in overrides):
            config_lib.override(config, name, value)
        config_lib.validate(config)
        run_task(config, workdir, mode)
    assert snapshot(workdir) == before
    line = " ".join(str(caught.value).split())
    assert len(line) < 600
    return line


def main_refused(*flags, cwd, **env):
    """Runs the program in ``cwd``; returns its one line on stderr."""
    command = [sys.executable, "-m", "resnet_jax.main", *map(str, flags)]
    before = snapshot(cwd)
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"error: .+\n", result.stderr), result.stderr
    assert snapshot(cwd) == before
    return result.stderr


def mentions(line, *parts):
    missing = [part for part in parts if str(part) not in line]
    assert not missing, f"{line!r} does not say {missing}"


# The whole way: the program's exit status, its one line, and a folder left as it was.


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--config is needed"]),
        (["--config"], ["Missing value", "--config"]),
        (["--config=digits_20", "--workdir"], ["Missing value", "--workdir"]),
        (["--config=digits_20", "--config.seed"], ["--config.seed", "--config.seed=VALUE"]),
        (["--config=digits_20", "--wrokdir=run"], ["wrokdir", "Did you mean: workdir"]),
        (["--config=digits_20", "--mode=trian"], ["--mode=trian", "train|eval"]),
        (["--config=digits_20", "run"], ["'run'", "--name=value"]),
        (["--config=digits_20", "--config.modle.name=x"], ["modle.name", "did you mean 'model.name'"]),
    ],
    ids=lambda value: " ".join(value[-1:]) if value and value[-1].startswith("--") else None,
)
def test_a_mistaken_flag_is_one_line(flags, parts, tmp_path):
    mentions(main_refused(*flags, cwd=tmp_path), *parts)


def test_an_unknown_model_is_one_line_and_leaves_no_work_directory(tmp_path):
    line = main_refused("--config=digits_20", "--config.model.name=cifar_resent20", cwd=tmp_path)
    mentions(line, "'cifar_resent20'", "did you mean 'cifar_resnet20'")


def test_a_batch_that_does_not_divide_over_the_devices_names_one_that_does(tmp_path):
    line = main_refused(
        *("--config=digits_20", "--config.batch_size=100"),
        cwd=tmp_path,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    mentions(line, "batch_size=100", "8 devices")
    near = int(re.search(r"(\d+) would", line)[1])
    assert near in (96, 104)


def test_a_work_directory_that_cannot_be_written_is_one_line(tmp_path):
    mentions(main_refused("--config=digits_20", "--workdir=/proc/run", cwd=tmp_path), "--workdir=/proc/run")


def test_a_config_file_with_an_error_in_it_is_named_with_the_line(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return 1 / 0\n")
    mentions(main_refused(f"--config={tmp_path}/mine.py", cwd=tmp_path), "mine.py:2:", "division by zero")


# The config.


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learning_rate=1", ["learning_rate", "did you mean 'schedule.learning_rate'"]),
        ("data.wrokers=1", ["data.wrokers", "did you mean 'data.workers'"]),
        ("model=cifar_resnet20", ["model is a section", "--config.model.x=value"]),
        ("batch_size=many", ["batch_size=many", "a whole number"]),
        ("batch_size=64.5", ["batch_size=64.5", "a whole number"]),
        ("schedule.learning_rate=fast", ["schedule.learning_rate=fast", "a number"]),
        ("data.flip=perhaps", ["data.flip=perhaps", "true or false"]),
        ("schedule.boundaries=1,x", ["schedule.boundaries=1,x", "whole numbers separated by commas"]),
        ("batch_size=0", ["batch_size=0", "positive"]),
        ("schedule.learning_rate=-1", ["schedule.learning_rate=-1", "positive"]),
        ("schedule.learning_rate=nan", ["schedule.learning_rate=nan", "finite"]),
        ("epochs=inf", ["epochs=inf", "finite"]),
        ("optimizer.momentum=1", ["optimizer.momentum=1", "below 1"]),
        ("data.holdout=-5", ["data.holdout=-5", "negative"]),
        ("schedule.name=cosin", ["schedule.name=cosin", "cosine"]),
        ("optimizer.decay=some", ["optimizer.decay=some", "all, kernels"]),
        ("data.mean=pixl", ["data.mean=pixl", "pixel, channel, imagenet, none"]),
        ("epochs=0", ["epochs or steps", "neither"]),
    ],
)
def test_a_mistaken_field_is_named_with_what_would_be_right(override, parts, tmp_path):
    mentions(run_refused(tmp_path / "run", override), *parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.name=resnet5", ["'resnet5'", "did you mean 'resnet50'"]),
        ("model.name=cifar_resnet21", ["'cifar_resnet21'", "6n + 2", "'cifar_resnet20'"]),
        ("model.dtype=float8", ["float8", "bfloat16"]),
        ("model.init_fan=fan_it", ["model.init_fan=fan_it", "fan_out, fan_in"]),
        ("model.batch_norm=local", ["local", "global, per_device, group:N"]),
        ("model.batch_norm=group:48", ["group:48", "64", "48"]),
        ("model.num_classes=7", ["model.num_classes=7", "digits", "10 classes"]),
        ("batch_size=100", ["batch_size=100", "8 devices"]),
        ("optimizer.accumulate=3", ["batch_size=64", "8 devices", "optimizer.accumulate=3", "72 would"]),
        ("data.source=digitz", ["data.source=digitz", "did you mean 'digits'"]),
        ("data.holdout=5000", ["data.holdout=5000", "1438"]),
        ("init.weights=/nowhere/at/all", ["init.weights=/nowhere/at/all"]),
        ("data.labels=/nowhere/labels.txt", ["data.labels=/nowhere/labels.txt", "no such file"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(override, parts, tmp_path):
    mentions(run_refused(tmp_path / "run", override), *parts)


def test_images_too_small_for_the_network_are_refused(tmp_path):
    mentions(run_refused(tmp_path / "run", "model.name=vgg16", "steps=1"), "VGG", "224 pixels and up")


def test_vgg_below_its_fully_connected_layers_size_is_refused():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # Its last stage is 1x1: not empty, but below 7x7.
    with pytest.raises(UsageError, match="224 pixels and up"):
        jax.eval_shape(create_model("vgg16").init, jax.random.key(0), images)


def test_a_work_directory_of_another_store_than_gs_is_refused(tmp_path):
    mentions(main_refused("--config=digits_20", "--workdir=s3://bucket/run", cwd=tmp_path), "s3://bucket/run", "gs://")


def test_a_dangling_link_in_an_image_folder_is_named(folder):
    (folder / "train" / "cat" / "gone.png").symlink_to("/nowhere.png")
    mentions(folder_refused(folder), "gone.png", "not readable")


def test_plateau_without_evaluations_is_refused(tmp_path):
    mentions(run_refused(tmp_path / "run", "schedule.name=plateau", "eval.every=0"), "plateau", "eval.every")


def config_refused(path, text):
    path.write_text("from resnet_jax.config import default_config, load_config\n\n\n" + text)
    with pytest.raises(UsageError) as caught:
        config_lib.validate(config_lib.load_config(str(path)))
    return str(caught.value)


def test_an_unknown_config_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"--config=digits_2O: .*did you mean 'digits_20'"):
        config_lib.load_config("digits_2O")
    with pytest.raises(UsageError, match=r"--config=mine/digits.py: no such file"):
        config_lib.load_config("mine/digits.py")


def test_a_config_file_names_the_misspelt_field_and_its_line(tmp_path):
    text = (
        "def get_config():\n    config = default_config()\n    config.schedule.learning_rat = 1.0\n    return config\n"
    )
    mentions(config_refused(tmp_path / "mine.py", text), "mine.py:6:", '"learning_rat"', 'Did you mean "learning_rate"')


def test_a_config_file_given_by_a_relative_name_says_the_line_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def get_config():\n    return default_config().no_such_field\n"
    mentions(config_refused(pathlib.Path("mine.py"), text), "mine.py:5:")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "def get_config():\n    config = default_config()\n    config.batch_size = 'x'\n",
            [":6:", "batch_size", "int"],
        ),
        ("def get_config(:\n    pass\n", [":4:", "SyntaxError"]),
        ("import no_such_module\n", [":4:", "no_such_module"]),
        ("x = 1\n", ["get_config"]),
        ("def get_config():\n    return {}\n", ["get_config() returned dict"]),
        ("def get_config():\n    return load_config('digits_2O')\n", ["digits_2O", "did you mean 'digits_20'"]),
    ],
    ids=["type", "syntax", "import", "no get_config", "a dict", "unknown base"],
)
def test_a_broken_config_file_is_named_with_the_line(text, parts, tmp_path):
    line = config_refused(tmp_path / "mine.py", text)
    mentions(line, *(["mine.py"] if "base" not in line and "digits_2O" not in line else []), *parts)


def test_boundaries_in_a_file_must_be_whole_numbers(tmp_path):
    text = "def get_config():\n    c = load_config('digits_20')\n    c.schedule.boundaries = ('a', 1.5)\n    return c\n"
    mentions(config_refused(tmp_path / "mine.py", text), "schedule.boundaries", "whole numbers")


def test_epochs_and_steps_both_in_a_file_are_refused(tmp_path):
    text = "def get_config():\n    config = load_config('digits_20')\n    config.steps = 10\n    return config\n"
    mentions(config_refused(tmp_path / "mine.py", text), "epochs or steps", "both")


# The data.


def image(path, height=8, width=8, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """train and test with cat and dog, two images each of 8x8 pixels."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(2):
                image(tmp_path / "images" / part / name / f"{i}.png", value=60 * i)
    return tmp_path / "images"


def folder_refused(folder, *overrides):
    cache = folder.parent / "cache"
    settings = ["data.source=image_folder", f"data.dir={folder}", f"data.cache_dir={cache}", *overrides]
    line = run_refused(folder.parent / "run", *settings)
    assert not list(cache.rglob("*.partial"))
    return line


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_an_image_folder_that_is_not_there_is_named(folder):
    mentions(folder_refused(folder / "elsewhere"), f"data.dir={folder}/elsewhere", "no such folder")
    mentions(run_refused(folder.parent / "run", "data.source=image_folder"), "data.dir", "train/<class>")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_folder_without_one_of_its_parts_says_which(part, folder):
    remove(folder / part)
    mentions(folder_refused(folder), str(folder), part, "<class>")


def test_an_empty_class_folder_is_named(folder):
    remove(folder / "train" / "dog")
    (folder / "train" / "dog").mkdir()
    mentions(folder_refused(folder), folder / "train/dog", "no images", ".png")


def test_a_class_that_only_training_has_is_named(folder):
    remove(folder / "test" / "dog")
    mentions(folder_refused(folder), folder / "test/dog", "'dog'")


def test_a_class_that_only_the_test_set_has_is_named(folder):
    image(folder / "test" / "emu" / "0.png")
    mentions(folder_refused(folder), folder / "test/emu")


def test_a_class_count_that_does_not_fit_says_what_the_data_has(folder):
    mentions(folder_refused(folder, "model.num_classes=3"), "model.num_classes=3", "2 classes", "cat", "dog")


@pytest.mark.parametrize("content", [b"just text", b"", b"\x89PNG\r\n\x1a\n" + b"\x00" * 20])
def test_a_file_that_is_no_image_is_named(content, folder):
    (folder / "train" / "cat" / "odd.png").write_bytes(content)
    mentions(folder_refused(folder), folder / "train/cat/odd.png", "not a readable image")


def test_an_image_cut_short_is_named(folder):
    path = folder / "test" / "dog" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:150])
    mentions(folder_refused(folder), path, "not a readable image")


def test_images_of_different_sizes_are_named_with_the_way_out(folder):
    image(folder / "train" / "dog" / "wide.png", height=8, width=12)
    mentions(folder_refused(folder), folder / "train/dog/wide.png", "12x8", "8x8", "data.image_size")


def test_test_images_of_another_size_are_refused_with_the_way_out(folder):
    for path in (folder / "test").rglob("*.png"):
        image(path, height=9, width=9)
    mentions(folder_refused(folder), "8x8", "9x9", "data.image_size")


def test_a_label_file_that_does_not_fit_is_named(folder, tmp_path):
    mentions(folder_refused(folder, "data.labels=/nowhere.txt"), "data.labels=/nowhere.txt", "no such file")
    (tmp_path / "labels.txt").write_text("cat\nemu\n")
    mentions(folder_refused(folder, f"data.labels={tmp_path}/labels.txt"), "labels.txt", "'emu'", folder / "train")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00c", b"\n\n"], ids=["binary", "blank"])
def test_a_label_file_without_labels_is_named(content, folder, tmp_path):
    (tmp_path / "labels.txt").write_bytes(content)
    mentions(folder_refused(folder, f"data.labels={tmp_path}/labels.txt"), f"data.labels={tmp_path}/labels.txt")


def cifar_archive(path, record=3073):
    """A CIFAR-10 archive of 20 random images a file."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        add("batches.meta.txt", "\n".join("abcdefghij").encode())
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            content = random.integers(0, 256, (20, record), np.uint8)
            content[:, 0] %= 10
            add(name, content.tobytes())
    return path


def cifar_refused(path, *overrides):
    return run_refused(path.parent / "run", "data.source=cifar", f"data.dir={path}", *overrides)


def test_a_cifar_archive_cut_short_is_refused(tmp_path):
    path = cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    path.write_bytes(path.read_bytes()[:100_000])
    mentions(cifar_refused(path), f"data.dir={path}", "damaged archive")
    path.write_bytes(b"not an archive")
    mentions(cifar_refused(path), f"data.dir={path}", "damaged archive")
    mentions(cifar_refused(tmp_path / "elsewhere"), f"data.dir={tmp_path}/elsewhere", "no such folder or archive")


@pytest.mark.parametrize("where", [0.3, 0.95])
def test_a_cifar_archive_with_damaged_bytes_is_refused(where, tmp_path):
    path = cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    content = bytearray(path.read_bytes())
    start = int(where * len(content))
    content[start : start + 20] = bytes(255 - byte for byte in content[start : start + 20])
    path.write_bytes(content)
    mentions(cifar_refused(path), f"data.dir={path}", "damaged archive")


def test_a_cifar_file_of_another_record_size_is_refused(tmp_path):
    path = cifar_archive(tmp_path / "other.tar.gz", record=3000)
    mentions(cifar_refused(path), path, "data_batch_1.bin", "60000 bytes", "3073")


def test_a_folder_of_pngs_given_as_cifar_says_which_source_reads_it(folder):
    mentions(cifar_refused(folder), f"data.dir={folder}", "is missing", "data.source=image_folder")


def test_an_unknown_cifar_names_the_nearest(tmp_path):
    line = cifar_refused(cifar_archive(tmp_path / "archive.tar.gz"), "data.name=cifar11")
    mentions(line, "data.name=cifar11", "did you mean 'cifar10'")
    line = cifar_refused(tmp_path / "archive.tar.gz", "data.name=cifar100")
    mentions(line, "fine_label_names.txt is missing", "cifar-100-binary.tar.gz")


# The work directory.


def test_a_work_directory_of_another_model_lists_what_differs(tmp_path):
    run = tmp_path / "run"
    config = config_lib.load_config("digits_20")
    values = config_lib.flatten(config) | {"model.name": "cifar_resnet56", "optimizer.momentum": 0.5}
    run.mkdir()
    (run / "config.json").write_text(json.dumps(values))
    line = run_refused(run)
    mentions(line, f"--workdir={run}", "model.name: cifar_resnet56 -> cifar_resnet20", "optimizer.momentum: 0.5 -> 0.9")
    assert "batch_size" not in line


def test_checkpoints_without_a_config_or_in_a_file_s_place_are_refused(tmp_path):
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    mentions(run_refused(tmp_path / "run"), tmp_path / "run", "no config.json")
    before = config_lib.flatten(config_lib.load_config("digits_20"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(before))
    (tmp_path / "other" / "checkpoints").touch()
    mentions(run_refused(tmp_path / "other"), tmp_path / "other", "checkpoints in it is a file")


def test_a_work_directory_with_half_a_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model.name": "cifar_res')
    mentions(run_refused(tmp_path), tmp_path / "config.json", "not readable")


def test_a_work_directory_with_a_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    mentions(run_refused(tmp_path), tmp_path / "config.json")


def test_a_file_as_work_directory_or_above_it_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        mentions(run_refused(run), f"--workdir={run}", "not a folder")


def test_evaluation_without_a_checkpoint_says_what_is_missing(tmp_path):
    new, empty, started = (tmp_path / name for name in ("new", "empty", "started"))
    empty.mkdir()
    (started / "checkpoints").mkdir(parents=True)  # Killed before its first checkpoint was whole.
    for run in (new, empty, started):
        mentions(run_refused(run, mode="eval"), "--mode=eval", run, "no checkpoint", "init.weights")
