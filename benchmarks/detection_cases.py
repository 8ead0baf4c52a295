"""What detection.py measures: the images, boxes and features that all are given, as drawn, and the ops in NumPy."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import ml_collections
import numpy as np

CLASSES = 80  # COCO's, without background, whatever the config's data have.
TRUTH = 8  # Annotated boxes an image: COCO has 7.
CANDIDATES = 400  # Detections an image above the score threshold, of all classes: what a trained network has.

STRIDES = {"c4": (16,), "fpn": (4, 8, 16, 32, 64)}
REGION_LEVELS = 4  # Of FPN's five: regions are pooled from the first four.
FPN_WIDTH = 256


class Scene(NamedTuple):
    """What the networks are given.

    Attributes:
      size: (height, width) of the images, pixels.
      canvas: likewise, padded to a multiple of 32, as both libraries do.
      images: uint8 [n, H, W, 3].
      boxes: float32 [n, G, 4].
      labels: int32 [n, G], classes from 0.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def make_scene(config: ml_collections.ConfigDict, batch: int) -> Scene:
    """Images of the config's size in COCO's commonest shape, 480 x 640."""
    from resnet_jax.detection.resize import scaled_size

    size = scaled_size(480, 640, config.detection.shorter[-1], config.detection.longer).size
    canvas = tuple(-(-side // 32) * 32 for side in size)
    rng = np.random.default_rng(0)
    images = np.zeros((batch, *canvas, 3), np.uint8)
    # Smooth, as photos are.
    coarse = rng.integers(0, 256, (batch, -(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
    images[:, : size[0], : size[1]] = coarse.repeat(8, 1).repeat(8, 2)[:, : size[0], : size[1]]
    boxes = np.stack([objects(rng, TRUTH, size, (min(size) / 8, min(size) / 3)) for _ in range(batch)])
    return Scene(size, canvas, images, boxes, rng.integers(0, CLASSES, (batch, TRUTH), np.int32))


def objects(rng: np.random.Generator, count: int, size: tuple[int, int], sides: Sequence[float]) -> np.ndarray:
    """Boxes [count, 4] within an image, with sides about those given: whole pixels, so that areas are exact."""
    limits = np.array([size[1], size[0]])
    side = rng.choice(sides, (count, 1)) * np.exp(rng.normal(0, 0.3, (count, 2)))
    center = rng.uniform(0, 1, (count, 2)) * limits
    return corners(center, side, limits)


def around(rng: np.random.Generator, boxes: np.ndarray, count: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes [count, 4], each a little beside one of ``boxes``: what a network proposes."""
    chosen = boxes[rng.integers(len(boxes), size=count)]
    side = chosen[:, 2:] - chosen[:, :2]
    center = chosen[:, :2] + side * (0.5 + rng.normal(0, 0.15, (count, 2)))
    return corners(center, side * np.exp(rng.normal(0, 0.15, (count, 2))), np.array([size[1], size[0]]))


def corners(center: np.ndarray, side: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """float32 [n, 4] of whole coordinates, at least a pixel wide, clipped to (width, height)."""
    low = np.clip(np.floor(center - side / 2), 0, limits - 1)
    high = np.clip(np.ceil(center + side / 2), low + 1, limits)
    return np.concatenate([low, high], axis=1).astype(np.float32)


class Suppression(NamedTuple):
    """Boxes of n images to be suppressed among their own class (or level of a pyramid).

    Attributes:
      boxes: float32 [n, N, 4].
      scores: float32 [n, N], no two of an image that count equal.
      classes: int32 [n, N], or None: all are of one.
      least: scores below don't count.
      threshold: of the IoU.
      keep: how many are wanted.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray | None
    least: float
    threshold: float
    keep: int


def proposals_of(config: ml_collections.ConfigDict, batch: int) -> Suppression:
    """What the RPN hands to NMS in training: the best of every level, around a few dozen objects."""
    numbers, scene, rng = config.detection, make_scene(config, 1), np.random.default_rng(1)
    strides = STRIDES[numbers.neck]
    sizes = [(size,) for size in numbers.anchor_sizes] if len(strides) > 1 else [tuple(numbers.anchor_sizes)]
    boxes, levels = [], []
    for level, (stride, own) in enumerate(zip(strides, sizes, strict=True)):
        cells = math.prod(-(-side // stride) for side in scene.canvas)
        count = min(numbers.train_before_nms, cells * len(own) * len(numbers.anchor_ratios))
        images = [around(rng, objects(rng, 40, scene.size, own), count, scene.size) for _ in range(batch)]
        boxes.append(np.stack(images))
        levels.append(np.full((batch, count), level, np.int32))
    boxes, levels = np.concatenate(boxes, 1), np.concatenate(levels, 1)
    scores = np.stack([distinct(rng, boxes.shape[1]) for _ in range(batch)])
    classes = levels if len(strides) > 1 else None
    return Suppression(boxes, scores, classes, 0.0, numbers.proposal_nms, numbers.train_after_nms)


def detections_of(config: ml_collections.ConfigDict, batch: int) -> Suppression:
    """What the head hands to NMS in test: every class of every proposal, of which few have a score that counts."""
    numbers, size, rng = config.detection, make_scene(config, 1).size, np.random.default_rng(2)
    count = numbers.test_after_nms * CLASSES
    boxes = np.zeros((batch, count, 4), np.float32)
    scores = np.zeros((batch, count), np.float32)
    for row in range(batch):
        own = objects(rng, 20, size, (min(size) / 8, min(size) / 3))
        labels = rng.choice(CLASSES, 6, replace=False)
        regions = rng.choice(numbers.test_after_nms, CANDIDATES, replace=True)
        chosen = np.unique(regions * CLASSES + rng.choice(labels, CANDIDATES))
        boxes[row] = around(rng, own, count, size)
        scores[row, chosen] = numbers.score_threshold + (1 - numbers.score_threshold) * distinct(rng, len(chosen))
    classes = np.tile(np.arange(CLASSES, dtype=np.int32), (batch, numbers.test_after_nms))
    least = max(numbers.score_threshold, 1e-6)
    return Suppression(boxes, scores, classes, least, numbers.detection_nms, numbers.detections)


def distinct(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count] in (0, 1), no two equal: libraries sort equal ones differently."""
    return ((rng.permutation(count) + 0.5) / count).astype(np.float32)


def numpy_nms(boxes, scores, classes, least: float, threshold: float, keep: int) -> np.ndarray:
    """The indices that are kept of one image's boxes: greedy, each kept box against all that are left."""
    order = np.flatnonzero(scores >= least)
    order = order[np.argsort(-scores[order], kind="stable")]
    sides = boxes[:, 2:] - boxes[:, :2]
    areas, kept = sides[:, 0] * sides[:, 1], []
    while len(order) and len(kept) < keep:
        best, order = order[0], order[1:]
        kept.append(best)
        low = np.maximum(boxes[order, :2], boxes[best, :2])
        high = np.minimum(boxes[order, 2:], boxes[best, 2:])
        shared = np.maximum(high - low, 0).prod(1)
        close = shared / (areas[order] + areas[best] - shared) > threshold
        order = order[~(close if classes is None else close & (classes[order] == classes[best]))]
    return np.array(kept, int)


def numpy_suppression(case: Suppression) -> Callable[[], list[np.ndarray]]:
    """The indices that are kept of each image, by falling score."""
    classes = [None] * len(case.boxes) if case.classes is None else case.classes
    images = list(zip(case.boxes, case.scores, classes, strict=True))
    return lambda: [numpy_nms(*image, *case[3:]) for image in images]


class Regions(NamedTuple):
    """Regions of n images, each to be pooled from its level of a pyramid.

    Attributes:
      maps: float32 [n, h, w, C], of each level.
      strides: of each.
      boxes: float32 [n, R, 4].
      levels: int32 [n, R].
      size: cells per side that they are pooled to.
      cotangent: float32 [n, R, size, size, C].
    """

    maps: list[np.ndarray]
    strides: tuple[int, ...]
    boxes: np.ndarray
    levels: np.ndarray
    size: int
    cotangent: np.ndarray


def regions_of(config: ml_collections.ConfigDict, batch: int) -> Regions:
    """The RoIs of a training step: of all sizes, each in its level (FPN, equation 1)."""
    numbers, scene, rng = config.detection, make_scene(config, 1), np.random.default_rng(3)
    pyramid = numbers.neck == "fpn"
    strides = STRIDES[numbers.neck][:REGION_LEVELS]
    channels = FPN_WIDTH if pyramid else int(1024 * config.model.width)
    size = numbers.pooled or (7 if pyramid else 14)
    shapes = [(batch, *(side // stride for side in scene.canvas), channels) for stride in strides]
    maps = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    sides = np.exp(rng.uniform(math.log(16), math.log(min(scene.size)), numbers.rois_sampled))
    # No whole pixels, as a network's.
    boxes = np.stack([objects(rng, numbers.rois_sampled, scene.size, sides) for _ in range(batch)])
    boxes += rng.uniform(-0.4, 0.4, boxes.shape).astype(np.float32)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    limits = np.array([112.0, 224.0, 448.0]) ** 2 if pyramid else np.zeros(0)
    levels = (areas[..., None] >= limits).sum(-1).astype(np.int32)
    cotangent = rng.normal(size=(*levels.shape, size, size, channels)).astype(np.float32)
    return Regions(maps, strides, boxes, levels, size, cotangent)


def numpy_regions(op: str, case: Regions) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward and backward, in NumPy and SciPy: pooled [n, R, s, s, C], and the maps' gradients."""
    pool = {"RoIAlign": numpy_align, "RoI pooling": numpy_pool}[op]

    def run(backward: bool):
        pooled = np.zeros_like(case.cotangent)
        gradients = [np.zeros_like(x) for x in case.maps] if backward else []
        for image in range(len(case.boxes)):
            for level, (features, stride) in enumerate(zip(case.maps, case.strides, strict=True)):
                own = np.flatnonzero(case.levels[image] == level)
                given = case.cotangent[image, own] if backward else None
                found, gradient = pool(features[image], case.boxes[image, own], case.size, 1 / stride, given)
                pooled[image, own] = found
                if backward:
                    gradients[level][image] = gradient
        return pooled, gradients

    return lambda: run(False)[0], lambda: run(True)


def numpy_align(features: np.ndarray, boxes: np.ndarray, size: int, scale: float, cotangent: np.ndarray | None):
    """RoIAlign [R, size, size, C] of features [h, w, C], and their gradient: a sparse matrix, and its transpose.

    Every sample reads the four cells around it.
    """
    from scipy import sparse

    height, width, channels = features.shape
    bins, cells, weights = [], [], []
    for number, box in enumerate(boxes):
        axes = []
        for low, high, extent in ((box[1], box[3], height), (box[0], box[2], width)):
            low, length = low * scale - 0.5, (high - low) * scale
            count = max(1, math.ceil(length / size))
            place = low + length / size * (np.arange(size * count) + 0.5) / count
            counts = (place >= -1) & (place <= extent)
            place = np.clip(place, 0, extent - 1)
            before = np.minimum(place.astype(int), extent - 1)
            after, part = np.minimum(before + 1, extent - 1), place - before
            of_bin = np.repeat(np.arange(size), count)
            # Of the cell before and of the one after: where, in which bin, how much.
            weight = np.concatenate([1 - part, part]) * np.tile(counts, 2) / count
            axes.append((np.concatenate([before, after]), np.tile(of_bin, 2), weight))
        (rows, down, row_weights), (columns, across, column_weights) = axes
        cells.append((rows[:, None] * width + columns).ravel())
        bins.append(((number * size + down[:, None]) * size + across).ravel())
        weights.append((row_weights[:, None] * column_weights).astype(np.float32).ravel())
    shape = (len(boxes) * size * size, height * width)
    if not len(boxes):
        return np.zeros((0, size, size, channels), np.float32), np.zeros_like(features)
    parts = (np.concatenate(weights), (np.concatenate(bins), np.concatenate(cells)))
    matrix = sparse.coo_matrix(parts, shape).tocsr()
    pooled = (matrix @ features.reshape(-1, channels)).reshape(len(boxes), size, size, channels)
    if cotangent is None:
        return pooled, None
    return pooled, (matrix.T @ cotangent.reshape(-1, channels)).reshape(features.shape)


def numpy_pool(features: np.ndarray, boxes: np.ndarray, size: int, scale: float, cotangent: np.ndarray | None):
    """RoI pooling [R, size, size, C] of features [h, w, C], and their gradient: bin after bin."""
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), size, size, channels), np.float32)
    gradient = None if cotangent is None else np.zeros((height * width, channels), np.float32)

    def edges(low: float, high: float, extent: int) -> list[tuple[int, int]]:
        first, last = (math.floor(np.float32(x) * np.float32(scale) + np.float32(0.5)) for x in (low, high - 1))
        cells = max(last - first + 1, 1)
        spans = ((first + i * cells // size, first - (-(i + 1) * cells // size)) for i in range(size))
        return [(min(max(start, 0), extent), min(max(end, 0), extent)) for start, end in spans]

    every = np.arange(channels)
    for number, (left, top, right, bottom) in enumerate(boxes):
        columns = edges(left, right, width)
        for i, (upper, lower) in enumerate(edges(top, bottom, height)):
            for j, (start, end) in enumerate(columns):
                if upper >= lower or start >= end:
                    continue
                cells = features[upper:lower, start:end].reshape(-1, channels)
                if cotangent is None:
                    pooled[number, i, j] = cells.max(0)
                    continue
                best = cells.argmax(0)
                pooled[number, i, j] = cells[best, every]
                place = (upper + best // (end - start)) * width + start + best % (end - start)
                gradient[place, every] += cotangent[number, i, j]  # Channels differ: no place twice.
    return pooled, None if gradient is None else gradient.reshape(features.shape)
