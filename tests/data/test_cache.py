"""Examples kept in memory: the same pixels as without, from fewer reads, within the budget."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
import io
from threading import Barrier

import numpy as np
from PIL import Image
import pytest

from resnet_jax.data.cache import Budget, CachedViews
from resnet_jax.data.crops import CenterCrop, Crop, InceptionCrop, ScaleCrop, Views, example_uniforms
from resnet_jax.data.decode import BrokenImage

SCALE, CENTRE = ScaleCrop(size=16, smallest=18, largest=32), CenterCrop(size=16, shorter_side=18)


class Listed:
    """Examples in memory that remember what was read."""

    def __init__(self, contents: list[bytes]):
        self.contents, self.reads = contents, Counter()

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        self.reads[i] += 1
        return self.contents[i], i % 3

    def where(self, i: int) -> str:
        return str(i)

    def fingerprint(self, stamps: bool) -> str:
        return str(id(self))


def picture(seed: int, height: int, width: int, form: str = "JPEG") -> bytes:
    """Soft colours, which take less room encoded than decoded, as photographs do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()


# JPEGs whose shorter side is at least 36 pixels may be decoded at half their size, if a crop is small.
SMALL = [(30, 40), (35, 35), (24, 60), (20, 19)]
LARGE = [(36, 36), (80, 100), (150, 120), (300, 290)]


def pictures(*shapes: tuple[int, int]) -> Listed:
    return Listed([picture(i, *shape, "PNG" if i % 5 == 4 else "JPEG") for i, shape in enumerate(shapes)])


def budget_of(size: int) -> Budget:
    budget = Budget(0)
    budget.left = size
    return budget


def epoch(views: Views, number: int, order: list[int] | None = None) -> list[tuple[np.ndarray, int]]:
    order = range(len(views.examples)) if order is None else order
    return [views(i, example_uniforms(7, number, i, views.crop.draws)) for i in order]


def assert_same(ours: list[tuple[np.ndarray, int]], theirs: list[tuple[np.ndarray, int]]) -> None:
    for (image, label), (other, other_label) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(image, other)
        assert (image.dtype, label) == (other.dtype, other_label)


def kept(views: CachedViews) -> int:
    """Bytes that are remembered, counted without the budget's help."""
    values = [value for value, _ in views._kept.values()]
    return sum(len(value) if isinstance(value, bytes) else value.nbytes for value in values)


def decoded_size(examples: Listed) -> int:
    return sum(3 * height * width for height, width in (Image.open(io.BytesIO(c)).size for c in examples.contents))


def encoded_size(examples: Listed) -> int:
    return sum(map(len, examples.contents))


@pytest.mark.parametrize("budget", [0, 3_000, 40_000, 10**9])
@pytest.mark.parametrize(
    "crop",
    [SCALE, ScaleCrop(16, 18, 32, reduced_dct=False), InceptionCrop(size=16), CENTRE],
    ids=["scale", "scale, full size", "inception", "centre"],
)
def test_pixels_and_labels_are_those_without_a_cache(crop, budget):
    examples = pictures(*SMALL, *LARGE, *SMALL, *LARGE)
    plain, cached = Views(examples, crop), CachedViews(examples, crop, budget_of(budget))
    for number in (0, 1, 2):
        assert_same(epoch(cached, number), epoch(plain, number))


def test_what_fits_is_read_once():
    examples = pictures(*SMALL, *LARGE)
    for crop in (SCALE, CENTRE):
        views = CachedViews(examples, crop, Budget(1))
        first = epoch(views, 0)
        examples.reads.clear()
        second = epoch(views, 1)
        assert not examples.reads
        assert len(second) == len(first) == 8


def test_of_a_crop_without_random_numbers_the_result_is_kept_and_nothing_is_computed_again(monkeypatch):
    examples = pictures(*SMALL, *LARGE)
    views = CachedViews(examples, CENTRE, Budget(1))
    first = epoch(views, 0)
    assert kept(views) == len(examples) * 16 * 16 * 3

    def refuse(*args):
        raise AssertionError("cropped again")

    monkeypatch.setattr(CenterCrop, "__call__", refuse)
    assert_same(epoch(views, 1), first)


def test_small_pictures_are_kept_decoded_where_all_of_them_fit():
    examples = pictures(*SMALL, *SMALL)
    size = decoded_size(examples)
    views = CachedViews(examples, SCALE, budget_of(size))
    epoch(views, 0)
    assert views.decodes
    assert kept(views) == size
    assert all(isinstance(value, np.ndarray) for value, _ in views._kept.values())
    assert views.description.startswith("100% of 8 images, decoded")


