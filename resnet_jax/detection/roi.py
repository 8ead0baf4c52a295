"""Features of a region at a fixed size: RoI pooling (Fast R-CNN) and RoIAlign (Mask R-CNN).

Cell i of a feature map of stride s covers the pixels s i to s (i + 1). Boxes get no gradient from either, as in the
public codes; features do. Both take RoIs a few at a time where all at once would need gigabytes: at 14 x 14, 300
RoIs of 1024 channels are 240 MB when they are done, and several times that on the way.

RoIAlign is two small matrix products. Bilinear weights and averages separate into rows and columns, so that a bin is
(weights of rows) x (features) x (weights of columns): dense work that TPUs and GPUs are made for, forwards and
backwards, where reading four cells for each sample would be gathers, and their gradient scatters. For a pyramid on
CPUs there is another way to the same numbers (``roi_tiles``).

RoI pooling looks at one cell of every bin at a time, as often as the largest bin has cells: the channels of a cell
lie together, and most bins have few cells. Its gradient goes to the largest cell alone, through a scatter: on TPUs
RoIAlign is the better choice.
"""

from collections.abc import Callable

import jax
from jax import numpy as jnp

from resnet_jax.detection import boxes as box_ops
from resnet_jax.detection.roi_tiles import bin_weights, line, most_samples

