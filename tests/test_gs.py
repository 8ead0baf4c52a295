"""Runs in a bucket: an emulator on this machine gives gcsfs and tensorstore what Google's servers would."""

from collections.abc import Iterator
import contextlib
import http.server
import io
import json
import signal
import threading
import time

import jax
import numpy as np
from processes import finish, free_port, run, start
import pytest

from resnet_jax import buckets
from resnet_jax.classification.ensemble import predictions_file, read_predictions
from resnet_jax.errors import UsageError
from resnet_jax.locks import lock
from resnet_jax.output import write_json, write_whole
from resnet_jax.paper.runs import find_runs, read_run
from resnet_jax.pretrained.source import read_weights
from resnet_jax.training.checkpoints import latest_step
from resnet_jax.training.metrics import MetricsWriter
from resnet_jax.training.workdir import check_writable, read_json

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")

STEPS = ("--config.steps=300", "--config.checkpoint.every=20", "--config.log.tensorboard=true")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the emulator listens; it has a bucket, ``runs``."""
    port = free_port()
    with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="runs"):
        yield f"http://127.0.0.1:{port}"


def point_to(address: str, monkeypatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)


@pytest.fixture
def bucket(address, monkeypatch, tmp_path) -> str:
    """A folder of the emulator's bucket that nothing is in yet."""
    point_to(address, monkeypatch)
    return f"gs://runs/{tmp_path.name}"


def workdir(name: str) -> buckets.Folder:
    return buckets.open_folder("--workdir", name)


def names(folder: buckets.Folder) -> set[str]:
    """All files of a run; those named after time, host and content are told by their kind."""
    found = {str(path.relative_to(folder)) for path in buckets.files_below(folder)}
    found = {"events" if name.startswith("events.out.tfevents") else name for name in found}
    return {name for name in found if not name.startswith(("checkpoints", "damaged", ".lock"))}


def records(folder: buckets.Folder) -> list[dict]:
    timings = ("seconds", "images_per_second", "seconds_per_step")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


def summary(folder: buckets.Folder) -> dict:
    return {n: v for n, v in read_json(folder / "summary.json").items() if n not in ("seconds", "images_per_second")}


def predictions(folder: buckets.Folder) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO((folder / "predictions.npz").read_bytes())) as arrays:
        return dict(arrays)


def assert_same(one: buckets.Folder, other: buckets.Folder) -> None:
    assert records(one) == records(other)
    assert summary(one) == summary(other)
    for name, array in predictions(one).items():
        np.testing.assert_array_equal(array, predictions(other)[name], err_msg=name)


def stop_at(step: int, *flags: str) -> str:
    """Starts a run and sends it SIGTERM when it has come to ``step``; what it said."""
    running = start(0, 1, 0, *flags)
    for line in running.stdout:
        if line.startswith(f"step {step}/"):
            break
    running.send_signal(signal.SIGTERM)
    (end,) = finish([running])
    assert end.status == 75, end.err
    return end.out


def went_well(*flags: str, of: int = 1) -> str:
    ends = run(of, *flags)
    assert not any(end.status for end in ends), "\n".join(end.err for end in ends)
    assert not any("warning: gs" in end.err or "Traceback" in end.err for end in ends), ends[0].err
    return ends[0].out + ends[0].err


