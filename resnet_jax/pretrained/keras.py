"""Keras's HDF5 files: whole models, the published weights of its applications, and ``.weights.h5``."""

from collections.abc import Iterator
import pathlib
from typing import Any

import numpy as np

from resnet_jax.errors import UsageError

# What a layer's arrays are where the file only counts them, by how many there are.
_COUNTED = {
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}


def read_h5(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a network, named ``layer/kernel``, ``layer/gamma``, ...

    Raises:
      UsageError: it can't be read.
    """
    try:
        import h5py
    except ImportError as error:
        raise UsageError(f"{path}: Keras's files need h5py: pip install 'resnet_jax[keras]'") from error
    try:
        with h5py.File(path) as file:
            if "layers" in file:
                return _once(path, _counted(file["layers"], h5py.Dataset))
            return _once(path, _named(file.get("model_weights", file), h5py.Dataset))
    except (OSError, KeyError, RuntimeError) as error:
        raise UsageError(f"{path}: not a whole HDF5 file ({error})") from error


def _once(path: pathlib.Path, arrays: Iterator[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, array in arrays:
        if name in found:
            raise UsageError(f"{path}: has {name} twice, so that nobody can say which is meant")
        found[name] = array
    return found


def _named(group: Any, dataset: type) -> Iterator[tuple[str, np.ndarray]]:
    """``layer/layer/kernel:0``: the layer's name stands before the array's."""
    items: list[tuple[str, Any]] = []
    group.visititems(lambda name, item: items.append((name, item)))
    for name, item in items:
        if isinstance(item, dataset):
            yield "/".join(name.removesuffix(":0").split("/")[-2:]), item[()]


def _counted(group: Any, dataset: type) -> Iterator[tuple[str, np.ndarray]]:
    """``conv2d_7/vars/0``: groups are named by kind and number, and hold the layer's own name."""
    for layer in group.values():
        if "layers" in layer:  # A model within the model.
            yield from _counted(layer["layers"], dataset)
        found = [item for item in layer.get("vars", {}).values() if isinstance(item, dataset)]
        if found:
            name = layer["vars"].attrs["name"]
            names = _COUNTED.get(len(found), tuple(map(str, range(len(found)))))
            for item in found:
                yield f"{name}/{names[int(item.name.rsplit('/', 1)[-1])]}", item[()]
