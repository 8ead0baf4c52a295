"""What a run writes and remembers: metrics.jsonl across resumes, JSON files, averages, divergence."""

import dataclasses
import json
import os
import pathlib
import queue
import sys
import types

from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.output import write_json, write_whole
from resnet_jax.training import metrics as metrics_lib, record as record_lib
from resnet_jax.training.metrics import Console, MetricsWriter
from resnet_jax.training.record import Diverged, Record, Window


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir: pathlib.Path, first_step: int, records: list[tuple[int, dict[str, float]]]) -> None:
    writer = MetricsWriter(workdir, first_step, tensorboard=False)
    for step, values in records:
        writer.write(step, values)
    writer.close()


def test_each_record_is_a_line_with_its_step(tmp_path):
    write(tmp_path, 0, [(10, {"train_loss": 2.5}), (10, {"test_top1_error": 90.0}), (20, {"train_loss": 1.5})])
    assert lines(tmp_path) == [
        {"step": 10, "train_loss": 2.5},
        {"step": 10, "test_top1_error": 90.0},
        {"step": 20, "train_loss": 1.5},
    ]


def test_a_resumed_run_cuts_back_what_was_written_after_its_step(tmp_path):
    write(tmp_path, 0, [(step, {"train_loss": float(step)}) for step in (10, 20, 30, 40)])
    write(tmp_path, 20, [(30, {"train_loss": -30.0})])
    assert [(line["step"], line["train_loss"]) for line in lines(tmp_path)] == [(10, 10), (20, 20), (30, -30)]


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    write(tmp_path, 0, [(10, {"train_loss": 1.0})])
    write(tmp_path, 0, [])
    assert lines(tmp_path) == []


def test_a_run_resumed_twice_has_every_step_once(tmp_path):
    for first, steps in [(0, (10, 20, 30)), (20, (30, 40)), (40, (50,))]:
        write(tmp_path, first, [(step, {"train_loss": 1.0}) for step in steps])
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("broken", ['{"step": 30, "train_lo', '{"step": 30', "{", '{"step": 30, "train_loss": 1.0'])
def test_a_last_line_broken_off_is_left_out(tmp_path, broken):
    write(tmp_path, 0, [(10, {"train_loss": 1.0}), (20, {"train_loss": 2.0})])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(broken)
    write(tmp_path, 20, [(30, {"train_loss": 3.0})])
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_records_reach_the_disk_before_the_run_ends(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(10, {"train_loss": 1.0})
    assert lines(tmp_path) == [{"step": 10, "train_loss": 1.0}]  # A killed run keeps what it said.
    writer.close()


def test_the_cut_back_log_replaces_the_old_one_at_once(tmp_path, monkeypatch):
    write(tmp_path, 0, [(10, {"train_loss": 1.0}), (20, {"train_loss": 2.0})])
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics_lib.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, 10, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    seen = []

    class Events:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Events))
    writer = MetricsWriter(tmp_path, 20, tensorboard=True)
    writer.write(30, {"train_loss": 1.5, "learning_rate": 0.1})
    writer.close()
    # Steps that an earlier run wrote after step 20 are not shown.
    assert seen == [(str(tmp_path), 21), ("train_loss", 1.5, 30), ("learning_rate", 0.1, 30), "closed"]


def test_write_json_writes_what_can_be_read(tmp_path):
    write_json(tmp_path / "summary.json", {"a": [1, 2.5, None, "x"]})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": [1, 2.5, None, "x"]}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_file_whose_writing_is_broken_off_stays_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"step": 1})

    def half(file):
        file.write(b'{"st')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert os.listdir(tmp_path) == ["summary.json"]
    assert json.loads(path.read_text()) == {"step": 1}
    write_json(path, {"step": 3})  # What was left of the attempt is in nobody's way.
    assert json.loads(path.read_text()) == {"step": 3}


def test_write_json_of_what_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "summary.json", {"step": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"step": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"step": 1}


def metrics(loss: float, gradient_norm: float = 1.0, learning_rate: float = 0.1, **more: float) -> dict[str, float]:
    """What a step gives."""
    norms = {"gradient_norm": gradient_norm, "weight_norm": 2.0}
    return {"loss": loss, "learning_rate": learning_rate} | norms | more


