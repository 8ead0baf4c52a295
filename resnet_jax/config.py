"""The config tree: every field, its default, unit and meaning, in one place; and how a config file is read.

A config file is Python with a ``get_config()`` that starts from ``default_config()`` (or, for a variant, from
``load_config("cifar_20")``) and sets what it needs. ``--config.a.b=value`` overrides a field on the command line.
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from typing import Any

import ml_collections

from resnet_jax.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Limit:
    """A test of a value, and what is said when it fails."""

    test: Callable[[Any], bool]
    message: str


POSITIVE = Limit(lambda value: value > 0, "must be positive")
NOT_NEGATIVE = Limit(lambda value: value >= 0, "must not be negative")
SHARE = Limit(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
PART = Limit(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
ITERATIONS = Limit(
    lambda steps: all(isinstance(step, int) and step > 0 for step in steps), "must be whole numbers above zero"
)
SEED = Limit(lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32")  # Of JAX's keys.


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field; its type is its default's.

    ``allowed`` is what a value must be beyond its type: a tuple of choices, or a test and what is said when it fails.
    ``recipe`` is whether the field has a part in what is learnt: a run resumes only with the same recipe.
    """

    name: str
    default: Any
    unit: str
    text: str
    allowed: tuple[str, ...] | Limit | None = None
    recipe: bool = True