@pytest.mark.slow
def test_a_run_stopped_damaged_resumed_and_evaluated_in_a_bucket_is_one_never_stopped_in_a_folder(bucket, tmp_path):
    local, remote = workdir(str(tmp_path / "run")), workdir(bucket)
    went_well(f"--workdir={local}", *STEPS)
    assert "saved at step" in stop_at(50, f"--workdir={remote}", *STEPS)
    stopped = max(int(path.name) for path in (remote / "checkpoints").iterdir())
    assert 50 <= stopped < 300
    assert [line["step"] for line in records(remote)][-1] >= stopped - 1  # All that was told of is there already.
    # The newest loses a part of its arrays: the one before it is taken, and the newest is kept aside.
    part = max((remote / f"checkpoints/{stopped}/state/d").iterdir(), key=lambda path: path.stat().length)
    part.unlink()
    said = went_well(f"--workdir={remote}", *STEPS)
    assert (
        f"{bucket}/checkpoints/{stopped} is damaged (state/d/{part.name} is missing); moved to {bucket}/damaged" in said
    )
    before = int(said.split("resuming from step ")[1].split()[0])
    assert 0 < before < stopped
    assert_same(local, remote)
    assert (
        names(remote)
        == names(local)
        == {"config.json", "data.json", "metrics.jsonl", "events", "summary.json"} | {"predictions.npz"}
    )
    # The latest ones stay, and each whole: what else was saved is gone.
    kept = {path.name for path in (local / "checkpoints").iterdir()}
    assert {path.name for path in (remote / "checkpoints").iterdir()} == kept
    assert "is finished: step 300" in went_well(f"--workdir={remote}", *STEPS)
    for path in ("summary.json", "predictions.npz"):
        (remote / path).unlink()
    went_well(f"--workdir={remote}", *STEPS, "--mode=eval")
    for name, value in summary(remote).items():  # What is of the training alone is not known any more.
        assert value == pytest.approx(summary(local)[name]), name
    went_well(f"--workdir={remote}", *STEPS, "--mode=calibrate")
    assert {"calibrated.safetensors", "eval/calibrated/summary.json"} <= names(remote)
    # Others read it there.
    other = tmp_path / "other"
    went_well(f"--workdir={other}", *STEPS, "--mode=eval", f"--config.init.weights={remote}")
    assert summary(workdir(str(other)))["top1_error"] == summary(local)["top1_error"]
    ours, theirs = read_weights(bucket, "tiny")[1], read_weights(str(local), "tiny")[1]
    assert ours.history["source"] == f"{tmp_path.name} (a run of ours)" and ours.classes == theirs.classes
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    (found,) = find_runs([bucket])
    assert (str(found), read_run(found).step, set(read_run(found).summaries)) == (bucket, 300, {"center", "calibrated"})
    scores = read_predictions(predictions_file(bucket, "center"))
    np.testing.assert_array_equal(scores["probabilities"], predictions(local)["probabilities"])


@pytest.mark.slow
def test_several_processes_share_a_bucket(bucket, tmp_path):
    ten, twenty = "--config.steps=10", "--config.steps=20"
    local, remote = workdir(str(tmp_path / "run")), workdir(bucket)
    went_well(f"--workdir={remote}", ten, of=2)
    went_well(f"--workdir={remote}", twenty, of=2)
    went_well(f"--workdir={local}", twenty, of=2)
    assert {record["step"] for record in records(remote)} == set(range(1, 21))
    for name in ("step", "examples", "loss", "top1_error"):
        assert summary(remote)[name] == pytest.approx(summary(local)[name], abs=1e-3), name
    assert not [name for name in names(remote) if name.startswith(".")]  # Nothing of what they tried the folder with.


@pytest.mark.slow
def test_several_seeds_in_a_bucket(bucket):
    went_well(f"--workdir={bucket}", "--config.steps=3", "--seeds=0,1")
    found, each = read_json(workdir(bucket) / "seeds.json"), [workdir(f"{bucket}/seed_{seed}") for seed in (0, 1)]
    assert list(found["top1_error"].values()) == [summary(folder)["top1_error"] for folder in each]
    (end,) = run(1, f"--workdir={bucket}", "--config.steps=3", "--mode=eval")
    assert end.status == 2 and "add --seeds=0,1" in end.err


def test_files_go_to_a_bucket_whole_or_not_at_all(bucket):
    path = workdir(bucket) / "summary.json"
    assert read_json(path) is None
    write_json(path, {"step": 1})

    def broken(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken)
    assert read_json(path) == {"step": 1}


