"""Checkpoints that can be trusted: damage is found and passed over, a full disk costs a save and not the run."""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import shutil
import subprocess
import time

import jax
from jax import numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config, flatten
from resnet_jax.distributed import make_mesh, replicate
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.output import write_json
from resnet_jax.run import run_task
from resnet_jax.training import stored
from resnet_jax.training.checkpoints import Checkpoints, SaveFailed, latest_step, load_run_weights
from resnet_jax.training.fingerprint import fingerprints
from resnet_jax.training.loop import Training
from resnet_jax.training.metrics import MetricsWriter
from resnet_jax.training.results import write_results
from resnet_jax.training.run import Run
from resnet_jax.training.schedules import initial_schedule_state
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation
from resnet_jax.training.workdir import check_writable, open_workdir, read_json


def make_state(step: int, width: int = 300) -> TrainState:
    """A small state on all eight devices, of every type that a state may have."""
    random = np.random.default_rng(step)
    tree = TrainState(
        np.int32(step),
        {"head": {"kernel": random.normal(size=(width, 10)).astype(np.float32), "bias": np.zeros(10, jnp.bfloat16)}},
        {"mean": random.normal(size=7).astype(np.float32)},
        ({"count": np.uint8(step), "done": np.array([True, False])},),
        jax.device_get(initial_schedule_state()),
        None,
    )
    return replicate(make_mesh(), tree)


