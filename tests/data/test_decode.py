"""Decoding against Pillow, whose pixels published test errors rest on; resizing against plain NumPy and Pillow."""

import io
import struct
import time
import tracemalloc
import zlib

from bilinear_by_hand import bilinear
import numpy as np
from PIL import Image
import pytest
import simplejpeg

from resnet_jax.data import decode

# A plain bilinear value may be off by 0.5 from rounding; by 0.255 an axis, as sampling points may be a thousandth of a
# pixel off and neighbours 255 levels apart; and by 0.06 an axis, as OpenCV's weights have 11 bits.
BILINEAR_TOLERANCE = 1.15

# What is no image, and what was one before it was cut off.
TEXT, HTML = b"n01440764 tench, Tinca tinca\n" * 40, b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def photo(height: int, width: int, noise: float = 8, seed: int = 0) -> np.ndarray:
    """Smooth waves, others in each channel, and noise: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(y / (17 + 5 * channel) + x / (23 - 4 * channel)) for channel in range(3)]
    grain = np.random.default_rng(seed).normal(0, noise, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)


def image(mode: str = "RGB", height: int = 45, width: int = 70) -> Image.Image:
    return Image.fromarray(photo(height, width)).convert(mode)


def encoded(picture: Image.Image, form: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def png(height: int, width: int, depth: int, colour_type: int, rows: list[bytes]) -> bytes:
    """A PNG of kinds that Pillow doesn't write, from the format's definition."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def rotated() -> Image.Exif:
    """EXIF data that say that the picture is to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_stray_bytes(jpeg: bytes) -> bytes:
    """More stray bytes before the end marker than a decoder's bit buffer swallows."""
    return jpeg[:-2] + bytes(range(1, 60)) + jpeg[-2:]


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def negative() -> Image.Image:
    return Image.fromarray(255 - photo(45, 70))


FILES = {
    "JPEG": lambda: encoded(image(), "JPEG"),
    "JPEG of full colour resolution": lambda: encoded(image(), "JPEG", subsampling=0, quality=95),
    "JPEG, grey": lambda: encoded(image("L"), "JPEG"),
    "JPEG, progressive": lambda: encoded(image(), "JPEG", progressive=True),
    "JPEG, CMYK": lambda: encoded(image("CMYK"), "JPEG"),
    "PNG": lambda: encoded(image(), "PNG"),
    "PNG, grey": lambda: encoded(image("L"), "PNG"),
    "PNG, 1 bit": lambda: encoded(image("1"), "PNG"),
    "PNG, 2 bits of grey": lambda: png(9, 12, 2, 0, [bytes([27, 228, row]) for row in range(9)]),
    "PNG, palette": lambda: encoded(image("P"), "PNG"),
    "PNG, palette with transparency": lambda: encoded(image("P"), "PNG", transparency=3),
    "PNG, grey with a transparent level": lambda: encoded(image("L"), "PNG", transparency=100),
    "PNG, RGB with a transparent colour": lambda: encoded(
        image(), "PNG", transparency=tuple(photo(45, 70)[0, 0].tolist())
    ),
    "PNG, RGBA": lambda: encoded(Image.fromarray(np.dstack([photo(45, 70), photo(45, 70)[..., 0]])), "PNG"),
    "PNG, LA": lambda: encoded(Image.fromarray(photo(45, 70)[..., :2]), "PNG"),
    "PNG, 16-bit RGB": lambda: png(4, 5, 16, 2, [bytes(range(7 * row, 7 * row + 30)) for row in range(4)]),
    "PNG, animated": lambda: encoded(image(), "PNG", save_all=True, append_images=[negative()]),
    "PNG, animated, with a picture for others": lambda: encoded(
        image(), "PNG", save_all=True, append_images=[negative(), image()], default_image=True
    ),
    "WebP": lambda: encoded(image(), "WEBP"),
    "WebP, lossless": lambda: encoded(image(), "WEBP", lossless=True),
    "BMP": lambda: encoded(image(), "BMP"),
    "GIF": lambda: encoded(image("P"), "GIF"),
    "JPEG of one pixel": lambda: encoded(image("RGB", 1, 1), "JPEG"),
    "PNG of one pixel": lambda: encoded(image("RGB", 1, 1), "PNG"),
    "JPEG of 3 x 20000 pixels": lambda: encoded(image("RGB", 3, 20_000), "JPEG"),
    "PNG of 3 x 20000 pixels": lambda: encoded(image("RGB", 3, 20_000), "PNG"),
}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_pillow(kind):
    content = FILES[kind]()
    pixels = decode.decode(content)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, by_pillow(content))


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_lossless_pixels_are_those_encoded_in_the_order_red_green_blue(form):
    np.testing.assert_array_equal(decode.decode(encoded(image(), form)), photo(45, 70))


