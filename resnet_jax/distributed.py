"""Devices: the mesh that training runs on, and arrays laid out on it."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from resnet_jax.errors import UsageError

BATCH_AXIS = "data"  # The mesh axis that batches are split over.


def make_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of ``devices`` (all there are), over which batches are split and everything else is replicated.

    They are in the order of their processes, so that a process's part of a batch is one run of consecutive examples.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return jax.sharding.Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def count_devices() -> int:
    """Over how many devices a batch is split, by the mesh in force (``jax.set_mesh``).

    One without a mesh, and in what each device runs by itself (``jax.shard_map``).
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if BATCH_AXIS in mesh.manual_axes else dict(mesh.shape).get(BATCH_AXIS, 1)


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: what the mesh in force is of, even if it is only compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device and device.platform else jax.default_backend()


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
    """Puts the same host arrays on every device; all processes have the same."""
    put = partial(jax.make_array_from_process_local_data, replicated(mesh))
    return jax.tree.map(lambda array: put(np.asarray(array)), tree)


@cache
def _gathering(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def gather(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """The whole of arrays that are split over the devices, on every device: each process can then look at them."""
    return _gathering(mesh)(tree)


def own_rows(batch: int) -> slice:
    """Which rows of a batch over all devices are this process's."""
    count = batch // jax.process_count()
    return slice(jax.process_index() * count, (jax.process_index() + 1) * count)


def leads() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def from_leader(value: int) -> int:
    """The leading process's ``value`` (a small number, or a bool as one) in every process; waits for all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(what: str) -> None:
    """Waits until every process has come here; ``what`` tells this place from others."""
    multihost_utils.sync_global_devices(what)


def check_batch(name: str, batch: int, mesh: jax.sharding.Mesh, parts: int = 1) -> None:
    """Raises a UsageError where ``batch`` examples don't divide over the devices (and ``parts`` of a batch)."""
    devices = mesh.size
    if batch % (devices * parts):
        step = devices * parts
        near = max(step, round(batch / step) * step)
        ways = f"{devices} devices" + (f" times optimizer.accumulate={parts}" if parts > 1 else "")
        raise UsageError(f"{name}={batch} does not divide over {ways}; {near} would")
