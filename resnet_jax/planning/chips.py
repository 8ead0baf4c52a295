"""TPU chips as a table: what their makers say of them. No JAX here: it is read before JAX starts.

Sources, by the letters in the table:
  [a] Norrie et al. (2021), "The Design Process for Google's Training Chips: TPUv2 and TPUv3", table 3; Jouppi et al.
      (2021), "Ten Lessons From Three Generations Shaped Google's TPUv4i", table 1.
  [b] Jouppi et al. (2023), "TPU v4: An Optically Reconfigurable Supercomputer for Machine Learning", table 4.
  [c] docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, key specifications.
  [d] Austin et al. (2025), "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus: clocks, and which axes wrap.
"""

import dataclasses
from typing import Any

GIB = 2**30

# Before JAX starts: the compiler finds no TPU and must not ask Google's metadata server for one, keep logs, or keep
# other processes from it, as it does where there is a TPU to be shared.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Any will do: what is compiled for is said later.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      kind: ``device_kind`` of its JAX devices.
      example: a slice's name.
      devices: JAX devices a chip is.
      memory: bytes of HBM a chip.
      clock: of its cores, Hz: what the compiler's cycles are divided by.
      peak: bfloat16 operations a second and chip.
      link: bytes a second of one link to a neighbour, one way.
      axes: of the torus; a chip has two links an axis.
      wraps: the axes' lengths that are multiples of this are rings, others are lines.
      slice: chips in the largest slice with links between them.
      network: bytes a second a chip has of the data centre's network, one way, between slices; None: not published.
      arguments: what the compiler must be told besides the slice's name.
    """

    kind: str
    example: str
    devices: int
    memory: int
    clock: float
    peak: float
    link: float
    axes: int
    wraps: int
    slice: int
    network: float | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    # Two cores, each a device with half of the memory [c]; 940 MHz, 123 TFLOP/s, four links of 656 Gbit/s [a]. Rings
    # are only in the whole pod of 32x32 [c].
    "v3": Chip(
        "TPU v3", "v3:2x2", devices=2, memory=32 * GIB, clock=0.94e9, peak=123e12, link=656e9 / 8, axes=2, wraps=32,
        slice=1024,
    ),
    # Two cores as one device ("megacore"); 32 GiB, 275 TFLOP/s [c]; 1050 MHz, six links of 50 GB/s [b]. Cubes of 4x4x4
    # are joined by optical switches, which close the rings [b].
    "v4": Chip(
        "TPU v4", "v4:2x2x1", devices=1, memory=32 * GIB, clock=1.05e9, peak=275e12, link=50e9, axes=3, wraps=4,
        slice=4096,
        # Without these the compiler takes each core for a device, which nobody runs.
        arguments={"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1},
    ),
    # 16 GB, 197 TFLOP/s, 400 GB/s over four links both ways together, 6.4 Tbit/s of network for a pod of 256 [c];
    # 1.5 GHz, axes of 16 are rings [d].
    "v5e": Chip(
        "TPU v5 lite", "v5e:2x2", devices=1, memory=16 * GIB, clock=1.5e9, peak=197e12, link=50e9, axes=2, wraps=16,
        slice=256, network=6.4e12 / 8 / 256,
    ),
    # 95 GB, 459 TFLOP/s, 1200 GB/s over six links both ways together, 50 Gbit/s of network a chip, at most 6144 chips
    # [c]; 1.75 GHz [d].
    "v5p": Chip(
        "TPU v5", "v5p:2x2x1", devices=1, memory=95 * GIB, clock=1.75e9, peak=459e12, link=100e9, axes=3, wraps=4,
        slice=6144, network=50e9 / 8,
    ),
    # 32 GB, 918 TFLOP/s, 800 GB/s over four links both ways together [c]; axes of 16 are rings [d]. The clock is what
    # the peak means at the compiler's 524,288 operations a cycle.
    "v6e": Chip(
        "TPU v6 lite", "v6e:2x2", devices=1, memory=32 * GIB, clock=1.75e9, peak=918e12, link=100e9, axes=2, wraps=16,
        slice=256,
    ),
}  # fmt: skip


def chip_of(kind: str) -> Chip | None:
    """The chip whose JAX devices are of this ``device_kind``; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
