"""The config tree, of the fields in ``fields.py``: how a config file is read, overridden and checked.

A config file is Python with a ``get_config()`` that starts from ``default_config()`` (or, for a variant, from
``load_config("cifar_20")``) and sets what it needs. ``--config.a.b=value`` overrides a field on the command line.
"""

from collections.abc import Collection, Mapping
import importlib.util
import math
import os
import pathlib
import re
from typing import Any

import ml_collections

from resnet_jax.errors import UsageError, did_you_mean
from resnet_jax.fields import FIELDS, Field
from resnet_jax.limits import Limit


def default_config() -> ml_collections.ConfigDict:
    """A config with every field at its default; unknown fields can't be added to it."""
    config = ml_collections.ConfigDict()
    for field in FIELDS:
        *sections, name = field.name.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ml_collections.ConfigDict()
            node = node[section]
        node[name] = field.default
    return config.lock()


def make_section(name: str, values: Mapping[str, Any] | None = None, **changes: Any) -> ml_collections.FrozenConfigDict:
    """A section of a config, or its defaults, with changes; it can't be changed further."""
    section = ml_collections.ConfigDict(default_config()[name] if values is None else values)
    section.update(changes)
    return ml_collections.FrozenConfigDict(section)


def describe_fields() -> str:
    """The whole tree as text, for ``--help``."""
    lines = ["Fields of a config (default, unit):"]
    for field in FIELDS:
        unit = f" {field.unit}" if field.unit else ""
        lines.append(f"  --config.{field.name}={field.default!r}{unit}\n      {field.text}")
    return "\n".join(lines)


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs that come with the project: bare name (``cifar_20``) -> file."""
    here = pathlib.Path(__file__).resolve().parent
    # In the wheel they lie inside the package, in a checkout beside it.
    folder = next((path for path in (here / "configs", here.parent / "configs") if path.is_dir()), None)
    files = sorted(folder.rglob("*.py")) if folder else []
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_config(name: str) -> pathlib.Path:
    """The file of a shipped config's bare name, or ``name`` itself as a path."""
    path = pathlib.Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    shipped = shipped_configs()
    bare = name.removesuffix(".py").removeprefix("configs/")
    if bare in shipped:
        return shipped[bare]
    if path.suffix == ".py":
        raise UsageError(f"--config={name}: no such file")
    raise UsageError(f"--config={name}: no such file or shipped config{did_you_mean(bare, shipped)}")