def test_epoch_averages_are_of_the_last_epoch_alone():
    record = Record()
    assert record.epoch_average("loss") is None
    for step, (epoch, loss) in enumerate([(0, 9.0), (0, 7.0), (1, 4.0), (1, 2.0), (1, 3.0)], start=1):
        record.take_in(step, epoch, metrics(loss, top1_error=10 * loss))
    assert record.epoch_average("loss") == pytest.approx(3.0)
    assert record.epoch_average("top1_error") == pytest.approx(30.0)
    assert record.epoch_average("unknown") is None
    record.take_in(6, 2, metrics(0.5))
    assert record.epoch_average("loss") == pytest.approx(0.5)


def test_a_record_goes_on_after_a_checkpoint_in_the_middle_of_an_epoch_and_between_log_lines():
    losses = [5.0, 4.0, 3.0, 2.0]
    whole, stopped = Record(), Record()
    for step, loss in enumerate(losses, start=1):
        whole.take_in(step, 0, metrics(loss))
    for step, loss in enumerate(losses[:2], start=1):
        stopped.take_in(step, 0, metrics(loss))
    resumed = Record(**json.loads(json.dumps(dataclasses.asdict(stopped))))
    for step, loss in enumerate(losses[2:], start=3):
        resumed.take_in(step, 0, metrics(loss))
    assert resumed == whole
    assert resumed.epoch_average("loss") == 3.5
    assert resumed.take_window()["train_loss"] == 3.5


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": float("inf")}, {"gradient_norm": float("nan")},
                                 {"gradient_norm": float("inf")}, {"weight_norm": float("inf")}])  # fmt: skip
def test_a_step_that_is_not_finite_is_named(bad):
    record = Record()
    record.take_in(1, 0, metrics(2.0))
    with pytest.raises(Diverged) as error:
        record.take_in(2, 0, metrics(2.0) | bad)
    assert error.value.step == 2
    (name,) = bad
    assert str(error.value).startswith("step 2: ")
    assert f"{name.replace('_', ' ')} {bad[name]}" in str(error.value)
    assert record.epoch_average("loss") == 2.0  # The bad step is not in the averages.


def test_other_metrics_need_not_be_finite():
    record = Record()
    record.take_in(1, 0, metrics(2.0, top1_error=float("nan")))
    assert record.epoch_average("loss") == 2.0
    assert np.isnan(record.epoch_average("top1_error"))


def test_a_window_gives_back_every_step_of_single_and_of_joint_dispatches():
    window = Window()
    window.add({"loss": jnp.float32(1), "gradient_norm": jnp.float32(10)}, 1, "one")
    window.add({"loss": jnp.array([2.0, 3.0]), "gradient_norm": jnp.array([20.0, 30.0])}, 2, "two")
    window.add({"loss": jnp.float32(4), "gradient_norm": jnp.float32(40)}, 1, "one")

    def steps(*numbers):
        return [{"loss": float(i), "gradient_norm": 10.0 * i} for i in numbers]

    (taken,) = window.take(3)  # Of the first two dispatches, while the third is under way.
    assert taken.metrics == steps(1, 2, 3)
    (taken,) = window.take()
    assert taken.metrics == steps(4)
    (taken,) = window.take(0)
    assert taken.metrics == []


def test_a_window_of_several_runs_gives_each_its_own():
    window = Window()
    window.add({"loss": jnp.array([1.0, 10.0])}, 1, "one")
    window.add({"loss": jnp.array([[2.0, 3.0], [20.0, 30.0]])}, 2, "two")
    first, second = window.take(runs=2)
    assert first.metrics == [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]
    assert second.metrics == [{"loss": 10.0}, {"loss": 20.0}, {"loss": 30.0}]


def test_the_first_bad_step_of_a_joint_dispatch_is_found():
    window, record = Window(), Record()
    losses = jnp.array([1.0, jnp.nan, jnp.nan])
    window.add(
        {"loss": losses, "gradient_norm": jnp.ones(3), "weight_norm": jnp.ones(3), "learning_rate": jnp.ones(3)},
        3,
        "three",
    )
    (taken,) = window.take()
    with pytest.raises(Diverged) as error:
        for number, values in enumerate(taken.metrics, start=8):
            record.take_in(number, 0, values)
    assert error.value.step == 9


