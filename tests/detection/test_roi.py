"""RoI pooling and RoIAlign against loops from the definitions, published figures, and finite differences."""

import functools
import math

import boxes_by_hand as by_hand
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import roi, roi_tiles

HEIGHT, WIDTH, CHANNELS, SCALE = 7, 10, 3, 1 / 16


def some_boxes() -> np.ndarray:
    """Within an image of 112 x 160 pixels, at its borders, beyond them, tiny, and as padding."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (12, 2, 2)), axis=1) * [160, 112]
    odd = [
        [0, 0, 160, 112],
        [-40, -20, 30, 60],
        [100, 80, 260, 190],
        [300, 300, 400, 400],
        [-90, -90, -40, -40],
        [30, 30, 34, 33],
        [8, 24, 41, 73],  # Halves of cells, for the rounding.
        [0, 0, 0, 0],
        [50, 20, 50, 60],
    ]
    return np.concatenate([corners.reshape(12, 4), odd]).astype(np.float32)


def some_features(dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(HEIGHT, WIDTH, CHANNELS)).astype(dtype)


def round_half_away(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def roi_pool_by_hand(features, boxes, size, scale):
    """Fast R-CNN's pooling, bin after bin."""
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), *size, channels), features.dtype)
    for number, box in enumerate(boxes.astype(np.float64)):
        left, top = round_half_away(box[0] * scale), round_half_away(box[1] * scale)
        right, bottom = round_half_away((box[2] - 1) * scale), round_half_away((box[3] - 1) * scale)
        rows, columns = max(bottom - top + 1, 1), max(right - left + 1, 1)
        for i in range(size[0]):
            for j in range(size[1]):
                cells = [
                    features[row, column]
                    for row in range(top + math.floor(i * rows / size[0]), top + -(-(i + 1) * rows // size[0]))
                    for column in range(left + j * columns // size[1], left + -(-(j + 1) * columns // size[1]))
                    if 0 <= row < height and 0 <= column < width
                ]
                if cells:
                    pooled[number, i, j] = np.max(cells, axis=0)
    return pooled


def bilinear_by_hand(features, y, x):
    """The value at (y, x), where cell (i, j) has its value at (i, j): Mask R-CNN's codes, borders and all."""
    height, width, _ = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(features.shape[2])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    down, right = y - top, x - left
    return (
        (1 - down) * (1 - right) * features[top, left]
        + (1 - down) * right * features[top, left + 1]
        + down * (1 - right) * features[top + 1, left]
        + down * right * features[top + 1, left + 1]
    )


def roi_align_by_hand(features, boxes, size, scale, samples, aligned):
    features = features.astype(np.float64)
    pooled = np.zeros((len(boxes), *size, features.shape[2]))
    for number, box in enumerate(boxes.astype(np.float64)):
        left, top, right, bottom = box * scale - (0.5 if aligned else 0)
        height, width = bottom - top, right - left
        if not aligned:
            height, width = max(height, 1), max(width, 1)
        down, across = samples or math.ceil(height / size[0]), samples or math.ceil(width / size[1])
        for i in range(size[0]):
            for j in range(size[1]):
                values = [
                    bilinear_by_hand(
                        features,
                        top + height / size[0] * (i + (row + 0.5) / down),
                        left + width / size[1] * (j + (column + 0.5) / across),
                    )
                    for row in range(down)
                    for column in range(across)
                ]
                if values:
                    pooled[number, i, j] = np.mean(values, axis=0)
    return pooled


@functools.partial(jax.jit, static_argnames=("size", "scale"))
def pool(features, boxes, size=(3, 4), scale=SCALE, extent=None):
    return roi.roi_pool(features, boxes, size, scale, extent)


@functools.partial(jax.jit, static_argnames=("size", "scale", "samples", "aligned"))
def align(features, boxes, size=(3, 4), scale=SCALE, samples=2, aligned=True, extent=None):
    return roi.roi_align(features, boxes, size, scale, samples, aligned, extent)


@functools.partial(jax.jit, static_argnames=("size", "scale", "samples", "aligned"))
def align_by_tiles(features, boxes, size=(3, 4), scale=SCALE, samples=2, aligned=True, extent=None):
    extents = (jnp.array(features.shape[:2] if extent is None else extent),)
    level = jnp.zeros(len(boxes), jnp.int32)
    return roi_tiles.align((features,), extents, boxes, level, size, (scale,), samples, aligned)


BOTH_WAYS = pytest.mark.parametrize("align", [align, align_by_tiles])


@pytest.mark.parametrize("size", [(3, 4), (14, 14)])
def test_pooled_features_are_those_of_the_definition(size):
    found = pool(some_features(), some_boxes(), size)
    np.testing.assert_array_equal(found, roi_pool_by_hand(some_features(), some_boxes(), size, SCALE))


def test_pooling_worked_by_hand():
    features = np.arange(20.0, dtype=np.float32).reshape(4, 5, 1)
    # Pixels 8 to 71 are the columns round(.5) = 1 to round(4.4) = 4, pixels 0 to 55 the rows 0 to round(3.4) = 3: of
    # four cells two bins take two each. Of three (0 to 2) they take 0, 1 and 1, 2. The last box has no cells at all.
    boxes = np.array([[8, 0, 72, 56], [0, 0, 40, 40], [90, 0, 120, 20]], np.float32)
    expected = [[[7, 9], [17, 19]], [[6, 7], [11, 12]], [[0, 0], [0, 0]]]
    np.testing.assert_array_equal(pool(features, boxes, (2, 2))[..., 0], expected)


def test_of_negative_features_the_largest_is_pooled_and_not_padding():
    features = -1 - np.abs(some_features())
    found = pool(features, some_boxes())
    np.testing.assert_array_equal(found, roi_pool_by_hand(features, some_boxes(), (3, 4), SCALE))


def test_the_gradient_of_pooling_goes_to_the_first_of_the_largest():
    features = np.zeros((4, 4, 1), np.float32)
    features[1, 2] = features[2, 1] = 5
    gradient = jax.grad(lambda x: pool(x, np.array([[0.0, 0, 64, 64]], np.float32), (1, 1)).sum())(features)
    assert gradient[1, 2, 0] == 1 and gradient.sum() == 1


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("aligned", [True, False])
@BOTH_WAYS
def test_aligned_features_are_those_of_the_definition(align, samples, aligned):
    found = align(some_features(), some_boxes(), samples=samples, aligned=aligned)
    # More samples than cells, which a box far beyond the map would ask for, are not taken.
    boxes = some_boxes()
    expected = roi_align_by_hand(some_features(), boxes, (3, 4), SCALE, samples, aligned)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@BOTH_WAYS
def test_bins_of_k_cells_have_k_samples(align):
    # 7 k cells, for which a product with 1/7 in place of the division would ask for up to k + 1 samples a bin.
    features = np.random.default_rng(5).normal(size=(100, 100, 1)).astype(np.float32)
    cells = 7 * np.arange(1, 13)
    rest = 100 - cells
    boxes = np.stack([rest // 2, rest // 3, rest // 2 + cells, rest // 3 + cells], axis=1).astype(np.float32)
    boxes = np.concatenate([boxes, boxes + np.float32([0, 0, 1, -1])])
    found = align(features, boxes * 4, (7, 7), 1 / 4, samples=0)
    np.testing.assert_allclose(found, roi_align_by_hand(features, boxes, (7, 7), 1.0, 0, True), atol=1e-4)


@pytest.mark.parametrize("samples", [0, 2])
def test_tiles_of_a_pyramid_are_its_levels_matrices(samples, monkeypatch):
    monkeypatch.setattr(roi_tiles, "TILES", 8)  # Long regions have more tiles.
    rng = np.random.default_rng(6)
    shapes, scales, padding = [(70, 90), (35, 45), (18, 23)], (1 / 4, 1 / 8, 1 / 16), 3
    maps = [rng.normal(size=(2, *shape, 2)) for shape in shapes]
    extents = tuple(np.array([shape, np.array(shape) - padding], np.int32) for shape in shapes)
    boxes = np.sort(rng.uniform(-30, 390, (2, 9, 2, 2)), axis=2).reshape(2, 9, 4)
    special = [[0, 0, 360, 9], [3, 0, 5, 280], [-99, -99, -50, -50], [20, 20, 20, 60], [60, 60, 50, 50]]
    boxes = np.concatenate([boxes, np.tile(special, (2, 1, 1))], axis=1)
    level = rng.integers(0, 3, boxes.shape[:2])
    boxes[1, :3] = 0  # Fewer tiles than the other image.
    weight = rng.normal(size=(2, 14, 3, 4, 2))

    @jax.vmap
    def tiles(maps, extents, boxes, level):
        return roi_tiles.align(maps, extents, boxes, level, (3, 4), scales, samples)

    def matrices(maps, extents, boxes, level):
        found = 0
        for number, (features, own) in enumerate(zip(maps, extents, strict=True)):
            one = functools.partial(align, scale=scales[number], samples=samples)
            each = jax.vmap(lambda x, y, z, one=one: one(x, y, extent=z))(features, boxes, own)
            found = jnp.where((level == number)[..., None, None, None], each, found)
        return found

    def value_and_gradient(way):
        def total(maps):
            return (weight * jnp.sin(way(maps, extents, boxes, level))).sum()

        return jax.jit(jax.value_and_grad(total))(maps)

    with jax.enable_x64(True):
        found, expected = value_and_gradient(tiles), value_and_gradient(matrices)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected)
        assert all(np.abs(gradient).max() > 0.1 for gradient in found[1])
        assert all((gradient[1, -padding:] == 0).all() for gradient in found[1])


@BOTH_WAYS
def test_aligned_features_are_those_of_detectron2s_test(align):
    features = np.arange(25, dtype=np.float32).reshape(5, 5, 1)
    box = np.array([[1, 1, 3, 3]], np.float32)
    corrected = [[4.5, 5, 5.5, 6], [7, 7.5, 8, 8.5], [9.5, 10, 10.5, 11], [12, 12.5, 13, 13.5]]
    found = align(features, box, (4, 4), 1.0, samples=0)
    np.testing.assert_allclose(found[0, ..., 0], corrected, rtol=1e-6)
    found = align(features, box, (4, 4), 1.0, samples=0, aligned=False)
    np.testing.assert_allclose(found[0, ..., 0], np.array(corrected) + 3, rtol=1e-6)  # Half a cell down and right.
    assert (align(features, np.array([[3, 4, 5, 4]], np.float32), (4, 4), 1.0, samples=0) == 0).all()


@pytest.mark.torch
def test_aligned_features_are_those_of_pytorchs_grid_sample():
    torch = pytest.importorskip("torch")
    features, boxes = some_features(), some_boxes()[:12]
    for number, (left, top, right, bottom) in enumerate(boxes * SCALE):
        x = left + (right - left) * (torch.arange(8) + 0.5) / 8
        y = top + (bottom - top) * (torch.arange(6) + 0.5) / 6
        # From -1 at the map's left edge to 1 at its right one.
        grid = torch.stack(torch.meshgrid(2 * y / HEIGHT - 1, 2 * x / WIDTH - 1, indexing="ij")[::-1], dim=-1)
        planes = torch.from_numpy(features).permute(2, 0, 1)[None]
        sampled = torch.nn.functional.grid_sample(planes, grid[None], padding_mode="border", align_corners=False)
        expected = torch.nn.functional.avg_pool2d(sampled, 2)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(align(features, boxes)[number], expected, atol=1e-5)


@pytest.mark.parametrize("function", [pool, align, align_by_tiles])
def test_gradients_are_those_of_finite_differences(function):
    features = some_features(np.float64)
    weight = np.random.default_rng(2).normal(size=(21, 3, 4, CHANNELS))
    with jax.enable_x64(True):
        total = jax.jit(lambda x: (weight * jnp.sin(function(x, some_boxes()))).sum())
        gradient = jax.grad(total)(features)
        assert gradient.dtype == np.float64
        np.testing.assert_allclose(gradient, by_hand.numeric_gradient(total, features), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", [pool, align, align_by_tiles, functools.partial(align, samples=0)])
def test_padding_the_map_changes_nothing(function):
    padded = np.pad(some_features(), ((0, 4), (0, 2), (0, 0)), constant_values=99)
    extent = np.array([HEIGHT, WIDTH], np.int32)
    boxes = some_boxes()
    # Beyond the map's size, how often a bin is sampled may differ.
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] <= [160, 112]).all(1)]
    np.testing.assert_allclose(
        function(padded, boxes, extent=extent), function(some_features(), boxes), rtol=0, atol=1e-6
    )
    gradient = jax.grad(lambda x: (function(x, boxes, extent=extent) ** 2).sum())(padded)
    assert (gradient[HEIGHT:] == 0).all() and (gradient[:, WIDTH:] == 0).all()


@pytest.mark.parametrize("function", [roi.roi_pool, roi.roi_align])
def test_rois_taken_a_few_at_a_time_are_the_same(function, monkeypatch):
    weight = np.random.default_rng(3).normal(size=(21, 4, 4, CHANNELS)).astype(np.float32)

    def value_and_gradient(features, boxes):
        return jax.value_and_grad(lambda x: (weight * function(x, boxes, 4, SCALE)).sum())(features)

    whole = jax.jit(value_and_gradient)(some_features(), some_boxes())
    monkeypatch.setattr(roi, "CHUNK_ELEMENTS", 4 * 7 * CHANNELS * 8)  # At most eight.
    parts = jax.jit(lambda *x: value_and_gradient(*x))(some_features(), some_boxes())
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-4)


@pytest.mark.parametrize("function", [pool, align, align_by_tiles])
def test_a_batch_of_images_and_low_precision(function):
    images = np.stack([some_features(), some_features()[::-1]]).astype(jnp.bfloat16)
    boxes = np.stack([some_boxes(), some_boxes()[::-1]])
    found = jax.vmap(function)(images, boxes)
    assert found.dtype == jnp.bfloat16
    for number in range(2):
        expected = function(images[number].astype(np.float32), boxes[number])
        np.testing.assert_array_equal(found[number], expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("function", [roi.roi_pool, roi.roi_align, align_by_tiles])
def test_eight_devices_give_what_one_does(function, monkeypatch):
    monkeypatch.setattr(roi, "CHUNK_ELEMENTS", 4 * 7 * CHANNELS * 8)
    rng = np.random.default_rng(4)
    images = rng.normal(size=(8, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
    boxes = np.stack([some_boxes()[rng.permutation(21)] for _ in range(8)])
    one_image = jax.grad(lambda features, boxes: (function(features, boxes, (4, 4), SCALE) ** 2).sum())
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    whole = jax.vmap(one_image)
    mapped = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=spec, out_specs=spec))(images, boxes)
    np.testing.assert_allclose(mapped, jax.jit(whole)(images, boxes), rtol=0, atol=1e-5)


def test_boxes_have_no_gradient():
    for function in (pool, align, align_by_tiles):
        gradient = jax.grad(lambda boxes, function=function: function(some_features(), boxes).sum())(some_boxes())
        assert (gradient == 0).all()
