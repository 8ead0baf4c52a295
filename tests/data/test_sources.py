"""The sources of images, each against files that the test itself writes in the published format."""

import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import tarfile
import types
import urllib.request
import zlib

import numpy as np
from PIL import Image
import pytest

from resnet_jax.config import default_config
from resnet_jax.data import cifar, decode, image_folder
from resnet_jax.data.sources import Dataset, cache_folder, load_dataset
from resnet_jax.errors import UsageError


def load(**settings) -> Dataset:
    config = default_config()
    config.data.update(settings)
    return load_dataset(config.data)


def test_digits_are_all_of_scikit_learns_scans_split_1438_to_359():
    from sklearn.datasets import load_digits

    scans = load_digits()
    data = load(source="digits")
    assert data.train.images.shape == (1438, 8, 8, 1)
    assert data.test.images.shape == (359, 8, 8, 1)
    assert data.classes == tuple("0123456789")
    for part in (data.train, data.test):
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int32)
    # Every scan once, with its own label; 16 grey levels above black become 0 to 255.
    ours = [
        (image.tobytes(), int(label))
        for part in (data.train, data.test)
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    theirs = [
        (bytes(int(255 * value / 16 + 0.5) for value in image.ravel()), int(label))
        for image, label in zip(scans.images, scans.target, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)
    assert data.train.images.min() == 0
    assert data.train.images.max() == 255


def test_digits_test_fifth_is_always_the_same():
    labels = load(source="digits").test.labels
    assert labels[:20].tolist() == [4, 2, 4, 9, 1, 8, 5, 9, 1, 2, 3, 4, 6, 8, 7, 3, 1, 7, 6, 3]
    assert np.bincount(labels).tolist() == [28, 32, 35, 42, 26, 49, 36, 35, 38, 38]


def cifar_files(name: str, per_file: int = 2) -> dict[str, bytes]:
    """Tiny files of the official names and format; pixels are random, labels count up."""
    rng = np.random.default_rng(0)
    batches = {
        "cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"],
        "cifar100": ["train.bin", "test.bin"],
    }[name]
    files, label = {}, 0
    for file in batches:
        content = b""
        for _ in range(per_file):
            labels = [label] if name == "cifar10" else [label % 20, 99 - label]  # Coarse, then fine.
            content += bytes(labels) + rng.integers(0, 256, 3072, np.uint8).tobytes()
            label = (label + 1) % 10
        files[file] = content
    if name == "cifar10":
        names = "airplane automobile bird cat deer dog frog horse ship truck"
        files["batches.meta.txt"] = "\n".join(
            [*names.split(), "", ""]
        ).encode()  # As published: blank lines at its end.
        files["readme.html"] = b"<html></html>"
    else:
        files["fine_label_names.txt"] = "".join(f"fine_{i:02}\n" for i in range(100)).encode()
        files["coarse_label_names.txt"] = "".join(f"coarse_{i:02}\n" for i in range(20)).encode()
    return files


INNER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
PACKED = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: pathlib.Path, name: str, files: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{INNER[name]}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def one_record_set(name: str, record: bytes) -> dict[str, bytes]:
    """The files of a data set in which every file holds the one record."""
    return {file: record if file.endswith(".bin") else content for file, content in cifar_files(name).items()}


def assert_same(a: Dataset, b: Dataset) -> None:
    assert a.classes == b.classes
    for left, right in ((a.train, b.train), (a.test, b.test)):
        np.testing.assert_array_equal(left.images, right.images)
        np.testing.assert_array_equal(left.labels, right.labels)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_the_same_from_folder_archive_and_folder_with_the_archive(tmp_path, name):
    files = cifar_files(name)
    places = [
        write_files(tmp_path / "plain", files),
        write_files(tmp_path / "unpacked" / INNER[name], files).parent,
        write_archive(tmp_path / "renamed.tar.gz", name, files),
    ]
    (tmp_path / "packed").mkdir()
    write_archive(tmp_path / "packed" / PACKED[name], name, files)
    places.append(tmp_path / "packed")

    first, *others = [load(source="cifar", name=name, dir=str(place)) for place in places]
    assert len(first.test) == 2
    for other in others:
        assert_same(first, other)


def test_cifar10_has_the_label_before_the_pixels_and_the_batches_in_order(tmp_path):
    files = cifar_files("cifar10")
    data = load(source="cifar", name="cifar10", dir=str(write_files(tmp_path / "c", files)))
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert data.test.labels.tolist() == [0, 1]
    assert data.classes[0] == "airplane"
    assert data.classes[9] == "truck"
    assert len(data.classes) == 10
    assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int32)
    # Red of the top left pixel is the first byte after the label; blue of the bottom right one the last.
    second = files["data_batch_3.bin"][3073:]
    assert data.train.images[5, 0, 0, 0] == second[1]
    assert data.train.images[5, 31, 31, 2] == second[-1]