def test_a_window_times_steps_without_those_that_compile_and_without_pauses(monkeypatch):
    clock = iter([100.0, 107.0, 150.0, 160.0, 160.0, 500.0, 504.0, 504.0, 600.0, 603.0])
    monkeypatch.setattr(record_lib, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    window, one = Window(), {"loss": jnp.float32(0), "gradient_norm": jnp.float32(0)}
    five = {name: jnp.zeros(5) for name in one}

    def dispatch(metrics, steps, kind=None):
        kind = kind or steps
        window.start(kind)
        window.add(metrics, steps, kind)

    def taken():
        (found,) = window.take()
        return found.seconds, found.timed

    dispatch(one, 1)  # Compiles; the clock starts behind it, at 100,
    dispatch(one, 1)
    dispatch(five, 5)  # stops at 107 for another compilation, and goes on at 150.
    dispatch(five, 5)
    assert taken() == (7.0 + 10.0, 1 + 5)  # At 160.
    window.pause()  # An evaluation.
    dispatch(one, 1)  # The clock goes on at 500.
    dispatch(one, 1)
    assert taken() == (4.0, 2)
    dispatch(one, 1, "another canvas")  # Compiles too: the clock stops at 504 and goes on at 600.
    dispatch(one, 1, "another canvas")
    assert taken() == (3.0, 1)


def test_speed_is_timed_steps_over_their_seconds():
    assert Record().steps_per_second is None
    assert Record(timed_seconds=4.0, timed_steps=10, seconds=100.0).steps_per_second == 2.5


def test_averages_between_two_log_lines_are_means_and_the_last_rate():
    record = Record()
    record.take_in(1, 0, metrics(1.0, 4.0, learning_rate=0.1, top1_error=50.0))
    record.take_in(2, 1, metrics(3.0, 8.0, learning_rate=0.01, top1_error=30.0))  # Whichever epochs they are in.
    assert record.take_window() == {
        "train_loss": 2.0,
        "train_gradient_norm": 6.0,
        "train_weight_norm": 2.0,
        "train_top1_error": 40.0,
        "learning_rate": 0.01,
    }
    record.take_in(3, 1, metrics(7.0, learning_rate=0.01))
    assert record.take_window() == {
        "train_loss": 7.0,
        "train_gradient_norm": 1.0,
        "train_weight_norm": 2.0,
        "learning_rate": 0.01,
    }
    assert record.epoch_average("loss") == 5.0  # A log line does not cut the epoch.


def test_the_console_prints_a_line_with_loss_error_rate_speed_and_time_left(capsys):
    console = Console(total_steps=1000)
    values = {"train_loss": 1.23456, "train_top1_error": 45.678, "learning_rate": 0.1, "images_per_second": 12345.6,
              "seconds_per_step": 4.0}  # fmt: skip
    console.start(100)
    console.advance(100)
    console.progress(100, 2.5, values)
    console.close()
    out = capsys.readouterr().out.strip()
    assert out == "step 100/1000  epoch 2.5  loss 1.2346  error 45.68%  rate 0.1  12,346 images/s  ETA 1:00:00"


class Device:
    """A device that is done with what it was given at a time, and data that arrives at another."""

    def __init__(self, busy_until: float, data_at: float):
        self.now, self.busy_until, self.data_at = 102.0, busy_until, data_at

    def monotonic(self) -> float:
        return self.now

    def is_ready(self) -> bool:
        return self.now >= self.busy_until

    def block_until_ready(self) -> "Device":
        return self

    def get(self, timeout: float | None) -> str:
        if timeout is not None and self.now + timeout < self.data_at:
            self.now += timeout
            raise queue.Empty
        self.now = max(self.now, self.data_at)
        return "batch"


@pytest.mark.parametrize(
    ("busy_until", "data_at", "waited"),
    [(102, 105, 3.0), (104, 105, 1.0), (106, 105, 0.0), (102, 102, 0.0)],
    ids=["idle", "idle from 104 on", "busy", "data at hand"],
)
def test_waiting_for_data_is_the_time_that_the_device_has_nothing_to_do(busy_until, data_at, waited, monkeypatch):
    device = Device(busy_until, data_at)
    monkeypatch.setattr(record_lib, "time", device)
    monkeypatch.setattr(record_lib.jax, "device_get", lambda pending: [{"loss": 0.0} for _ in pending])
    window = Window()
    window.start("one")
    window.add({"loss": device}, 1, "one")  # Compiles; the clock starts behind it, at 102.
    assert window.wait_for(device) == "batch"
    # To within a look at the device.
    assert window.take()[0].waited == pytest.approx(waited, abs=2 * record_lib._POLL)
