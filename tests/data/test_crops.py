"""Crops against plain NumPy, Pillow and torchvision's rules, and their randomness against what it should be.

Bounds on chi-square statistics are their 0.01% and 99.99% points, those of Kolmogorov and Smirnov's their 99.99% point;
the seeds are fixed, so that nothing here is a matter of luck.
"""

import functools
import io
import math

from bilinear_by_hand import bilinear
import numpy as np
from PIL import Image
import pytest

from resnet_jax.data import crops, decode, order

CHI_SQUARE = {32: (10.33, 70.57), 176: (114.61, 254.46), 224: (153.69, 311.39)}  # By degrees of freedom.
DRAWS = 10_000

# A plain bilinear value may be off by 0.5 from rounding; by 0.255 an axis, as sampling points may be a thousandth of a
# pixel off and neighbours 255 levels apart; and by 0.06 an axis, as OpenCV's weights have 11 bits.
BILINEAR_TOLERANCE = 1.15


def photo(height: int, width: int, noise: float = 8, coarseness: float = 1) -> np.ndarray:
    """Smooth waves, others in each channel, and noise: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / coarseness
    waves = [128 + 90 * np.sin(y / (17 + 5 * channel) + x / (23 - 4 * channel)) for channel in range(3)]
    grain = np.random.default_rng(0).normal(0, noise, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **options)
    return content.getvalue()


@functools.cache
def large_jpeg(height: int, width: int) -> bytes:
    """Of one content whatever the size, so that its crops differ as much between neighbouring pixels."""
    return encoded(photo(height, width, noise=1, coarseness=min(height, width) / 500), "JPEG", quality=95)


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def with_stray_bytes(jpeg: bytes) -> bytes:
    """More stray bytes before the end marker than a decoder's bit buffer swallows: Pillow reads it."""
    return jpeg[:-2] + bytes(range(1, 60)) + jpeg[-2:]


def torchvision_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    longer = int(shorter * long / short)
    return (longer, shorter) if width <= height else (shorter, longer)


def mean_error(pixels: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(pixels - expected.astype(np.float64)).mean())


def assert_uniform(counts: np.ndarray) -> None:
    expected = counts.sum() / len(counts)
    low, high = CHI_SQUARE[len(counts) - 1]
    assert low < (np.square(counts - expected) / expected).sum() < high


def assert_uniform_from_0_to_1(values: np.ndarray) -> None:
    """Kolmogorov and Smirnov's test."""
    steps = np.arange(len(values) + 1) / len(values)
    values = np.sort(values)
    distance = max((steps[1:] - values).max(), (values - steps[:-1]).max())
    assert distance < 2.225 / math.sqrt(len(values))