FIELDS = (
    Field("model.name", "cifar_resnet20", "", "The network: a name of `python -m resnet_jax.summary`."),
    Field("model.num_classes", 0, "classes", "Length of the logits; 0 takes the data's number of classes.",
          NOT_NEGATIVE),
    Field("model.batch_norm", "global", "", "Examples that share BN statistics: global, per_device or group:N; frozen"
          " keeps the statistics that the weights came with."),
    Field("model.batch_norm_momentum", 0.9, "", "Share of the running statistics that a step keeps (1 - torch's).",
          SHARE),
    Field("model.dtype", "auto", "", "Compute dtype: auto (bfloat16 on TPU and GPU, else float32), bfloat16,"
          " float32 or float64."),
    Field("model.init_fan", "fan_out", "", "He initialisation by fan_out (fb.resnet.torch) or fan_in (Caffe).",
          ("fan_out", "fan_in")),
    Field("model.freeze_at", 0, "", "What training leaves as it is: 1 the stem, 2 stage 1 too, ...; 0 nothing (residual"
          " nets).", NOT_NEGATIVE),
    Field("model.zero_init_last", False, "", "Start the last BN scale of each block at zero (residual nets)."),
    Field("data.source", "digits", "", "Where images come from: digits, cifar, image_folder, tfds, array_record (what"
          " `python -m resnet_jax.prepare` writes) or ilsvrc (ImageNet's tar files)."),
    Field("data.name", "", "", "Data set within the source: cifar10 or cifar100 for cifar; TFDS's name for tfds."),
    Field("data.dir", "", "path", "Folder or archive of the data; empty where the source can do without.",
          recipe=False),
    Field("data.train_split", "train", "", "tfds: the training split, as train or train[:90%]."),
    Field("data.test_split", "", "", "tfds: the test split; empty: test, or validation where there is none."),
    Field("data.labels", "", "path", "image_folder: text file with one class folder a line, in the order of their"
          " numbers; empty takes all of them, sorted."),
    Field("data.holdout", 0, "images", "Training images held out at random (the same for every seed) for validation.",
          NOT_NEGATIVE),
    Field("data.placement", "auto", "", "device: all images lie on the devices; stream: they are read as training goes;"
          " auto: on the devices for data.crop=whole.", ("auto", "device", "stream"), recipe=False),
    Field("data.image_size", 0, "pixels", "Side of the squares that the network sees; 0 takes images as they are.",
          NOT_NEGATIVE),
    Field("data.crop", "whole", "", "What training sees of an image: whole; scale, a crop at a random scale (the"
          " paper's, section 3.4); inception, a crop of random area and shape.", ("whole", "scale", "inception")),
    Field("data.scales", (256, 480), "pixels", "scale: limits of the shorter side, both included.", ITERATIONS),
    Field("data.smallest_area", 0.08, "", "inception: least share of an image's area.", PART),
    Field("data.interpolation", "bilinear", "", "How training images are resized: bilinear, bicubic or area; not"
          " antialiased (but for whole).", ("bilinear", "bicubic", "area")),
    Field("data.reduced_dct", True, "", "Decode training JPEGs at a half, a quarter or an eighth of their size where"
          " the crop needs no more."),
    Field("data.mean", "channel", "", "What is subtracted: pixel (a mean image) or channel, of the training images"
          " alone; imagenet (0.485, 0.456, 0.406) or none.", ("pixel", "channel", "imagenet", "none")),
    Field("data.mean_image", "", "path", "A .npy file [H, W, 3] or [3] from 0 to 1 to subtract instead."),
    Field("data.std", "channel", "", "What images are divided by: channel (of the training images), imagenet (0.229,"
          " 0.224, 0.225) or none.", ("channel", "imagenet", "none")),
    Field("data.pad", 0, "pixels", "Zeros on each side (after the mean) before a random crop of the original size.",
          NOT_NEGATIVE),
    Field("data.flip", False, "", "Mirror half of the training images, at random."),
    Field("data.color_noise", 0.0, "", "Strength of random colour along ImageNet's principal components; AlexNet's and"
          " the paper's is 0.1.", NOT_NEGATIVE),
    Field("data.workers", -1, "", "Readers of image files; -1: one per core; 0: none, batches are read when they are"
          " needed.", Limit(lambda value: value >= -1, "must be at least -1"), recipe=False),
    Field("data.worker_type", "thread", "", "What readers are: thread, or process where a host has so many cores that"
          " Python's lock holds threads up.", ("thread", "process"), recipe=False),
    Field("data.prefetch", 2, "batches", "Batches that wait on the devices.", POSITIVE, recipe=False),
    Field("data.cache", "none", "", "memory: keep images in the host's memory, decoded if all of them fit.",
          ("none", "memory"), recipe=False),
    Field("data.cache_gb", 8.0, "GB", "Most that data.cache=memory takes.", NOT_NEGATIVE, recipe=False),
    Field("data.on_error", "raise", "", "An image that can't be read: raise stops there and names it; skip leaves it"
          " out, counts it, and lets training see the next image in its place.", ("raise", "skip"), recipe=False),
    Field("data.cache_dir", "", "path", "Where decoded and downloaded data is kept; empty: ~/.cache/resnet_jax.",
          recipe=False),
    Field("batch_size", 128, "images", "Images a step over all devices together.", POSITIVE),
    Field("epochs", 0.0, "epochs", "Length of the training; this or steps.", NOT_NEGATIVE, recipe=False),
    Field("steps", 0, "iterations", "Length of the training; this or epochs.", NOT_NEGATIVE, recipe=False),
    Field("seed", 0, "", "Seed of the initial weights, the order of the images and their augmentation.", SEED),
    Field("loss.label_smoothing", 0.0, "", "Share of the target spread over all classes (in training alone).", SHARE),
    Field("optimizer.momentum", 0.9, "", "SGD's momentum.", SHARE),
    Field("optimizer.nesterov", False, "", "Nesterov's momentum."),
    Field("optimizer.momentum_style", "torch", "", "torch: rate times velocity; caffe: the rate inside the velocity"
          " (they differ only where the rate changes).", ("torch", "caffe")),
    Field("optimizer.weight_decay", 1e-4, "", "L2 penalty added to the gradient.", NOT_NEGATIVE),
    Field("optimizer.decay", "all", "", "What decays: all parameters (Caffe, the paper) or kernels only.",
          ("all", "kernels")),
    Field("optimizer.clip_norm", 0.0, "", "Largest norm of the whole gradient; 0 does not clip.", NOT_NEGATIVE),
    Field("optimizer.accumulate", 1, "", "Parts a batch is worked through in, to save"
          " memory; gradients are averaged. BN groups stay whole; global BN is of one part.", POSITIVE),
    Field("optimizer.ema", 0.0, "", "Decay of an average of the weights and BN statistics that is evaluated in"
          " their place, from the first step on; 0: none.",
          SHARE),
    Field("optimizer.head_rate", 1.0, "", "The classifier's learning rate, times the others'.", POSITIVE),
    Field("schedule.name", "steps", "", "constant, steps, linear, cosine or plateau.",
          ("constant", "steps", "linear", "cosine", "plateau")),
    Field("schedule.learning_rate", 0.1, "", "Learning rate after warm-up.", POSITIVE),
    Field("schedule.boundaries", (), "iterations", "steps: where the rate is multiplied by schedule.factor.",
          ITERATIONS),
    Field("schedule.factor", 0.1, "", "steps and plateau: the multiplier.", POSITIVE),
    Field("schedule.end_rate", 0.0, "", "linear and cosine: the final rate, constant after schedule.end_step.",
          NOT_NEGATIVE),
    Field("schedule.end_step", 0, "iterations", "linear and cosine: where the final rate is reached; 0: at the end.",
          NOT_NEGATIVE),
    Field("schedule.patience", 3, "evaluations", "plateau: so many evaluations without a better error drop the rate.",
          POSITIVE),
    Field("schedule.threshold", 0.0, "% points", "plateau: what counts as better.", NOT_NEGATIVE),
    Field("schedule.warmup_steps", 0, "iterations", "Linear warm-up from zero to the rate.", NOT_NEGATIVE),
    Field("schedule.warmup_rate", 0.01, "", "The rate until schedule.warmup_error is reached (section 4.2).",
          NOT_NEGATIVE),
    Field("schedule.warmup_error", 0.0, "%", "Hold schedule.warmup_rate until the training error (averaged over about"
          " the last 20 steps) is below this; 0: off.", NOT_NEGATIVE),
    Field("eval.every", 0, "iterations", "Evaluate so often; 0: only at the end.", NOT_NEGATIVE, recipe=False),
    Field("eval.patience", 0, "evaluations", "Stop after so many without a better error; 0: train to the end.",
          NOT_NEGATIVE, recipe=False),
    Field("eval.batch_size", 1000, "images", "Images a step in evaluation.", POSITIVE, recipe=False),
    Field("eval.resize", 256, "pixels", "Shorter side, where training sees crops; the middle is evaluated.",
          POSITIVE, recipe=False),
    Field("eval.interpolation", "bilinear", "", "How evaluation resizes, antialiased: bilinear, bicubic or area.",
          ("bilinear", "bicubic", "area"), recipe=False),
    Field("eval.protocol", "center", "", "Test protocol: center (one view of each image).", ("center",), recipe=False),
    Field("checkpoint.every", 0, "iterations", "Save so often; 0: by time alone.", NOT_NEGATIVE, recipe=False),
    Field("checkpoint.minutes", 10.0, "minutes", "Save when so much time has passed; 0: by iterations alone (the"
          " end is saved anyway).",
          NOT_NEGATIVE, recipe=False),
    Field("checkpoint.keep", 1, "", "How many of the latest checkpoints stay (the best one always does).",
          POSITIVE, recipe=False),
    Field("log.every", 100, "iterations", "Write metrics so often. An accelerator runs the"
          " steps between two log lines at once.", POSITIVE, recipe=False),
    Field("log.tensorboard", True, "", "Write TensorBoard events too.", recipe=False),
    Field("deterministic", False, "", "Bit-exact reruns on GPUs, slower (CPUs and TPUs are exact anyway).",
          recipe=False),
    Field("init.weights", "", "path", "Start from these weights: a .safetensors or torch file (torchvision's, timm's,"
          " akamaster's or ours) or the work directory of a run. They bring their preprocessing."),
    Field("init.head", "keep", "", "The classifier of init.weights: keep it, or replace it by a new one for the data's"
          " classes.", ("keep", "replace")),
)  # fmt: skip


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
    kind = type(fields[name].default)
    try:
        value = _read(kind, text)
    except ValueError as error:
        raise UsageError(f"--config.{name}={text}: expected {_KINDS[kind]}") from error
    *sections, last = name.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[last] = value
    if name in ("epochs", "steps") and value:
        other = "steps" if name == "epochs" else "epochs"
        config[other] = type(fields[other].default)(0)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
          tuple: "whole numbers separated by commas"}  # fmt: skip


