"""Shards of ArrayRecord: what was put in comes out, however often writing was cut off."""

from collections import Counter
import io
import json
import os
import pathlib
import pickle

import numpy as np
from PIL import Image
import pytest

from resnet_jax.data import array_record
from resnet_jax.data.array_record import open_prepared, write
from resnet_jax.data.crops import CenterCrop
from resnet_jax.data.sources import Dataset, Examples
from resnet_jax.errors import UsageError

SMALL = 0.02  # MB: shards of some of the tests' images.


class Listed:
    """Examples in memory that remember what was read; ``fails`` says what reading an example raises."""

    def __init__(self, contents: list[bytes], fails: dict[int, BaseException] | None = None):
        self.contents, self.fails, self.reads = contents, fails or {}, Counter()

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        self.reads[i] += 1
        if i in self.fails:
            raise self.fails[i]
        return self.contents[i], i % 3

    def where(self, i: int) -> str:
        return f"/data/images/class {i % 3}/{i:04}.png"

    def fingerprint(self, stamps: bool) -> str:
        return f"{len(self)} {sum(map(sum, self.contents))}"


def noise(count: int, length: int = 1000, seed: int = 0) -> list[bytes]:
    """Bytes that are no images; each other than the others."""
    rng = np.random.default_rng(seed)
    return [rng.bytes(length) for _ in range(count)]


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """PNG files of noise of several shapes."""
    rng, files = np.random.default_rng(seed), []
    for _ in range(count):
        file = io.BytesIO()
        shape = (*rng.integers(12, 30, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def dataset(train: list[bytes], test: list[bytes] | None = None, fails: dict | None = None) -> Dataset:
    return Dataset(Listed(train, fails), Listed(noise(5, seed=9) if test is None else test), ("a", "b", "c"))


def read(examples: Examples) -> list[tuple[bytes, int, str]]:
    return [(*examples[i], examples.where(i)) for i in range(len(examples))]


def shards(folder: pathlib.Path, split: str = "train") -> list[str]:
    return sorted(path.name for path in folder.glob(f"{split}-*.array_record"))


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_written_is_read_from_several_shards(tmp_path, workers):
    data = dataset(noise(100))
    write(data, tmp_path / "out", workers, shard_megabytes=SMALL)
    assert shards(tmp_path / "out") == [f"train-{i:05}-of-00005.array_record" for i in range(5)]
    found = open_prepared(str(tmp_path / "out"))
    assert found.classes == ("a", "b", "c")
    assert found.statistics is None
    for ours, theirs in ((found.train, data.train), (found.test, data.test)):
        assert isinstance(ours, Examples)
        assert [(content, label) for content, label, _ in read(ours)] == [theirs[i] for i in range(len(theirs))]
    assert found.train.where(37) == f"{(tmp_path / 'out').resolve()}: class 1/0037.png"


def test_shards_are_about_as_large_as_asked_for_and_cover_every_example_once(tmp_path):
    data = dataset(noise(61, length=100_000))
    index = write(data, tmp_path / "out", 2, shard_megabytes=1)
    sizes = [(tmp_path / "out" / name).stat().st_size for name in index["splits"]["train"]]
    assert len(sizes) == 6
    assert all(0.8e6 < size < 1.3e6 for size in sizes)
    assert sum(index["splits"]["train"].values()) == 61
    assert index["splits"]["test"] == {"test-00000-of-00001.array_record": 5}


def test_a_finished_folder_holds_nothing_else_and_is_not_written_again(tmp_path):
    folder = tmp_path / "out"
    data = dataset(pictures(6), pictures(2))
    first = write(data, folder, 1, mean=CenterCrop(size=8, shorter_side=10))
    assert sorted(os.listdir(folder)) == [
        "index.json", "mean.npy", "test-00000-of-00001.array_record", "train-00000-of-00001.array_record",
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = write(data, folder, 1, mean=CenterCrop(size=8, shorter_side=10))
    assert again == json.loads((folder / "index.json").read_text())
    assert {name: again[name] for name in first} == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("power cut")], ids=["Ctrl-C", "error"])
def test_writing_goes_on_where_it_was_cut_off_and_ends_the_same(tmp_path, monkeypatch, workers, stop):
    monkeypatch.setattr(array_record, "_SAMPLE", 1)  # Planning reads the first example alone.
    contents, view = pictures(40), CenterCrop(size=8, shorter_side=10)
    write(dataset(contents), tmp_path / "whole", workers, SMALL, mean=view)
    whole = open_prepared(str(tmp_path / "whole"))

    folder = tmp_path / "cut"
    with pytest.raises(type(stop)):
        write(dataset(contents, fails={25: stop}), folder, workers, SMALL, mean=view)
    with pytest.raises(UsageError, match=r"not finished; the same python -m resnet_jax\.prepare goes on") as error:
        open_prepared(str(folder))
    assert "\n" not in str(error.value)
    done = {name: (folder / name).stat().st_mtime_ns for name in shards(folder)}
    expected = shards(tmp_path / "whole")
    assert expected[2] == f"train-00002-of-{len(expected):05}.array_record"
    assert len(done) < len(expected)
    if workers == 1:
        assert len(done) == 25 * len(expected) // 40  # All shards before the one that was cut off.

    data = dataset(contents)
    write(data, folder, workers, SMALL, mean=view)
    bounds = [len(contents) * i // len(expected) for i in range(len(expected) + 1)]
    wanted = Counter({0: 1})
    for name, start, end in zip(expected, bounds, bounds[1:], strict=False):
        wanted.update(() if name in done else range(start, end))
    assert data.train.reads == wanted
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done
    found = open_prepared(str(folder))
    for ours, theirs in ((found.train, whole.train), (found.test, whole.test)):
        assert [record[:2] for record in read(ours)] == [record[:2] for record in read(theirs)]
    for name in ("image", "mean", "std"):
        np.testing.assert_array_equal(getattr(found.statistics, name), getattr(whole.statistics, name))
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "whole"))
    assert (folder / "index.json").read_bytes() == (tmp_path / "whole" / "index.json").read_bytes()


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "out"
    write(dataset(noise(4)), folder, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for other, settings in ((dataset(noise(4, seed=1)), {}), (dataset(pictures(4)), {"mean": CenterCrop(8, 10)})):
        with pytest.raises(UsageError, match="holds other data already") as error:
            write(other, folder, 1, **settings)
        assert str(folder) in str(error.value)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("all of it")
    with pytest.raises(UsageError, match="is not empty"):
        write(dataset(noise(4)), tmp_path / "home", 1)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_unfinished_folder_of_other_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(array_record, "_SAMPLE", 1)  # Planning reads the first example alone.
    with pytest.raises(KeyboardInterrupt):
        write(dataset(noise(4), fails={3: KeyboardInterrupt()}), tmp_path / "out", 1)
    with pytest.raises(UsageError, match="holds other data"):
        write(dataset(noise(4, seed=1)), tmp_path / "out", 1)


def test_a_folder_that_can_not_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        write(dataset(noise(4)), tmp_path / "file" / "out", 1)


BROKEN = {
    "no image": lambda data: data.train.contents.__setitem__(7, b"no image"),
    "cut short": lambda data: data.train.contents.__setitem__(7, data.train.contents[7][:-60]),
    "unreadable": lambda data: data.train.fails.update({7: PermissionError(13, "Permission denied")}),
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_named_with_a_hint(tmp_path, breaks):
    data = dataset(pictures(12))
    breaks(data)
    with pytest.raises(UsageError, match=r"class 1/0007\.png: not a readable image .*--on_error=skip") as error:
        write(data, tmp_path / "out", 2, mean=CenterCrop(8, 10))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_left_out_and_listed_where_that_is_asked_for(tmp_path, breaks):
    good = pictures(12)
    data = dataset(list(good))
    breaks(data)
    index = write(data, tmp_path / "out", 2, mean=CenterCrop(8, 10), skip_broken=True)
    assert index["skipped"] == ["/data/images/class 1/0007.png"]
    found = open_prepared(str(tmp_path / "out"))
    kept = [i for i in range(12) if i != 7]
    assert [record[:2] for record in read(found.train)] == [(good[i], i % 3) for i in kept]
    assert found.train.where(7).endswith("0008.png")
    assert_statistics(found.statistics, [good[i] for i in kept], CenterCrop(8, 10))


def test_after_a_broken_image_the_same_call_goes_on_with_leaving_out(tmp_path):
    data = dataset(pictures(12), fails={7: OSError(5, "Input/output error")})
    with pytest.raises(UsageError, match=r"0007\.png.*Input/output error"):
        write(data, tmp_path / "out", 1, SMALL)
    write(data, tmp_path / "out", 1, SMALL, skip_broken=True)
    assert len(open_prepared(str(tmp_path / "out")).train) == 11


def test_a_shard_of_which_nothing_is_readable_does_not_make_the_rest_unreadable(tmp_path):
    contents = noise(40)
    data = dataset(contents, fails={i: OSError(5, "Input/output error") for i in range(20)})
    index = write(data, tmp_path / "out", 1, shard_megabytes=0.01, skip_broken=True)
    assert list(index["splits"]["train"].values()) == [0, 20]
    assert [record[0] for record in read(open_prepared(str(tmp_path / "out")).train)] == contents[20:]


def assert_statistics(ours, contents: list[bytes], view: CenterCrop) -> None:
    """They are NumPy's over the views, to the last bit but one of float32."""
    pixels = np.stack([view(content, None) for content in contents]) / 255
    assert (ours.image.dtype, ours.mean.dtype, ours.std.dtype) == (np.float32,) * 3
    np.testing.assert_array_max_ulp(ours.image, pixels.mean(0).astype(np.float32), 1)
    np.testing.assert_allclose(ours.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(ours.std, pixels.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_mean_image_is_numpys_over_the_views_of_all_training_images(tmp_path, workers):
    contents, view = pictures(50), CenterCrop(size=8, shorter_side=11)
    write(dataset(contents, pictures(3, seed=5)), tmp_path / "out", workers, SMALL, mean=view)
    assert len(shards(tmp_path / "out")) > 2
    assert_statistics(open_prepared(str(tmp_path / "out")).statistics, contents, view)


def cut(path: pathlib.Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["train-00001-of-00003.array_record", "test-00000-of-00001.array_record"])
def test_a_shard_cut_short_is_an_error(tmp_path, name, share):
    write(dataset(noise(60)), tmp_path, 1, SMALL)
    path = tmp_path / name
    cut(path, int(share * path.stat().st_size))
    with pytest.raises(UsageError) as error:
        open_prepared(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_record_that_was_overwritten_is_an_os_error_that_says_where(tmp_path):
    contents = noise(6)
    write(dataset(contents), tmp_path, 1)
    path = tmp_path / "train-00000-of-00001.array_record"
    stored = path.read_bytes()
    place = stored.index(contents[4]) + 100
    path.write_bytes(stored[:place] + bytes(200) + stored[place + 200 :])
    train = open_prepared(str(tmp_path)).train
    assert train[3][0] == contents[3]
    with pytest.raises(OSError, match="damaged record"):
        train[4]
    assert str(tmp_path) in train.where(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "index.json").unlink(), "no folder that python -m resnet_jax.prepare wrote"),
        (lambda root: cut(root / "index.json", 40), "no folder that python -m resnet_jax.prepare wrote"),
        (lambda root: (root / "index.json").write_text("{}"), "no folder that python -m resnet_jax.prepare wrote"),
        (lambda root: (root / "train-00000-of-00001.array_record").unlink(), "train-00000-of-00001"),
        (lambda root: (root / "mean.npy").unlink(), "mean.npy"),
    ],
    ids=["no index", "cut index", "other index", "no shard", "no mean"],
)
def test_a_folder_that_is_not_whole_is_a_usage_error(tmp_path, change, message):
    write(dataset(pictures(4), pictures(2)), tmp_path, 1, mean=CenterCrop(8, 10))
    change(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        open_prepared(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"needs data\.dir"):
        open_prepared("")
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        open_prepared(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"python -m resnet_jax\.prepare"):
        open_prepared(str(tmp_path))


def test_a_pickled_copy_reads_the_same(tmp_path):
    write(dataset(noise(60)), tmp_path, 1, SMALL)
    train = open_prepared(str(tmp_path)).train
    expected = read(train)
    assert read(pickle.loads(pickle.dumps(train))) == expected
