"""ImageNet's own archives, here tiny ones made as the real ones are, read without unpacking."""

from concurrent.futures import ThreadPoolExecutor
import io
import pathlib
import pickle
import sys
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from resnet_jax.data.ilsvrc import KIT, TRAIN, VALIDATION, open_archives
from resnet_jax.data.sources import Examples
from resnet_jax.errors import UsageError

# ImageNet's own numbers of its classes are in another order than their WordNet ids.
NUMBERS = {"n01440764": 3, "n01443537": 1, "n01484850": 2}
WNIDS = tuple(sorted(NUMBERS))


def noise(seed: int) -> bytes:
    """Bytes of a length of its own; two of them are more than what a whole tar file ends in, 10 kB of zeros."""
    rng = np.random.default_rng(seed)
    return rng.bytes(int(rng.integers(6000, 9000)))


TRAINING = {
    wnid: {f"{wnid}_{i}.JPEG": noise(100 * NUMBERS[wnid] + i) for i in (10026, 9, 117)[: NUMBERS[wnid]]}
    for wnid in WNIDS
}
TESTING = {f"ILSVRC2012_val_{i:08}.JPEG": noise(i) for i in range(1, 7)}
TRUTH = (2, 3, 3, 1, 2, 1)


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar file with its members in the order given."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def kit(truth: tuple[int, ...] = TRUTH) -> bytes:
    rows = [(number, wnid) for wnid, number in NUMBERS.items()]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object)]).reshape(-1, 1)})
    data = {
        "meta.mat": meta.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
    }
    return tar({f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in data.items()}, "w:gz")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """The three files; nothing in them is sorted."""
    root = tmp_path / "archives"
    root.mkdir()
    (root / TRAIN).write_bytes(tar({f"{wnid}.tar": tar(TRAINING[wnid]) for wnid in reversed(WNIDS)}))
    (root / VALIDATION).write_bytes(tar(dict(reversed(TESTING.items()))))
    (root / KIT).write_bytes(kit())
    return root


def read(examples: Examples) -> list[tuple[bytes, int]]:
    return [examples[i] for i in range(len(examples))]


def expected_training() -> list[tuple[bytes, int]]:
    return [(TRAINING[wnid][name], label) for label, wnid in enumerate(WNIDS) for name in sorted(TRAINING[wnid])]


def test_training_images_are_what_was_packed_sorted_by_class_and_name(folder):
    data = open_archives(str(folder))
    assert data.classes == WNIDS
    assert isinstance(data.train, Examples)
    assert read(data.train) == expected_training()
    assert [data.train.where(i).split("/")[-1] for i in range(len(data.train))] == [
        name for wnid in WNIDS for name in sorted(TRAINING[wnid])
    ]


def test_validation_images_are_what_was_packed_with_the_development_kits_labels(folder):
    wnids = {number: wnid for wnid, number in NUMBERS.items()}
    labels = [WNIDS.index(wnids[number]) for number in TRUTH]
    assert read(open_archives(str(folder)).test) == list(zip(TESTING.values(), labels, strict=True))


def test_an_image_is_named_by_its_archive_and_its_name_in_it(folder):
    data = open_archives(str(folder))
    assert data.test.where(3) == f"{folder.resolve() / VALIDATION}: ILSVRC2012_val_00000004.JPEG"
    assert data.train.where(0).startswith(f"{folder.resolve() / TRAIN}: n01440764")


def test_a_pickled_copy_reads_the_same_before_and_after_the_first_read(folder):
    train = open_archives(str(folder)).train
    before = pickle.dumps(train)
    assert read(train) == expected_training()
    for copy in (pickle.loads(before), pickle.loads(pickle.dumps(train))):
        assert read(copy) == expected_training()
        assert copy.fingerprint(stamps=False) == train.fingerprint(stamps=False)
    del copy  # Closes its own file, not the other's.
    assert read(train) == expected_training()


def test_threads_that_read_at_once_get_the_right_bytes(folder):
    train, expected = open_archives(str(folder)).train, expected_training()
    chosen = np.random.default_rng(0).integers(0, len(train), 4000).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(train.__getitem__, chosen))
    finally:
        sys.setswitchinterval(interval)
    assert found == [expected[i] for i in chosen]


def damaged(content: bytes, place: str) -> bytes:
    """An archive that ends too early, seen from its middle member: its header's 512 bytes, then its data."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
    member = members[len(members) // 2]
    return {
        "nothing": b"",
        "first header": content[:100],
        "before a header": content[: member.offset],
        "in a header": content[: member.offset + 100],
        "before the data": content[: member.offset_data],
        "in the data": content[: member.offset_data + member.size // 2],
        "zeros": content[: member.offset] + bytes(len(content) - member.offset),  # A download that reserved its place.
        "other bytes": content[: member.offset] + b"x" * 512 + content[member.offset_data :],
    }[place]


PLACES = ("nothing", "first header", "before a header", "in a header", "before the data", "in the data", "zeros")


@pytest.mark.parametrize("name", [TRAIN, VALIDATION])
@pytest.mark.parametrize("place", [*PLACES, "other bytes"])
def test_an_archive_that_is_not_whole_is_named(folder, name, place):
    path = folder / name
    path.write_bytes(damaged(path.read_bytes(), place))
    with pytest.raises(UsageError, match=name) as error:
        open_archives(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["before a header", "in the data", "zeros", "other bytes"])
def test_a_class_whose_inner_archive_is_not_whole_is_not_taken_for_whole(folder, place):
    inner = {f"{wnid}.tar": tar(TRAINING[wnid]) for wnid in WNIDS}
    inner["n01440764.tar"] = damaged(inner["n01440764.tar"], place)
    (folder / TRAIN).write_bytes(tar(inner))
    with pytest.raises(UsageError, match=TRAIN):
        open_archives(str(folder))


@pytest.mark.parametrize("name", [TRAIN, VALIDATION, KIT])
def test_a_missing_archive_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name) as error:
        open_archives(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [TRAIN, VALIDATION, KIT])
def test_a_file_that_is_no_archive_is_named(folder, name):
    (folder / name).write_bytes(b"<html><body>Sign in to download</body></html>" * 100)
    with pytest.raises(UsageError, match=name):
        open_archives(str(folder))


def test_labels_for_other_images_are_refused(folder):
    (folder / KIT).write_bytes(kit(TRUTH[:-1]))
    with pytest.raises(UsageError, match=r"ILSVRC2012_val_00000006\.JPEG"):
        open_archives(str(folder))


def test_a_validation_class_without_training_images_is_refused(folder):
    (folder / TRAIN).write_bytes(tar({f"{wnid}.tar": tar(TRAINING[wnid]) for wnid in WNIDS[:2]}))
    with pytest.raises(UsageError, match=r"val_00000001\.JPEG is of class 'n01484850'"):
        open_archives(str(folder))