# How many numbers the intermediate results of the RoIs taken together may have (128 MB of float32).
CHUNK_ELEMENTS = 1 << 25


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _in_chunks(pool: Callable[..., jax.Array], rois: tuple[jax.Array, ...], elements: int) -> jax.Array:
    """``pool`` of RoIs [R, ...], so many at a time that ``elements`` for each stay within the limit."""
    total = len(rois[0])
    chunk = max(1, CHUNK_ELEMENTS // elements)
    if total <= chunk:
        return pool(*rois)
    # Chunks as equal as can be: one RoI beyond the limit shall not double the work.
    chunks = -(-total // chunk)
    chunk = -(-total // chunks)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, chunks * chunk - total)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(chunks, chunk, *x.shape[1:])

    pooled = jax.lax.map(lambda part: pool(*part), tuple(map(split, rois)))
    return pooled.reshape(chunks * chunk, *pooled.shape[2:])[:total]


def _extent(features: jax.Array, extent: jax.Array | None) -> jax.Array:
    return jnp.asarray(features.shape[:2] if extent is None else extent, jnp.int32)


def _round(x: jax.Array) -> jax.Array:
    """To the nearest whole number, halves away from zero, as C's round(): int32. (jnp.round takes halves to even.)"""
    return (jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)).astype(jnp.int32)


def _pool_bins(low: jax.Array, high: jax.Array, scale: float, size: int, extent: jax.Array):
    """First cell of each bin, and the one after its last: int32 [R, size] each, from a box's edges [R]."""
    first = _round(low * scale)
    cells = jnp.maximum(_round((high - 1) * scale) - first + 1, 1)[:, None]
    bins = jnp.arange(size, dtype=jnp.int32)
    start = first[:, None] + bins * cells // size
    end = first[:, None] - (-(bins + 1) * cells // size)
    return jnp.clip(start, 0, extent), jnp.clip(end, 0, extent)


def _largest(features, top, bottom, left, right):
    """The largest of features [H, W, C] in each bin, and its cell's index in [H * W]: both [R, rows, columns, C].

    Bins take the rows from ``top`` to before ``bottom``, int [R, rows], and the columns from ``left`` to before
    ``right``, int [R, columns]. The first of equals, row by row; -inf and 0 for a bin without cells.
    """
    height, width, channels = features.shape
    flat = features.reshape(-1, channels)
    # At least one, to be a divisor where there is nothing to do.
    most_rows, most_columns = jnp.maximum((bottom - top).max(), 1), jnp.maximum((right - left).max(), 1)

    def look(step, state):
        best, where = state
        row, column = top + step // most_columns, left + step % most_columns
        counts = (row < bottom)[:, :, None] & (column < right)[:, None, :]
        cell = jnp.minimum(row, height - 1)[:, :, None] * width + jnp.minimum(column, width - 1)[:, None, :]
        value = flat[cell]
        better = counts[..., None] & (value > best)
        return jnp.where(better, value, best), jnp.where(better, cell[..., None], where)

    shape = (len(top), top.shape[1], left.shape[1], channels)
    zero = box_ops.zero_of(features, top, left)
    nothing = jnp.full(shape, zero - jnp.inf, features.dtype), jnp.full(shape, zero)
    return jax.lax.fori_loop(0, most_rows * most_columns, look, nothing)


def _filled(top, bottom, left, right):
    """Which bins have cells: bool [R, rows, columns, 1]."""
    return ((bottom > top)[:, :, None] & (right > left)[:, None, :])[..., None]


@jax.custom_jvp
def _max_pool(features, top, bottom, left, right):
    """The largest of features [H, W, C] in each bin, 0 in one without cells: [R, rows, columns, C]."""
    return jnp.where(_filled(top, bottom, left, right), _largest(features, top, bottom, left, right)[0], 0)


@_max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    # The loop cannot be differentiated in reverse; reading the cells it found can. Only training pays for them.
    features, *bins = primals
    best, cell = _largest(features, *bins)
    filled = _filled(*bins)
    flat = tangents[0].reshape(-1, features.shape[-1])
    tangent = jnp.take_along_axis(flat, cell.reshape(-1, cell.shape[-1]), axis=0).reshape(cell.shape)
    return jnp.where(filled, best, 0), jnp.where(filled, tangent, 0)


def roi_pool(
    features: jax.Array,
    boxes: jax.Array,
    size: int | tuple[int, int],
    scale: float,
    extent: jax.Array | None = None,
) -> jax.Array:
    """RoI max pooling, quantised as in Fast R-CNN (section 2.1; Caffe's ``roi_pooling_layer``).

    Caffe's boxes name their first and last pixel. In our coordinates: a box covers the cells round(left * scale) to
    round((right - 1) * scale), both included, halves rounded away from zero, and at least one. Of these n cells bin
    i of m takes floor(i n / m) to ceil((i + 1) n / m) - 1, in whole numbers (Caffe divides in floating point, where
    ceil() may come out one higher; torchvision's roi_pool is Caffe's, without the - 1 when it is given continuous
    boxes). Cells outside the map are dropped; a bin without cells is 0.

    Args:
      features: [H, W, C].
      boxes: [R, 4], pixels.
      size: bins per side, or (rows, columns).
      scale: cells per pixel, 1 / stride.
      extent: int [2], rows and columns that are the image's, if the rest of the map is padding.

    Returns:
      [R, rows, columns, C] in the features' dtype. The gradient of a bin goes to its largest cell, the first
      of equals row by row, as in Caffe.
    """
    rows, columns = _pair(size)
    left, top, right, bottom = jnp.moveaxis(jax.lax.stop_gradient(box_ops.at_least_float32(boxes)), -1, 0)
    row_extent, column_extent = _extent(features, extent)
    bins = (
        *_pool_bins(top, bottom, scale, rows, row_extent),
        *_pool_bins(left, right, scale, columns, column_extent),
    )
    return _in_chunks(lambda *bins: _max_pool(features, *bins), bins, rows * columns * features.shape[-1])


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    size: int | tuple[int, int],
    scale: float,
    samples: int = 0,
    aligned: bool = True,
    extent: jax.Array | None = None,
) -> jax.Array:
    """RoIAlign: the mean of bilinear samples in each bin, with nothing rounded (Mask R-CNN, section 3).

    As in detectron2 and torchvision: between the centres of the outermost cells and one cell further out features
    go on as they are at the border, beyond that they are 0 (in the mean, too).

    Args:
      features: [H, W, C].
      boxes: [R, 4], pixels.
      size: bins per side, or (rows, columns).
      scale: cells per pixel, 1 / stride.
      samples: per bin and axis; 0: as many as the bin has cells, rounded up, which is detectron2's default (at most
        as many as a box as large as the map has, and one).
      aligned: a cell's value lies at its centre, half a cell from its edge; False: at its edge, and RoIs are at least
        one cell in size, as in Mask R-CNN's first code.
      extent: int [2], rows and columns that are the image's, if the rest of the map is padding.

    Returns:
      [R, rows, columns, C] in the features' dtype, computed in float32 at least; 0 for an empty box where ``samples``
      is 0 and ``aligned``, as in detectron2.
    """
    rows, columns = _pair(size)
    height, width, channels = features.shape
    wide = box_ops.at_least_float32(features)
    left, top, right, bottom = jnp.moveaxis(jax.lax.stop_gradient(boxes.astype(wide.dtype)), -1, 0)
    row_extent, column_extent = _extent(features, extent)

    def weights(low, high, bins, extent, cells):
        most = most_samples(cells, bins)
        placed = line(low, high, scale, aligned)
        return bin_weights(*placed, bins, samples, most, most, extent, jnp.arange(cells))

    def pool(left, top, right, bottom):
        row_weights = weights(top, bottom, rows, row_extent, height)
        column_weights = weights(left, right, columns, column_extent, width)
        # The order that multiplies least is chosen: first the longer axis of the map, which leaves less behind.
        return jnp.einsum(
            "rih,rjw,hwc->rijc", row_weights, column_weights, wide, optimize="optimal", precision="highest"
        ).astype(features.dtype)

    elements = channels * min(rows * width, columns * height)
    return _in_chunks(pool, (left, top, right, bottom), elements)