def test_cifar100_takes_the_fine_label_which_is_the_second_byte(tmp_path):
    data = load(source="cifar", name="cifar100", dir=str(write_files(tmp_path / "c", cifar_files("cifar100"))))
    assert data.train.labels.tolist() == [99, 98]
    assert data.test.labels.tolist() == [97, 96]
    assert data.classes[99] == "fine_99"
    assert len(data.classes) == 100


@pytest.mark.parametrize(("name", "labels"), [("cifar10", [3]), ("cifar100", [3, 42])])
def test_cifar_pixels_are_stored_channel_by_channel_row_by_row(tmp_path, name, labels):
    record = bytearray(labels) + bytearray(3072)
    for channel, value in enumerate((200, 100, 50)):  # One orange pixel in row 3, column 5.
        record[len(labels) + 1024 * channel + 32 * 3 + 5] = value
    folder = write_files(tmp_path / "c", one_record_set(name, bytes(record)))
    image = load(source="cifar", name=name, dir=str(folder)).test.images[0]
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[3, 5] = (200, 100, 50)
    np.testing.assert_array_equal(image, expected)


def test_cifar_is_cifar10_unless_named(tmp_path):
    folder = write_files(tmp_path / "c", cifar_files("cifar10"))
    assert len(load(source="cifar", dir=str(folder)).classes) == 10


def test_published_md5s_are_known():
    # https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 binary version", "CIFAR-100 binary version".
    assert cifar.ARCHIVES["cifar10"].md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert cifar.ARCHIVES["cifar100"].md5 == "03b5dce01913d631647c71ecec9e9cb8"
    assert cifar.ARCHIVES["cifar10"].url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert cifar.ARCHIVES["cifar100"].url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"


@pytest.fixture
def served(tmp_path, monkeypatch) -> pathlib.Path:
    """A tiny CIFAR-10 archive at the address that downloads come from, with its MD5 as the published one."""
    server = tmp_path / "server"
    server.mkdir()
    path = write_archive(server / PACKED["cifar10"], "cifar10", cifar_files("cifar10"))
    entry = dataclasses.replace(
        cifar.ARCHIVES["cifar10"], url=path.as_uri(), md5=hashlib.md5(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", entry)
    return path


def test_a_download_is_kept_and_not_repeated(served, tmp_path):
    cache = tmp_path / "new" / "cache"
    first = load(source="cifar", name="cifar10", cache_dir=str(cache))
    assert [file.name for file in cache.iterdir()] == [PACKED["cifar10"]]
    served.unlink()
    assert_same(load(source="cifar", name="cifar10", cache_dir=str(cache)), first)


def test_a_download_with_another_md5_is_refused_and_leaves_nothing(served, tmp_path):
    served.write_bytes(served.read_bytes() + b"\0")
    cache = tmp_path / "cache"
    with pytest.raises(UsageError, match=r"MD5 \w{32} is not the expected " + cifar.ARCHIVES["cifar10"].md5):
        load(source="cifar", name="cifar10", cache_dir=str(cache))
    assert list(cache.iterdir()) == []


def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(served, tmp_path):
    served.unlink()
    cache = tmp_path / "cache"
    with pytest.raises(UsageError, match=r"could not be fetched .* --config\.data\.dir="):
        load(source="cifar", name="cifar10", cache_dir=str(cache))
    assert list(cache.iterdir()) == []


def test_a_download_broken_off_in_the_middle_leaves_nothing(served, tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        headers = types.MappingProxyType({})

        def read(self, size=-1):
            if self.tell() > 0:
                raise ConnectionResetError("connection reset by peer")
            return super().read(100)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Broken(served.read_bytes()))
    cache = tmp_path / "cache"
    with pytest.raises(UsageError, match="connection reset by peer"):
        load(source="cifar", name="cifar10", cache_dir=str(cache))
    assert list(cache.iterdir()) == []


def test_a_download_into_a_cache_that_can_not_be_written_is_a_usage_error(served, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        load(source="cifar", name="cifar10", cache_dir=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("data_batch_4.bin"), r"data_batch_4\.bin is missing"),
        (lambda files: files.pop("batches.meta.txt"), r"batches\.meta\.txt is missing"),
        (lambda files: files.update({"data_batch_2.bin": b"\0" * 3072}), r"data_batch_2\.bin: 3072 bytes .* 3073"),
        (lambda files: files.update({"test_batch.bin": b""}), r"test_batch\.bin: 0 bytes"),
        (lambda files: files.update({"test_batch.bin": b"\x0a" + b"\0" * 3072}), r"test_batch\.bin: label 10 .* 10"),
    ],
    ids=["no batch", "no names", "cut short", "empty", "label"],
)
def test_cifar_files_that_are_not_what_they_should_be_are_named(tmp_path, change, message):
    files = cifar_files("cifar10")
    change(files)
    with pytest.raises(UsageError, match=message):
        load(source="cifar", name="cifar10", dir=str(write_files(tmp_path / "c", files)))


def test_a_cifar_archive_cut_short_is_a_usage_error(tmp_path):
    path = write_archive(tmp_path / "c.tar.gz", "cifar10", cifar_files("cifar10"))
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"c\.tar\.gz"):
            load(source="cifar", name="cifar10", dir=str(path))