def same(state, step: int) -> bool:
    found, expected = (jax.tree.leaves(jax.device_get(tree)) for tree in (state, make_state(step)))
    return all(a.tobytes() == b.tobytes() and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def save(workdir: pathlib.Path, *steps: int, keep: int = 10, best: int | None = None) -> None:
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(make_state(step), step, {"of": step, "best_step": best}, best)
    checkpoints.wait()
    checkpoints.close()


def restore(workdir: pathlib.Path, write: bool = True):
    """The step restored (state and record are made sure to be its own), and what was said."""
    said = []
    checkpoints = Checkpoints(workdir, 10, write, said.append)
    state, step, record = checkpoints.restore(make_state(0))
    checkpoints.close()
    assert same(state, step) and record["of"] == step
    return step, said


def on_disk(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path, bit: int = 7) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1 << bit
        path.write_bytes(data)


DAMAGE = {"cut": cut, "deleted": pathlib.Path.unlink, "flipped": flip, "one bit": functools.partial(flip, bit=0)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("two")
    save(workdir, 1, 2)
    return workdir


@pytest.fixture
def run(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run")


# Fingerprints.


def by_hand(array: np.ndarray) -> int:
    data, size = array.tobytes(), min(array.dtype.itemsize, 4)
    words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    return sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.int32, np.uint8, np.int8, np.bool_])
def test_a_fingerprint_is_the_weighted_sum_of_the_words(dtype):
    array = (np.random.default_rng(0).normal(size=(3, 5, 7)) * 50).astype(dtype)
    expected = {"a/0/b": f"{np.dtype(dtype).name}[3,5,7] {by_hand(array):08x}"}
    assert fingerprints({"a": [{"b": jnp.asarray(array)}]}) == expected  # On a device,
    assert fingerprints({"a": [{"b": array}]}) == expected  # and on the host.


def test_a_fingerprint_of_64_bits_counts_both_halves():
    array = np.random.default_rng(0).normal(size=9)
    with jax.enable_x64(True):
        marks = [fingerprints([x])["0"] for x in (array, jnp.asarray(array))]
    assert marks == [f"float64[9] {by_hand(array):08x}"] * 2


def test_a_fingerprint_does_not_know_on_how_many_devices_an_array_lies():
    array = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    mesh = make_mesh()
    split = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert fingerprints([array]) == fingerprints([replicate(mesh, array)]) == fingerprints([split])


def test_every_bit_counts_and_so_does_its_place():
    array = np.random.default_rng(0).normal(size=33).astype(np.float32)
    whole = fingerprints([array])
    for bit in range(8 * array.nbytes):
        changed = np.frombuffer(array.tobytes(), np.uint8).copy()
        changed[bit // 8] ^= 1 << bit % 8
        assert fingerprints([changed.view(np.float32)]) != whole
    assert fingerprints([array[::-1]]) != whole
    assert fingerprints([-np.zeros(3, np.float32)]) != fingerprints([np.zeros(3, np.float32)])
    assert fingerprints([np.zeros((3, 1), np.float32)]) != fingerprints([np.zeros(3, np.float32)])


# Damage.


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("checksums", [True, False], ids=["", "without checksums"])
def test_whatever_file_is_damaged_what_is_restored_is_the_state_or_the_one_before(two, tmp_path, kind, checksums):
    outcomes, names = {}, files(two / "checkpoints/2")
    assert len(names) >= 10
    for name in names:
        run = shutil.copytree(two, tmp_path / str(len(outcomes)))
        DAMAGE[kind](run / "checkpoints/2" / name)
        if not checksums:  # Killed before they were written: Orbax and the fingerprints find it.
            (run / "checkpoints/2/checksums.json").unlink(missing_ok=True)
        before = latest_step(run)
        step, said = restore(run)
        outcomes[str(name)] = step
        if step == 2:
            assert said == [] and before == 2
            continue
        (line,) = said
        assert line.startswith(f"warning: {run}/checkpoints/2 is damaged (")
        assert line.endswith(f"; moved to {run}/damaged/2; taking 1, the one before")
        assert "\n" not in line and len(line) < 600
        if checksums:
            assert str(name) in line
        assert on_disk(run) == [1] and latest_step(run) == 1
        assert files(run / "damaged/2")  # Nothing of the user's is deleted.
    assert outcomes["_CHECKPOINT_METADATA"] == outcomes["state/manifest.ocdbt"] == 1
    if checksums:
        assert set(outcomes.values()) == {1, 2}
        assert [
            name for name, step in outcomes.items() if step == 2 and (two / "checkpoints/2" / name).stat().st_size
        ] == ["checksums.json"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_come_from_a_checkpoint_that_is_whole(run, kind, capfd):
    newest = load_run_weights(str(run))
    assert newest["params"]["head"]["kernel"].tobytes() == np.asarray(make_state(2).params["head"]["kernel"]).tobytes()
    (data,) = (run / "checkpoints/2/state/d").iterdir()
    DAMAGE[kind](data)
    weights = load_run_weights(str(run))
    assert weights["params"]["head"]["kernel"].tobytes() == np.asarray(make_state(1).params["head"]["kernel"]).tobytes()
    err = capfd.readouterr().err
    assert err.startswith(f"warning: {run}/checkpoints/2 is damaged (state/d/{data.name} ") and err.count("\n") == 1
    assert on_disk(run) == [1, 2]  # Who only reads leaves things where they are.


def test_an_array_that_changed_on_its_way_to_the_disk_is_named(tmp_path, monkeypatch):
    save(tmp_path, 1)
    whole = ocp.save_async

    def spoil(folder, state, **more):
        kernel = state.params["head"]["kernel"].at[5, 3].add(1e-6)
        return whole(folder, state.replace(params={"head": state.params["head"] | {"kernel": kernel}}), **more)

    monkeypatch.setattr(ocp, "save_async", spoil)
    save(tmp_path, 2)
    step, (line,) = restore(tmp_path)
    assert step == 1
    assert "2 is damaged (params/head/kernel is not what was saved)" in line


def test_a_reader_passes_over_and_leaves_things_as_they_are(run):
    cut(run / "checkpoints/2/_CHECKPOINT_METADATA")
    before = files(run)
    step, (line,) = restore(run, write=False)
    assert step == 1 and "moved" not in line
    assert files(run) == before


@pytest.mark.parametrize("leave", [[], ["state"]], ids=["empty", "empty inside"])
def test_an_empty_folder_is_damage(run, leave):
    shutil.rmtree(run / "checkpoints/2")
    for name in ["", *leave]:
        (run / "checkpoints/2" / name).mkdir()
    assert latest_step(run) == 1
    assert restore(run)[0] == 1


def test_a_damaged_step_can_be_saved_again_and_be_damaged_again(run):
    for n in range(3):
        cut(run / "checkpoints/2/state/manifest.ocdbt")
        checkpoints = Checkpoints(run, 2, tell=lambda line: None)
        assert checkpoints.restore(make_state(0))[1] == 1 == checkpoints.latest
        checkpoints.save(make_state(2), 2, {"of": 2}, None)
        checkpoints.wait()
        assert checkpoints.latest == 2
        checkpoints.close()
        assert restore(run) == (2, [])
        assert sorted(path.name for path in (run / "damaged").iterdir()) == ["2", "2.1", "2.2"][: n + 1]


def test_where_all_are_damaged_it_says_so_and_what_to_do(run):
    for step in (1, 2):
        cut(run / f"checkpoints/{step}/_CHECKPOINT_METADATA")
    before = files(run)
    assert latest_step(run) == 2  # Still: it is not a new folder.
    for read in (restore, lambda workdir: load_run_weights(str(workdir))):
        with pytest.raises(UsageError, match=r"no checkpoint in it is whole \(2: _CHECKPOINT_METADATA has .*1 more\);"
                           " bring back a copy, or move the folder away") as error:  # fmt: skip
            read(run)
        assert "\n" not in str(error.value)
    assert files(run) == before


def test_another_network_s_checkpoint_is_not_damaged(run):
    checkpoints = Checkpoints(run, 2)
    with pytest.raises(UsageError, match=r"of another network or optimizer .*params/head/kernel is float32\[300,10\],"
                       r" not float32\[301,10\]"):  # fmt: skip
        checkpoints.restore(make_state(0, width=301))
    assert on_disk(run) == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_not_the_files_fault_is_not_damage(run, error, monkeypatch):
    def load(*args):
        raise error

    monkeypatch.setattr(ocp, "load", load)
    with pytest.raises(error):
        restore(run)
    assert on_disk(run) == [1, 2]


def test_checkpoints_from_before_there_were_fingerprints_load(tmp_path):
    metadata = {"record": json.dumps({"of": 3})}
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(3, make_state(3), custom_metadata=metadata)
    assert latest_step(tmp_path) == 3
    assert restore(tmp_path) == (3, [])
    assert load_run_weights(str(tmp_path))["params"]["head"]["bias"].dtype == jnp.bfloat16


# What stays.


def test_the_newest_and_the_best_stay(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert on_disk(tmp_path) == [2, 4, 5]


def test_the_best_stays_after_a_newer_one_was_passed_over(tmp_path):
    save(tmp_path, 1, 2, 3, keep=3, best=1)
    cut(tmp_path / "checkpoints/3/state/_METADATA")
    checkpoints = Checkpoints(tmp_path, 1, tell=lambda line: None)
    assert checkpoints.restore(make_state(0))[1] == 2
    checkpoints.save(make_state(3), 3, {"of": 3}, 1)
    checkpoints.close()
    assert on_disk(tmp_path) == [1, 3]


def test_the_best_stays_until_a_better_one_is_saved(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 1, tell=lambda line: None)
    checkpoints.save(make_state(1), 1, {}, 1)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(stored, "save_async", lambda *_: 1 / 0)
        checkpoints.save(make_state(2), 2, {}, 2)  # The best one, and it fails.
    checkpoints.save(make_state(3), 3, {}, 2)
    checkpoints.wait()
    assert on_disk(tmp_path) == [1, 3]
    checkpoints.save(make_state(4), 4, {}, 4)
    checkpoints.close()
    assert on_disk(tmp_path) == [4]


def test_what_a_kill_left_half_written_is_removed_by_who_writes_and_by_nobody_else(run):
    half = run / "checkpoints/3.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints/2", half)
    assert latest_step(run) == 2
    assert restore(run, write=False)[0] == 2 and half.exists()
    assert restore(run)[0] == 2 and not half.exists()


@pytest.mark.parametrize("jump", [-86400, 366 * 86400], ids=["back a day", "forward a year"])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, jump):
    now, nanoseconds, shift = time.time, time.time_ns, [0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + shift[0] * 10**9)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().fromtimestamp(time.time(), tz)

    monkeypatch.setattr(datetime, "datetime", Clock)
    checkpoints = Checkpoints(tmp_path, 2)
    for step in range(1, 7):
        checkpoints.save(make_state(step), step, {"of": step}, 2)
        if step in (2, 4):
            shift[0] += jump  # While it is saved, too.
    checkpoints.wait()
    assert checkpoints.latest == 6 == latest_step(tmp_path)
    checkpoints.close()
    assert on_disk(tmp_path) == [2, 5, 6]
    assert restore(tmp_path) == (6, [])


# Full disks and those that can't be written.


@pytest.fixture
def disk(tmp_path):
    """Mounts file systems of so many bytes; takes their options."""
    mounted = []

    def mount(*options: str) -> pathlib.Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", *options, str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: pathlib.Path) -> pathlib.Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            with contextlib.suppress(OSError):  # The disk is full for pieces of this size.
                while True:
                    file.write(b"x" * size)
    return ballast


def test_a_full_disk_fails_a_save_and_the_next_one_goes_well(disk):
    workdir, said = disk("-t", "tmpfs", "-o", "size=2m", "tmpfs"), []
    checkpoints = Checkpoints(workdir, 2, tell=said.append)
    for step in (1, 2):
        checkpoints.save(make_state(step), step, {"of": step}, 1)
    checkpoints.wait()
    ballast = fill(workdir)
    checkpoints.save(make_state(3), 3, {"of": 3}, 1)
    assert checkpoints.latest == 2
    assert said == [
        "warning: step 3 could not be saved: No space left on device; training goes on, the newest checkpoint is step 2"
    ]
    assert on_disk(workdir) == [1, 2]  # And nothing half-written.
    checkpoints.save(make_state(4), 4, {"of": 4}, 1)
    with pytest.raises(SaveFailed, match=r"step 4 could not be saved: No space left on device; the newest .* step 2"):
        checkpoints.wait()
    ballast.unlink()
    checkpoints.save(make_state(5), 5, {"of": 5}, 1)
    checkpoints.wait()
    checkpoints.save(make_state(6), 6, {"of": 6}, 1)
    checkpoints.close()
    assert len(said) == 1
    assert on_disk(workdir) == [1, 5, 6]
    assert restore(workdir) == (6, [])


def test_a_disk_that_fills_up_in_the_middle_of_a_save_fails_it(disk):
    workdir = disk("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    save(workdir, 1)
    random = np.random.default_rng(0).integers(0, 2**32, 10**6, np.uint32)  # 4 MB that don't compress.
    large = make_state(2).replace(params={"kernel": jnp.asarray(random)})
    checkpoints = Checkpoints(workdir, 2)
    checkpoints.save(large, 2, {}, None)
    with pytest.raises(SaveFailed, match=r"step 2 could not be saved: No space left on device; the newest .* step 1"):
        checkpoints.wait()
    checkpoints.close()
    assert on_disk(workdir) == [1]
    assert restore(workdir) == (1, [])


def test_results_that_a_full_disk_does_not_take_are_one_line(disk):
    workdir = disk("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    evaluation = Evaluation({"top1_error": 1.0}, {"probabilities": np.ones(10_000)})
    write_results(workdir, {"step": 1}, evaluation)
    fill(workdir)
    with pytest.raises(UsageError, match=r"predictions\.npz: can't be written \(No space left on device\)"):
        write_results(workdir, {"step": 2}, evaluation)
    with pytest.raises(UsageError, match=r"summary\.json: can't be written \(No space left on device\)"):
        write_json(workdir / "summary.json", {"step": 2})
    assert read_json(workdir / "summary.json")["step"] == 1
    assert sorted(os.listdir(workdir)) == ["ballast", "predictions.npz", "summary.json"]


def test_a_disk_that_may_only_be_read_is_called_so(disk):
    workdir = disk("-t", "tmpfs", "-o", "ro", "tmpfs")
    with pytest.raises(UsageError, match=f"can't be written \\(read-only file system: {workdir}\\)"):
        check_writable(workdir / "run")


def test_logs_go_on_after_a_full_disk_with_nothing_missing(disk, capfd):
    workdir = disk("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    writer = MetricsWriter(workdir, 0, tensorboard=True)
    writer.write(1, {"train_loss": 1.0})
    ballast = fill(workdir)
    for step in range(2, 50):
        writer.write(step, {f"metric_{n}": 0.5 for n in range(20)})
    err = capfd.readouterr().err
    assert err.startswith(
        f"warning: {workdir}/metrics.jsonl: can't be written (No space left on device); training goes"
    )
    assert err.count("metrics.jsonl") == 1 and "Traceback" not in err
    ballast.unlink()
    writer.write(50, {"train_loss": 0.1})
    writer.close()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 51))
    (events,) = workdir.glob("events*")
    assert events.read_bytes().count(b"metric_7") == 48
    assert b"train_loss" in events.read_bytes()[-80:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Lets all trainings here share what the first one compiles."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture
def config(monkeypatch, compiled):
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="A", stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    config = default_config()
    config.model.name = "tiny"
    config.batch_size = 32
    config.steps, config.log.every, config.eval.every = 20, 4, 20
    config.checkpoint.every, config.checkpoint.minutes = 4, 0.0
    config.log.tensorboard = False
    return config


def train(config, workdir) -> int:
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh), StopSignal() as stop:
        task = Classification(config, mesh)
        open_workdir(workdir, flatten(config), task.description)
        return Training([Run(task, config, workdir, mesh)], mesh, 1).run(stop)


def at_saves(monkeypatch, actions):
    """Does something before the saves of some steps."""
    original = Checkpoints.save

    def hooked(self, state, step, *rest):
        actions.get(step, lambda: None)()
        original(self, state, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", hooked)


def test_training_goes_on_over_a_full_disk(disk, config, monkeypatch, capfd):
    workdir = disk("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    at_saves(monkeypatch, {8: lambda: fill(workdir), 16: lambda: (workdir / "ballast").unlink()})
    assert train(config, workdir) == 0
    out, err = capfd.readouterr()
    failed = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert failed == [f"warning: step {step} could not be saved: No space left on device; training goes on, the newest"
                      " checkpoint is step 4" for step in (8, 12)]  # fmt: skip
    assert all("metrics.jsonl: can't be written" in line for line in err.splitlines())  # Once, or it still fitted.
    assert on_disk(workdir) == [16, 20]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == [4, 8, 12, 16, 20]
    assert json.loads((workdir / "summary.json").read_text())["step"] == 20


def test_where_the_last_save_fails_the_run_fails_in_one_line(disk, config, monkeypatch, capfd):
    workdir = disk("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    with monkeypatch.context() as patch:
        at_saves(patch, {20: lambda: fill(workdir)})
        assert train(config, workdir) == 1
    out, err = capfd.readouterr()
    line = "error: step 20 could not be saved: No space left on device; the newest checkpoint is step 16"
    assert out.splitlines()[-1] == line
    assert "Traceback" not in out + err and " saved at" not in out
    assert not (workdir / "summary.json").exists()
    (workdir / "ballast").unlink()  # The same command goes on from there.
    assert train(config, workdir) == 0
    assert "resuming from step 16" in capfd.readouterr().out


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(config, tmp_path, capfd):
    assert train(config, tmp_path / "whole") == 0
    config.steps = 16
    assert train(config, tmp_path / "run") == 0
    config.steps = 20
    (data,) = (tmp_path / "run/checkpoints/16/state/d").iterdir()
    flip(data)
    assert train(config, tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert f"warning: {tmp_path}/run/checkpoints/16 is damaged (state/d/{data.name} has other bytes" in out
    assert "resuming from step 12" in out
    assert on_disk(tmp_path / "run") == [16, 20]
    weights = (jax.tree.leaves(load_run_weights(str(tmp_path / name))) for name in ("whole", "run"))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*weights, strict=True))


def test_a_folder_that_can_only_be_read_is_an_error_at_start_and_its_weights_can_be_read(disk, config, tmp_path):
    config.steps = 4
    assert train(config, tmp_path / "run") == 0
    mounted = disk("--bind", str(tmp_path / "run"))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(mounted)], check=True)
    for workdir, mode in [(mounted, "train"), (mounted, "eval"), (mounted / "new", "train")]:
        with pytest.raises(UsageError, match=f"--workdir={workdir}: can't be written") as error:
            run_task(config, workdir, mode)
        assert "\n" not in str(error.value)
    assert set(load_run_weights(str(mounted))) == {"params", "batch_stats"}
