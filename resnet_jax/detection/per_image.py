"""Functions of one image, applied to the images of a batch wherever they lie."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from resnet_jax.distributed import BATCH_AXIS, count_devices


def for_each_image(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays of one image -> the same of batches of them, on a first axis of every array.

    Over several devices (``jax.set_mesh``) each works on its own images: loops whose length depends on the data, as
    NMS's, would else wait for each other at every round. A batch that does not divide over them, as the single image
    of an initialisation, is not split.
    """
    mapped, devices = jax.vmap(function), count_devices()
    split = PartitionSpec(BATCH_AXIS)

    def apply(*arrays: Any) -> Any:
        if devices == 1 or len(jax.tree.leaves(arrays)[0]) % devices:
            return mapped(*arrays)
        return jax.shard_map(mapped, in_specs=split, out_specs=split)(*arrays)

    return apply
