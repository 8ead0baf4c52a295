"""Runs of identical blocks: one array each for all of a run, and the blocks' own arrays by their names.

A deep net is stored as ``stage1/block2_to_200/conv1/kernel`` [199, 3, 3, 16, 16], so that what works on it (network,
optimizer, checkpoint) compiles and runs as one of few layers does. At the edges (imported and exported weights,
analysis) it is ``stage1/block2/conv1/kernel`` [3, 3, 16, 16] and so on, as of a net of few blocks.
"""

from collections.abc import Iterable, Mapping
import re
from typing import Any

import jax
import numpy as np

# Blocks that a run has at least: storing few together gains nothing, and nets people load by hand keep plain names.
SHORTEST_RUN = 8
_RUN = re.compile(r"block(\d+)_to_(\d+)")


def run_name(first: int, last: int) -> str:
    """The name of the blocks ``first`` to ``last`` of a stage, stored together."""
    return f"block{first}_to_{last}"


def _blocks_of(name: str) -> range | None:
    """The numbers of the blocks that are stored together under this name; None of any other name."""
    found = _RUN.fullmatch(name)
    return range(int(found[1]), int(found[2]) + 1) if found else None


def in_run(names: Iterable[str]) -> bool:
    """Whether the array under these names, one in another, is a whole run's, with a leading axis of blocks."""
    return any(_RUN.fullmatch(name) for name in names)


def per_block(tree: Any) -> Any:
    """A tree of arrays with each block under its own name, ``block2``, ``block3``, ...; other names stay."""
    if not isinstance(tree, Mapping):
        return tree
    blocks: dict[str, Any] = {}
    for name, part in tree.items():
        numbers = _blocks_of(name)
        if numbers is None:
            blocks[name] = per_block(part)
        else:
            blocks |= {f"block{number}": jax.tree.map(lambda x, i=i: x[i], part) for i, number in enumerate(numbers)}
    return blocks


def stack(tree: Any, like: Any) -> Any:
    """The opposite of ``per_block``: NumPy arrays stored as ``like`` stores them.

    Args:
      tree: arrays under the blocks' own names; parts may lack, but not of a run.
      like: a tree with the wanted names.
    """
    if not isinstance(like, Mapping) or not isinstance(tree, Mapping):
        return tree
    stacked = dict(tree)
    for name, part in like.items():
        numbers = _blocks_of(name)
        if numbers is not None:
            blocks = [stacked.pop(f"block{number}") for number in numbers]
            stacked[name] = jax.tree.map(lambda *arrays: np.stack(arrays), *blocks)
        elif name in stacked:
            stacked[name] = stack(stacked[name], part)
    return stacked
