"""The work directory: whose run it holds, and what is written there."""

import itertools
import json
import os
import time
from typing import Any

import jax
import numpy as np

from resnet_jax import buckets, distributed
from resnet_jax.buckets import Folder, in_bucket
from resnet_jax.config import recipe_changes
from resnet_jax.errors import UsageError
from resnet_jax.output import make_folder, refusal, write_json, write_whole
from resnet_jax.training.checkpoints import FOLDER, latest_step

DATA, MEAN = "data.json", "mean.npy"
CENTER = "center"  # The protocol of evaluations while training goes, and of the work directory's own results.


def results_folder(workdir: Folder, *names: str) -> Folder:
    """Where an evaluation's results go: the work directory itself, or for others than the usual one a folder below."""
    names = tuple(name for name in names if name and name != CENTER)
    return workdir / "eval" / "_".join(names) if names else workdir


def read_json(path: Folder) -> dict[str, Any] | None:
    """The file's JSON object, or None where there is no file.

    Raises:
      UsageError: it is no JSON, or can't be read.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object of JSON")
        return value
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UsageError(f"--workdir={path.parent}: not a folder") from error
    except Exception as error:  # Of a bucket there are many kinds.
        why = buckets.reason(error) if in_bucket(path) else error
        raise UsageError(f"{path}: not readable ({why})") from error


def check_recipe(workdir: Folder, values: dict[str, Any], training: bool) -> None:
    """Checks that the folder is new, or holds a run of the same recipe.

    Raises:
      UsageError: it holds a run of another one; the fields that differ are listed.
    """
    before = read_json(workdir / "config.json")
    if before is None:
        if latest_step(workdir) is not None:
            raise UsageError(f"--workdir={workdir} has checkpoints but no config.json: no run of ours; choose another")
        return
    changes = recipe_changes(before, values, training)
    if changes:
        raise UsageError(f"--workdir={workdir} holds a run of another recipe ({'; '.join(changes)});"
                         " choose another work directory or the same settings")  # fmt: skip


def check_data(workdir: Folder, now: dict[str, Any], training: bool) -> None:
    """Checks that the data are those that the folder's run was trained on, by their classes and their number.

    Args:
      workdir: the folder.
      now: ``classes`` (names) and ``examples`` (of the training set).
      training: whether it is to be trained on.

    Raises:
      UsageError: they are not.
    """
    before = read_json(workdir / DATA)
    if before is None:
        return
    classes, examples = now["classes"], now["examples"]
    if before["classes"] != classes:
        pairs = itertools.zip_longest(before["classes"], classes)
        number, (was, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UsageError(
            f"--workdir={workdir} was trained on {len(before['classes'])} classes and the data have {len(classes)};"
            f" class {number} was {was!r} and is {now!r}"
        )
    if training and before["examples"] != examples:
        raise UsageError(
            f"--workdir={workdir} was trained on {before['examples']} training images and the data have {examples};"
            " choose another work directory or the same data"
        )


def check_writable(workdir: Folder) -> None:
    """Raises a UsageError where the folder can't be made or written."""
    if in_bucket(workdir):
        # Each process has a name of its own: one object takes one change a second.
        return buckets.check_writable("--workdir", workdir, f".writable-{jax.process_index()}")
    nearest = workdir
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"--workdir={workdir}: can't be written ({nearest} is a file, not a folder)")
    if (workdir / FOLDER).is_file():
        raise UsageError(f"--workdir={workdir}: can't be written ({FOLDER} in it is a file, not a folder)")
    if why := refusal(nearest):
        raise UsageError(f"--workdir={workdir}: can't be written ({why})")


def open_workdir(workdir: Folder, values: dict[str, Any], data: dict[str, Any]) -> None:
    """Makes the folder where needed and writes ``config.json``, ``data.json`` and, where there is one, ``mean.npy``.

    Args:
      workdir: the folder.
      values: the flat config.
      data: see ``Classification.description``.

    Raises:
      UsageError: it can't be written.
    """
    make_folder(workdir, f"--workdir={workdir}")
    write_json(workdir / "config.json", values)
    write_json(workdir / DATA, {name: value for name, value in data.items() if name != "mean_image"})
    if data["mean_image"] is not None:
        write_whole(workdir / MEAN, lambda file: np.save(file, data["mean_image"]))
    elif buckets.exists(workdir / MEAN):
        (workdir / MEAN).unlink(missing_ok=True)  # Of an earlier start that was another's.


def check_shared(workdir: Folder, seconds: float = 30) -> None:
    """Checks that every process sees what the leading one writes; waits for all of them.

    Raises:
      UsageError: some don't, in those that don't.
    """
    if jax.process_count() == 1:
        return
    token = workdir / f".shared-{distributed.from_leader(os.getpid())}"
    if distributed.leads():
        token.write_text("")
    distributed.wait_for_all("shared")
    end = time.monotonic() + seconds  # Network file systems may take a while to show a new file.
    while not token.exists():
        if time.monotonic() > end:
            raise UsageError(f"--workdir={workdir}: not the folder that process 0 writes to; several hosts need a"
                             " shared one")  # fmt: skip
        time.sleep(0.2)
    distributed.wait_for_all("seen")
    if distributed.leads():
        token.unlink(missing_ok=True)