def test_16_bit_grey_is_scaled_to_8_bits_and_rounded():
    levels = np.append(np.random.default_rng(0).integers(0, 65_536, 58), [0, 65_535]).reshape(6, 10).astype(np.uint16)
    content = png(6, 10, 16, 0, [row.astype(">u2").tobytes() for row in levels])
    expected = np.floor(levels / 257 + 0.5)  # 65,535 = 255 * 257.
    np.testing.assert_array_equal(decode.decode(content), np.stack([expected] * 3, axis=-1))


def test_of_an_animation_the_first_picture_is_taken():
    # Few colours, so that a palette holds them all exactly.
    first, second = (np.random.default_rng(seed).integers(0, 4, (20, 30, 3), np.uint8) * 85 for seed in (0, 1))
    content = encoded(Image.fromarray(first), "GIF", save_all=True, append_images=[Image.fromarray(second)])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    np.testing.assert_array_equal(decode.decode(content), first)


def test_transparency_is_dropped_and_what_it_hides_is_seen():
    colours = photo(20, 30)
    content = encoded(Image.fromarray(np.dstack([colours, np.zeros((20, 30), np.uint8)])), "PNG")
    np.testing.assert_array_equal(decode.decode(content), colours)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_ignored(form):
    turned, plain = (encoded(image(), form, **options) for options in ({"exif": rotated()}, {}))
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    assert decode.decode(turned).shape == (45, 70, 3)
    np.testing.assert_array_equal(decode.decode(turned), decode.decode(plain))


JPEG, PNG = encoded(image(), "JPEG"), encoded(image(), "PNG")


