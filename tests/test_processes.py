"""Several real processes train, evaluate, save and resume as one; and what is said when they can't."""

import json
import pathlib
import re
import shutil
import signal
import time

import cv2
import jax
import numpy as np
from processes import TINY, finish, free_port, run, start
import pytest

from resnet_jax.data.feed import ResidentFeed
from resnet_jax.data.order import Order
from resnet_jax.data.sources import Images
from resnet_jax.distributed import make_mesh

TEN = "--config.steps=10"


def losses(workdir: pathlib.Path) -> np.ndarray:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return np.array([line["train_loss"] for line in steps])


def summary(folder: pathlib.Path) -> dict:
    found = json.loads((folder / "summary.json").read_text())
    timings = ("seconds", "images_per_second", "data_wait_percent")
    return {name: value for name, value in found.items() if name not in timings}


def files(workdir: pathlib.Path) -> set[str]:
    return {path.name for path in workdir.iterdir()}


def went_well(ends) -> None:
    assert not any(end.status for end in ends), "\n".join(f"{end.status}: {end.err}" for end in ends)


def same_evaluation(one: pathlib.Path, other: pathlib.Path, tolerance: float) -> None:
    with np.load(one / "predictions.npz") as a, np.load(other / "predictions.npz") as b:
        np.testing.assert_array_equal(a["index"], np.arange(len(a["index"])))  # Every example once.
        for name in ("index", "label", "test_set"):
            np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_allclose(a["probabilities"], b["probabilities"], rtol=0, atol=tolerance)
    for name, value in summary(one).items():
        assert summary(other)[name] == pytest.approx(value, abs=100 * tolerance), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with one device: ``alone(norm, dtype)`` is its work directory after ten steps."""
    known = {}

    def run_alone(norm: str, dtype: str) -> pathlib.Path:
        if (norm, dtype) not in known:
            workdir = known[norm, dtype] = tmp_path_factory.mktemp("alone") / "run"
            went_well(run(1, f"--workdir={workdir}", TEN, *of_kind(norm, dtype)))
        return known[norm, dtype]

    return run_alone


def of_kind(norm: str, dtype: str) -> tuple[str, str]:
    return f"--config.model.batch_norm={norm}", f"--config.model.dtype={dtype}"


# Gloo's threads write at once: pieces of its lines may come in any order.
GLOO = re.compile(r"\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is|:|\d+|\s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "norm", "dtype", "tolerance"),
    [
        (2, 1, "global", "float64", 1e-9),
        (2, 4, "group:16", "float64", 1e-9),
        (4, 2, "global", "float32", 1e-4),
        (4, 1, "group:16", "float32", 1e-4),
        (4, 1, "group:32", "float64", 1e-9),  # A group lies on two processes.
    ],
)
def test_several_processes_are_one(alone, tmp_path, processes, devices, norm, dtype, tolerance):
    one, several = alone(norm, dtype), tmp_path / "run"
    ends = run(processes, f"--workdir={several}", TEN, *of_kind(norm, dtype), devices=devices)
    went_well(ends)
    np.testing.assert_allclose(losses(several), losses(one), rtol=0, atol=tolerance)
    same_evaluation(one, several, tolerance)
    assert files(several) == files(one)
    assert not [end.out for end in ends[1:] if GLOO.sub("", end.out)]
    assert f"{processes} processes, {processes * devices} devices" in ends[0].out


@pytest.mark.slow
def test_an_evaluation_and_a_calibration_by_two_processes(alone, tmp_path):
    shutil.copytree(alone("global", "float64"), tmp_path / "one")
    shutil.copytree(alone("global", "float64"), tmp_path / "two")
    for mode in ("eval", "calibrate"):
        for name, processes in (("one", 1), ("two", 2)):
            flags = (f"--workdir={tmp_path / name}", f"--mode={mode}", TEN, *of_kind("global", "float64"))
            went_well(run(processes, *flags))
    for folder in (".", "eval/calibrated"):
        same_evaluation(tmp_path / "one" / folder, tmp_path / "two" / folder, 1e-6)


@pytest.mark.slow
def test_one_two_four_and_one_process_continue_the_same_run(tmp_path):
    kind = of_kind("group:16", "float64")
    went_well(run(1, f"--workdir={tmp_path / 'steady'}", "--config.steps=24", *kind))
    for processes, steps in ((1, 6), (2, 12), (4, 18), (1, 24)):
        ends = run(processes, f"--workdir={tmp_path / 'moved'}", f"--config.steps={steps}", *kind)
        went_well(ends)
        assert (f"resuming from step {steps - 6}" in ends[0].out) == (steps > 6)
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "steady"), rtol=0, atol=1e-9)
    moved, steady = summary(tmp_path / "moved"), summary(tmp_path / "steady")
    assert moved["top1_error"] == steady["top1_error"]
    assert moved["loss"] == pytest.approx(steady["loss"], abs=1e-9)


def test_processes_share_each_epoch_s_examples_out_exactly_once(monkeypatch):
    examples, batch = 50, 16
    images = Images(np.zeros((examples, 2, 2, 1), np.uint8), np.arange(examples, dtype=np.int32))
    feed = ResidentFeed(images, {}, make_mesh(jax.devices()[:1]))
    seen, evaluated = [], []
    for processes, first, end in ((1, 0, 3), (2, 3, 9), (4, 9, 20), (1, 20, 25)):
        parts, looks = [], []
        for process in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
            parts.append([part["index"] for part in feed.training(7, batch, first, end)])
            looks.append([part["index"][part["valid"]] for part in feed.evaluation(batch)])
        seen += [np.concatenate(rows) for rows in zip(*parts, strict=True)]
        evaluated.append(np.concatenate([np.concatenate(rows) for rows in zip(*looks, strict=True)]))
    np.testing.assert_array_equal(
        np.stack(seen), [Order(7, examples).batch(step, batch)["index"] for step in range(25)]
    )
    epochs = np.concatenate(seen).reshape(-1, examples)  # 25 x 16 = 8 x 50.
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(examples), (8, 1)))
    for index in evaluated:
        np.testing.assert_array_equal(index, np.arange(examples))


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
    """A folder of two classes: 24 training images and 7 for testing."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i:02}.png"), draw.integers(0, 256, (20, 24, 3), np.uint8))
    (tmp_path / "photos/test/dog/03.png").unlink()
    return tmp_path / "photos"


