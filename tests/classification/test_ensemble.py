"""Ensembles of predictions: figures worked by hand, the command, and its mistakes in one line."""

import functools
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile

from absl import flags
import jax
import numpy as np
import pytest

from resnet_jax import cli
from resnet_jax.classification import ensemble
from resnet_jax.config import default_config, flatten
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.run import run_task

ROOT = pathlib.Path(__file__).resolve().parents[2]
LABELS = [0, 1, 2, 0]
# Of four examples; rows sum to 1. The first is wrong about 1 and 3, the second about 0 and 2.
FIRST = [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]]
SECOND = [[0.3, 0.4, 0.3], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4], [0.8, 0.1, 0.1]]


def scores(probabilities, labels=LABELS, index=None) -> dict[str, np.ndarray]:
    index = np.arange(len(labels)) if index is None else index
    return {
        "index": np.array(index, np.int32),
        "label": np.array(labels, np.int32),
        "probabilities": np.array(probabilities, np.float32),
    }


def save(path: pathlib.Path, *arguments, **changes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(scores(*arguments) | changes))
    return path


def test_combined_probabilities_are_the_mean_and_one_named_twice_counts_twice():
    random = np.random.default_rng(0)
    members = [scores(random.dirichlet([1, 1, 1], 4)) for _ in range(3)]
    for chosen in ((0, 1, 2), (0, 0, 1)):
        found = ensemble.combine([members[i] for i in chosen])
        expected = sum(members[i]["probabilities"].astype(float) for i in chosen) / 3
        np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-6)
        np.testing.assert_array_equal(found["label"], LABELS)
        np.testing.assert_array_equal(found["index"], [0, 1, 2, 3])


def test_errors_are_those_worked_by_hand():
    # Ranks of the labels: 0, 1, 0, 1; 1, 0, 1, 0; together (0.5 0.3 0.2), (0.3 0.55 0.15), ... all right.
    assert ensemble.errors(scores(FIRST))["top1_error"] == 50
    assert ensemble.errors(scores(SECOND))["top1_error"] == 50
    together = ensemble.errors(ensemble.combine([scores(FIRST), scores(SECOND)]))
    assert together["top1_error"] == 0
    assert together["loss"] == pytest.approx(-np.log([0.5, 0.55, 0.6, 0.55]).mean(), rel=1e-6)
    assert together["examples"] == 4
    chosen = ensemble.errors(scores(FIRST), np.array([True, True, True, False]))
    assert chosen["top1_error"] == pytest.approx(100 / 3)
    assert chosen["loss"] == pytest.approx(-np.log([0.7, 0.3, 0.8]).mean(), rel=1e-6)
    # Of seven classes: the label is the fifth and the sixth best, and ties and NaNs count against the network.
    seven = np.array([[6, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0], [1] * 7, [np.nan] * 7]) / 21
    found = ensemble.errors(scores(seven, [4, 5, 0, 0]))
    assert (found["top1_error"], found["top5_error"]) == (100, 75)


def test_members_are_brought_into_the_order_of_index(tmp_path):
    order = [2, 0, 3, 1]
    shuffled = save(tmp_path / "b.npz", np.array(SECOND)[order], np.array(LABELS)[order], order)
    found, first = ensemble.read_predictions(shuffled), ensemble.read_predictions(save(tmp_path / "a.npz", FIRST))
    for name, expected in scores(SECOND).items():
        np.testing.assert_array_equal(found[name], expected)
    ensemble.check_same_examples(["a", "b"], [first, found])
    assert ensemble.errors(ensemble.combine([first, found]))["top1_error"] == 0


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (scores(FIRST, [0, 1, 2, 1]), "b and a were not evaluated on the same test set: example 3 has label 1"),
        (scores(FIRST, index=[0, 1, 2, 9]), "b and a were not evaluated on the same test set: example 3 has index 9"),
        (scores(FIRST[:3], LABELS[:3]), "b was evaluated on 3 examples, a on 4: not the same test set"),
        (scores(np.full((4, 5), 0.2)), "b has 5 classes, a has 3"),
    ],
)
def test_members_of_other_examples_labels_or_classes_are_refused_by_name(other, said):
    with pytest.raises(UsageError, match=said):
        ensemble.check_same_examples(["a", "b"], [scores(FIRST), other])


