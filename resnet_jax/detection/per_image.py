"""Functions of one image, applied to the images of a batch wherever they lie."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from resnet_jax.distributed import BATCH_AXIS


def for_each_image(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays of one image -> the same of batches of them, on a first axis of every array.

    Over several devices (``jax.set_mesh``) each works on its own images: loops whose length depends on the data, as
    NMS's, would else wait for each other at every round. The batch must divide over them.
    """
    mapped = jax.vmap(function)
    if dict(jax.sharding.get_abstract_mesh().shape).get(BATCH_AXIS, 1) == 1:
        return mapped
    split = PartitionSpec(BATCH_AXIS)
    return jax.shard_map(mapped, in_specs=split, out_specs=split)
