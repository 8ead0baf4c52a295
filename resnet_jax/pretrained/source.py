"""Weights by whatever names them: a file, a run of ours, a name of the hub, an address."""

from collections.abc import Collection
import dataclasses
import io
import re
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.buckets import Folder, absolute, exists, in_bucket
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import create_model
from resnet_jax.pretrained.fetch import fetch, is_remote
from resnet_jax.pretrained.load import Pretrained, read_pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.training.checkpoints import latest_step, load_run_weights
from resnet_jax.training.workdir import DATA, MEAN, read_json


def load_pretrained(
    source: str, model: str | None = None, dtype: str = "auto", **overrides: Any
) -> tuple[nn.Module, dict[str, Any], Preprocessing | None]:
    """A network with weights from elsewhere.

    Args:
      source: a file (``.safetensors``; torch's, Caffe's or Keras's), the work directory of a run of ours,
        ``hf:OWNER/NAME``, or an address with its checksum, ``https://...#sha256=DIGITS``.
      model: our name of the network, as ``resnet50_v1_5``; needed where several networks have the same arrays.
      dtype: compute dtype, as of ``create_model``.
      **overrides: attributes of the network, as of ``create_model``.

    Returns:
      ``(module, variables, preprocessing)``; ``module.apply(variables, images)`` gives logits of images normalised as
      ``preprocessing`` says.

    Raises:
      UsageError: nothing there, or its arrays are not exactly those of the network.
    """
    name, found = read_weights(source, model)
    module = create_model(name, found.num_classes, dtype, **(found.settings | overrides))
    return module, jax.tree.map(jnp.asarray, found.variables), found.preprocessing


def read_weights(
    source: str, model: str | None, tasks: Collection[str] = ("classification",)
) -> tuple[str, Pretrained]:
    """The network's name and its weights.

    Args:
      source: see ``load_pretrained``.
      model: our name of the network, or None where the source says it or only one has its arrays.
      tasks: what the network may have been trained for; files are of classification.

    Raises:
      UsageError: nothing there, no name, or weights of another network or task.
    """
    source = str(source)
    path = fetch(source)
    if not exists(path):
        hint = f"; of the hub it is hf:{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise UsageError(f"{source}: no such file or folder{hint}")
    if path.is_dir():
        config = read_json(path / "config.json")
        if config is None or "model.name" not in config:
            raise UsageError(f"{source}: no work directory of a run (no config.json of one in it)")
        if model not in (None, config["model.name"]):
            raise UsageError(f"{source}: holds {config['model.name']}, not {model}")
        task = config.get("task", "classification")
        if task not in tasks:
            raise UsageError(f"{source}: is a run of task={task}; here one of {' or '.join(sorted(tasks))} is needed")
        evaluated = latest_step(path) is None and (path / "summary.json").is_file()
        if evaluated and config.get("init.weights"):  # Others' weights were, and nothing was trained.
            return read_weights(config["init.weights"], config["model.name"], tasks)
        return config["model.name"], _read_run(path, config)
    if in_bucket(path):
        raise UsageError(f"{source}: of a bucket only the work directory of a run is read; copy the file")
    model, found = read_pretrained(path, model)
    if is_remote(source):
        found = dataclasses.replace(found, history=found.history | {"source": f"{source} ({found.title})"})
    return model, found


def resumed(workdir: Folder) -> Pretrained:
    """What a run that goes on knows of the weights it started from."""
    return _known(workdir, None)


def _read_run(workdir: Folder, config: dict[str, Any]) -> Pretrained:
    """The weights of a run of ours, with the preprocessing it was trained with."""
    found = _known(workdir, load_run_weights(str(workdir)))
    metrics = read_json(workdir / "summary.json") or {}
    history = {"source": f"{absolute(workdir).name} (a run of ours)", "metrics": metrics, "config": config}
    return dataclasses.replace(found, history=history, task=config.get("task", "classification"))


def _known(workdir: Folder, variables: dict[str, Any] | None) -> Pretrained:
    data = read_json(workdir / DATA) or {}
    mean_image = np.load(io.BytesIO((workdir / MEAN).read_bytes())) if (workdir / MEAN).is_file() else None
    return Pretrained.of_run(data | {"mean_image": mean_image}, variables)
