"""RoIAlign's weights, and RoIAlign by tiles: of a pyramid it reads only the cells that a region lies on.

``roi_align`` multiplies whole maps, and for a pyramid does so at every level. Here the cells of a region's own level
are covered with square tiles, and each tile adds its part to the region's bins. How many tiles there are depends on
the regions: those of all make one list, and a loop takes some at a time, forwards and, by its own rule, backwards.
Shapes stay fixed, and a long region only costs what it has.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax import distributed
from resnet_jax.detection import boxes as box_ops

TILE = 16  # Cells per side.
TILES = 64  # Taken at a time: of 256 channels they are 16 MB of float32.
# Where this is used for pyramids: it takes a seventh of the time there. On TPUs and GPUs it has not been measured, and
# on GPUs the order in which a scatter adds up gradients is not the same every time.
PLATFORMS = ("cpu",)


def suits() -> bool:
    """Whether pyramids are to be read by tiles on the devices in force."""
    return distributed.platform() in PLATFORMS


def most_samples(cells: int, size: int) -> int:
    """How often a bin is sampled at most, if that follows from its length: as in a box as large as the map, and one."""
    return -(-cells // size) + 1


def line(low: jax.Array, high: jax.Array, scale: jax.Array | float, aligned: bool) -> tuple[jax.Array, jax.Array]:
    """Where boxes begin and how long they are, in cells from the first cell's value, from their edges in pixels."""
    length = (high - low) * scale
    # From the edge of a cell to its centre, where its value lies, it is half a cell.
    return (low * scale - 0.5, length) if aligned else (low * scale, jnp.maximum(length, 1))


def bin_weights(
    low: jax.Array,
    length: jax.Array,
    size: int,
    samples: int,
    most: int | jax.Array,
    bound: int,
    extent: jax.Array,
    cells: jax.Array,
) -> jax.Array:
    """How much each cell counts in each bin, along one axis: [R, size, w].

    Args:
      low: [R], of ``line``.
      length: [R].
      size: bins.
      samples: per bin; 0: as many as it has cells, rounded up; none in an empty one.
      most: int [R] or one for all, the limit where ``samples`` is 0.
      bound: the largest of ``most``.
      extent: int [R] or one for all, how many cells are the image's.
      cells: int [R, w], or [w] for all, whose weights are wanted.
    """
    low, length = low[:, None, None], length[:, None, None]
    most, extent = (jnp.reshape(x, (-1, 1, 1)) for x in (most, extent))
    sample = jnp.arange(samples or bound)  # From here on [R, size, samples].
    # ceil(length / size) of them, in whole numbers: compiled, a division by 7 is a product with 1/7, and where a bin
    # has exactly k cells that may come out above k.
    taken = sample < samples if samples else (sample * size < length) & (sample < most)
    count = jnp.maximum(taken.sum(-1, keepdims=True), 1)
    position = low + length / size * (jnp.arange(size)[:, None] + (sample + 0.5) / count)
    taken &= (position >= -1) & (position <= extent)
    position = jnp.clip(position, 0, extent - 1)
    weights = jnp.maximum(1 - jnp.abs(position[..., None] - cells[..., None, None, :]), 0)
    return jnp.where(taken[..., None], weights, 0).sum(-2) / count


class _Bins(NamedTuple):
    """What is fixed: bins (rows, columns), ``samples`` of each and axis, and the most that they may be if that is 0."""

    size: tuple[int, int]
    samples: int
    most: tuple[int, int]


class _Regions(NamedTuple):
    """Regions in their level: ``line``'s, the limit of samples, and the image's cells, each [R, 2], (rows, columns).

    Of the level ``offset`` [R] is where in the table of all levels' cells it starts, ``width`` [R] its columns.
    """

    low: jax.Array
    length: jax.Array
    most: jax.Array
    extent: jax.Array
    offset: jax.Array
    width: jax.Array


@jax.custom_batching.custom_vmap
def _largest_of_batch(x: jax.Array) -> jax.Array:
    """``x``, or under ``jax.vmap`` the largest of the batch, for all: a loop of that length copies nothing."""
    return x


@_largest_of_batch.def_vmap
def _largest_of_batch_vmap(size: int, batched: Sequence[bool], x: jax.Array):
    del size, batched
    return x.max(0), False


