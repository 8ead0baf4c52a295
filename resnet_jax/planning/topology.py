"""Devices to compile for: those here, or a TPU slice's that nobody has to own."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import re

import jax
from jax.experimental import topologies

from resnet_jax.errors import UsageError, did_you_mean
from resnet_jax.planning.chips import CHIPS, Chip, chip_of

LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Topology:
    """What is compiled for.

    Attributes:
      name: as it was asked for.
      devices: JAX devices.
      chip: their kind, where the table has it.
      shape: chips along each axis, where that is known.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None
    shape: tuple[int, ...] | None

    @property
    def chips(self) -> int:
        """How many chips; one a device where the kind is not known."""
        return len(self.devices) // (self.chip.devices if self.chip else 1)

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a device has; None of CPUs."""
        if self.name != LOCAL:
            return self.chip.memory // self.chip.devices
        return (self.devices[0].memory_stats() or {}).get("bytes_limit")


def open_topology(name: str) -> Topology:
    """``local``, the devices here, or a slice's name as ``v5e:16x16``.

    Slices want ``chips.ENVIRONMENT`` in force when JAX starts.

    Raises:
      UsageError: no such chip or slice, no compiler for it, or another process has it.
    """
    if name == LOCAL:
        return Topology(name, jax.devices(), chip_of(jax.devices()[0].device_kind), None)
    kind, _, sizes = name.partition(":")
    known = ", ".join(chip.example for chip in CHIPS.values())
    if kind not in CHIPS:
        raise UsageError(f"--topology={name}: no such chip{did_you_mean(kind, CHIPS)}; names are as {known}, or local")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != chip.axes:
        raise UsageError(f"--topology={name}: {kind} has {chip.axes} axes; names are as {chip.example}")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(f"--topology={name} needs the TPU compiler: pip install 'resnet_jax[tpu]'")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **chip.arguments).devices
    except Exception as error:  # Of several classes, by what is wrong.
        reason = " ".join(str(error).split())
        if "lockfile" in reason or "in use" in reason:
            raise UsageError(
                f"--topology={name}: another process has the TPU compiler, which one at a time may use; wait for it"
            ) from error
        raise UsageError(f"--topology={name}: the compiler knows no such slice ({reason})") from error
    shape = tuple(map(int, sizes.split("x")))
    return Topology(name, devices, chip, shape)


def without_cache() -> None:
    """Lets nothing be taken from, or put into, JAX's cache of compiled programs: what compiling takes is reported."""
    jax.config.update("jax_enable_compilation_cache", False)