def test_metrics_in_a_bucket_are_cut_back_and_go_on(bucket):
    writer = MetricsWriter(workdir(bucket), 0, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, {"train_loss": 1.0 / step, "learning_rate": 0.1})
    writer.flush()  # As with a checkpoint: it is there soon, and not after half a minute.
    end = time.monotonic() + 10
    while not (workdir(bucket) / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    writer.close()
    assert [record["step"] for record in records(workdir(bucket))] == [1, 2, 3]
    writer = MetricsWriter(workdir(bucket), 2, tensorboard=True)
    writer.write(3, {"train_loss": 9.0})
    writer.close()
    assert [(record["step"], record["train_loss"]) for record in records(workdir(bucket))] == [(1, 1), (2, 0.5), (3, 9)]
    assert names(workdir(bucket)) == {"metrics.jsonl", "events"}


def test_a_bucket_has_no_locks_and_can_be_written(bucket):
    check_writable(workdir(bucket))
    with lock(workdir(bucket) / ".lock", "taken"), lock(workdir(bucket) / ".lock", "taken") as second:
        assert second is None  # Neither is refused.
    assert not workdir(bucket).exists()  # Nothing is left of what was tried.


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(UsageError, match=r"--workdir=gs://no-such-bucket/run: can't be written \(no such bucket"):
        check_writable(workdir("gs://no-such-bucket/run"))
    with pytest.raises(UsageError, match="gs://no-such-bucket/run: no such file or folder"):
        read_weights("gs://no-such-bucket/run", None)


@contextlib.contextmanager
def refusing(status: int, message: str) -> Iterator[str]:
    """A server that says no to everything."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = json.dumps({"error": {"code": status, "message": message}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *unused) -> None:
            """Its answers are looked at, and not its log."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


REFUSALS = {
    401: ("Anonymous caller does not have storage.objects.create access", "no valid credentials: Anonymous caller"),
    403: ("me@example.org does not have storage.objects.create access", "no permission: me@example.org"),
}


@pytest.mark.parametrize("status", REFUSALS)
def test_no_credentials_or_no_permission_is_one_line(status, monkeypatch):
    message, said = REFUSALS[status]
    with refusing(status, message) as address:
        point_to(address, monkeypatch)
        folder = workdir("gs://runs/mine")
        reads = {
            "written": lambda: check_writable(folder),
            "written by": lambda: write_json(folder / "config.json", {}),
            "readable": lambda: read_json(folder / "config.json"),
            "looked through": lambda: latest_step(folder),
            "read": lambda: read_weights("gs://runs/mine", None),
            "read by": lambda: find_runs(["gs://runs/mine"]),
        }
        for call in reads.values():
            with pytest.raises(UsageError) as caught:
                call()
            assert said in str(caught.value) and "gs://runs/mine" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_what_a_bucket_does_not_take_is_told_of_once_and_kept(bucket, monkeypatch, capfd):
    with refusing(403, "not any more") as address:
        point_to(address, monkeypatch)
        files = buckets.GrowingFiles(workdir(bucket), seconds=0.05)
        (files.folder / "metrics.jsonl").write_text("{}\n")
        time.sleep(1)
        files.close()
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith(f"warning: {bucket}: can't be written (no permission: not any more); training goes on")
    assert last == f"warning: what is missing in {bucket} is in {files.folder}"
    assert (files.folder / "metrics.jsonl").read_text() == "{}\n"


def test_a_bucket_gets_few_copies_of_a_file_that_grows(bucket, monkeypatch):
    copies = []
    files = buckets.GrowingFiles(workdir(bucket), seconds=0.3)
    copy = files._copy
    monkeypatch.setattr(files, "_copy", lambda: copies.append(time.monotonic()) or copy())
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with (files.folder / "log").open("a") as file:
            file.write("line\n")
        time.sleep(0.001)
    written = (files.folder / "log").read_text()
    files.close()
    assert 2 <= len(copies) <= 5
    assert (workdir(bucket) / "log").read_text() == written and not files.folder.exists()


@pytest.mark.parametrize("name", ["gs://", "gs://runs", "gs://runs/", "gs:///x", "gs://Runs/x", "gs://runs/../x"])
def test_what_is_no_folder_of_a_bucket_is_refused(name):
    with pytest.raises(UsageError, match="expected gs://BUCKET/PATH"):
        workdir(name)


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--workdir=gs://runs/x: gs:// needs gcsfs: pip install 'resnet_jax\[gcs\]'"):
        workdir("gs://runs/x")
    assert str(workdir("runs/x")) == "runs/x"  # Local folders need nothing of it.