# The numbers.


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64-10 from its definition (Salmon et al., 2011, section 4.3): four words of 64 bits."""
    mask, (a, b, c, d), (k, m) = 2**64 - 1, counter, key
    for _ in range(10):
        high, low = divmod(0xD2E7470EE14C6C93 * a, 2**64)
        high2, low2 = divmod(0xCA5A826395121157 * c, 2**64)
        a, b, c, d = high2 ^ b ^ k, low2, high ^ d ^ m, low
        k, m = (k + 0x9E3779B97F4A7C15) & mask, (m + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


@pytest.mark.parametrize(("seed", "epoch", "index"), [(0, 0, 0), (7, 3, 1_281_166), (2**40, 599, 5)])
def test_uniforms_are_53_bits_of_philox_keyed_by_seed_and_epoch(seed, epoch, index):
    words = [word for block in (1, 2, 3) for word in philox([block, index, 1, 0], [seed, epoch])]
    expected = [(word >> 11) / 2**53 for word in words]
    assert crops.example_uniforms(seed, epoch, index, 12).tolist() == expected


def test_uniforms_are_what_they_were():
    pinned = [0.2002512588852512, 0.877076018050304, 0.2796147664221119, 0.7842347116471287, 0.917760687698024]
    assert crops.example_uniforms(7, 3, 1_281_166, 5).tolist() == pinned


def test_fewer_uniforms_are_the_first_of_more():
    more = crops.example_uniforms(1, 2, 3, 40)
    assert more.dtype == np.float64
    for count in (0, 1, 3, 5):
        np.testing.assert_array_equal(crops.example_uniforms(1, 2, 3, count), more[:count])


def test_uniforms_of_all_triples_differ_and_those_of_one_are_the_same():
    triples = [(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(20)]
    draws = np.array([crops.example_uniforms(*triple, 40) for triple in triples])
    assert len(np.unique(draws)) == draws.size  # Not even shifted ones are the same.
    assert ((draws >= 0) & (draws < 1)).all()
    again = np.array([crops.example_uniforms(*triple, 40) for triple in reversed(triples)])
    np.testing.assert_array_equal(again[::-1], draws)


def test_uniforms_are_of_other_bits_than_the_order_of_the_examples():
    bits = np.random.Philox(key=[3, 2]).random_raw(100_000)
    np.testing.assert_array_equal(np.argsort(bits, kind="stable"), order.epoch_order(3, 2, 100_000))
    draws = np.array([crops.example_uniforms(3, 2, index, 40) for index in range(1_000)])
    assert not np.isin(draws, (bits >> np.uint64(11)) * 2.0**-53).any()


# ScaleCrop.


@pytest.fixture(scope="module", params=["examples", "epochs"])
def uniforms(request) -> np.ndarray:
    """[10,000, 3], of as many examples, or of one in as many epochs."""
    pairs = [(0, i) if request.param == "examples" else (i, 3) for i in range(DRAWS)]
    return np.array([crops.example_uniforms(0, epoch, index, crops.ScaleCrop.draws) for epoch, index in pairs])


def test_the_shorter_side_is_uniform_over_256_to_480_with_both_ends(uniforms):
    sides = np.array([crops.ScaleCrop().shorter_side(row) for row in uniforms])
    assert (sides.min(), sides.max()) == (256, 480)  # 44 of each are expected.
    assert_uniform(np.bincount(sides - 256, minlength=225))


@pytest.mark.parametrize(("smallest", "largest"), [(256, 480), (256, 256), (32, 40)])
def test_the_extreme_uniforms_give_the_extreme_sides(smallest, largest):
    crop = crops.ScaleCrop(smallest=smallest, largest=largest)
    assert crop.shorter_side(np.zeros(3)) == smallest
    assert crop.shorter_side(np.full(3, 1 - 2.0**-53)) == largest


@pytest.mark.parametrize(("height", "width"), [(256, 400), (400, 256)])
def test_the_corner_is_uniform_over_all_there_are(uniforms, height, width):
    corners = np.array([crops.ScaleCrop().corner(height, width, row) for row in uniforms])
    for places, side in zip(corners.T, (height, width), strict=True):
        assert (places.min(), places.max()) == (0, side - 224)
        assert_uniform(np.bincount(places, minlength=side - 224 + 1))


def test_a_crop_as_large_as_the_image_has_one_corner():
    assert crops.ScaleCrop().corner(224, 224, np.full(3, 1 - 2.0**-53)) == (0, 0)


def test_scale_top_and_left_are_uncorrelated_and_so_are_neighbours(uniforms):
    crop = crops.ScaleCrop()
    table = np.array([(crop.shorter_side(row), *crop.corner(500, 700, row)) for row in uniforms])
    both = np.corrcoef(np.hstack([table[1:], table[:-1]]).T)  # Of one draw, and of one and the one before.
    assert np.abs(both - np.eye(6)).max() < 4 / math.sqrt(DRAWS)  # 4 standard deviations.


def drawn(crop: crops.ScaleCrop, height: int, width: int, uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """What the three numbers mean: height and width of the resized image, top and left in it."""
    shorter = crop.smallest + math.floor(uniforms[0] * (crop.largest - crop.smallest + 1))
    resized = torchvision_shape(height, width, shorter)
    return *resized, *(math.floor(u * (side - crop.size + 1)) for u, side in zip(uniforms[1:], resized, strict=True))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "pixels"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (1100, 1400), (120, 90), (224, 700)])
def test_a_scale_crop_is_plain_bilinear_at_the_drawn_scale_and_corner(height, width, form, index):
    image = photo(height, width) if form == "pixels" else encoded(photo(height, width), form)
    pixels = image if form == "pixels" else by_pillow(image)
    crop, uniforms = crops.ScaleCrop(reduced_dct=False), crops.example_uniforms(0, 0, index, 3)
    output = crop(image, uniforms)
    assert output.dtype == np.uint8
    expected = bilinear(pixels, *drawn(crop, height, width, uniforms), 224)
    np.testing.assert_allclose(output, expected, rtol=0, atol=BILINEAR_TOLERANCE)


@pytest.mark.parametrize("uniforms", [(0, 0.2, 0.9), (0.3, 1 - 2**-53, 0.5), (0.999, 0, 1 - 2**-53)])
@pytest.mark.parametrize(("height", "width"), [(1100, 1400), (1403, 1101), (2100, 2501)])
def test_a_large_jpeg_looks_the_same_decoded_at_a_reduced_scale(height, width, uniforms):
    content, uniforms = large_jpeg(height, width), np.array(uniforms)
    whole, reduced = (crops.ScaleCrop(reduced_dct=flag)(content, uniforms) for flag in (False, True))
    assert not np.array_equal(whole, reduced)  # It was reduced.
    # Noise and the highest frequencies go: 0.4 to 0.65 levels. Elsewhere by a pixel, it would be 2.8 to 6.
    assert mean_error(reduced, whole) < 0.8
    assert mean_error(reduced[1:], whole[:-1]) > 2.5
    assert mean_error(reduced[:, 1:], whole[:, :-1]) > 2.5


@pytest.mark.parametrize("index", range(3))
def test_a_jpeg_too_small_to_be_reduced_stays_the_same(index):
    content, uniforms = encoded(photo(375, 500), "JPEG"), crops.example_uniforms(0, 0, index, 3)
    whole, reduced = (crops.ScaleCrop(reduced_dct=flag)(content, uniforms) for flag in (False, True))
    np.testing.assert_array_equal(reduced, whole)


CROPS = {"ScaleCrop": crops.ScaleCrop, "InceptionCrop": crops.InceptionCrop}


@pytest.mark.parametrize("kind", CROPS)
def test_no_jpeg_smaller_than_reducible_from_is_reduced_and_some_at_it_are(kind):
    crop = CROPS[kind]()
    numbers = np.zeros(crop.draws)  # The smallest scale.
    if kind == "InceptionCrop":
        numbers = np.tile([1 - 2**-53, 0.5, 0, 0], crop.attempts)  # The largest box: all there is of a square.
    side = int(crop.reducible_from)
    for pixels, same in ((photo(side - 1, side - 1), True), (photo(side, side), False)):
        content = encoded(pixels, "JPEG", quality=95)
        whole = CROPS[kind](reduced_dct=False)(content, numbers)
        assert np.array_equal(crop(content, numbers), whole) == same
    assert CROPS[kind](reduced_dct=False).reducible_from == math.inf


@pytest.mark.parametrize(("height", "width"), [(1100, 1400), (1101, 1401)])
@pytest.mark.parametrize("kind", CROPS)
def test_a_large_jpeg_with_stray_bytes_is_cropped_like_any_other(kind, height, width):
    content = large_jpeg(height, width)
    crop = CROPS[kind]()
    numbers = crops.example_uniforms(0, 0, 0, crop.draws)
    # Decoders may differ in how they bring colours to full resolution. Cut out elsewhere, it would be tens of levels.
    assert mean_error(crop(with_stray_bytes(content), numbers), crop(content, numbers)) < 1


# InceptionCrop.


@pytest.fixture(scope="module")
def boxes() -> np.ndarray:
    """10,000 boxes [N, 4] (top, left, height, width) in a square so large that rounding does not matter."""
    crop = crops.InceptionCrop()
    return np.array([crop.box(20_000, 20_000, crops.example_uniforms(0, 0, i, crop.draws)) for i in range(DRAWS)])


def test_the_area_is_uniform_from_8_percent_where_every_ratio_fits(boxes):
    area = boxes[:, 2] * boxes[:, 3] / 20_000**2
    assert 0.08 * 0.999 < area.min() < 0.081
    assert area.max() > 0.98
    # A box of less than 3/4 of a square fits into it whatever its ratio; a larger one, only if nearly square.
    fitting = area[area < 0.75]
    assert_uniform_from_0_to_1((fitting - 0.08) / (0.75 - 0.08))
    # Larger areas a fit with probability -log(a) / log(4 / 3), of which 0.75 to 1 has the integral 0.1190.
    share, expected = len(fitting) / DRAWS, 0.67 / (0.67 + 0.1190)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / DRAWS)


def test_the_ratio_is_uniform_in_the_logarithm_from_3_4_to_4_3(boxes):
    ratio = (boxes[:, 3] / boxes[:, 2])[boxes[:, 2] * boxes[:, 3] < 0.75 * 20_000**2]
    assert_uniform_from_0_to_1(np.log(ratio * 4 / 3) / np.log(16 / 9))


@pytest.mark.parametrize(("place", "side"), [(0, 2), (1, 3)])
def test_the_place_is_uniform_over_all_there_are(boxes, place, side):
    allowed = 20_000 - boxes[:, side] + 1
    assert_uniform_from_0_to_1((boxes[:, place] + 0.5) / allowed)


def test_area_ratio_and_place_are_uncorrelated(boxes):
    boxes = boxes[boxes[:, 2] * boxes[:, 3] < 0.75 * 20_000**2]
    top, left, height, width = boxes.T
    columns = [height * width, np.log(width / height), top / (20_001 - height), left / (20_001 - width)]
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 4 / math.sqrt(len(boxes))


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (500, 375), (7, 50), (1, 1), (2, 3)])
def test_boxes_are_inside_the_image_and_reach_its_edges(height, width):
    crop = crops.InceptionCrop()
    boxes = np.array([crop.box(height, width, crops.example_uniforms(1, 0, i, crop.draws)) for i in range(1_000)])
    top, left, h, w = boxes.T
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (top + h).max() == height and (left + w).max() == width
    assert top.min() == left.min() == 0
    # Each side was rounded by half a pixel at most, or comes from torchvision's rule when nothing fits.
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()


def test_a_later_attempt_is_taken_where_the_first_does_not_fit():
    misfit, fit = [0.95, 0, 0.1, 0.2], [0.25, 0.5, 0.6, 0.7]  # 95% of a square at 3 : 4 is higher than it.
    area = 0.08 + 0.92 * 0.25
    side = round(1000 * math.sqrt(area))
    place = [int(u * (1000 - side + 1)) for u in (0.6, 0.7)]
    for before in (0, 1, 9):
        rows = [misfit] * before + [fit] + [misfit] * (9 - before)
        assert crops.InceptionCrop().box(1000, 1000, np.ravel(rows)) == (*place, side, side)


@pytest.mark.parametrize(("height", "width"), [(1, 100), (100, 1), (9, 100), (101, 8), (30, 1000), (100, 110)])
def test_the_largest_box_in_the_middle_is_taken_where_nothing_fits(height, width):
    misfit = [1 - 2**-53, 0, 0.3, 0.3]  # All of the area, at 3 : 4: too high or too wide for each of these.
    # torchvision.transforms.RandomResizedCrop.get_params
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    box = crops.InceptionCrop().box(height, width, np.array(misfit * 10))
    assert box == ((height - h) // 2, (width - w) // 2, h, w)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "pixels"])
def test_an_inception_crop_is_its_box_resized_by_plain_bilinear(form, index):
    image = photo(375, 500) if form == "pixels" else encoded(photo(375, 500), form)
    pixels = image if form == "pixels" else by_pillow(image)
    crop = crops.InceptionCrop(reduced_dct=False)
    numbers = crops.example_uniforms(0, 0, index, crop.draws)
    top, left, height, width = crop.box(375, 500, numbers)
    expected = bilinear(pixels[top : top + height, left : left + width], 224, 224, 0, 0, 224)
    np.testing.assert_allclose(crop(image, numbers), expected, rtol=0, atol=BILINEAR_TOLERANCE)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("height", "width"), [(1600, 2000), (1603, 2001)])
def test_an_inception_crop_of_a_large_jpeg_looks_the_same_decoded_at_a_reduced_scale(height, width, index):
    content = large_jpeg(height, width)
    numbers = crops.example_uniforms(0, 0, index, 40)
    whole, reduced = (crops.InceptionCrop(reduced_dct=flag)(content, numbers) for flag in (False, True))
    # Sides begin and end up to a pixel of the reduced image, so of the result, beside where they should, and a pixel is
    # 2.5 to 6.5 levels an axis. Cut out elsewhere, it would be tens.
    assert mean_error(reduced, whole) < 6


# Evaluation.

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SHAPES = [(500, 375), (375, 500), (333, 501), (501, 333), (256, 256), (257, 259), (90, 131), (1100, 1403), (5, 900)]


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (223, 256), (256, 256), (64, 73)])
def test_a_center_crop_is_that_of_torchvision_on_pillow(size, shorter, height, width, interpolation):
    content = encoded(photo(height, width), "PNG")
    resized_height, resized_width = torchvision_shape(height, width, shorter)
    resized = Image.open(io.BytesIO(content)).resize((resized_width, resized_height), PILLOW[interpolation])
    top, left = round((resized_height - size) / 2.0), round((resized_width - size) / 2.0)
    expected = np.asarray(resized, np.float64)[top : top + size, left : left + size]
    crop = crops.CenterCrop(size, shorter, interpolation)(content, np.empty(0))
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    # Pillow's box has 24 bits, and the order in which it takes the axes depends on the box: 1 level of rounding.
    np.testing.assert_allclose(crop, expected, rtol=0, atol=1)


def test_a_center_crop_of_pixels_is_that_of_their_file():
    pixels = photo(300, 401)
    from_pixels, from_file = (crops.CenterCrop()(image, np.empty(0)) for image in (pixels, encoded(pixels, "PNG")))
    np.testing.assert_array_equal(from_pixels, from_file)


@pytest.mark.parametrize("form", ["PNG", "pixels"])
def test_a_whole_square_of_the_right_size_is_untouched(form):
    pixels = photo(32, 32)
    output = crops.Whole(32)(pixels if form == "pixels" else encoded(pixels, form), np.empty(0))
    np.testing.assert_array_equal(output, pixels)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("height", "width"), [(32, 33), (31, 32), (28, 28), (375, 500), (1, 70)])
def test_a_whole_image_of_another_shape_is_resized_by_pillow(height, width, interpolation):
    content = encoded(photo(height, width), "JPEG")
    expected = Image.open(io.BytesIO(content)).resize((32, 32), PILLOW[interpolation])
    np.testing.assert_array_equal(crops.Whole(32, interpolation)(content, np.empty(0)), expected)


@pytest.mark.parametrize("crop", [crops.ScaleCrop(), crops.InceptionCrop(), crops.CenterCrop(), crops.Whole(224)])
def test_views_are_the_crops_of_the_examples_with_their_labels(crop):
    examples = [(encoded(photo(240 + i, 300), "PNG"), i + 5) for i in range(3)]
    for i, (content, label) in enumerate(examples):
        numbers = crops.example_uniforms(0, 0, i, crop.draws)
        pixels, seen = crops.Views(examples, crop)(i, numbers)
        assert seen == label
        np.testing.assert_array_equal(pixels, crop(content, numbers))


def test_a_broken_image_is_reported_by_its_crop():
    for crop in (crops.ScaleCrop(), crops.InceptionCrop(), crops.CenterCrop(), crops.Whole(224)):
        with pytest.raises(decode.BrokenImage):
            crop(encoded(photo(600, 600), "JPEG")[:-1000], crops.example_uniforms(0, 0, 0, crop.draws))