def load_config(name: str) -> ml_collections.ConfigDict:
    """Runs a config file's ``get_config()``.

    Raises:
      UsageError: no such file, or an error in it, with the file and line.
    """
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path}:{_line_in(path, error)}: {_one_line(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UsageError(f"{path}: get_config() returned {type(config).__name__}, not a config")
    return config


def _line_in(path: pathlib.Path, error: Exception) -> int:
    line = getattr(error, "lineno", None) or 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == os.path.abspath(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _one_line(error: Exception) -> str:
    text = " ".join(str(error.args[0] if error.args else error).split())
    # ml_collections lists the whole tree.
    text = re.sub(r" Other fields present: .*?(?=Did you mean|$)", " ", text).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets the field ``name`` (``a.b``) from the command line's text; the field's type says how to read it.

    Setting one of ``epochs`` and ``steps`` clears the other.

    Raises:
      UsageError: unknown field or wrong type.
    """
    fields = {field.name: field for field in FIELDS}
    if name not in fields:
        sections = {field.name.split(".")[0] for field in FIELDS if "." in field.name}
        if name in sections:
            raise UsageError(f"--config.{name} is a section; set one of its fields, as in --config.{name}.x=value")
        by_last_part = {field.rsplit(".", 1)[-1]: field for field in fields}
        near = did_you_mean(name, fields) or did_you_mean(by_last_part.get(name.rsplit(".", 1)[-1], ""), fields)
        raise UsageError(f"--config.{name}: no such field{near}")
    kind, *parts = _kind(fields[name])
    try:
        value = _read(kind, text, *parts)
    except ValueError as error:
        raise UsageError(f"--config.{name}={text}: expected {_KINDS[kind, *parts]}") from error
    *sections, last = name.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[last] = value
    if name in ("epochs", "steps") and value:
        other = "steps" if name == "epochs" else "epochs"
        config[other] = type(fields[other].default)(0)


_KINDS = {(int,): "a whole number", (float,): "a number", (bool,): "true or false", (str,): "text",
          (tuple, int): "whole numbers separated by commas", (tuple, float): "numbers separated by commas"}  # fmt: skip


def _kind(field: Field) -> tuple[type, ...]:
    """The type of a field's value; of a tuple, whole numbers unless its default has others, that of its parts too."""
    if isinstance(field.default, tuple):
        return tuple, type(next(iter(field.default), 0))
    return (type(field.default),)


def _read(kind: type, text: str, part: type = int) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind is tuple:
        return tuple(part(word) for word in text.strip("()[] ").split(",") if word.strip())
    return kind(text)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks what can be said of a config without data or devices.

    Raises:
      UsageError: the first field that is wrong, and what would be right.
    """
    values = flatten(config)
    for field in FIELDS:
        value = values[field.name]
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{field.name}={value} must be finite")
        if isinstance(field.allowed, tuple) and value not in field.allowed:
            raise UsageError(f"{field.name}={value} is unknown: {', '.join(field.allowed)}")
        if isinstance(field.allowed, Limit) and not field.allowed.test(value):
            raise UsageError(f"{field.name}={value} {field.allowed.message}")
    if bool(config.epochs) == bool(config.steps):
        both = "both are" if config.epochs else "neither is"
        raise UsageError(f"the length of the training is epochs or steps; {both} set")
    for section in ("detection", "localization"):
        if config[section].anchor_low > config[section].anchor_high:
            raise UsageError(f"{section}.anchor_low={config[section].anchor_low} is above {section}.anchor_high")
    if config.optimizer.nesterov and config.optimizer.momentum_style == "caffe":
        raise UsageError("optimizer.nesterov=true goes with optimizer.momentum_style=torch")
    if config.optimizer.name == "lars" and config.optimizer.decay != "kernels":
        raise UsageError("optimizer.name=lars adapts and decays kernels alone: set optimizer.decay=kernels")
    if config.eval.patience and not config.eval.every:
        raise UsageError("eval.patience counts evaluations: set eval.every")
    if config.schedule.name == "plateau" and not config.eval.every:
        raise UsageError("schedule.name=plateau looks at evaluations: set eval.every")


def reads(config: ml_collections.ConfigDict, name: str) -> bool:
    """Whether ``config.task`` reads a field."""
    tasks = next(field.tasks for field in FIELDS if field.name == name)
    return not tasks or config.task in tasks


def check_task(config: ml_collections.ConfigDict, names: Collection[str]) -> None:
    """Raises a UsageError for the first of ``names``, set on the command line, that ``config.task`` doesn't read."""
    for field in FIELDS:
        if field.name in names and not reads(config, field.name):
            of = " and ".join(field.tasks)
            raise UsageError(f"--config.{field.name} is a setting of {of}, and this is task={config.task}")


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Every field as ``{"a.b": value}``, tuples as lists: what ``config.json`` holds and recipes are compared by."""
    values = {}
    for field in FIELDS:
        value = config
        for part in field.name.split("."):
            value = value[part]
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def restore_config(values: dict[str, Any], where: str) -> ml_collections.ConfigDict:
    """The inverse of ``flatten``: the config of a run; fields that came later have their defaults.

    Raises:
      UsageError: it has a field that there is no longer, or a value of another kind; ``where`` says whose it is.
    """
    config, fields = default_config(), {field.name: field for field in FIELDS}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(f"{where}: written by another version of resnet_jax (its field {name} is unknown here)")
        value = tuple(value) if isinstance(value, list) else value
        *sections, last = name.split(".")
        node = config
        for section in sections:
            node = node[section]
        try:
            node[last] = value
        except TypeError as error:
            raise UsageError(f"{where}: written by another version of resnet_jax ({name}={value!r})") from error
    validate(config)
    return config


def recipe_changes(before: dict[str, Any], now: dict[str, Any], training: bool = True) -> list[str]:
    """The recipe's fields that differ between two flat configs, as ``name: before -> now``.

    For more training its length is one of them where the schedule ends with it, and ``eval.every`` where it looks at
    evaluations.
    """
    follows_length = now["schedule.name"] in ("linear", "cosine", "polynomial") and not now["schedule.end_step"]
    also = ("epochs", "steps") if follows_length else ("eval.every",) if now["schedule.name"] == "plateau" else ()
    recipe = [field for field in FIELDS if field.recipe or (training and field.name in also)]
    changes = []
    for field in recipe:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        was = before.get(field.name, default)
        if was != now[field.name]:
            changes.append(f"{field.name}: {was} -> {now[field.name]}")
    return changes