def test_selection_takes_the_best_then_what_helps_most_and_stops():
    everything = np.ones(4, bool)
    # The third is right once and adds nothing; the first two are each right twice and together always.
    third = [[0.2, 0.6, 0.2], [0.2, 0.6, 0.2], [0.2, 0.6, 0.2], [0.2, 0.6, 0.2]]
    members = [scores(third), scores(FIRST), scores(SECOND)]
    chosen = ensemble.select_greedily(members, everything)
    # The second's loss alone is less: -log(.3 .8 .4 .8) = 2.57 against -log(.7 .3 .8 .3) = 2.99.
    assert chosen[:2] == [2, 1]
    assert 0 not in chosen
    # Every other choice of up to three, by brute force, errs as much or more.
    assert ensemble.errors(ensemble.combine([members[i] for i in chosen]))["top1_error"] == 0
    # On the first and third examples the first is right alone, and nobody can make it better there but by loss.
    partly = np.array([True, False, True, False])
    assert ensemble.select_greedily(members, partly) == [1]


def test_the_hold_out_is_a_share_the_same_every_time():
    chosen = ensemble.hold_out(1000, 0.3)
    assert chosen.sum() == 300
    np.testing.assert_array_equal(chosen, ensemble.hold_out(1000, 0.3))
    assert 100 < np.flatnonzero(chosen).mean() < 900
    assert np.abs(np.diff(np.flatnonzero(chosen))).max() > 1  # Not the first ones.
    assert not ensemble.hold_out(1000, 0).any()


# The command.


@pytest.fixture(scope="module")
def entry():
    """The entry point, whose flags are taken back: others have flags of the same names."""
    name = "resnet_jax.ensemble"
    yield importlib.import_module(name)
    for flag in flags.FLAGS.flags_by_module_dict()[name]:
        delattr(flags.FLAGS, flag.name)
    del sys.modules[name]


@pytest.fixture
def command(entry, monkeypatch, capsys):
    """Runs the entry point in this process: flags -> exit status, what it printed, its errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ensemble", *map(str, arguments)])
        for flag in flags.FLAGS.flags_by_module_dict()[entry.__name__]:
            flag.unparse()
        with pytest.raises(SystemExit) as ended:
            cli.run(entry.main, entry.__doc__, needs=["runs"])
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    return run


def refused(result: tuple[int, str, str], *parts) -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    assert not [part for part in parts if str(part) not in err], err


def test_the_command_prints_each_member_and_the_ensemble(tmp_path, command):
    first, second = save(tmp_path / "a.npz", FIRST), save(tmp_path / "b.npz", SECOND)
    status, out, err = command(f"--runs={first},{second}")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == [str(first), str(second), "ensemble"]
    assert [re.search(r"top1 error +([\d.]+)%", line)[1] for line in out.splitlines()] == ["50.00", "50.00", "0.00"]
    assert "4 examples" in out


def test_the_command_s_json_is_one_object_and_its_output_the_mean(tmp_path, command):
    first, second = save(tmp_path / "a.npz", FIRST), save(tmp_path / "b.npz", SECOND)
    status, out, _ = command(f"--runs={first},{second}", "--json", f"--output={tmp_path / 'mean.npz'}")
    found = json.loads(out)
    assert status == 0
    assert set(found["members"]) == {str(first), str(second)}
    assert found["members"][str(first)]["top1_error"] == 50
    assert found["ensemble"]["top1_error"] == 0
    assert found["ensemble"]["loss"] == pytest.approx(-np.log([0.5, 0.55, 0.6, 0.55]).mean(), rel=1e-6)
    assert found["chosen"] == [str(first), str(second)]
    written = np.load(tmp_path / "mean.npz")
    np.testing.assert_allclose(written["probabilities"], (np.array(FIRST) + SECOND) / 2, rtol=1e-6)
    np.testing.assert_array_equal(written["label"], LABELS)
    # It is a member of other ensembles like any run.
    assert json.loads(command(f"--runs={tmp_path / 'mean.npz'}", "--json")[1])["ensemble"] == found["ensemble"]


def test_selection_judges_on_the_examples_that_it_did_not_see(tmp_path, command):
    """The first is right where the selection looks and wrong everywhere else; the second is right half the time."""
    labels = np.arange(40) % 2
    seen = ensemble.hold_out(40, 0.25)
    right = np.eye(2)[labels] * 0.8 + 0.1
    always_seen = np.where(seen[:, None], right, 1 - right)
    half = np.where((np.arange(40) // 2 % 2 == 0)[:, None], right, 1 - right)
    first, second = save(tmp_path / "a.npz", always_seen, labels), save(tmp_path / "b.npz", half, labels)
    status, out, _ = command(f"--runs={second},{first}", "--select=0.25", "--json")
    found = json.loads(out)
    assert status == 0
    assert set(found["chosen"]) == {str(first)}
    assert found["ensemble"]["top1_error"] == found["members"][str(first)]["top1_error"] == 100
    assert {row["examples"] for row in (*found["members"].values(), found["ensemble"])} == {30}
    expected = 100 * np.mean(half[~seen].argmax(1) != labels[~seen])
    assert found["members"][str(second)]["top1_error"] == pytest.approx(expected)
    assert "chosen on the other 10 examples" in command(f"--runs={second},{first}", "--select=0.25")[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[pathlib.Path]:
    """Two evaluated runs of digits."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        row = functools.partial(ResNet, blocks=(1,), widths=(4,), shortcut="A", stem="cifar", stem_width=4)
        patch.setitem(MODELS, "tiny", row)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        for seed in (0, 1):
            config = default_config()
            config.model.name, config.seed, config.steps, config.batch_size = "tiny", seed, 3, 64
            config.log.tensorboard = False
            assert run_task(config, folder / f"seed_{seed}", "train") == 0
        yield [folder / "seed_0", folder / "seed_1"]


