"""What bounds a program: the operations and bytes that XLA counts in it, against what the device can do."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.planning.chips import chip_of

COLUMNS = ("GFLOP an image", "MB an image", "images/s by operations", "by bytes", "share of the bound")

# NVIDIA's data sheets of the H100 and H200 (SXM): bfloat16 and TF32 operations a second, dense; bytes a second.
GPUS = {"H100": (989e12, 495e12, 3.35e12), "H200": (989e12, 495e12, 4.8e12)}
# Bytes a second of a chip's HBM: docs.cloud.google.com/tpu/docs, key specifications of each.
TPU_BANDWIDTH = {"TPU v3": 900e9, "TPU v4": 1228e9, "TPU v5 lite": 819e9, "TPU v5": 2765e9, "TPU v6 lite": 1638e9}
_MATRIX, _COPY = 2048, 2**26  # Rows; floats.


class Peaks(NamedTuple):
    """What a JAX device can do at most.

    Attributes:
      operations: floating-point operations a second.
      bandwidth: bytes a second, read or written.
      source: where they are from.
    """

    operations: float
    bandwidth: float
    source: str


class Cost(NamedTuple):
    """What XLA counts in a program: floating-point operations, and bytes that its kernels read and write."""

    operations: float
    bytes: float


def cost_of(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> Cost | None:
    """Counts a program; None where XLA does not say.

    Operations are those of the program as it was written, which library calls in the compiled one hide.
    """
    written, found = lowered.cost_analysis() or {}, compiled.cost_analysis() or {}
    if "bytes accessed" not in found:
        return None
    return Cost(written.get("flops") or found.get("flops", 0), found["bytes accessed"])


def peaks_of(device: jax.Device, dtype: str) -> Peaks | None:
    """The peaks of a device in ``bfloat16`` or ``float32``: published, on CPUs measured; None of unknown ones."""
    chip = chip_of(device.device_kind)
    if chip:
        return Peaks(chip.peak / chip.devices, TPU_BANDWIDTH[chip.kind] / chip.devices, "published, bfloat16")
    name = next((name for name in GPUS if name in device.device_kind), None)
    if name:
        narrow, wide, bandwidth = GPUS[name]
        return Peaks(narrow if dtype == "bfloat16" else wide, bandwidth, f"published for the {name} SXM")
    return _measured() if device.platform == "cpu" else None


def _measured() -> Peaks:
    matrix, array = np.ones((_MATRIX, _MATRIX), np.float32), np.ones(_COPY, np.float32)
    target = np.empty_like(array)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    on_device = jax.device_put(matrix), jax.device_put(array)
    products = [lambda: multiply(on_device[0], on_device[0]).block_until_ready(), lambda: matrix @ matrix]
    copies = [lambda: copy(on_device[1]).block_until_ready(), lambda: np.copyto(target, array)]
    operations, moved = 2 * _MATRIX**3, 2 * array.nbytes
    said = f"measured: the better of JAX's and NumPy's {_MATRIX}-row float32 product and {_COPY * 4 >> 20} MiB copy"
    return Peaks(operations / min(map(_fastest, products)), moved / min(map(_fastest, copies)), said)


def _fastest(call: Callable[[], Any], tries: int = 7) -> float:
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def cells(cost: Cost | None, peaks: Peaks | None, images: int, seconds: float) -> list[str]:
    """A contender's cells for ``COLUMNS``.

    Args:
      cost: of a call; None is unknown.
      peaks: of the device; likewise.
      images: of a call.
      seconds: that a call takes.
    """
    if cost is None:
        return ["-"] * len(COLUMNS)
    counted = [f"{cost.operations / images / 1e9:.2f}", f"{cost.bytes / images / 1e6:.1f}"]
    if peaks is None:
        return [*counted, "-", "-", "-"]
    least = cost.operations / peaks.operations, cost.bytes / peaks.bandwidth
    rates = [f"{images / bound:,.0f}" for bound in least]
    return [*counted, *rates, f"{100 * max(least) / seconds:.0f}%"]


def describe(peaks: Peaks | None) -> str:
    """A note on the peaks."""
    if peaks is None:
        return "the device's peaks are not known here: no bound"
    return (
        f"bounds are of {peaks.operations / 1e12:.3g} TFLOP/s and {peaks.bandwidth / 1e9:,.0f} GB/s ({peaks.source});"
        " bytes are those of every kernel, also where a cache has them, so that they can be exceeded"
    )
