"""Batches that are read as training goes: the same from any number of threads, processes and hosts."""

from collections.abc import Callable
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time

import numpy as np
from PIL import Image
import pytest

from resnet_jax.data import stream
from resnet_jax.data.crops import CenterCrop, ScaleCrop, Views, example_uniforms
from resnet_jax.data.image_folder import Files, open_folder
from resnet_jax.data.order import Order
from resnet_jax.data.sources import Subset
from resnet_jax.data.stream import Batch, Batches, EvaluationPlan, Reader, Rows, TrainingPlan
from resnet_jax.errors import UsageError

SCALE, CENTRE = ScaleCrop(size=16, smallest=18, largest=32), CenterCrop(size=16, shorter_side=18)
SEED, EXAMPLES = 3, 24


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """24 training images of three classes and several shapes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", EXAMPLES), ("test", 3)):
        for i in range(count):
            path = root / part / f"class {i % 3}" / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def files(written) -> Files:
    return open_folder(str(written), "").train


@pytest.fixture
def own_files(written, tmp_path) -> Files:
    """Files that the test may break."""
    shutil.copytree(written, tmp_path / "images")
    return open_folder(str(tmp_path / "images"), "").train


def training(files: Files, rows: Rows, broken: str = "raise") -> Reader:
    return Reader(Views(files, SCALE), TrainingPlan(Order(SEED, len(files)), rows), SEED, broken)


def evaluation(files: Files, rows: Rows, broken: str = "raise") -> Reader:
    return Reader(Views(files, CENTRE), EvaluationPlan(np.arange(len(files), dtype=np.int32), rows), 0, broken)


def read(reader: Reader, first: int, end: int, workers: int = 0, processes: bool = False, broken=None) -> list[Batch]:
    batches = Batches(reader, first, end, workers, processes, broken)
    try:
        return list(batches)
    finally:
        batches.close()


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.keys() == other.keys() == {"images", "labels", "index", "epoch", "valid"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
            assert batch[name].dtype == other[name].dtype


def join(parts: list[list[Batch]]) -> list[Batch]:
    """Global batches from each host's, which lie one behind the other."""
    return [{name: np.concatenate([batch[name] for batch in hosts]) for name in hosts[0]} for hosts in zip(*parts)]  # noqa: B905


def within(seconds: float, function: Callable) -> object:
    """What a function returns or raises, or a failure where it hangs."""
    result = []

    def call() -> None:
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        pytest.fail(f"hangs for more than {seconds} s")
    value, error = result[0]
    if error:
        raise error
    return value


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_batch_is_the_views_of_the_orders_examples(files):
    for step, batch in enumerate(read(training(files, Rows(7)), 0, 8)):
        order = Order(SEED, EXAMPLES).batch(step, 7)
        np.testing.assert_array_equal(batch["index"], order["index"])
        np.testing.assert_array_equal(batch["epoch"], order["epoch"])
        assert (batch["images"].shape, batch["images"].dtype) == ((7, 16, 16, 3), np.uint8)
        for row, (i, epoch) in enumerate(zip(order["index"].tolist(), order["epoch"].tolist(), strict=True)):
            image = SCALE(pathlib.Path(files.where(i)).read_bytes(), example_uniforms(SEED, epoch, i, 3))
            np.testing.assert_array_equal(batch["images"][row], image)
            assert f"class {batch['labels'][row]}" in files.where(i)
        assert batch["valid"].all()


def test_another_epoch_and_another_seed_see_other_crops(files):
    (first,) = read(training(files, Rows(EXAMPLES)), 0, 1)
    (second,) = read(training(files, Rows(EXAMPLES)), 1, 2)
    reader = Reader(Views(files, SCALE), TrainingPlan(Order(SEED, EXAMPLES), Rows(EXAMPLES)), SEED + 1, "raise")
    (other,) = read(reader, 0, 1)
    np.testing.assert_array_equal(other["index"], first["index"])
    second = dict(zip(second["index"].tolist(), second["images"], strict=True))
    changed = [(image != second[i]).any() for i, image in zip(first["index"].tolist(), first["images"], strict=True)]
    assert np.mean(changed) > 0.9
    assert np.mean((other["images"] != first["images"]).any((1, 2, 3))) > 0.9


