"""The mean of training images that are read one at a time, against NumPy's over all of them at once."""

from collections import Counter
import io
import pathlib

import numpy as np
from PIL import Image
import pytest

from resnet_jax.data.crops import CenterCrop, Crop, Whole
from resnet_jax.data.sources import Statistics
from resnet_jax.data.statistics import Sums, training_statistics
from resnet_jax.errors import UsageError

VIEW = CenterCrop(size=8, shorter_side=11)


class Listed:
    """Examples in memory that remember what was read; None can't be read."""

    def __init__(self, contents: list[bytes | None]):
        self.contents, self.reads = contents, Counter()

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        self.reads[i] += 1
        if self.contents[i] is None:
            raise OSError(5, "Input/output error")
        return self.contents[i], 0

    def where(self, i: int) -> str:
        return f"/images/{i:04}.png"

    def fingerprint(self, stamps: bool) -> str:
        return str(hash(tuple(self.contents)))


def pictures(count: int) -> list[bytes]:
    """PNG files of several shapes and colours."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        file = io.BytesIO()
        shape = (*rng.integers(12, 30, 2), 3)
        Image.fromarray(rng.integers(i, 256, shape, np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def assert_numpys(ours: Statistics, contents: list[bytes], view: Crop) -> None:
    pixels = np.stack([view(content, None) for content in contents]) / 255
    assert (ours.image.dtype, ours.mean.dtype, ours.std.dtype) == (np.float32,) * 3
    np.testing.assert_array_max_ulp(ours.image, pixels.mean(0).astype(np.float32), 1)
    np.testing.assert_allclose(ours.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(ours.std, pixels.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("view", [VIEW, Whole(size=6)], ids=["centre crop", "whole image"])
def test_the_statistics_are_numpys_over_all_views(tmp_path, view, workers):
    contents = pictures(150)
    examples = Listed(contents)
    assert_numpys(training_statistics(examples, view, workers, tmp_path, skip_broken=False), contents, view)
    assert examples.reads == Counter(range(150))


def test_one_image_is_its_own_mean(tmp_path):
    contents = pictures(1)
    ours = training_statistics(Listed(contents), VIEW, 1, tmp_path, skip_broken=False)
    np.testing.assert_array_equal(ours.image, (VIEW(contents[0], None) / 255).astype(np.float32))


def test_images_of_one_colour_have_no_nan_for_a_deviation(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (12, 12), (255, 77, 0)).save(file, "PNG")
    ours = training_statistics(Listed([file.getvalue()] * 7), VIEW, 1, tmp_path, skip_broken=False)
    np.testing.assert_allclose(ours.mean, [1, 77 / 255, 0], rtol=1e-6)
    assert np.isfinite(ours.std).all()
    assert (ours.std < 1e-5).all()


def test_sums_of_more_than_32_bits_are_exact():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 255
    sums = Sums()
    sums.add(image)
    for _ in range(30):  # 2^30 images, half of whose pixels are white.
        sums.merge(sums)
    found = sums.statistics()
    assert sums.count == 2**30
    np.testing.assert_array_equal(found.image, image / np.float32(255))
    np.testing.assert_array_equal(found.mean, np.full(3, 0.5, np.float32))
    np.testing.assert_allclose(found.std, np.full(3, 0.5), rtol=1e-6)


def test_the_second_time_no_example_is_read(tmp_path):
    contents, cache = pictures(20), tmp_path / "new" / "cache"
    first = training_statistics(Listed(contents), VIEW, 2, cache, skip_broken=False)
    again = Listed(contents)
    second = training_statistics(again, VIEW, 2, cache, skip_broken=False)
    assert not again.reads
    for name in ("image", "mean", "std"):
        ours, before = getattr(second, name), getattr(first, name)
        np.testing.assert_array_equal(ours, before)
        assert ours.dtype == before.dtype


def test_another_view_and_other_examples_are_computed_anew(tmp_path):
    contents = pictures(20)
    training_statistics(Listed(contents), VIEW, 2, tmp_path, skip_broken=False)
    other_view = CenterCrop(size=8, shorter_side=12)
    ours = training_statistics(Listed(contents), other_view, 2, tmp_path, skip_broken=False)
    assert_numpys(ours, contents, other_view)
    ours = training_statistics(Listed(contents[:-1]), VIEW, 2, tmp_path, skip_broken=False)
    assert_numpys(ours, contents[:-1], VIEW)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_cache_is_computed_anew(tmp_path, share):
    contents = pictures(5)
    training_statistics(Listed(contents), VIEW, 1, tmp_path, skip_broken=False)
    (path,) = tmp_path.iterdir()
    stored = path.read_bytes()
    path.write_bytes(stored[: int(share * len(stored))])
    assert_numpys(training_statistics(Listed(contents), VIEW, 1, tmp_path, skip_broken=False), contents, VIEW)
    assert path.stat().st_size == len(stored)


def test_a_cache_that_can_not_be_written_costs_only_the_cache(tmp_path, capsys):
    contents = pictures(5)
    (tmp_path / "file").write_text("")
    ours = training_statistics(Listed(contents), VIEW, 1, tmp_path / "file" / "cache", skip_broken=False)
    assert_numpys(ours, contents, VIEW)
    assert "could not keep the mean image" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [None, b"no image", b"\xff\xd8\xff\xe0 cut short"])
def test_a_broken_image_is_named_and_nothing_is_kept(tmp_path, broken):
    contents = pictures(100)
    contents[70] = broken
    with pytest.raises(UsageError, match=r"/images/0070\.png: not a readable image \(.+\)") as error:
        training_statistics(Listed(contents), VIEW, 2, tmp_path, skip_broken=False)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_broken_images_are_left_out_where_that_is_asked_for(tmp_path):
    contents = pictures(100)
    contents[70], contents[3], contents[99] = None, b"no image", contents[99][:-60]
    ours = training_statistics(Listed(contents), VIEW, 2, tmp_path, skip_broken=True)
    assert_numpys(ours, [content for i, content in enumerate(contents) if i not in (3, 70, 99)], VIEW)


def test_images_of_which_none_can_be_read_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="none of the training images can be read"):
        training_statistics(Listed([None] * 3), VIEW, 2, tmp_path, skip_broken=True)
    assert list(pathlib.Path(tmp_path).iterdir()) == []
