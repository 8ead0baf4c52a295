"""Streaming as a person starts it: prepare, then train from shards, a TFDS data set, processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
from PIL import Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = ["--config=cifar_20", "--config.model.name=cifar_resnet8", "--config.model.batch_norm=global",
            "--config.data.crop=scale", "--config.data.image_size=16", "--config.data.scales=18,28",
            "--config.eval.resize=18", "--config.batch_size=8", "--config.log.every=1",
            "--config.log.tensorboard=false", "--config.data.name="]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for name in ("ant", "bee"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (30 + i, 40, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{i}.jpg")
    return tmp_path / "images"


def start(folder: pathlib.Path, *arguments: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Compiling would take most of the time.
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(folder: pathlib.Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


@pytest.mark.slow
def test_shards_of_prepare_train_as_the_folder_they_were_made_of(folder, tmp_path):
    done = run(tmp_path, "-m", "resnet_jax.prepare", "--source=image_folder", "--data_dir=images", "--output=shards",
               "--mean_size=16", "--mean_resize=18")  # fmt: skip
    assert "20 train, 6 test images of 2 classes" in done
    command = ["-m", "resnet_jax.main", *SETTINGS, "--config.steps=3"]
    out = run(
        tmp_path, *command, "--config.data.source=array_record", "--config.data.dir=shards", "--workdir=shards_run"
    )
    assert "computing the mean" not in out  # prepare has written it.
    out = run(tmp_path, *command, "--config.data.source=image_folder", "--config.data.dir=images", "--workdir=run")
    assert "computing the mean of 20 training images, once" in out
    ours, theirs = (np.load(tmp_path / name / "predictions.npz") for name in ("shards_run", "run"))
    for name in ("index", "label", "probabilities"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert 0 <= record["data_wait_percent"] <= 100
    assert "waiting for data" in out


def test_a_tfds_data_set_trains_without_tensorflow(folder, tmp_path):
    (tmp_path / "animals.py").write_text(
        textwrap.dedent("""
        import io, pathlib
        import tensorflow_datasets as tfds

        class Animals(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                classes = tfds.features.ClassLabel(names=["ant", "bee"])
                features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": classes})
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

            def _split_generators(self, manager):
                return {name: self._generate_examples(part) for name, part in (("train", "train"), ("test", "val"))}

            def _generate_examples(self, part):
                for path in sorted(pathlib.Path("images", part).rglob("*.jpg")):
                    yield str(path), {"image": io.BytesIO(path.read_bytes()), "label": path.parent.name}

        Animals(data_dir="tfds", file_format="array_record").download_and_prepare()
        """)
    )
    run(tmp_path, "animals.py")
    main = textwrap.dedent("""
        import sys
        from resnet_jax import cli, main
        try:
            cli.run(main.main, main.__doc__, needs=["config"])
        finally:
            assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
    """)
    arguments = ["--config.data.source=tfds", "--config.data.name=animals", "--config.data.dir=tfds",
                 "--config.steps=2", "--workdir=run"]  # fmt: skip
    run(tmp_path, "-c", main, *SETTINGS, *arguments, "--config.data.name=animals")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 2
    assert summary["examples"] == 6


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_seconds_with_one_line_and_what_was_learnt_saved(folder, tmp_path):
    psutil = pytest.importorskip("psutil")
    arguments = ["--config.data.source=image_folder", "--config.data.dir=images", "--workdir=run",
                 "--config.steps=100000", "--config.data.worker_type=process", "--config.data.workers=2"]  # fmt: skip
    process = start(tmp_path, "-m", "resnet_jax.main", *SETTINGS, *arguments)
    try:
        while "step 5/" not in process.stdout.readline():
            assert process.poll() is None
        workers = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        output, errors = process.communicate(timeout=60)
        assert time.monotonic() - killed < 20
    finally:
        process.kill()
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "a process that reads data was killed" in line
    assert "saved at step" in output
    assert "Traceback" not in errors
    time.sleep(1)
    assert not workers[1].is_running()