def test_runs_of_ours_are_members_by_their_folder(runs, command):
    status, out, _ = command(f"--runs={runs[0]},{runs[1]}", "--json")
    found = json.loads(out)
    assert status == 0
    predictions = [np.load(run / "predictions.npz") for run in runs]
    mean = (predictions[0]["probabilities"].astype(float) + predictions[1]["probabilities"]) / 2
    expected = 100 * np.mean(mean.argmax(1) != predictions[0]["label"])
    assert found["ensemble"]["top1_error"] == pytest.approx(expected, abs=0.3)  # But for ties.
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert found["members"][str(run)]["top1_error"] == pytest.approx(summary["top1_error"])
        assert found["members"][str(run)]["loss"] == pytest.approx(summary["loss"], rel=1e-4)


def test_a_run_that_was_never_evaluated_is_refused_and_evaluated_where_asked_for(runs, command, tmp_path):
    stored = (runs[1] / "predictions.npz").read_bytes()
    (runs[1] / "predictions.npz").unlink()
    try:
        refused(command(f"--runs={runs[0]},{runs[1]}"), runs[1] / "predictions.npz", "never evaluated", "--evaluate")
        refused(command(f"--runs={runs[0]}", "--protocol=ten_crop"), "eval/ten_crop/predictions.npz", "never evaluated")
        status, out, _ = command(f"--runs={runs[0]},{runs[1]}", "--evaluate", "--json")
        assert status == 0
        again = np.load(runs[1] / "predictions.npz")
        np.testing.assert_allclose(again["probabilities"], np.load(io.BytesIO(stored))["probabilities"], atol=1e-6)
        assert json.loads(out)["ensemble"]["examples"] == 359  # One JSON object, and nothing beside it.
    finally:
        (runs[1] / "predictions.npz").write_bytes(stored)


def test_a_protocol_that_the_data_do_not_allow_is_one_line(runs, command):
    status, _, err = command(f"--runs={runs[0]}", "--protocol=ten_crop", "--evaluate")
    assert status == 2
    assert re.fullmatch(r"error: .*eval\.protocol=ten_crop.*\n", err)
    refused(command(f"--runs={runs[0]}", "--protocol=tencrop"), "tencrop")


def test_a_run_of_another_version_is_one_line(command, tmp_path):
    (tmp_path / "old").mkdir()
    values = flatten(default_config()) | {"model.widening": 2}
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    refused(command(f"--runs={tmp_path / 'old'}", "--evaluate"), tmp_path / "old", "model.widening")
    refused(command(f"--runs={tmp_path / 'old'}"), "never evaluated")
    (tmp_path / "old" / "config.json").write_text('{"model.name": ')
    refused(command(f"--runs={tmp_path / 'old'}", "--evaluate"), tmp_path / "old" / "config.json", "not readable")


def test_folders_that_are_no_runs_are_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(command(f"--runs={tmp_path / 'empty'}"), tmp_path / "empty", "no work directory of a run")
    refused(command(f"--runs={tmp_path / 'nowhere'}"), tmp_path / "nowhere", "no such folder")
    refused(command(f"--runs={tmp_path / 'nothing.npz'}"), tmp_path / "nothing.npz", "not there")
    refused(command("--runs="), "--runs is needed")
    refused(command())


@pytest.mark.parametrize("flag", ["--select=1", "--select=-0.1", "--output=mean.npy", "--config.seed=1"])
def test_flags_out_of_range_are_one_line(command, tmp_path, flag):
    refused(command(f"--runs={save(tmp_path / 'a.npz', FIRST)}", flag), flag.split("=")[0])


def test_an_output_that_can_not_be_written_is_one_line(command, tmp_path):
    run = save(tmp_path / "a.npz", FIRST)
    refused(command(f"--runs={run}", f"--output={tmp_path / 'no' / 'folder' / 'x.npz'}"), "x.npz")


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_no_example_on_one_side_is_one_line(command, tmp_path, share):
    refused(command(f"--runs={save(tmp_path / 'a.npz', FIRST)}", f"--select={share}"), "--select", share)