def test_a_cifar_archive_that_does_not_decompress_is_a_usage_error(tmp_path):
    path = write_archive(tmp_path / "c.tar.gz", "cifar10", cifar_files("cifar10"))
    content = gzip.decompress(path.read_bytes())
    stream = zlib.compressobj(wbits=31)  # With gzip's header.
    path.write_bytes(stream.compress(content[:20_000]) + stream.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 100)
    with pytest.raises(UsageError):
        load(source="cifar", name="cifar10", dir=str(path))


def test_a_cifar_archive_with_altered_pixels_is_refused_by_its_checksum(tmp_path):
    files = cifar_files("cifar10", per_file=20)
    path = write_archive(tmp_path / "c.tar.gz", "cifar10", files)
    content = gzip.decompress(path.read_bytes())
    at = content.index(files["data_batch_2.bin"]) + 100
    altered = gzip.compress(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    path.write_bytes(altered[:-8] + gzip.compress(content)[-8:])  # The sum and length of the right content.
    with pytest.raises(UsageError):
        load(source="cifar", name="cifar10", dir=str(path))


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    """A random picture; ``size`` is (width, height)."""
    channels = {"RGB": 3, "L": 1, "LA": 2, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two classes; three pictures to train on and one to test with in each."""
    root = tmp_path / "images"
    for number, (part, name, count) in enumerate(
        [("train", "cat", 3), ("train", "ant", 3), ("test", "cat", 1), ("test", "ant", 1)]
    ):
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            picture(10 * number + i).save(root / part / name / f"{i:04}.png")
    return root


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    return tmp_path / "cache"


def load_folder(folder: pathlib.Path, cache: pathlib.Path, **settings) -> Dataset:
    return load(source="image_folder", dir=str(folder), cache_dir=str(cache), **settings)


def test_image_folder_has_sorted_classes_and_files_in_order(folder, cache):
    data = load_folder(folder, cache)
    assert data.classes == ("ant", "cat")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.images.shape == (6, 4, 6, 3)  # Rows first: Pillow's size is (6, 4).
    assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int32)
    expected = [np.asarray(picture(seed)) for seed in (10, 11, 12, 0, 1, 2)]
    np.testing.assert_array_equal(data.train.images, expected)
    np.testing.assert_array_equal(data.test.images, [np.asarray(picture(30)), np.asarray(picture(20))])


@pytest.mark.parametrize("workers", [1, 4])
def test_many_readers_keep_the_order(tmp_path, cache, workers):
    for part in ("train", "test"):
        (tmp_path / "f" / part / "a").mkdir(parents=True)
        for i in range(50):
            Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / "f" / part / "a" / f"{i:02}.png")
    data = load_folder(tmp_path / "f", cache, workers=workers)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(50))


def test_image_folder_takes_val_where_there_is_no_test(folder, cache):
    expected = load_folder(folder, cache)
    (folder / "test").rename(folder / "val")
    assert_same(load_folder(folder, cache), expected)


def test_image_folder_prefers_test_to_val(folder, cache):
    shutil.copytree(folder / "train", folder / "val")
    assert len(load_folder(folder, cache).test) == 2


def test_image_folder_ignores_other_files_and_hidden_folders(folder, cache):
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    (folder / "train" / ".thumbnails").mkdir()
    (folder / "train" / "index.csv").write_text("")
    data = load_folder(folder, cache)
    assert data.classes == ("ant", "cat")
    assert len(data.train) == 6


def test_data_labels_gives_classes_their_numbers(folder, cache, tmp_path):
    labels = tmp_path / "classes.txt"
    labels.write_text("cat\nant\n\n")
    data = load_folder(folder, cache, labels=str(labels))
    assert data.classes == ("cat", "ant")
    assert data.test.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(data.test.images[0], np.asarray(picture(20)))  # The cat.


def test_data_labels_may_choose_some_of_the_classes(folder, cache, tmp_path):
    labels = tmp_path / "classes.txt"
    labels.write_text("cat")
    data = load_folder(folder, cache, labels=str(labels))
    assert data.classes == ("cat",)
    assert len(data.train) == 3


def one_picture_folder(root: pathlib.Path, image: Image.Image, name: str, **options) -> pathlib.Path:
    for part in ("train", "test"):
        (root / part / "a").mkdir(parents=True)
        image.save(root / part / "a" / name, **options)
    return root


def test_grey_pictures_become_three_equal_channels(tmp_path, cache):
    image = picture(1, "L")
    data = load_folder(one_picture_folder(tmp_path / "f", image, "x.png"), cache)
    np.testing.assert_array_equal(data.train.images[0], np.stack([np.asarray(image)] * 3, axis=-1))


def test_palette_pictures_become_their_colours(tmp_path, cache):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    data = load_folder(one_picture_folder(tmp_path / "f", image, "x.png"), cache)
    assert data.train.images[0].tolist() == [[[70, 80, 90], [10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_left_out(tmp_path, cache, mode):
    image = picture(1, mode)
    data = load_folder(one_picture_folder(tmp_path / "f", image, "x.png"), cache)
    colours = np.asarray(image)[..., :-1]
    np.testing.assert_array_equal(data.train.images[0], np.broadcast_to(colours, (*colours.shape[:2], 3)))


def test_16_bit_grey_keeps_its_grey_levels(tmp_path, cache):
    image = Image.fromarray(np.array([[0, 257 * 100, 257 * 200, 65535]], np.uint16))
    data = load_folder(one_picture_folder(tmp_path / "f", image, "x.png"), cache)
    assert data.train.images[0, 0, :, 0].tolist() == [0, 100, 200, 255]


def test_jpegs_are_read_within_their_losses(tmp_path, cache):
    y, x = np.mgrid[:16, :16]
    smooth = np.stack([16 * y, 16 * x, 8 * (x + y)], axis=-1).astype(np.uint8)
    root = one_picture_folder(tmp_path / "f", Image.fromarray(smooth), "x.JPG", quality=95, subsampling=0)
    data = load_folder(root, cache)
    assert np.abs(data.train.images[0].astype(int) - smooth).max() < 16


def test_image_size_resizes_to_squares(tmp_path, cache):
    # The left half black, the right half white: halves stay halves, whatever the filter does in between.
    image = Image.fromarray(np.repeat(np.repeat([[0, 255]], 8, axis=1), 4, axis=0).astype(np.uint8))  # 16 x 4.
    data = load_folder(one_picture_folder(tmp_path / "f", image, "x.png"), cache, image_size=8)
    assert data.train.images.shape == (1, 8, 8, 3)
    columns = data.train.images[0, :, :, 0]
    assert (columns[:, :3] == 0).all()
    assert (columns[:, 5:] == 255).all()


def test_pictures_of_the_right_size_are_not_resampled(tmp_path, cache):
    image = picture(1, size=(8, 8))
    data = load_folder(one_picture_folder(tmp_path / "f", image, "x.png"), cache, image_size=8)
    np.testing.assert_array_equal(data.train.images[0], np.asarray(image))


def forbid_decoding(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("an image file was opened")

    monkeypatch.setattr(image_folder.Files, "__getitem__", refuse)


def test_the_second_start_reads_no_image_file(folder, cache, monkeypatch):
    first = load_folder(folder, cache)
    forbid_decoding(monkeypatch)
    assert_same(load_folder(folder, cache), first)
    with pytest.raises(AssertionError, match="was opened"):
        load_folder(folder, cache, image_size=8)  # Other pixels: not in the cache.


def overwrite(folder: pathlib.Path) -> None:
    path = folder / "train" / "cat" / "0001.png"
    before = path.stat()
    picture(99).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


def add(folder: pathlib.Path) -> None:
    picture(99).save(folder / "test" / "ant" / "9999.png")


def remove(folder: pathlib.Path) -> None:
    (folder / "train" / "ant" / "0000.png").unlink()


def move(folder: pathlib.Path) -> None:
    (folder / "train" / "ant" / "0000.png").rename(folder / "train" / "cat" / "ant.png")


@pytest.mark.parametrize("change", [overwrite, add, remove, move])
def test_a_changed_folder_is_read_again(folder, cache, tmp_path, change):
    before = load_folder(folder, cache)
    change(folder)
    after = load_folder(folder, cache)
    assert_same(after, load_folder(folder, tmp_path / "another cache"))
    with pytest.raises(AssertionError):
        assert_same(after, before)


def test_the_same_relative_path_elsewhere_is_another_folder(tmp_path, cache, monkeypatch):
    for place, colour in (("one", "red"), ("two", "blue")):
        root = one_picture_folder(tmp_path / place / "images", Image.new("RGB", (4, 4), colour), "x.bmp")
        for file in root.rglob("*.bmp"):
            os.utime(file, (1e9, 1e9))  # As archives do that are unpacked with their dates.
    monkeypatch.chdir(tmp_path / "one")
    load_folder(pathlib.Path("images"), cache)
    monkeypatch.chdir(tmp_path / "two")
    assert load_folder(pathlib.Path("images"), cache).train.images[0, 0, 0].tolist() == [0, 0, 255]


def test_a_full_disk_costs_only_the_cache(folder, cache, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    expected = load_folder(folder, cache.with_name("another"))
    monkeypatch.setattr(np, "savez", full)
    assert_same(load_folder(folder, cache), expected)
    assert "could not write the cache" in caplog.text
    assert "No space left on device" in caplog.text
    assert list(cache.iterdir()) == []  # Nothing half-written.


def test_a_cache_that_can_not_be_written_only_warns(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(load_folder(folder, tmp_path / "file" / "cache").train) == 6
    assert "could not write the cache" in caplog.text


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_cache_is_read_again_from_the_files(folder, cache, share):
    expected = load_folder(folder, cache)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_same(load_folder(folder, cache), expected)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), r"no folder train in it"),
        (lambda root: shutil.rmtree(root / "test"), r"no folder test or val in it"),
        (lambda root: shutil.rmtree(root / "test" / "cat"), r"test/cat: no such folder"),
        (lambda root: (root / "test" / "cat" / "0000.png").unlink(), r"test/cat: no images in it"),
        (lambda root: (root / "train" / "ant" / "0001.png").write_text("text"), r"ant/0001\.png: not a readable image"),
        (
            lambda root: picture(1, size=(5, 5)).save(root / "train" / "ant" / "0002.png"),
            r"5x5 .* 6x4; set data\.image",
        ),
    ],
    ids=["no train", "no test", "no class", "empty class", "no image", "sizes"],
)
def test_a_folder_that_is_not_as_it_should_be_is_a_usage_error(folder, cache, change, message):
    change(folder)
    with pytest.raises(UsageError, match=message):
        load_folder(folder, cache)
    assert not cache.exists()


def test_test_images_of_a_class_without_training_images_are_not_dropped_in_silence(folder, cache):
    (folder / "test" / "dog").mkdir()
    picture(1).save(folder / "test" / "dog" / "0.png")
    with pytest.raises(UsageError, match="dog"):
        load_folder(folder, cache)


def test_a_picture_cut_short_is_a_usage_error(folder, cache):
    path = folder / "train" / "cat" / "0000.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match=r"cat/0000\.png: not a readable image"):
        load_folder(folder, cache)


def test_training_and_test_images_of_two_sizes_need_image_size(folder, cache):
    for file in (folder / "test").rglob("*.png"):
        picture(1, size=(8, 8)).save(file)
    with pytest.raises(UsageError, match=r"training images are 4x6 pixels, test images 8x8; set data\.image_size"):
        load_folder(folder, cache)


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'image_folder'"):
        load(source="image_foldr")


def test_an_unknown_cifar_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'cifar100'"):
        load(source="cifar", name="cifar-100")


def test_the_cache_lies_where_the_config_or_xdg_or_home_says(monkeypatch, tmp_path):
    data = default_config().data
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(data) == tmp_path / "home" / ".cache" / "resnet_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(data) == tmp_path / "xdg" / "resnet_jax"
    data.cache_dir = "~/mine"
    assert cache_folder(data) == tmp_path / "home" / "mine"


def test_image_folder_is_a_source_for_any_extension_it_lists(tmp_path, cache):
    for extension in decode.EXTENSIONS:
        root = one_picture_folder(tmp_path / extension[1:], picture(1, size=(8, 8)), f"x{extension}")
        assert load_folder(root, cache).train.images.shape == (1, 8, 8, 3)
