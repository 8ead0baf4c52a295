"""Which batch fits into a device's memory: what a compiled step says of it, and what follows for other sizes."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import re
from typing import Any

import jax

from resnet_jax.planning.chips import GIB

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SHARE = 0.98  # Of the memory that is left, for what a straight line from one size to another does not know.


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device that a step needs.

    ``fixed`` are its arguments (parameters, optimizer, data that stays) and program; ``total`` is all of it, with
    what grows with the examples that are worked through at once.
    """

    fixed: int
    total: int


def memory_of(compiled: Any) -> Memory | None:
    """What a compiled step needs (``jax.stages.Compiled``); None where the compiler does not say."""
    try:
        found = compiled.memory_analysis()
    except NotImplementedError:  # JAX's word for a platform whose compiler does not say.
        return None
    if found is None:
        return None
    fixed = found.argument_size_in_bytes + found.generated_code_size_in_bytes
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes  # Results that take no argument's place.
    return Memory(fixed, fixed + fresh + found.temp_size_in_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a JAX error says that a device's memory does not do."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def memory_of_error(error: BaseException, fixed: int) -> Memory | None:
    """What the TPU compiler says that a step which does not fit would need; None if this error does not say.

    Args:
      error: ``Used 20.5G of 15.75G hbm``, or ``required for HLO temporaries (16.36G)``, a lower bound.
      fixed: bytes of the step's arguments.
    """
    everything = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", str(error))
    temporary = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", str(error))
    match = everything or temporary
    if not match:
        return None
    needed = round(float(match[1]) * _UNITS[match[2]])
    return Memory(min(fixed, needed), needed) if everything else Memory(fixed, fixed + needed)


def argument_bytes(arguments: Any) -> int:
    """What a tree of arrays (or their shapes) takes of each device it lies on, bytes."""

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(arguments))


def group_of(batch_norm: str) -> int:
    """Examples that BN takes together whatever the batch: N for ``group:N``, else 1."""
    name, _, size = batch_norm.partition(":")
    return int(size) if name == "group" and size.isdecimal() else 1


def unit_of(group: int, at_once: int, devices: int, accumulate: int) -> int:
    """The numbers of examples that a device may take at once, BN groups kept whole, are multiples of this.

    Groups that span devices stay whole in the batch; parts of a batch have them whole on the device.
    """
    return group if accumulate > 1 or at_once % group == 0 else math.lcm(group, devices) // devices


def advise(
    memory: Memory | None,
    limit: int | None,
    batch_size: int,
    devices: int,
    accumulate: int,
    batch_norm: str,
    in_parts: bool = True,
    remat: bool = False,
) -> str:
    """One line on what fits where a step does not: fewer images, or more parts, with BN's groups unchanged.

    Args:
      memory: what the present step needs (``memory_of``); None if it is not known.
      limit: bytes that a device has to give, likewise. Where the two explain nothing, half is advised.
      batch_size: images a step over all devices together.
      devices: how many they are.
      accumulate: ``optimizer.accumulate``.
      batch_norm: ``model.batch_norm``; the groups of ``group:N`` stay whole.
      in_parts: whether the task can work a batch through in parts.
      remat: whether the network's blocks can be computed again in the backward pass, and are not yet.

    Returns:
      A sentence that names the ``optimizer.accumulate`` and ``batch_size`` that would do, or says that neither can.
    """
    own, at_once, group = batch_size // devices, batch_size // (devices * accumulate), group_of(batch_norm)
    if memory and limit and memory.total > limit:
        needs = f"{at_once} images at once on a device need {memory.total / GIB:.1f} of {limit / GIB:.1f} GiB"
        grown = (memory.total - memory.fixed) / at_once
        fitting = _SHARE * (limit - memory.fixed) / grown if grown else at_once
    else:
        needs = f"{at_once} images at once on a device are too many"
        fitting = at_once / 2
    most = int(min(fitting, at_once - 1))
    unit = unit_of(group, at_once, devices, accumulate)
    smaller = most // unit * unit
    divisors = (n for n in range(accumulate + 1, own + 1) if own % n == 0)
    parts = next((n for n in divisors if own // n <= most and own // n % group == 0), None)
    ways = []
    if parts and in_parts:
        changed = {"global": ", over which BN averages", "per_device": ", over which BN averages"}.get(batch_norm, "")
        ways.append(f"optimizer.accumulate={parts} (the same batch, {own // parts} images at once{changed})")
    if smaller > 0:
        ways.append(f"batch_size={smaller * devices * accumulate}")
    less = "; model.remat=True needs less of each image" if remat else ""
    if ways:
        return f"{needs}; would fit: {' or '.join(ways)}{less}"
    least = f"a BN group of {group} images" if group > 1 else "one image"
    return f"{needs}; even {least} on a device is too much{less}"


def explain(
    error: BaseException,
    step: Any,
    arguments: Sequence[Any],
    limit: int | None,
    batch_size: int,
    devices: int,
    accumulate: int,
    batch_norm: str,
    in_parts: bool = True,
    remat: bool = False,
) -> str:
    """``advise`` for a jitted step that a device's memory was too small for, when it was compiled or when it ran.

    Args:
      error: for which ``is_out_of_memory``.
      step: of ``jax.jit``.
      arguments: what it was called with; they may be gone (donated).
      limit: and the rest as in ``advise``.
    """
    memory = memory_of_error(error, argument_bytes(arguments))
    if memory is None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tuple(arguments))
        try:
            memory = memory_of(step.lower(*shapes).compile())
        except jax.errors.JaxRuntimeError:  # Out of memory again.
            memory = None
    return advise(memory, limit, batch_size, devices, accumulate, batch_norm, in_parts, remat)


def largest_that_fits(fits: Callable[[int], bool], start: int, unit: int, tries: int = 6) -> Iterator[tuple[int, bool]]:
    """Looks for the largest multiple of ``unit`` that fits, by halves: near its limit the compiler trades time for
    memory, so that no line through smaller sizes says where that is.

    Args:
      fits: whether a size does.
      start: a size that does not.
      unit: sizes are multiples of it.
      tries: how often ``fits`` is asked at most.

    Yields:
      Each size that was tried, and whether it fits: the largest that does is the answer.
    """  # fmt: skip
    low, high = 0, -(-start // unit)
    for _ in range(tries):
        if high - low <= 1:
            return
        middle = (low + high) // 2
        good = fits(middle * unit)
        yield middle * unit, good
        low, high = (middle, high) if good else (low, middle)
