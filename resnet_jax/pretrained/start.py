"""What a run starts from: ``init.weights``, whatever it names, and what those weights say of the config."""

from collections.abc import Collection
import pathlib
from typing import Any

import ml_collections
import numpy as np

from resnet_jax.errors import UsageError
from resnet_jax.pretrained.load import Pretrained, known_model, read_pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.training.checkpoints import load_run_weights
from resnet_jax.training.workdir import DATA, MEAN, read_json


def starting_weights(config: ml_collections.ConfigDict) -> Pretrained | None:
    """What ``init.weights`` names: a file, or a run of ours; None where it is empty.

    Raises:
      UsageError: nothing there, or not weights of ``model.name``.
    """
    source = config.init.weights
    if not source:
        if config.init.head == "replace":
            raise UsageError("init.head=replace goes with init.weights: set --config.init.weights=FILE")
        return None
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise UsageError(f"init.weights={source}: no such file or folder")
    return read_run(path) if path.is_dir() else read_pretrained(source, config.model.name)


def read_any(source: str, model: str | None) -> tuple[str, Pretrained]:
    """The network's name and its weights, of a file or a run of ours.

    Args:
      source: the file, or the work directory of the run.
      model: our name of the network; a run and a file of ours know their own.

    Raises:
      UsageError: nothing there, no name, or weights of another network.
    """
    path = pathlib.Path(source).expanduser()
    if not path.is_dir():
        model = model or known_model(path)
        if not model:
            raise UsageError(f"--weights={source} does not say which network it is of: --model=NAME is needed")
        return model, read_pretrained(source, model)
    config = read_json(path / "config.json")
    if config is None:
        raise UsageError(f"--weights={source}: no work directory of a run (no config.json in it)")
    if model not in (None, config["model.name"]):
        raise UsageError(f"--weights={source}: holds {config['model.name']}, not {model}")
    return config["model.name"], read_run(path)


def read_run(workdir: pathlib.Path) -> Pretrained:
    """The weights of a run of ours, with the preprocessing it was trained with."""
    variables = load_run_weights(str(workdir))
    return _known(workdir, variables)


def resumed(workdir: pathlib.Path) -> Pretrained:
    """What a run that goes on knows of the weights it started from."""
    return _known(workdir, None)


def _known(workdir: pathlib.Path, variables: dict[str, Any] | None) -> Pretrained:
    data = read_json(workdir / DATA) or {}
    preprocessing = data.get("preprocessing")
    classes = data.get("classes")
    return Pretrained(
        data.get("settings", {}),
        variables,
        Preprocessing.from_json(preprocessing) if preprocessing else None,
        tuple(classes) if classes else None,
        "a run of ours",
        np.load(workdir / MEAN) if (workdir / MEAN).is_file() else None,
    )


def with_preprocessing(
    config: ml_collections.ConfigDict, start: Pretrained | None, explicit: Collection[str]
) -> tuple[ml_collections.ConfigDict, tuple[np.ndarray, np.ndarray] | None]:
    """The config as the weights want it, and their mean and deviation, but for what the command line has set.

    Args:
      config: as the file and the command line have it.
      start: the weights.
      explicit: names of the fields that the command line has set.
    """
    if start is None or start.preprocessing is None:
        return config, None
    config = config.copy_and_resolve_references()
    wanted = start.preprocessing
    if config.init.weights and config.data.crop != "whole":
        fields = {
            "data.image_size": wanted.image_size,
            "eval.resize": wanted.resize,
            "eval.interpolation": wanted.interpolation,
        }
        for name, value in fields.items():
            if name not in explicit:
                section, field = name.split(".")
                config[section][field] = value
    resumes = start.variables is None  # With the same recipe, so with the mean that it was trained with.
    if not resumes and {"data.mean", "data.std", "data.mean_image"} & set(explicit):
        return config, None
    image, size = start.mean_image, config.data.image_size
    # Where images have another size the mean image's own mean takes its place.
    fits = image is not None and size in (0, image.shape[0])
    return config, (image if fits else np.array(wanted.mean), np.array(wanted.std))
