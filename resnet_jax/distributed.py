"""Devices: the mesh that training runs on, and arrays laid out on it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from resnet_jax.errors import UsageError

BATCH_AXIS = "data"  # The mesh axis that batches are split over.


def make_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of ``devices`` (all there are), over which batches are split and everything else is replicated."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """Axis ``axis`` of an array split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))


def shard_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices; ``axis`` is the one that counts examples."""
    sharding = batch_sharding(mesh, axis)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Puts the same host arrays on every device."""
    return jax.device_put(tree, replicated(mesh))


def check_batch(name: str, batch: int, mesh: jax.sharding.Mesh, parts: int = 1) -> None:
    """Raises a UsageError where ``batch`` examples don't divide over the devices (and ``parts`` of a batch)."""
    devices = mesh.size
    if batch % (devices * parts):
        step = devices * parts
        near = max(step, round(batch / step) * step)
        ways = f"{devices} devices" + (f" times optimizer.accumulate={parts}" if parts > 1 else "")
        raise UsageError(f"{name}={batch} does not divide over {ways}; {near} would")