class _Boom:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOOM"],)


def _with_byte(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + bytes([value]) + content[at + 1 :]


def _compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **scores(FIRST))
    return buffer.getvalue()


def _plain() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **scores(FIRST))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 3)))
    return buffer.getvalue()


def _without(name: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value for key, value in scores(FIRST).items() if key != name})
    return buffer.getvalue()


DIRECTORY = (
    b"PK\x01\x02"  # Of an entry in the archive's list at its end; 6 bytes on is the version it needs, then flags.
)
DAMAGED = {
    "empty": lambda: b"",
    "text": lambda: b"not a zip",
    "truncated": lambda: _plain()[:-200],
    "cut_early": lambda: _plain()[:100],
    "flipped_data": lambda: _with_byte(_plain(), 140, 0xFF),
    "first_compressed_byte": lambda: _with_byte(_compressed(), 28 + _compressed()[26] + 22, 0xFF),
    "newer_zip": lambda: _with_byte(_plain(), _plain().index(DIRECTORY) + 6, 109),
    "encrypted": lambda: _with_byte(_plain(), _plain().index(DIRECTORY) + 8, 1),
    "one_array": _npy,
    "no_labels": lambda: _without("label"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_predictions_are_one_line_that_names_the_file(command, tmp_path, damage):
    file = tmp_path / "a.npz"
    file.write_bytes(DAMAGED[damage]())
    refused(command(f"--runs={save(tmp_path / 'good.npz', FIRST)},{file}"), file)


def test_damage_anywhere_is_a_usage_error(tmp_path):
    """Each byte of a compressed file flipped, one at a time: read all the same, or refused."""
    file, content = tmp_path / "a.npz", _compressed()
    refusals = 0
    for at in range(0, len(content), 3):
        file.write_bytes(_with_byte(content, at, content[at] ^ 0xFF))
        try:
            ensemble.read_predictions(file)
        except UsageError:
            refusals += 1
    assert refusals > len(content) / 10


WRONG = {
    "shapes": {"probabilities": np.full((3, 3), 1 / 3, np.float32)},
    "axes": {"probabilities": np.zeros(4, np.float32)},
    "label_beyond_the_classes": {"label": np.array([0, 1, 3, 0])},
    "label_below_0": {"label": np.array([0, 1, -1, 0])},
    "labels_of_fractions": {"label": np.array([0.0, 1.5, 2.0, 0.0])},
    "probabilities_of_text": {"probabilities": np.full((4, 3), "x")},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arrays_that_are_no_predictions_are_one_line_that_names_the_file(command, tmp_path, wrong):
    file = save(tmp_path / "a.npz", FIRST, **WRONG[wrong])
    refused(command(f"--runs={file}"), file)


@pytest.mark.parametrize("place", ["whole", "array"])
def test_pickles_are_refused_and_not_executed(command, tmp_path, monkeypatch, place):
    monkeypatch.setenv("BOOM", str(tmp_path / "executed"))
    file = tmp_path / "a.npz"
    if place == "whole":
        file.write_bytes(pickle.dumps(_Boom()))
    else:
        save(file, FIRST, probabilities=np.array([[_Boom()] * 3] * 4, object))
        assert zipfile.is_zipfile(file)
    refused(command(f"--runs={file}"), file)
    assert not (tmp_path / "executed").exists()


def test_the_program_itself_ends_with_its_line_and_status(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = functools.partial(
        subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    module = [sys.executable, "-m", "resnet_jax.ensemble"]
    save(tmp_path / "a.npz", FIRST)
    result = run([*module, "--runs=a.npz,b"])
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: b: no such folder\n", result.stderr)
    result = run([*module, "--runs=a.npz", "--json"])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ensemble"]["top1_error"] == 50


def test_other_images_of_the_same_number_and_labels_are_another_test_set(tmp_path):
    scores = {"index": np.arange(3), "label": np.array([0, 1, 1]), "probabilities": np.full((3, 2), 0.5, np.float32)}
    names = {"a": "files:1", "b": "files:2", "c": "pixels (8, 8, 3):2", "d": None}
    files = {}
    for name, test_set in names.items():
        known = {} if test_set is None else {"test_set": np.array(test_set)}
        np.savez(tmp_path / f"{name}.npz", **scores, **known)
        files[name] = ensemble.read_predictions(tmp_path / f"{name}.npz")
    with pytest.raises(UsageError, match="b and a were not evaluated on the same test set: its images are others"):
        ensemble.check_same_examples(["a", "b"], [files["a"], files["b"]])
    # Of another kind, or an older version's, nothing can be said.
    ensemble.check_same_examples(["a", "c", "d"], [files[name] for name in "acd"])
