"""How long an all-reduce takes on paper: rings over the links of a torus, and between slices the network."""

from collections.abc import Sequence
import dataclasses
import math

from resnet_jax.planning.chips import Chip

HOP = 1e-6  # Seconds from a chip to its neighbour, beside the bytes: an assumption, and a generous one.
NETWORK_DELAY = 50e-6  # Seconds from slice to slice, likewise.

ASSUMPTIONS = (
    "every chip does what the compiled step does on one, whatever their number (the same images a chip)",
    "an all-reduce moves 2 (n - 1) / n of its bytes over all of a chip's links at once, at their full speed",
    f"a hop takes {HOP * 1e6:.0f} us, a message between slices {NETWORK_DELAY * 1e6:.0f} us",
    "an axis that does not close to a ring has half of a ring's speed",
    "slices beyond the largest add their sums up over the data centre's network, each chip its share",
    "input is never waited for",
)


def slice_shape(chip: Chip, chips: int) -> tuple[int, ...]:
    """The shape nearest to a cube (square) of a slice of ``chips`` chips, a power of two: 128 -> (8, 16)."""
    doublings = chips.bit_length() - 1
    least, more = divmod(doublings, chip.axes)
    return tuple(2 ** (least + (axis >= chip.axes - more)) for axis in range(chip.axes))


def all_reduce_seconds(chip: Chip, shape: Sequence[int], size: float, collectives: int = 1, slices: int = 1) -> float:
    """Seconds that ``collectives`` all-reduces of ``size`` bytes together take; infinite where a speed is not known.

    Args:
      chip: its links.
      shape: chips along each axis of a slice.
      size: bytes that every chip has.
      collectives: how many exchanges they are in.
      slices: how many such slices there are, without links between them.
    """
    chips = math.prod(shape)
    lanes = sum(2 if length % chip.wraps == 0 else 1 for length in shape if length > 1)
    seconds, hops = 0.0, sum(2 * (length - 1) for length in shape)
    if chips > 1:
        seconds += 2 * (chips - 1) / chips * size / (lanes * chip.link) + collectives * hops * HOP
    if slices > 1:
        speed = chip.network * chips if chip.network else 0.0
        seconds += 2 * (slices - 1) / slices * size / speed if speed else math.inf
        seconds += collectives * 2 * (slices - 1) * NETWORK_DELAY
    return seconds


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A row of the scaling table.

    Attributes:
      chips: how many.
      shape: of a slice, as 16x16, and how many of them where there are several.
      all_reduce_seconds: as of ``all_reduce_seconds``; None where it is not known.
      images_per_second, efficiency: the step's computation and exchange one after the other; efficiency is of as many
        chips without exchange, from 0 to 1.
      overlapped_images_per_second, overlapped_efficiency: the shorter of the two behind the longer, the best there is.
    """

    chips: int
    shape: str
    all_reduce_seconds: float | None
    images_per_second: float | None
    efficiency: float | None
    overlapped_images_per_second: float | None
    overlapped_efficiency: float | None


def scaling_table(
    chip: Chip, compute_seconds: float, images: int, size: float, collectives: int, least: int = 8, most: int = 2048
) -> list[Scaled]:
    """The table for powers of two from ``least`` to ``most`` chips.

    Args:
      chip: the kind.
      compute_seconds: a step's computation, seconds.
      images: a chip and step.
      size: bytes of a step's exchanges.
      collectives: how many exchanges.
    """
    rows, chips = [], least
    while chips <= most:
        slices = max(1, chips // chip.slice)
        shape = slice_shape(chip, chips // slices)
        exchange = all_reduce_seconds(chip, shape, size, collectives, slices)
        name = "x".join(map(str, shape)) if slices == 1 else f"{slices} of {'x'.join(map(str, shape))}"
        if math.isinf(exchange):
            rows.append(Scaled(chips, name, None, None, None, None, None))
        else:
            both, longer = compute_seconds + exchange, max(compute_seconds, exchange)
            rows.append(
                Scaled(chips, name, exchange, chips * images / both, compute_seconds / both,
                       chips * images / longer, compute_seconds / longer)
            )  # fmt: skip
        chips *= 2
    return rows
