"""``profile.steps``: which steps a trace holds, as Perfetto reads it, and that a run does not change for it."""

import functools
import gzip
import json

import jax
from jax import numpy as jnp
import pytest

from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config, flatten, override, recipe_changes, validate
from resnet_jax.distributed import make_mesh
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.checkpoints import load_run_weights
from resnet_jax.training.loop import Training
from resnet_jax.training.profile import STEP, Profile
from resnet_jax.training.run import Run
from resnet_jax.training.signals import StopSignal
from resnet_jax.training.workdir import open_workdir


def traced(folder):
    """The numbers of the steps in each trace below ``folder``, in the order of their times."""
    found = []
    for path in sorted(folder.rglob("perfetto_trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = [event for event in events if event.get("name") == STEP and event.get("ph") == "X"]
        found.append([int(event["args"]["step_num"]) for event in sorted(steps, key=lambda event: event["ts"])])
        assert list(path.parent.glob("*.xplane.pb"))  # What TensorBoard reads.
    return found


def profiled(text, folder, dispatches, said=None):
    """Makes dispatches (step before, count) that a profile looks at, and closes it."""
    profile = Profile(text, folder, lambda: None, [].append if said is None else said.append)
    for step, count in dispatches:
        with profile.dispatch(step, count):
            jnp.ones(3).sum().block_until_ready()
    profile.close()


@pytest.mark.parametrize(
    ("text", "dispatches", "expected"),
    [
        ("3:5", [(step, 1) for step in range(8)], [[3, 4, 5]]),
        ("1:2", [(step, 1) for step in range(8)], [[2]]),  # The first one compiles.
        ("3:5", [(step, 1) for step in range(3)], [[3]]),  # Stopped there: what there is is written.
        ("3:5", [(step, 1) for step in range(3, 8)], [[5]]),  # Resumed within.
        ("3:5", [(step, 1) for step in range(5, 8)], []),  # Resumed beyond.
        ("", [(step, 1) for step in range(8)], []),
        ("13:25", [(0, 10), (10, 10), (20, 10), (30, 10)], [[11, 21]]),  # Ten steps at once: by their first.
        ("3:5", [(0, 10), (10, 10), (20, 10)], [[11]]),  # Those asked for were run at once with what compiles.
    ],
)
def test_the_steps_that_are_asked_for_are_traced(tmp_path, text, dispatches, expected):
    profiled(text, tmp_path / "profile", dispatches)
    assert traced(tmp_path) == expected
    assert (tmp_path / "profile").exists() == bool(expected)


def test_a_folder_that_can_t_be_written_costs_a_warning(tmp_path):
    (tmp_path / "profile").touch()
    said = []
    profiled("2:3", tmp_path / "profile", [(step, 1) for step in range(5)], said)
    (line,) = said
    assert line.startswith("warning: no profile (") and str(tmp_path / "profile") in line


@pytest.mark.parametrize("text", ["10", "10-15", "15:10", "0:4", "a:b", "1:2:3", ":", "-1:3"])
def test_other_texts_are_refused_in_one_line(text):
    config = default_config()
    config.steps = 5
    override(config, "profile.steps", text)
    with pytest.raises(UsageError, match=r"^profile.steps=.* must be as 10:15, which means from step 10 to step 15$"):
        validate(config)


def test_it_is_no_part_of_the_recipe():
    before, now = default_config(), default_config()
    now.profile.steps = "10:15"
    assert recipe_changes(flatten(before), flatten(now)) == []


def test_a_profiled_run_is_the_run_that_was_not(tmp_path, monkeypatch, capfd):
    row = functools.partial(ResNet, blocks=(1,), widths=(4,), shortcut="A", stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    config = default_config()
    config.model.name, config.batch_size, config.steps, config.log.every = "tiny", 16, 8, 1
    config.log.tensorboard = False
    mesh = make_mesh(jax.devices()[:1])
    for name in ("3:6", ""):
        config.profile.steps, workdir = name, tmp_path / f"run_{name[:1]}"
        with jax.set_mesh(mesh):
            task = Classification(config, mesh)
            open_workdir(workdir, flatten(config), task.description)
            with StopSignal() as stop:
                assert Training([Run(task, config, workdir, mesh)], mesh, 1).run(stop) == 0
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        seconds = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
        assert len(seconds) == 8 and min(seconds[1:]) > 1e-5  # Each line has its own step's; the first one compiles.
    assert traced(tmp_path) == [[3, 4, 5, 6]]
    assert f"profile of steps 3 to 6: {tmp_path}/run_3/profile\n" in capfd.readouterr().out
    weights = (jax.tree.leaves(load_run_weights(str(tmp_path / name))) for name in ("run_3", "run_"))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*weights, strict=True))
