"""The image folder that is read as training goes: what is listed, and whose label it gets."""

import csv
import io
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
from PIL import Image
import pytest
from scipy.io import savemat

from resnet_jax.data import image_folder
from resnet_jax.data.image_folder import open_folder
from resnet_jax.data.sources import Examples
from resnet_jax.errors import UsageError


def write_pictures(root: pathlib.Path, *names: str) -> pathlib.Path:
    """Small pictures of noise, each other than the others, under the names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(name.encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")
    return root


def listed(examples: Examples, root: pathlib.Path) -> list[tuple[str, int]]:
    """Each file's path below the root and its label, once the bytes are known to be that file's."""
    found = []
    for i in range(len(examples)):
        content, label = examples[i]
        path = pathlib.Path(examples.where(i))
        assert content == path.read_bytes()
        found.append((str(path.relative_to(root.resolve())), label))
    return found


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_pictures(
        tmp_path / "images", "train/ant/1.png", "train/ant/0.png", "train/cat/0.png", "val/ant/0.png", "val/cat/0.png"
    )


def test_images_in_nested_folders_are_of_the_topmost_folders_class(folder):
    write_pictures(folder, "train/ant/red/young/2.png", "train/cat/ant/3.png")
    data = open_folder(str(folder), "")
    assert listed(data.train, folder) == [
        ("train/ant/0.png", 0),
        ("train/ant/1.png", 0),
        ("train/ant/red/young/2.png", 0),
        ("train/cat/0.png", 1),
        ("train/cat/ant/3.png", 1),
    ]
    assert isinstance(data.train, Examples)


def test_classes_and_files_are_sorted_however_the_disk_lists_them(tmp_path, monkeypatch):
    names = [
        f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("bee", "Zebra", "ant") for i in (10, 9)
    ]
    write_pictures(tmp_path, *names)
    scandir, found = os.scandir, []
    for backwards in (False, True):

        def listing(path, backwards=backwards):
            return sorted(scandir(path), key=lambda entry: entry.name, reverse=backwards)

        with monkeypatch.context() as context:
            context.setattr(image_folder.os, "scandir", listing)
            data = open_folder(str(tmp_path), "")
        found.append((data.classes, listed(data.train, tmp_path), listed(data.test, tmp_path)))
    classes, train, test = found[0]
    assert found[1] == found[0]
    assert classes == ("Zebra", "ant", "bee")
    files = [("Zebra", 0), ("ant", 1), ("bee", 2)]
    assert train == [(f"train/{name}/{i}.png", label) for name, label in files for i in (10, 9)]
    assert test == [(f"test/{name}/{i}.png", label) for name, label in files for i in (10, 9)]


def test_hidden_and_foreign_files_are_no_images(folder):
    before = listed(open_folder(str(folder), "").train, folder)
    write_pictures(
        folder, "train/ant/._0.png", "train/ant/.thumbnails/0.png", "train/.checkpoints/0.png", "train/x.png"
    )
    for name in ("notes.txt", "0.png.part", "png", "Thumbs.db", "1.psd"):
        (folder / "train/ant" / name).write_text("no image")
    data = open_folder(str(folder), "")
    assert listed(data.train, folder) == before
    assert data.classes == ("ant", "cat")


def test_extensions_count_in_any_case(folder):
    write_pictures(folder, "train/cat/A.JPEG", "train/cat/b.Png", "train/cat/c.webp")
    names = [name for name, _ in listed(open_folder(str(folder), "").train, folder)]
    assert names[2:] == ["train/cat/0.png", "train/cat/A.JPEG", "train/cat/b.Png", "train/cat/c.webp"]


def test_a_list_of_classes_gives_the_order_of_the_labels(folder, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n\n ant \n")
    data = open_folder(str(folder), str(tmp_path / "labels.txt"))
    assert data.classes == ("cat", "ant")
    assert listed(data.test, folder) == [("val/cat/0.png", 0), ("val/ant/0.png", 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train/dog").mkdir(), "train/dog: no images"),
        (lambda root: (root / "val/cat/0.png").rename(root / "val/cat/0.txt"), "val/cat: no images"),
        (lambda root: shutil.rmtree(root / "val/cat"), "val/cat: no such folder"),
        (lambda root: write_pictures(root, "val/dog/0.png"), "val/dog: 'dog' is no class of the training set"),
        (lambda root: shutil.rmtree(root / "val"), "images: no folder test or val"),
        (lambda root: shutil.rmtree(root / "train"), "images: no folder train"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in ("ant", "cat")], "train: no class folders"),
    ],
    ids=["empty class", "empty test class", "missing class", "extra class", "no test", "no train", "no classes"],
)
def test_a_folder_that_is_missing_something_is_named(folder, change, message):
    change(folder)
    if message.startswith(("train/dog", "val/dog")) and "no images" in message:
        write_pictures(folder, "val/dog/0.png")
    with pytest.raises(UsageError) as error:
        open_folder(str(folder), "")
    assert message in one_line(error)


@pytest.mark.parametrize("place", ["", "nowhere", "images/train/ant/0.png"])
def test_no_folder_is_a_usage_error(folder, place):
    with pytest.raises(UsageError, match=r"data\.dir") as error:
        open_folder(str(folder.parent / place) if place else "", "")
    one_line(error)


def test_a_pickled_copy_reads_the_same(folder):
    files = open_folder(str(folder), "").train
    copy = pickle.loads(pickle.dumps(files))
    assert len(copy) == len(files) == 3
    assert listed(copy, folder) == listed(files, folder)
    assert copy.fingerprint(stamps=True) == files.fingerprint(stamps=True)


def test_the_fingerprint_sees_names_labels_and_dates(folder):
    before = open_folder(str(folder), "").train
    plain, stamped = before.fingerprint(stamps=False), before.fingerprint(stamps=True)
    path = folder / "train/ant/0.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    # Of a few files all are looked at in either case.
    assert before.fingerprint(stamps=False) != plain
    assert before.fingerprint(stamps=True) != stamped
    path.rename(path.with_name("2.png"))
    assert open_folder(str(folder), "").train.fingerprint(stamps=False) != plain
    with pytest.raises(UsageError, match=r"ant/0\.png: not readable"):
        before.fingerprint(stamps=True)


def test_a_file_that_vanished_is_an_os_error(folder):
    files = open_folder(str(folder), "").train
    (folder / "train/ant/1.png").unlink()
    with pytest.raises(OSError, match=r"ant/1\.png"):
        files[1]


# ImageNet's own numbers of its classes are in another order than their WordNet ids.
WNIDS = ("n01440764", "n01443537", "n01484850")
NUMBERS = {"n01440764": 3, "n01443537": 1, "n01484850": 2}
VALIDATION = ("n01484850", "n01440764", "n01484850", "n01443537", "n01440764")  # Of images 1, 2, ...
KIT = "ILSVRC2012_devkit_t12"


def kit_files() -> dict[str, bytes]:
    """The two files of the development kit that matter; ``meta.mat`` has inner nodes of the hierarchy too."""
    rows = [*((number, wnid) for wnid, number in NUMBERS.items()), (4, "n00001740")]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object)]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{NUMBERS[wnid]}\n" for wnid in VALIDATION)
    return {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def put_kit_unpacked(root: pathlib.Path) -> None:
    data = root / KIT / "data"
    data.mkdir(parents=True)
    for name, content in kit_files().items():
        (data / name).write_bytes(content)


def put_kit_files(root: pathlib.Path) -> None:
    for name, content in kit_files().items():
        (root / name).write_bytes(content)


def put_kit_packed(root: pathlib.Path) -> None:
    with tarfile.open(root / f"{KIT}.tar.gz", "w:gz") as tar:
        for name, content in {"readme.txt": b"read me", **kit_files()}.items():
            member = tarfile.TarInfo(f"{KIT}/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def put_list(root: pathlib.Path) -> None:
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("".join(f"{wnid}\n" for wnid in VALIDATION))


def put_kaggle(root: pathlib.Path) -> None:
    """Kaggle's rows are in no order, and have every object's box after its class."""
    rows = [(f"ILSVRC2012_val_{i:08}", f"{wnid} 1 2 3 4 {wnid} 5 6 7 8 ") for i, wnid in enumerate(VALIDATION, start=1)]
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *reversed(rows)])


def flat_folder(root: pathlib.Path) -> pathlib.Path:
    images = [f"val/ILSVRC2012_val_{i:08}.JPEG" for i in range(1, len(VALIDATION) + 1)]
    return write_pictures(root, *(f"train/{wnid}/{wnid}_1.JPEG" for wnid in WNIDS), *images)


LABELS = [put_kit_unpacked, put_kit_files, put_kit_packed, put_list, put_kaggle]


@pytest.mark.parametrize("place", ["", "val"])
@pytest.mark.parametrize("put", LABELS, ids=lambda put: put.__name__.removeprefix("put_"))
def test_flat_validation_images_get_their_labels(tmp_path, put, place):
    root = flat_folder(tmp_path)
    put(root / place)
    data = open_folder(str(root), "")
    assert data.classes == WNIDS
    assert listed(data.test, root) == [
        (f"val/ILSVRC2012_val_{i:08}.JPEG", WNIDS.index(wnid)) for i, wnid in enumerate(VALIDATION, start=1)
    ]


@pytest.mark.parametrize("put", LABELS, ids=lambda put: put.__name__.removeprefix("put_"))
def test_flat_validation_images_keep_their_labels_where_some_are_missing(tmp_path, put):
    root = flat_folder(tmp_path)
    put(root)
    (root / "val/ILSVRC2012_val_00000002.JPEG").unlink()
    labels = [label for _, label in listed(open_folder(str(root), "").test, root)]
    assert labels == [WNIDS.index(wnid) for i, wnid in enumerate(VALIDATION, start=1) if i != 2]


def test_flat_validation_images_without_labels_say_what_to_put_where(tmp_path):
    root = flat_folder(tmp_path)
    with pytest.raises(UsageError, match=rf"put {KIT}\.tar\.gz there .*LOC_val_solution\.csv") as error:
        open_folder(str(root), "")
    assert str(root.resolve()) in one_line(error)


def test_a_validation_image_without_a_label_is_named(tmp_path):
    root = flat_folder(tmp_path)
    put_list(root)
    write_pictures(root, "val/ILSVRC2012_val_00000006.JPEG")
    with pytest.raises(UsageError, match=r"ILSVRC2012_val_00000006\.JPEG") as error:
        open_folder(str(root), "")
    one_line(error)


def test_a_validation_image_of_a_class_without_training_images_is_named(tmp_path):
    root = flat_folder(tmp_path)
    put_list(root)
    shutil.rmtree(root / "train" / VALIDATION[0])
    with pytest.raises(UsageError, match=r"val_00000001\.JPEG: 'n01484850' is no class of the training set") as error:
        open_folder(str(root), "")
    one_line(error)


def cut(root: pathlib.Path, name: str) -> None:
    path = root / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("put", "damage"),
    [
        (put_kit_packed, lambda root: cut(root, f"{KIT}.tar.gz")),
        (put_kit_packed, lambda root: (root / f"{KIT}.tar.gz").write_bytes(b"<html>not found</html>")),
        (put_kit_files, lambda root: cut(root, "meta.mat")),
        (put_kit_files, lambda root: (root / "ILSVRC2012_validation_ground_truth.txt").write_text("no number")),
        (put_kit_files, lambda root: (root / "ILSVRC2012_validation_ground_truth.txt").write_text("7\n" * 5)),
        (put_list, lambda root: (root / "imagenet_2012_validation_synset_labels.txt").write_bytes(b"\xff\xfe")),
        (put_kaggle, lambda root: (root / "LOC_val_solution.csv").write_text("a,b\n1,2\n")),
    ],
    ids=["cut kit", "no kit", "cut meta", "no numbers", "unknown number", "no text", "other columns"],
)
def test_damaged_labels_are_a_usage_error(tmp_path, put, damage):
    root = flat_folder(tmp_path)
    put(root)
    damage(root)
    with pytest.raises(UsageError) as error:
        open_folder(str(root), "")
    one_line(error)
