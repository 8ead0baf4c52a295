"""What a run starts from, and what those weights say of the config."""

from collections.abc import Collection
import pathlib

import ml_collections
import numpy as np

from resnet_jax.errors import UsageError
from resnet_jax.pretrained.fetch import is_remote
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.source import read_weights


def starting_weights(config: ml_collections.ConfigDict) -> Pretrained | None:
    """What ``init.weights`` names; None where it is empty.

    Raises:
      UsageError: nothing there, or not weights of ``model.name``.
    """
    source = config.init.weights
    if source:
        if not is_remote(source) and not pathlib.Path(source).expanduser().exists():
            raise UsageError(f"init.weights={source}: no such file or folder")
        return read_weights(source, config.model.name, {"classification", config.task})[1]
    if config.init.head == "replace":
        raise UsageError("init.head=replace goes with init.weights: set --config.init.weights=FILE")
    return None


Given = tuple[np.ndarray | None, np.ndarray | None]  # Mean and deviation; None is left to the config.


def with_preprocessing(
    config: ml_collections.ConfigDict, start: Pretrained | None, explicit: Collection[str]
) -> tuple[ml_collections.ConfigDict, Given]:
    """The config as the weights want it, and their mean and deviation, but for what the command line has set.

    Args:
      config: as the file and the command line have it.
      start: the weights.
      explicit: names of the fields that the command line has set.
    """
    if start is None or start.preprocessing is None:
        return config, (None, None)
    config = config.copy_and_resolve_references()
    wanted = start.preprocessing
    if config.init.weights:
        fields = {"eval.interpolation": wanted.interpolation}
        # Images on the devices are resized once, for training and evaluation; localization always crops.
        if config.task == "classification" and config.data.crop == "whole":
            fields["data.interpolation"] = wanted.interpolation
        else:
            resize = wanted.image_size if wanted.resize is None else wanted.resize
            fields |= {"data.image_size": wanted.image_size, "eval.resize": resize}
        for name, value in fields.items():
            if name not in explicit:
                section, field = name.split(".")
                config[section][field] = value
    image, size = wanted.mean_image, config.data.image_size
    # Where images have another size the mean image's own mean takes its place.
    fits = image is not None and size in (0, image.shape[0])
    mean, std = (image if fits else np.array(wanted.mean)), np.array(wanted.std)
    if start.variables is None:  # The run goes on with what it was trained with.
        return config, (mean, std)
    own_mean = {"data.mean", "data.mean_image"} & set(explicit)
    return config, (None if own_mean else mean, None if "data.std" in explicit else std)