def streamed(photos: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
    return (f"--workdir={workdir}", f"--config.data.dir={photos}", "--config.data.source=image_folder", TEN,
            "--config.data.crop=scale", "--config.data.scales=18,22", "--config.data.image_size=16",
            "--config.eval.resize=18", "--config.batch_size=8", "--config.eval.batch_size=4", "--config.data.workers=1",
            f"--config.data.cache_dir={photos.parent / 'cache'}", "--config.model.dtype=float64")  # fmt: skip


@pytest.mark.slow
def test_files_that_are_read_as_training_goes_are_shared_out(photos, tmp_path):
    for processes in (1, 2):
        went_well(run(processes, *streamed(photos, tmp_path / str(processes))))
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=0, atol=1e-9)
    same_evaluation(tmp_path / "1", tmp_path / "2", 1e-9)


@pytest.mark.slow
def test_an_image_that_one_process_can_t_read_ends_all(photos, tmp_path):
    (photos / "train/dog/07.png").write_bytes(b"no image")
    ends = run(2, *streamed(photos, tmp_path / "run"), "--config.data.mean=imagenet", "--config.data.std=imagenet")
    assert [end.status for end in ends] == [2, 2]
    for end in ends:
        assert re.search(r"error: .*dog/07.png: not a readable image", end.err), end.err
        assert "Traceback" not in end.err


# What goes wrong at the start; quick, for nothing is compiled.


def refused(ends, *words: str, status: int = 2) -> None:
    for end in ends:
        assert end.status == status, end.err
        (line,) = [line for line in end.err.splitlines() if line.startswith("error:")]
        assert all(word in line for word in words), line
        assert "Traceback" not in end.err


def test_a_process_of_another_config_is_named(tmp_path):
    port = free_port()
    flags = f"--workdir={tmp_path / 'run'}", TEN
    ends = finish([start(0, 2, port, *flags), start(1, 2, port, *flags, "--config.optimizer.momentum=0.8")])
    refused(ends, "process 1", "differs from process 0", "optimizer.momentum is 0.8, not 0.9")
    assert not (tmp_path / "run").exists()


def test_a_process_of_another_seed_is_named(tmp_path):
    port, flags = free_port(), (f"--workdir={tmp_path / 'run'}", TEN)
    ends = finish([start(0, 2, port, *flags), start(1, 2, port, *flags, "--config.seed=7")], seconds=60)
    refused(ends, "process 1", "differs from process 0", "seed is 7, not 0")


def test_a_process_of_another_version_of_the_code_is_named(tmp_path):
    port = free_port()
    changed = TINY.replace(
        "sys.argv[0]", "import resnet_jax.run\nresnet_jax.run.code_version = lambda: 'x'\nsys.argv[0]"
    )
    flags = f"--workdir={tmp_path / 'run'}", TEN
    refused(finish([start(0, 2, port, *flags), start(1, 2, port, *flags, code=changed)]), "process 1", "code is 'x'")


def test_a_process_with_other_data_is_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "more")
    shutil.copy(tmp_path / "more/train/cat/00.png", tmp_path / "more/train/cat/99.png")
    port = free_port()
    fixed = "--config.data.mean=imagenet", "--config.data.std=imagenet"
    folders = (photos, tmp_path / "more")
    ends = finish([start(i, 2, port, *streamed(path, tmp_path / "run"), *fixed) for i, path in enumerate(folders)])
    refused(ends, "process 1", "train examples is '25, ", "not '24, ")


