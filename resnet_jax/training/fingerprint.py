"""Fingerprints of arrays: a few bytes by which a stored array is known again, or found to have changed."""

from typing import Any

import jax
from jax import numpy as jnp
import numpy as np


def fingerprints(tree: Any) -> dict[str, str]:
    """A fingerprint of every array, computed where the array lies.

    It is the sum of (2 i + 1) word_i mod 2^32 over the array's words, bit patterns of at most 32 bits each. Odd factors
    have inverses, so a change of any one word changes it; sums that wrap around are the same in every order, and so for
    every number of devices.

    Args:
      tree: of JAX arrays (replicated ones may lie on several processes' devices) or NumPy arrays.

    Returns:
      Path -> what is there, as in ``params/head/kernel -> float32[64,10] 0a1b2c3d``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_host_sum(x) if isinstance(x, np.ndarray) else _device_sum(x) for _, x in leaves])
    return {_name(path): f"{_layout(x)} {int(total):08x}" for (path, x), total in zip(leaves, sums, strict=True)}


def layouts(tree: Any) -> dict[str, str]:
    """Path -> data type and shape of every array (or of what only says so), as ``float32[64,10]``."""
    return {_name(path): _layout(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def other_layout(found: dict[str, str], expected: dict[str, str]) -> str:
    """Says where arrays differ in more than their values; empty where they don't.

    Args:
      found: fingerprints or layouts of what there is.
      expected: of what there should be.
    """
    for name in sorted(found.keys() | expected.keys()):
        is_there, should_be = (tree.get(name, "absent").split(" ")[0] for tree in (found, expected))
        if is_there != should_be:
            return f"{name} is {is_there}, not {should_be}"
    return ""


def _name(path: tuple[Any, ...]) -> str:
    # Attributes, keys and positions alike: Orbax gives dictionaries and lists for what was a dataclass or a tuple.
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _layout(x: Any) -> str:
    return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


# One small computation a shape, and not one for all arrays together: that takes XLA thrice as long to compile.
@jax.jit
def _device_sum(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")  # 64-bit types become pairs.
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32).reshape(-1)
    odd = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(odd * words, dtype=jnp.uint32)


def _host_sum(x: np.ndarray) -> np.uint32:
    words = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(np.uint32)
    odd = 2 * np.arange(words.size, dtype=np.uint32) + 1
    return np.sum(odd * words, dtype=np.uint32)
