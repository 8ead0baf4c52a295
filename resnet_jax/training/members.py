"""Several runs that differ in the seed alone, trained in one program: a small network alone does not fill a chip."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from resnet_jax import distributed
from resnet_jax.distributed import BATCH_AXIS

SEED = "seed"  # The one resident array that is each member's own.


def places(members: int, devices: int) -> list[int]:
    """Which member is computed at each place: as many places on every device, the last ones repeating the first."""
    return [place % members for place in range(-(-members // devices) * devices)]


def make_members_step(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], mesh: jax.sharding.Mesh, members: int
) -> Callable[[Sequence[Any], Any, Any], tuple[list[Any], dict[str, jax.Array]]]:
    """The step of several members, from that of one; each device works on whole members.

    Every device has all states before and after: that is what evaluation and checkpoints take. So this pays for
    networks that are small, and for many steps at once.

    Args:
      step: ``step(state, batch, resident) -> state, metrics``, of one step or of several.
      mesh: the devices, in force (``jax.set_mesh``).
      members: how many.

    Returns:
      ``step(states, batches, resident) -> states, metrics``: a sequence of states; what ``stack_members`` has made of
      the batches and of the seeds in ``resident``. Metrics have the members on their first axis.
    """
    where = places(members, mesh.size)

    def together(states: Sequence[Any], batches: Any, resident: Any) -> tuple[list[Any], dict[str, jax.Array]]:
        own = {name: name == SEED for name in resident}
        apply = jax.vmap(step, in_axes=(0, 0, {name: 0 if mine else None for name, mine in own.items()}))
        if mesh.size > 1:
            split = PartitionSpec(BATCH_AXIS)
            shared = {name: split if mine else PartitionSpec() for name, mine in own.items()}
            # Devices exchange nothing in there, so there is nothing to check.
            apply = jax.shard_map(apply, in_specs=(split, split, shared), out_specs=split, check_vma=False)
        stacked = jax.tree.map(lambda *leaves: jnp.stack([leaves[member] for member in where]), *states)
        stacked, metrics = apply(stacked, batches, resident)
        after = [jax.tree.map(lambda leaf, member=member: leaf[member], stacked) for member in range(members)]
        return after, jax.tree.map(lambda leaf: leaf[:members], metrics)

    return together


def stack_members(mesh: jax.sharding.Mesh, arrays: Sequence[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    """Each member's host arrays, all of one shape, on the devices that work on it: [...] of each -> [places, ...]."""
    where = places(len(arrays), mesh.size)
    stacked = {name: np.stack([arrays[member][name] for member in where]) for name in arrays[0]}
    return distributed.shard_batch(mesh, stacked)
