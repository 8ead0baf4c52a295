"""Compiles a step for devices that nobody has to own, and says what it will need and how fast it will be."""

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import jax

from resnet_jax.planning import flops as flops_lib, hlo
from resnet_jax.planning.links import all_reduce_seconds, slice_shape
from resnet_jax.planning.memory import Memory, argument_bytes, is_out_of_memory, memory_of, memory_of_error
from resnet_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, of one device; None is unknown.

    Attributes:
      fits: whether it fits into a device's memory.
      memory: bytes of a device.
      flops: floating-point operations a step.
      bytes_accessed: of a device's memory a step.
      collectives: how many of each kind a step.
      collective_bytes: of all of them.
      estimated_cycles: of a core's clock a step.
      trace_seconds, compile_seconds: how long Python and the compiler took.
    """

    fits: bool
    memory: Memory | None
    flops: int | None = None
    bytes_accessed: int | None = None
    collectives: dict[str, int] | None = None
    collective_bytes: int | None = None
    estimated_cycles: int | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None


def compile_step(
    step: Callable[..., Any],
    arguments: Sequence[Any],
    memory_limit: int | None,
    progress: Callable[[str], None] = lambda _: None,
) -> Compiled:
    """Compiles ``step``, whose first argument is donated, and reads what came of it.

    Args:
      step: a pure function.
      arguments: trees of ``jax.ShapeDtypeStruct`` with shardings over the devices to compile for.
      memory_limit: bytes that a device has; None if unknown.
      progress: is told what takes time.
    """
    start = time.monotonic()
    lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
    traced = time.monotonic()
    progress(f"traced in {traced - start:.1f} s; compiling (deep networks for TPUs take minutes)")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Compiled(False, memory_of_error(error, argument_bytes(arguments)), trace_seconds=traced - start,
                        compile_seconds=time.monotonic() - traced)  # fmt: skip
    seconds = time.monotonic() - traced
    progress(f"compiled in {seconds:.0f} s")
    memory, costs, program = memory_of(compiled), compiled.cost_analysis() or {}, hlo.parse(compiled.as_text())
    found = hlo.collectives(program)
    kinds: Counter[str] = Counter()
    for collective in found:
        kinds[collective.kind] += collective.times
    counted, repeated = costs.get("flops"), flops_lib.repeated_flops(program)
    return Compiled(
        fits=not (memory and memory_limit) or memory.total <= memory_limit,
        memory=memory,
        flops=None if counted is None else int(counted) + repeated,
        # What convolutions in loops read over and over is in no analysis; loops without (random numbers) are small.
        bytes_accessed=None if repeated or "bytes accessed" not in costs else int(costs["bytes accessed"]),
        collectives=dict(kinds),
        collective_bytes=sum(collective.bytes * collective.times for collective in found),
        estimated_cycles=hlo.estimated_cycles(program),
        trace_seconds=traced - start,
        compile_seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A plan in figures; what is None is unknown.

    Attributes:
      model, topology: their names.
      chips, devices: how many; a v3 chip is two JAX devices, any other one.
      batch_size: images a step over all devices.
      batch_per_device: images a step of one of them.
      fits: whether the step fits into memory.
      memory_bytes, memory_limit_bytes: of a chip: what the step needs, and what there is.
      flops: floating-point operations of a device and step, as XLA counts them.
      bytes_accessed_per_image: of the device's memory.
      collectives, collectives_by_kind: exchanges of a step.
      collective_bytes: what they move, of a device and step.
      estimated_cycles: the compiler's, of a device and step.
      compute_seconds, collective_seconds: of a step; the latter by ``links``.
      images_per_second: of all chips, one after the other of these.
      peak_share: of the chips' bfloat16 peak, from 0 to 1.
      train_images: images that the config trains on, all epochs together.
      hours, cost: for these, on all chips; the cost in the unit of the price.
      largest_batch_per_device: where the step does not fit, the largest found that does; 0: none.
      trace_seconds, compile_seconds: how long Python and the compiler took.
    """

    model: str
    topology: str
    chips: int
    devices: int
    batch_size: int
    batch_per_device: int
    fits: bool
    memory_bytes: int | None
    memory_limit_bytes: int | None
    flops: int | None
    bytes_accessed_per_image: float | None
    collectives: int | None
    collectives_by_kind: dict[str, int] | None
    collective_bytes: int | None
    estimated_cycles: int | None
    compute_seconds: float | None
    collective_seconds: float | None
    images_per_second: float | None
    peak_share: float | None
    train_images: int | None
    hours: float | None
    cost: float | None
    largest_batch_per_device: int | None
    trace_seconds: float | None
    compile_seconds: float | None


def estimate(
    model: str,
    topology: Topology,
    batch_size: int,
    compiled: Compiled,
    train_images: int | None,
    price: float | None = None,
    largest: int | None = None,
) -> Estimate:
    """What a compiled step comes to on a topology.

    Args:
      model: its name.
      topology: what was compiled for.
      batch_size: images a step.
      compiled: what the compiler says.
      train_images: how many the training sees; None if unknown.
      price: of a chip and hour; None if unknown.
      largest: batch per device that was found to fit where this one does not.
    """
    devices, chip = len(topology.devices), topology.chip
    a_chip = devices // topology.chips
    limit = topology.memory_limit
    compute = exchange = rate = share = hours = cost = None
    if chip and compiled.estimated_cycles and compiled.fits:
        compute = compiled.estimated_cycles / chip.clock
        exchange = all_reduce_seconds(
            chip, topology.shape or slice_shape(chip, topology.chips), compiled.collective_bytes,
            sum(compiled.collectives.values()),
        )  # fmt: skip
        rate = batch_size / (compute + exchange)
        share = compiled.flops and compiled.flops * a_chip / ((compute + exchange) * chip.peak)
        hours = train_images and train_images / rate / 3600
        cost = None if hours is None or price is None else hours * topology.chips * price
    accessed = compiled.bytes_accessed
    return Estimate(
        model=model,
        topology=topology.name,
        chips=topology.chips,
        devices=devices,
        batch_size=batch_size,
        batch_per_device=batch_size // devices,
        fits=compiled.fits,
        memory_bytes=compiled.memory and compiled.memory.total * a_chip,
        memory_limit_bytes=limit and limit * a_chip,
        flops=compiled.flops,
        bytes_accessed_per_image=None if accessed is None else accessed * devices / batch_size,
        collectives=None if compiled.collectives is None else sum(compiled.collectives.values()),
        collectives_by_kind=compiled.collectives,
        collective_bytes=compiled.collective_bytes,
        estimated_cycles=compiled.estimated_cycles,
        compute_seconds=compute,
        collective_seconds=exchange,
        images_per_second=rate,
        peak_share=share,
        train_images=train_images,
        hours=hours,
        cost=cost,
        largest_batch_per_device=largest,
        trace_seconds=compiled.trace_seconds,
        compile_seconds=compiled.compile_seconds,
    )