def _read(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind is tuple:
        return tuple(int(part) for part in text.strip("()[] ").split(",") if part.strip())
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
    if config.optimizer.nesterov and config.optimizer.momentum_style == "caffe":
        raise UsageError("optimizer.nesterov=true goes with optimizer.momentum_style=torch")
    if config.eval.patience and not config.eval.every:
        raise UsageError("eval.patience counts evaluations: set eval.every")
    if config.schedule.name == "plateau" and not config.eval.every:
        raise UsageError("schedule.name=plateau looks at evaluations: set eval.every")


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Every field as ``{"a.b": value}``, tuples as lists: what ``config.json`` holds and recipes are compared by."""
    values = {}
    for field in FIELDS:
        value = config
        for part in field.name.split("."):
            value = value[part]
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def recipe_changes(before: dict[str, Any], now: dict[str, Any], training: bool = True) -> list[str]:
    """The recipe's fields that differ between two flat configs, as ``name: before -> now``.

    For more training its length is one of them where the schedule ends with it, and ``eval.every`` where it looks at
    evaluations.
    """
    follows_length = now["schedule.name"] in ("linear", "cosine") and not now["schedule.end_step"]
    also = ("epochs", "steps") if follows_length else ("eval.every",) if now["schedule.name"] == "plateau" else ()
    recipe = [field for field in FIELDS if field.recipe or (training and field.name in also)]
    changes = []
    for field in recipe:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        was = before.get(field.name, default)
        if was != now[field.name]:
            changes.append(f"{field.name}: {was} -> {now[field.name]}")
    return changes