def _for_tiles(regions: _Regions, bins: _Bins, add, start: jax.Array) -> jax.Array:
    """``add(total, region, cells, row_weights, column_weights)`` for all tiles, some at a time, from ``start`` on.

    ``region`` is int [T], R for tiles beyond the last; ``cells`` int [T, TILE, 1], where in the table each row of a
    tile begins; the weights of its rows and columns [T, bins, TILE].
    """
    ends = jnp.stack([regions.low, regions.low + regions.length])
    first, last = (
        jnp.maximum(jnp.minimum(jnp.floor(x), regions.extent - 1), 0).astype(jnp.int32)
        for x in (ends.min(0), ends.max(0) + 1)
    )
    across = (last - first) // TILE + 1
    until = jnp.cumsum(across.prod(-1))  # The list of tiles: each region's end in it.

    def take(step: jax.Array, total: jax.Array) -> jax.Array:
        number = step * TILES + jnp.arange(TILES)
        region = jnp.searchsorted(until, number, side="right")
        own = jnp.minimum(region, len(until) - 1)
        low, length, most, extent, offset, width = (x[own] for x in regions)
        number -= (until - across.prod(-1))[own]
        corner = first[own] + TILE * jnp.stack([number // across[own, 1], number % across[own, 1]], -1)
        covered = corner[..., None] + jnp.arange(TILE)
        weights = [
            bin_weights(
                *(x[:, axis] for x in (low, length)), bins.size[axis], bins.samples, most[:, axis], bins.most[axis],
                extent[:, axis], covered[:, axis],
            )
            for axis in (0, 1)
        ]  # fmt: skip
        cells = offset[:, None] + covered[:, 0] * width[:, None] + corner[:, 1:]
        return add(total, region, cells[..., None], *weights)

    steps = -(-_largest_of_batch(until[-1]) // TILES)
    return jax.lax.fori_loop(0, steps, take, start)


def _zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    return jnp.full(shape, box_ops.zero_of(*like), like[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pool(table: jax.Array, regions: _Regions, bins: _Bins) -> jax.Array:
    """Regions of a table of cells [n, C], which ends in TILE more: [R, rows, columns, C]."""
    reads = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3), collapsed_slice_dims=(), start_index_map=(0,))

    def add(pooled, region, cells, rows, columns):
        # A row that ends beyond the map goes on with other cells, which have no weight.
        tiles = jax.lax.gather(table, cells, reads, (TILE, table.shape[1]), mode="clip")
        x = jnp.einsum("tih,thwc->tiwc", rows, tiles, precision="highest")
        x = jnp.einsum("tjw,tiwc->tijc", columns, x, precision="highest")
        return pooled.at[region].add(x, mode="drop", indices_are_sorted=True)

    shape = (len(regions.low), *bins.size, table.shape[1])
    return _for_tiles(regions, bins, add, _zeros(shape, table, regions.low))


def _pool_forward(table, regions, bins):
    return _pool(table, regions, bins), (regions, table[:, :0])


def _pool_backward(bins, kept, cotangent):
    """The transpose: of each tile its cells' part of the gradient."""
    regions, like = kept
    adds = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )

    def add(gradient, region, cells, rows, columns):
        x = cotangent.at[region].get(mode="fill", fill_value=0)
        x = jnp.einsum("tjw,tijc->tiwc", columns, x, precision="highest")
        x = jnp.einsum("tih,tiwc->thwc", rows, x, precision="highest")
        return jax.lax.scatter_add(gradient, cells, x, adds, mode="clip")

    shape = (len(like), cotangent.shape[-1])
    return _for_tiles(regions, bins, add, _zeros(shape, cotangent, regions.low)), None


_pool.defvjp(_pool_forward, _pool_backward)


def align(
    maps: Sequence[jax.Array],
    extents: Sequence[jax.Array],
    boxes: jax.Array,
    level: jax.Array,
    size: tuple[int, int],
    scales: Sequence[float],
    samples: int = 0,
    aligned: bool = True,
) -> jax.Array:
    """``roi.roi_align`` of boxes [R, 4], each from its own of several maps [h, w, C]: ``level`` is int [R].

    Maps have their ``extents``, int [2], and ``scales``.
    """
    shapes, channels = np.array([x.shape[:2] for x in maps]), maps[0].shape[-1]
    offsets = np.concatenate([[0], shapes.prod(1).cumsum()[:-1]])
    most = np.array([[most_samples(*pair) for pair in zip(shape, size, strict=True)] for shape in shapes.tolist()])
    tables = [box_ops.at_least_float32(x).reshape(-1, channels) for x in maps]
    tables.append(jnp.zeros((TILE, channels), tables[0].dtype))

    boxes = jax.lax.stop_gradient(boxes.astype(tables[0].dtype))
    scale = jnp.array(scales, boxes.dtype)[level][:, None]
    low, length = line(boxes[:, 1::-1], boxes[:, :1:-1], scale, aligned)
    levels = (jnp.array(most), jnp.stack(extents), jnp.array(offsets), jnp.array(shapes[:, 1]))
    regions = _Regions(low, length, *(x.astype(jnp.int32)[level] for x in levels))
    bins = _Bins(size, samples, tuple(most.max(0).tolist()))
    return _pool(jnp.concatenate(tables), regions, bins).astype(maps[0].dtype)
