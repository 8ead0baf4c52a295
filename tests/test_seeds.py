"""Several seeds of one config: their folders, going on, and what is said of them."""

import functools
import importlib
import json
import math
import pathlib
import re
import sys

from absl import flags
import jax
import numpy as np
import pytest

from resnet_jax import cli
from resnet_jax.config import default_config
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.run import run_members
from resnet_jax.seeds import run_seeds, spread
from resnet_jax.training.checkpoints import load_run_weights


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        row = functools.partial(ResNet, blocks=(1,), widths=(4,), shortcut="A", stem="cifar", stem_width=4)
        patch.setitem(MODELS, "tiny", row)
        patch.setattr("resnet_jax.distributed.jax.devices", lambda: jax.local_devices()[:1])
        yield


def settings(**changes):
    config = default_config()
    config.model.name = "tiny"
    config.batch_size = 64
    config.steps = 6
    config.schedule.name = "constant"
    config.schedule.learning_rate = 0.05
    config.log.tensorboard = False
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def test_the_spread_is_that_worked_by_hand():
    # The deviations from 6.5 are -0.5, 0.25, 0.25: (0.25 + 0.0625 + 0.0625) / 2 = 0.1875.
    found = spread([6.0, 6.75, 6.75])
    assert found == {"mean": pytest.approx(6.5), "std": pytest.approx(math.sqrt(0.1875)), "best": 6.0}
    values = [6.43, 6.61, 6.87, 6.52, 6.70]
    found = spread(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["best"] == 6.43
    assert spread([7.0]) == {"mean": 7.0, "std": None, "best": 7.0}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "several"
    assert run_seeds(settings(), workdir, "train", [0, 1], []) == 0
    return workdir


def summaries(workdir: pathlib.Path, *numbers: int) -> list[dict]:
    return [json.loads((workdir / f"seed_{seed}" / "summary.json").read_text()) for seed in numbers]


def test_each_seed_has_its_folder_its_network_and_its_share_of_the_summary(seeds):
    assert sorted(path.name for path in seeds.iterdir()) == ["seed_0", "seed_1", "seeds.json"]
    configs = [json.loads((seeds / f"seed_{seed}" / "config.json").read_text()) for seed in (0, 1)]
    assert [config.pop("seed") for config in configs] == [0, 1]
    assert configs[0] == configs[1]
    kernels = [load_run_weights(str(seeds / f"seed_{seed}"))["params"]["head"]["kernel"] for seed in (0, 1)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2
    errors = [summary["top1_error"] for summary in summaries(seeds, 0, 1)]
    found = json.loads((seeds / "seeds.json").read_text())
    assert found["top1_error"] == {"0": errors[0], "1": errors[1]}
    assert found["mean"] == pytest.approx(sum(errors) / 2)
    assert found["std"] == pytest.approx(abs(errors[0] - errors[1]) / math.sqrt(2))
    assert found["best"] == min(errors)


def test_a_seed_is_trained_as_it_is_alone(seeds, tmp_path):
    from resnet_jax.run import run_task

    assert run_task(settings(seed=1), tmp_path / "alone", "train") == 0
    one, other = (load_run_weights(str(run)) for run in (tmp_path / "alone", seeds / "seed_1"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_call_goes_on_where_it_was_stopped_and_leaves_what_is_finished(tmp_path, capsys, monkeypatch):
    workdir, train = tmp_path / "several", run_members
    calls = []

    def stopped_in_the_second(members, mode, explicit, whole_runs):
        assert not whole_runs
        (member,) = members
        calls.append(member.config.seed)
        if len(calls) == 2:
            shorter = member._replace(config=settings(seed=member.config.seed, steps=3))
            assert train([shorter], mode, explicit) == 0
            return 143  # As after SIGTERM.
        return train(members, mode, explicit)

    monkeypatch.setattr("resnet_jax.seeds.run_members", stopped_in_the_second)
    assert run_seeds(settings(), workdir, "train", [4, 2, 7], []) == 143
    assert calls == [4, 2]
    assert not (workdir / "seeds.json").exists()
    assert not (workdir / "seed_7").exists()
    finished = load_run_weights(str(workdir / "seed_4"))
    capsys.readouterr()
    assert run_seeds(settings(), workdir, "train", [4, 2, 7], []) == 0
    said = capsys.readouterr().out
    assert "seed_4 is finished: step 6" in said
    assert "resuming from step 3" in said
    assert re.search(r"3 seeds: top1 error [\d.]+ \+- [\d.]+%, best [\d.]+%", said)
    assert [summary["step"] for summary in summaries(workdir, 4, 2, 7)] == [6, 6, 6]
    for one, other in zip(
        jax.tree.leaves(finished), jax.tree.leaves(load_run_weights(str(workdir / "seed_4"))), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert json.loads((workdir / "seeds.json").read_text())["top1_error"].keys() == {"4", "2", "7"}


def test_a_single_seed_has_no_deviation(seeds, capsys):
    before = (seeds / "seeds.json").read_bytes()
    try:
        assert run_seeds(settings(), seeds, "train", [0], []) == 0
        assert json.loads((seeds / "seeds.json").read_text())["std"] is None
        assert "+-" not in capsys.readouterr().out.splitlines()[-1]
    finally:
        (seeds / "seeds.json").write_bytes(before)


@pytest.mark.slow
def test_what_is_said_of_calibrated_seeds_are_their_errors(tmp_path, capsys):
    workdir = tmp_path / "several"
    assert run_seeds(settings(), workdir, "train", [0, 1], []) == 0
    assert run_seeds(settings(), workdir, "calibrate", [0, 1], []) == 0
    files = [workdir / f"seed_{seed}/eval/calibrated/summary.json" for seed in (0, 1)]
    calibrated = [json.loads(file.read_text())["top1_error"] for file in files]
    own = [summary["top1_error"] for summary in summaries(workdir, 0, 1)]
    assert np.mean(own) != pytest.approx(np.mean(calibrated), abs=0.1)
    said = re.search(r"2 seeds: top1 error ([\d.]+)", capsys.readouterr().out.splitlines()[-1])[1]
    assert float(said) == pytest.approx(np.mean(calibrated), abs=0.01)


def test_imported_weights_are_calibrated_for_several_seeds(seeds, tmp_path):
    """There is no summary of a single view then."""
    config = settings(**{"init.weights": str(seeds / "seed_0")})
    assert run_seeds(config, tmp_path / "several", "calibrate", [0, 1], []) == 0
    assert (tmp_path / "several" / "seed_1" / "eval" / "calibrated" / "summary.json").exists()


# The command.


@pytest.fixture(scope="module")
def entry():
    """The entry point, whose flags are taken back: others have flags of the same names."""
    name = "resnet_jax.main"
    known = name in sys.modules
    yield importlib.import_module(name)
    if not known:
        for flag in flags.FLAGS.flags_by_module_dict()[name]:
            delattr(flags.FLAGS, flag.name)
        del sys.modules[name]


@pytest.fixture
def command(entry, monkeypatch, capsys):
    """Runs the entry point in this process: flags -> exit status, what it printed, its errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["main", "--config=digits_20", *map(str, arguments)])
        for name in ("config", "workdir", "mode", "seeds"):
            flags.FLAGS[name].unparse()
        with pytest.raises(SystemExit) as ended:
            cli.run(entry.main, entry.__doc__, needs=["config"])
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds=0,0"],
        ["--seeds=0,00"],
        ["--seeds=0,-1"],
        ["--seeds=0,one"],
        ["--seeds=1.5"],
        ["--seeds="],
        ["--seeds=0,"],
        ["--seeds=0,1", "--config.seed=3"],
        ["--seeds=0,4294967296"],
        ["--seeds_at_once=2"],
        ["--seeds=0,1", "--seeds_at_once=2", "--mode=eval"],
    ],
    ids=" ".join,
)
def test_wrong_lists_of_seeds_are_one_line(command, tmp_path, monkeypatch, arguments):
    def begin(*unused):
        raise AssertionError("not refused")

    monkeypatch.setattr("resnet_jax.run.run_task", begin)
    monkeypatch.setattr("resnet_jax.seeds.run_members", begin)
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .*--seeds.*\n", err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_each_seed_in_its_folder(command, tmp_path):
    short = ["--config.model.name=tiny", "--config.steps=2", "--config.batch_size=64", "--config.epochs=0",
             "--config.schedule.name=constant", "--config.log.tensorboard=false", "--config.eval.every=0"]  # fmt: skip
    status, out, err = command("--seeds=5,3", f"--workdir={tmp_path / 'here'}", *short)
    assert (status, err) == (0, "")
    found = json.loads((tmp_path / "here" / "seeds.json").read_text())
    assert list(found["top1_error"]) == ["5", "3"]
    for seed, error in found["top1_error"].items():
        folder = tmp_path / "here" / f"seed_{seed}"
        assert json.loads((folder / "config.json").read_text())["seed"] == int(seed)
        assert json.loads((folder / "summary.json").read_text())["top1_error"] == error
    assert f"wrote {tmp_path / 'here'}/seeds.json" in out
