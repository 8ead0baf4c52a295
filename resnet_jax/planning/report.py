"""A plan as text."""

from collections.abc import Sequence

from resnet_jax.planning.chips import GIB
from resnet_jax.planning.estimate import Estimate
from resnet_jax.planning.links import ASSUMPTIONS, Scaled

MODEL = "a cost model, not a measurement: the compiler's cycles over the clock, exchanges by their bytes over the links"


def describe(plan: Estimate, batch_norm: str) -> list[str]:
    """The plan in lines; what is unknown is left out."""
    lines = [
        f"{plan.model} on {plan.topology}: {_count(plan.chips, 'chip')}, {plan.batch_per_device} images a device,"
        f" {plan.batch_size:,} a step"
    ]
    if not plan.fits:
        return [*lines, _does_not_fit(plan, batch_norm)]
    if plan.memory_bytes is not None:
        limit, needed = plan.memory_limit_bytes, f"{plan.memory_bytes / GIB:.2f}"
        lines.append(
            f"memory       {needed} of {limit / GIB:.1f} GiB a chip ({100 * plan.memory_bytes / limit:.0f}%)"
            if limit
            else f"memory       {needed} GiB a chip"
        )
    if plan.flops is not None:
        accessed = plan.bytes_accessed_per_image
        read = "" if accessed is None else f"; {accessed / 1e6:.0f} MB of memory read and written an image"
        lines.append(f"arithmetic   {plan.flops / 1e9:,.1f} GFLOP a device and step{read}")
    if plan.collectives is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.collectives_by_kind.items()))
        moved = f", {plan.collective_bytes / 1e6:.1f} MB ({kinds})" if plan.collectives else ""
        lines.append(f"collectives  {plan.collectives} a step{moved}")
    if plan.images_per_second is not None:
        lines += [
            f"step         {1e3 * plan.compute_seconds:.2f} ms ({plan.estimated_cycles:,} cycles) and"
            f" {1e3 * plan.collective_seconds:.2f} ms of exchange",
            f"speed        {plan.images_per_second:,.0f} images/s, {plan.images_per_second / plan.chips:,.0f} a chip;"
            f" {100 * plan.peak_share:.0f}% of the bfloat16 peak",
        ]
    if plan.hours is not None:
        cost = "" if plan.cost is None else f", cost {plan.cost:,.2f}"
        lines.append(f"training     {plan.train_images:,} images in {plan.hours:,.2f} hours{cost}")
    lines.append(f"compiler     {plan.trace_seconds:.1f} s to trace, {plan.compile_seconds:.0f} s to compile")
    return [*lines, MODEL] if plan.images_per_second is not None else lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _does_not_fit(plan: Estimate, batch_norm: str) -> str:
    needs = "more" if plan.memory_bytes is None else f"{plan.memory_bytes / GIB:.1f} GiB"
    has = "there is" if plan.memory_limit_bytes is None else f"the {plan.memory_limit_bytes / GIB:.1f} GiB a chip has"
    found = plan.largest_batch_per_device
    if found is None:
        largest = "which smaller batch does is not known"
    elif found:
        largest = f"the largest found that does is --batch_per_chip={found}"
        largest += f" ({batch_norm} kept whole)" if batch_norm.startswith("group:") else ""
    else:
        largest = "no smaller batch was found that does"
    return f"does not fit: needs {needs} of {has}; {largest}"


def describe_scaling(rows: Sequence[Scaled]) -> list[str]:
    """The scaling table, and what it assumes."""
    lines = [
        f"{'chips':>6}  {'slice':<12} {'all-reduce':>10}  {'one after the other':>22}  {'overlapped':>22}",
        f"{'':>6}  {'':<12} {'ms':>10}  {'images/s efficiency':>22}  {'images/s efficiency':>22}",
    ]
    for row in rows:
        if row.all_reduce_seconds is None:
            lines.append(f"{row.chips:>6}  {row.shape:<12} unknown: the speed between slices is not published")
            continue
        one = f"{row.images_per_second:,.0f} {100 * row.efficiency:>9.1f}%"
        other = f"{row.overlapped_images_per_second:,.0f} {100 * row.overlapped_efficiency:>9.1f}%"
        lines.append(f"{row.chips:>6}  {row.shape:<12} {1e3 * row.all_reduce_seconds:>10.2f}  {one:>22}  {other:>22}")
    return [*lines, "Assumed:", *(f"- {assumption}" for assumption in ASSUMPTIONS)]