def test_a_work_directory_that_is_not_shared_is_refused(tmp_path):
    port = free_port()
    hurry = TINY.replace("sys.argv[0]", "import resnet_jax.training.workdir as w\n"
                         "w.check_shared.__defaults__ = (3,)\nsys.argv[0]")  # fmt: skip
    ends = finish([start(i, 2, port, f"--workdir={tmp_path / str(i)}", TEN, code=hurry) for i in range(2)])
    refused(ends, f"--workdir={tmp_path / '1'}", "several hosts need a shared one")


def test_a_peer_that_never_comes_is_waited_for_no_longer_than_said(tmp_path):
    for number in (0, 1):
        began = time.monotonic()
        end = finish([start(number, 2, free_port(), f"--workdir={tmp_path / 'run'}", TEN, "--start_seconds=2")])
        refused(end, f"process {number} of 2", "not all processes have come at 127.0.0.1:", "within 2 s", status=69)
        assert time.monotonic() - began < 30
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coordinator=here:1"], "--num_processes is not given"),
        (["--num_processes=2", "--process_id=0"], "--coordinator is not given"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1"),
        (["--coordinator=127.0.0.1:99999", "--num_processes=2", "--process_id=0"], "port 99999 can't be used"),
    ],
)
def test_flags_that_don_t_go_together(tmp_path, flags, words):
    refused(run(1, f"--workdir={tmp_path / 'run'}", TEN, *flags), words)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_in_the_first_compilation_ends_all_at_once(tmp_path, processes):
    port = free_port()
    deep = f"--workdir={tmp_path / 'run'}", TEN, "--config.model.name=cifar_resnet56"  # Some ten seconds to compile.
    running = [start(i, processes, port, *deep) for i in range(processes)]
    while "training cifar_resnet56" not in running[0].stdout.readline():
        assert running[0].poll() is None
    time.sleep(1)
    began = time.monotonic()
    running[-1].send_signal(signal.SIGTERM)
    ends = finish(running)
    assert time.monotonic() - began < 8
    for end in ends:
        assert (end.status, end.err.splitlines()[-1].endswith("; nothing was lost")) == (75, True), end.err
    assert not (tmp_path / "run/checkpoints").exists() or not any((tmp_path / "run/checkpoints").iterdir())


# A process whose files may not grow from its second checkpoint on, as where a quota or a disk of its own is full.
FULL_FOR_ONE = """
import resource, signal
from resnet_jax.training import checkpoints
checkpoints._ALONE = 3.0
save = checkpoints.Checkpoints.save
def save_or_not(self, state, step, *rest):
    if NUMBER == 1 and step >= 8:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    return save(self, state, step, *rest)
checkpoints.Checkpoints.save = save_or_not
"""


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_alone_ends_all_and_the_run_goes_on_from_the_one_before(tmp_path):
    port, flags = free_port(), (f"--workdir={tmp_path / 'run'}", "--config.steps=14", "--config.checkpoint.every=4")
    codes = [f"NUMBER = {i}\n{FULL_FOR_ONE}{TINY}" for i in range(2)]
    ends = finish([start(i, 2, port, *flags, code=code) for i, code in enumerate(codes)])
    for end in ends:
        assert end.status == 1, end.err
        assert "error: " in end.err and "step 8 could not be saved by every process" in end.err
        assert "Traceback" not in end.err
    ends = run(2, *flags)
    went_well(ends)
    assert "resuming from step 4" in ends[0].out


@pytest.mark.slow
def test_several_seeds_by_two_processes(tmp_path):
    wait = "run.write_results = lambda *a, write=run.write_results: (time.sleep(3), write(*a))\n"
    slow_leader = TINY.replace("sys.argv[0]", f"import time\nfrom resnet_jax.training import run\n{wait}sys.argv[0]")
    ends = run(2, f"--workdir={tmp_path / 'run'}", "--config.steps=3", "--seeds=0,1", code=slow_leader)
    went_well(ends)
    found = json.loads((tmp_path / "run/seeds.json").read_text())
    for seed in ("0", "1"):
        assert found["top1_error"][seed] == summary(tmp_path / f"run/seed_{seed}")["top1_error"]


@pytest.mark.slow
def test_an_evaluation_where_the_folder_is_not_shared_is_refused(alone, tmp_path):
    port, kind = free_port(), of_kind("global", "float64")
    shutil.copytree(alone("global", "float64"), tmp_path / "0")
    flags = "--mode=eval", TEN, *kind, f"--config.init.weights={alone('global', 'float64')}"
    ends = finish([start(i, 2, port, f"--workdir={tmp_path / str(i)}", *flags) for i in range(2)])
    refused(ends, "process 1", "newest checkpoint", "None, not 10")