def test_jpegs_that_may_be_decoded_at_half_their_size_stay_encoded():
    examples = Listed([picture(i, *shape) for i, shape in enumerate(SMALL + LARGE)])
    views = CachedViews(examples, SCALE, Budget(1))
    epoch(views, 0)
    forms = [type(views._kept[i][0]) for i in range(len(examples))]
    assert forms == [np.ndarray] * 4 + [bytes] * 4


def test_encoded_is_chosen_where_decoded_does_not_fit():
    examples = pictures(*SMALL, *SMALL)
    size = encoded_size(examples)
    assert size < decoded_size(examples) - 1
    for budget in (size, decoded_size(examples) - 1):
        views = CachedViews(examples, SCALE, budget_of(budget))
        epoch(views, 0)
        examples.reads.clear()
        epoch(views, 1)
        assert not views.decodes
        assert not examples.reads
        assert kept(views) == size
        assert views.description.startswith("100% of 8 images, encoded")


def test_a_part_is_kept_where_not_all_fit():
    examples = pictures(*[(30, 40)] * 20)
    size = encoded_size(examples)
    views = CachedViews(examples, SCALE, budget_of(size // 2))
    epoch(views, 0)
    examples.reads.clear()
    epoch(views, 1)
    assert 0 < len(examples.reads) < 20
    assert examples.reads.keys() | views._kept.keys() == set(range(20))
    assert not examples.reads.keys() & views._kept.keys()
    assert "50% of 20 images, encoded" in views.description


def test_a_budget_of_nothing_keeps_nothing():
    examples = pictures(*SMALL, *LARGE)
    views = CachedViews(examples, SCALE, Budget(0))
    for number in (0, 1):
        examples.reads.clear()
        epoch(views, number)
        assert examples.reads == Counter(range(8))
    assert kept(views) == 0


@pytest.mark.parametrize("crop", [SCALE, CENTRE], ids=["scale", "centre"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 1.0, 1.5])
def test_the_budget_is_never_exceeded_by_threads_that_share_it(crop: Crop, share):
    train, test = pictures(*SMALL * 5, *LARGE * 2), pictures(*SMALL * 3)
    allowed = int(share * (decoded_size(train) + decoded_size(test)))
    budget = budget_of(allowed)
    views = [CachedViews(train, crop, budget), CachedViews(test, CENTRE, budget)]
    expected = [epoch(Views(each.examples, each.crop), 0) for each in views]
    order = [(each, i) for each in (0, 1) for i in range(len(views[each].examples))]

    def read(place: tuple[int, int]) -> tuple[np.ndarray, int]:
        each, i = place
        found = views[each](i, example_uniforms(7, 0, i, views[each].crop.draws))
        assert budget.left >= 0
        assert sum(map(kept_now, views)) <= allowed
        return found

    def kept_now(each: CachedViews) -> int:
        values = list(each._kept.copy().values())
        return sum(len(value) if isinstance(value, bytes) else value.nbytes for value, _ in values)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = list(pool.map(read, order))
            assert_same(found, expected[0] + expected[1])
    assert sum(map(kept, views)) <= allowed


def test_threads_that_ask_for_the_same_example_take_its_room_once():
    class Waiting(Listed):
        """Both threads read before either goes on."""

        barrier: Barrier | None = None

        def __getitem__(self, i: int) -> tuple[bytes, int]:
            if self.barrier:
                self.barrier.wait(timeout=5)
            return super().__getitem__(i)

    examples = Waiting([picture(0, 30, 40)])
    budget = Budget(1)
    views = CachedViews(examples, SCALE, budget)
    budget = views._budget  # What it has of it.
    before = budget.left
    examples.barrier = Barrier(2)
    uniforms = np.zeros(SCALE.draws)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: views(0, uniforms), range(2)))
    assert before - budget.left == kept(views)


def test_a_broken_image_is_met_when_its_turn_comes_and_each_time():
    examples = pictures(*SMALL)
    examples.contents[2] = b"no image"
    views = CachedViews(examples, SCALE, Budget(1))
    for number in (0, 1):
        assert len(epoch(views, number, [0, 1, 3])) == 3
        with pytest.raises(BrokenImage):
            epoch(views, number, [2])


def test_a_data_set_of_broken_images_alone_does_not_stop_the_start():
    views = CachedViews(Listed([b"no image"] * 3), SCALE, Budget(1))
    with pytest.raises(BrokenImage):
        epoch(views, 0)