@pytest.mark.parametrize(
    "content",
    [
        *[pytest.param(whole[:kept], id=f"{form} cut off after {kept} bytes")
          for form, whole in (("JPEG", JPEG), ("PNG", PNG)) for kept in (3, 20, 100, len(whole) // 2, len(whole) - 40)],
        pytest.param(JPEG[:-2], id="JPEG without its end marker"),
        pytest.param(encoded(image("P"), "PNG")[:-500], id="palette PNG cut off"),
        pytest.param(encoded(image(), "WEBP")[:-10], id="WebP cut off"),
        pytest.param(encoded(image(), "BMP")[:-300], id="BMP cut off"),
        pytest.param(encoded(image("P"), "GIF")[:-2000], id="GIF cut off"),
        pytest.param(PNG[:1000] + bytes(40) + PNG[1040:], id="PNG with zeros in the middle"),
        pytest.param(JPEG[:2] + TEXT, id="text after a JPEG's first bytes"),
        pytest.param(PNG[:8] + TEXT, id="text after a PNG's first bytes"),
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(TEXT, id="text"),
        pytest.param(HTML, id="HTML"),
    ],
)  # fmt: skip
def test_what_is_no_whole_image_is_reported_as_broken_in_one_line(content):
    with pytest.raises(decode.BrokenImage) as error:
        decode.decode(content)
    assert len(str(error.value)) > 5
    assert "\n" not in str(error.value)


def test_stray_bytes_before_the_end_of_a_jpeg_are_skipped():
    stray = with_stray_bytes(JPEG)
    with pytest.raises(ValueError, match="extraneous bytes"):  # Otherwise this tests nothing.
        simplejpeg.decode_jpeg(stray)
    np.testing.assert_array_equal(decode.decode(stray), decode.decode(JPEG))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("height", "width"), [(320, 400), (321, 403)])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_reduced_jpeg_has_its_sides_divided_and_rounded_up_and_looks_like_block_means(scale, height, width, mode):
    content = encoded(image(mode, height, width), "JPEG", quality=95)
    reduced = decode.decode(content, scale)
    means = np.asarray(Image.open(io.BytesIO(content)).convert("RGB").reduce(scale), np.float64)
    assert reduced.shape == means.shape == (-(-height // scale), -(-width // scale), 3)
    # Low frequencies of the block are kept, not its mean: noise differs by about 1 level. A pixel's shift makes it 5.
    assert np.abs(reduced - means).mean() < 2
    assert np.abs(reduced[1:] - means[:-1]).mean() > 4


@pytest.mark.parametrize(("height", "width"), [(320, 400), (321, 403)])
def test_a_jpeg_with_stray_bytes_is_reduced_like_any_other(height, width):
    content = encoded(image("RGB", height, width), "JPEG", quality=95)
    expected, stray = decode.decode(content, 2), decode.decode(with_stray_bytes(content), 2)
    assert stray.shape == expected.shape
    assert np.abs(stray - expected.astype(np.float64)).mean() < 1  # Colours may be brought to full resolution later.


@pytest.mark.parametrize(
    ("side", "needed", "scale"),
    [(255, 256, 1), (256, 256, 1), (511, 256, 1), (512, 256, 2), (1023, 256, 2), (1024, 256, 4), (2047, 256, 4),
     (2048, 256, 8), (10_000, 256, 8), (1100, 480, 2), (960, 480, 2), (959, 480, 1)],
)  # fmt: skip
def test_the_scale_is_the_largest_that_leaves_the_pixels_needed(side, needed, scale):
    assert decode.jpeg_scale(side, needed) == scale


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": rotated()}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpegs_shape_is_read_from_its_header(mode, options):
    content = encoded(image(mode), "JPEG", **options)
    assert decode.jpeg_shape(content) == (45, 70)
    assert decode.jpeg_shape(content[:-50]) == (45, 70)


@pytest.mark.parametrize(
    "content",
    [PNG, encoded(image("CMYK"), "JPEG"), encoded(image(), "WEBP"), JPEG[:20], JPEG[:3], b"", TEXT, HTML],
    ids=["PNG", "CMYK", "WebP", "JPEG cut off", "JPEG's first bytes", "nothing", "text", "HTML"],
)
def test_there_is_no_shape_of_what_cannot_be_reduced(content):
    assert decode.jpeg_shape(content) is None


def test_the_resized_shape_is_that_of_torchvision():
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (1, 20_000), (20_000, 3), (375, 500), *generator.integers(1, 6_000, (300, 2)).tolist()]
    for (height, width), shorter in zip(sizes, generator.integers(1, 600, len(sizes)).tolist(), strict=True):
        # torchvision.transforms.functional._compute_resized_output_size
        short, long = (width, height) if width <= height else (height, width)
        new_short, new_long = shorter, int(shorter * long / short)
        expected = (new_long, new_short) if width <= height else (new_short, new_long)
        assert decode.resized_shape(height, width, shorter) == expected, (height, width, shorter)


@pytest.mark.parametrize("picture", ["photo", "noise"])
@pytest.mark.parametrize("case", range(30))
def test_a_crop_of_a_resized_image_is_plain_bilinear(case, picture):
    generator = np.random.default_rng(case)
    source = generator.integers(8, 700, 2)
    noise = generator.integers(0, 256, (*source, 3), np.uint8)  # The worst there is: errors show as nowhere else.
    pixels = noise if picture == "noise" else photo(*source)
    height, width = decode.resized_shape(*source.tolist(), int(generator.integers(32, 500)))
    size = int(generator.integers(8, min(height, width, 224) + 1))
    highest = np.array([height - size, width - size])
    for share in (generator.random(2), np.zeros(2), np.ones(2), np.array([0, 1])):  # Somewhere, and in corners.
        top, left = np.rint(share * highest).astype(int).tolist()
        crop = decode.resize_and_crop(pixels, (height, width), (top, left), size, "bilinear")
        assert crop.dtype == np.uint8
        expected = bilinear(pixels, height, width, top, left, size)
        np.testing.assert_allclose(crop, expected, rtol=0, atol=BILINEAR_TOLERANCE)


@pytest.mark.parametrize("share", [0, 0.31, 0.5, 1])
@pytest.mark.parametrize("shorter", [256, 311, 480])
@pytest.mark.parametrize(("height", "width"), [(1, 20_000), (3, 20_000), (20_000, 3), (11, 20_001)])
def test_a_strip_is_cropped_exactly_quickly_and_in_little_memory(height, width, shorter, share):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    resized = decode.resized_shape(height, width, shorter)
    top, left = (int(share * (side - 224)) for side in resized)
    tracemalloc.start()
    start = time.perf_counter()
    crop = decode.resize_and_crop(pixels, resized, (top, left), 224, "bilinear")
    seconds, (_, most_bytes) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(crop, bilinear(pixels, *resized, top, left, 224), rtol=0, atol=BILINEAR_TOLERANCE)
    assert seconds < 1  # Whole, they have up to 4.6 billion pixels.
    assert most_bytes < 100e6  # Each of a dozen readers may hold one.


@pytest.mark.parametrize(("height", "width"), [(30, 41), (100, 50), (77, 200)])
def test_resizing_is_plain_bilinear(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (77, 90, 3), np.uint8)
    padded = bilinear(pixels, height, width, 0, 0, max(height, width))  # Goes beyond the shorter side, with its edge.
    resized = decode.resize(pixels, height, width, "bilinear")
    np.testing.assert_allclose(resized, padded[:height, :width], rtol=0, atol=BILINEAR_TOLERANCE)


def test_resizing_to_the_same_shape_changes_nothing():
    np.testing.assert_array_equal(decode.resize(photo(45, 70), 45, 70, "bicubic"), photo(45, 70))


PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("height", "width"), [(30, 41), (100, 50), (77, 200)])
def test_antialiased_resizing_is_that_of_pillow(height, width, interpolation):
    expected = Image.fromarray(photo(77, 90)).resize((width, height), PILLOW[interpolation])
    np.testing.assert_array_equal(decode.resize_antialiased(photo(77, 90), height, width, interpolation), expected)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("share", [(0, 0), (0.5, 0.5), (1, 1), (0, 1), (0.3, 0.8)])
@pytest.mark.parametrize(("height", "width"), [(500, 375), (333, 501), (90, 131), (256, 300), (40, 700)])
def test_a_crop_of_antialiased_resizing_is_that_of_pillow_to_one_level(height, width, share, interpolation):
    pixels = photo(height, width)
    resized = decode.resized_shape(height, width, 256)
    top, left = (round(part * (side - 224)) for part, side in zip(share, resized, strict=True))
    crop = decode.resize_antialiased(pixels, *resized, interpolation, (top, left, 224))
    whole = np.asarray(Image.fromarray(pixels).resize(resized[::-1], PILLOW[interpolation]), np.float64)
    # Pillow's box has 24 bits, and the order in which it takes the axes depends on the box: 1 level of rounding.
    np.testing.assert_allclose(crop, whole[top : top + 224, left : left + 224], rtol=0, atol=1)
