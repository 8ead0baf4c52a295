"""The work directory: whose run it holds, and what is written there."""

import json
import os
import pathlib
from typing import Any

from resnet_jax.config import FIELDS, recipe_changes
from resnet_jax.errors import UsageError
from resnet_jax.training.metrics import write_json


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The file's JSON object, or None where there is no file.

    Raises:
      UsageError: it is no JSON.
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
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: not readable ({error})") from error


def check_recipe(workdir: pathlib.Path, values: dict[str, Any]) -> None:
    """Checks that the folder is new, or holds a run of the same recipe.

    Raises:
      UsageError: it holds a run of another one; the fields that differ are listed.
    """
    before = read_json(workdir / "config.json")
    if before is None:
        return
    changes = recipe_changes(before, values)
    if changes:
        raise UsageError(f"--workdir={workdir} holds a run of another recipe ({'; '.join(changes)});"
                         " choose another work directory or the same settings")  # fmt: skip


def open_workdir(workdir: pathlib.Path, values: dict[str, Any]) -> None:
    """Makes the folder where needed and writes ``config.json``.

    Raises:
      UsageError: it can't be written.
    """
    assert {field.name for field in FIELDS} == set(values)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("permission denied")
        write_json(workdir / "config.json", values)
    except OSError as error:
        raise UsageError(f"--workdir={workdir}: can't be written ({error.strerror or error})") from error