@pytest.mark.parametrize("batch", [7, 10, 12])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_threads_makes_the_same_batches(files, monkeypatch, batch, workers):
    plain = read(training(files, Rows(batch)), 0, 9)
    monkeypatch.setattr(stream, "_PIECE", 4)  # 4 and 3; 4, 3 and 3; 4, 4 and 4.
    assert Rows(batch).pieces == {7: 2, 10: 3, 12: 3}[batch]
    assert_same(read(training(files, Rows(batch)), 0, 9, workers), plain)
    assert_same(read(training(files, Rows(batch)), 0, 9, 0), plain)


def test_processes_make_the_same_batches_and_end_when_they_are_closed(files):
    assert Rows(256).pieces == 2
    before = set(multiprocessing.active_children())
    reader = training(files, Rows(256))
    batches = Batches(reader, 1, 50, workers=2, processes=True)
    found = within(60, lambda: [next(batches) for _ in range(3)])
    assert len(set(multiprocessing.active_children()) - before) >= 2
    batches.close()
    assert_same(found, read(reader, 1, 4))
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


@pytest.mark.parametrize("piece", [2, 128])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_hosts_parts_together_are_the_batch_of_one_host(files, monkeypatch, hosts, piece):
    whole = read(training(files, Rows(8)), 0, 7)
    monkeypatch.setattr(stream, "_PIECE", piece)
    parts = [read(training(files, Rows(8, host, hosts)), 0, 7, workers=2) for host in range(hosts)]
    assert all(len(batch["labels"]) == 8 // hosts for part in parts for batch in part)
    assert_same(join(parts), whole)
    for epoch in (0, 1):  # Three steps each.
        seen = [i for part in parts for batch in part[3 * epoch : 3 * epoch + 3] for i in batch["index"].tolist()]
        assert sorted(seen) == list(range(EXAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_gives_that_steps_batch(files, monkeypatch, workers):
    monkeypatch.setattr(stream, "_PIECE", 3)
    whole = read(training(files, Rows(9)), 0, 8)
    for first in (1, 4, 7):
        assert_same(read(training(files, Rows(9)), first, 8, workers), whole[first:])
    assert read(training(files, Rows(9)), 8, 8, workers) == []


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("examples", [1, 7, 8, 9, 23, 24])
def test_evaluation_sees_every_example_once_and_marks_the_padding(files, monkeypatch, examples, hosts):
    monkeypatch.setattr(stream, "_PIECE", 3)
    some, steps = Subset(files, np.arange(examples) * EXAMPLES // examples), -(-examples // 8)
    parts = [read(evaluation(some, Rows(8, host, hosts)), 0, steps, workers=2) for host in range(hosts)]
    assert all(batch["images"].shape == (8 // hosts, 16, 16, 3) for part in parts for batch in part)
    batches = join(parts)
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.tolist() == [True] * examples + [False] * (8 * steps - examples)
    index = np.concatenate([batch["index"] for batch in batches])
    assert index[valid].tolist() == list(range(examples))
    labels = np.concatenate([batch["labels"] for batch in batches])[valid]
    assert labels.tolist() == [some[i][1] for i in range(examples)]
    images = np.concatenate([batch["images"] for batch in batches])
    np.testing.assert_array_equal(images[valid], [CENTRE(some[i][0], np.empty(0)) for i in range(examples)])
    assert not images[~valid].any()


def spoil(files: Files, i: int, content: bytes = b"\xff\xd8\xff no image") -> str:
    pathlib.Path(files.where(i)).write_bytes(content)
    return files.where(i)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [training, evaluation])
@pytest.mark.parametrize("damage", ["other bytes", "empty", "cut short", "vanished"])
def test_a_broken_image_is_named_with_a_hint(own_files, make, workers, damage):
    path = pathlib.Path(own_files.where(5))
    content = {"other bytes": b"<html>", "empty": b"", "cut short": path.read_bytes()[:200], "vanished": None}[damage]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=r"data\.on_error=skip leaves such images out") as error:
        within(20, lambda: read(make(own_files, Rows(8)), 0, 3, workers))
    assert one_line(error).startswith(f"{path}: not a readable image (")
    if content is None:
        assert "No such file" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_broken_training_image_is_replaced_by_the_next_one_and_told_once(own_files, monkeypatch, workers):
    clean = read(training(own_files, Rows(8)), 0, 9)
    monkeypatch.setattr(stream, "_PIECE", 3)
    instead = {5: 7, 6: 7, 23: 0}  # Two in a row, and the last one.
    broken = [spoil(own_files, i) for i in instead]
    views = Views(own_files, SCALE)
    batches = Batches(training(own_files, Rows(8), "replace"), 0, 9, workers, processes=False)
    found = list(batches)
    batches.close()
    for ours, theirs in zip(found, clean, strict=True):
        assert ours["valid"].all()
        np.testing.assert_array_equal(ours["index"], [instead.get(i, i) for i in theirs["index"].tolist()])
        np.testing.assert_array_equal(ours["epoch"], theirs["epoch"])
        for row, (i, epoch) in enumerate(zip(ours["index"].tolist(), ours["epoch"].tolist(), strict=True)):
            image, label = views(i, example_uniforms(SEED, epoch, i, 3))
            np.testing.assert_array_equal(ours["images"][row], image)
            assert ours["labels"][row] == label
    assert sorted(batches.broken) == sorted(broken)


def test_the_caller_may_collect_what_is_broken_over_several_runs(own_files):
    told: dict[str, str] = {}
    paths = [spoil(own_files, 5)]
    for _ in range(2):
        read(training(own_files, Rows(8), "replace"), 0, 3, broken=told)
    assert len(told) == 1
    paths.append(spoil(own_files, 9))
    read(training(own_files, Rows(8), "replace"), 0, 3, broken=told)
    assert sorted(told) == sorted(paths)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_masked_where_every_example_counts_once(own_files, workers):
    clean = read(evaluation(own_files, Rows(10)), 0, 3)
    paths = [spoil(own_files, i) for i in (5, 13)]
    batches = Batches(evaluation(own_files, Rows(10), "mask"), 0, 3, workers, processes=False)
    found = list(batches)
    batches.close()
    ours, theirs = ({name: np.concatenate([batch[name] for batch in run]) for name in run[0]} for run in (found, clean))
    expected = theirs["valid"].copy()
    assert expected.tolist() == [True] * EXAMPLES + [False] * 6
    expected[[5, 13]] = False
    np.testing.assert_array_equal(ours["valid"], expected)
    for name in ("images", "labels", "index"):
        np.testing.assert_array_equal(ours[name][expected], theirs[name][expected])
    assert sorted(batches.broken) == sorted(paths)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_all_broken_end_in_an_error(own_files, workers):
    for i in range(EXAMPLES):
        spoil(own_files, i)
    with pytest.raises(UsageError, match="not a readable image") as error:
        within(20, lambda: read(training(own_files, Rows(8), "replace"), 0, 3, workers))
    assert "on_error=skip" not in one_line(error)  # It is set already.
    found = read(evaluation(own_files, Rows(8), "mask"), 0, 3, workers)
    assert not any(batch["valid"].any() for batch in found)


def test_a_single_broken_example_does_not_ask_for_what_is_set_already(own_files):
    spoil(own_files, 4)
    with pytest.raises(UsageError) as error:
        read(training(Subset(own_files, np.array([4])), Rows(1), "replace"), 0, 1)
    assert "on_error=skip" not in one_line(error)


def test_a_process_tells_of_broken_images_as_a_thread_does(own_files):
    path = spoil(own_files, 5)
    told, expected = {}, {}
    plain = read(training(own_files, Rows(12), "replace"), 0, 2, broken=expected)
    found = within(60, lambda: read(training(own_files, Rows(12), "replace"), 0, 2, 1, processes=True, broken=told))
    assert_same(found, plain)
    assert told == expected
    assert list(told) == [path]


def test_a_broken_image_in_a_process_is_named_with_a_hint(own_files):
    path = spoil(own_files, 5)
    with pytest.raises(UsageError, match=r"data\.on_error=skip") as error:
        within(60, lambda: read(training(own_files, Rows(12)), 0, 2, 1, processes=True))
    assert one_line(error).startswith(f"{path}: not a readable image (")


def test_a_killed_process_ends_in_an_error(files):
    before = set(multiprocessing.active_children())
    batches = Batches(training(files, Rows(8)), 0, 10**6, workers=2, processes=True)
    within(60, lambda: next(batches))
    victim = min(set(multiprocessing.active_children()) - before, key=lambda child: child.pid)
    os.kill(victim.pid, signal.SIGKILL)

    def go_on() -> None:
        while True:
            next(batches)

    with pytest.raises(UsageError, match=r"a process that reads data was killed .* data\.workers") as error:
        within(20, go_on)
    one_line(error)
    within(10, batches.close)
