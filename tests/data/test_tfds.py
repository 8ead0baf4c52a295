"""TensorFlow Datasets prepared as ArrayRecord, by a builder of the test's own; TensorFlow is not needed."""

import io
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.sources import Examples
from resnet_jax.data.tfds import open_builder
from resnet_jax.errors import UsageError

NAMES = ("wolf", "ant", "cat")  # Not sorted: TFDS keeps the order it is given.


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8 + seed, 9, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


# Each split's images and labels.
SPLITS = {
    "train": [(jpeg(i), i % 3) for i in range(8)],
    "validation": [(jpeg(i), (i + 1) % 3) for i in range(10, 14)],
    "test": [(jpeg(i), (i + 2) % 3) for i in range(20, 23)],
}


def prepare(folder: pathlib.Path, name: str, splits: tuple[str, ...], features: dict, keys: tuple | None) -> None:
    """Prepares a data set of the name; it is not registered, so that it is found by its files alone."""

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict, supervised_keys=keys)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (content, label) in enumerate(SPLITS[split]):
                example = {"label": label, "depth": i}
                yield i, {key: example.get(key, io.BytesIO(content)) for key in features}

    Pictures.name = name
    Pictures(data_dir=str(folder), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """TFDS's data_dir with several small data sets in it."""
    root = tmp_path_factory.mktemp("tfds")
    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=NAMES)
    features, keys = {"image": image, "label": label}, ("image", "label")
    prepare(root, "both", ("train", "validation", "test"), features, keys)
    prepare(root, "validated", ("train", "validation"), features, keys)
    prepare(root, "other_names", ("train", "test"), {"photo": image, "label": label}, ("photo", "label"))
    prepare(root, "no_keys", ("train", "test"), features, None)
    prepare(root, "numbers", ("train", "test"), {"image": image, "depth": np.int64}, ("image", "depth"))
    as_tfrecord = root / "as_tfrecord" / "1.0.0"
    shutil.copytree(root / "both" / "1.0.0", as_tfrecord)
    info = as_tfrecord / "dataset_info.json"
    text = info.read_text().replace('"both"', '"as_tfrecord"')
    assert '"array_record"' in text
    info.write_text(text.replace('"array_record"', '"tfrecord"'))
    return root


def read(examples: Examples) -> list[tuple[bytes, int]]:
    return sorted(examples[i] for i in range(len(examples)))  # TFDS shuffles as it prepares.


def test_images_and_labels_are_what_the_builder_was_given(folder):
    data = open_builder("both", str(folder), "train", "")
    assert data.classes == NAMES
    assert isinstance(data.train, Examples)
    assert read(data.train) == sorted(SPLITS["train"])
    assert isinstance(data.train[0][0], bytes)


@pytest.mark.parametrize(("name", "split"), [("both", "test"), ("validated", "validation")])
def test_the_test_split_is_test_or_where_there_is_none_validation(folder, name, split):
    assert read(open_builder(name, str(folder), "train", "").test) == sorted(SPLITS[split])


def test_a_named_test_split_is_taken(folder):
    assert read(open_builder("both", str(folder), "train", "validation").test) == sorted(SPLITS["validation"])


def test_split_expressions_cut_and_join(folder):
    first, second = (read(open_builder("both", str(folder), part, "").train) for part in ("train[:50%]", "train[50%:]"))
    assert len(first) == len(second) == 4
    assert sorted(first + second) == sorted(SPLITS["train"])
    joined = read(open_builder("both", str(folder), "train+validation", "").train)
    assert joined == sorted(SPLITS["train"] + SPLITS["validation"])
    joined = read(open_builder("both", str(folder), "train[:2]+validation[1:]", "").train)
    assert len(joined) == 5


@pytest.mark.parametrize("name", ["both:1.0.0", "other_names", "no_keys"])
def test_a_version_may_be_named_and_the_features_may_have_other_names_or_no_keys(folder, name):
    assert read(open_builder(name, str(folder), "train", "").train) == sorted(SPLITS["train"])


def test_the_folder_may_be_the_users(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(open_builder("both", f"~/{folder.name}", "train", "").train) == 8


def test_a_pickled_copy_reads_the_same(folder):
    train = open_builder("both", str(folder), "train[2:]", "").train
    content = pickle.dumps(train)
    assert len(content) < 1000  # The place, not the open files.
    copy = pickle.loads(content)
    assert [copy[i] for i in range(len(copy))] == [train[i] for i in range(len(train))]
    assert copy.fingerprint(stamps=False) == train.fingerprint(stamps=False)


def test_an_example_is_named_by_its_place(folder):
    assert open_builder("both", str(folder), "train", "").test.where(2) == f"{folder}/both/1.0.0, split test, example 2"


@pytest.mark.parametrize(
    ("name", "train", "test", "message"),
    [
        ("", "train", "", r"needs data\.name"),
        ("nowhere", "train", "", r"data\.name=nowhere: no data set of TFDS in "),
        ("both:2.0.0", "train", "", r"data\.name=both:2\.0\.0: "),
        ("both/large", "train", "", r"data\.name=both/large: "),
        ("no/such/name:at all", "train", "", r"data\.name=no/such/name:at all: "),
        (
            "mnist",
            "train",
            "",
            r"data\.name=mnist: .* no data set prepared as ArrayRecord \(nothing is prepared there\)",
        ),
        (
            "as_tfrecord",
            "train",
            "",
            r"\(it holds tfrecord files\); make it with tfds build --file_format=array_record",
        ),
        ("numbers", "train", "", r"its feature 'depth' is no class label"),
        ("both", "training", "", r"no split 'training'; it has .*validation"),
        ("both", "train", "testing", r"no split 'testing'"),
        ("both", "train+testing", "", r"data\.name=both: .*testing"),
        ("both", "train[:50%", "", r"data\.name=both: .*train\[:50%"),
        ("both", "train[:half]", "", r"data\.name=both: .*train\[:half\]"),
    ],
)
def test_what_can_not_be_read_is_a_usage_error(folder, name, train, test, message):
    with pytest.raises(UsageError, match=message) as error:
        open_builder(name, str(folder), train, test)
    assert "\n" not in str(error.value)


def cut(path: pathlib.Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize(
    "damage",
    [pathlib.Path.unlink, lambda path: cut(path, 0), lambda path: cut(path, 0.5), lambda path: cut(path, 0.9999)],
    ids=["missing", "empty", "cut in half", "without its end"],
)
def test_a_file_that_can_not_be_read_is_no_mistake_of_the_programs(folder, tmp_path, damage):
    """Refused as it is opened, or else an OSError, which readers of examples know, from the first example."""
    shutil.copytree(folder / "both", tmp_path / "both")
    (path,) = (tmp_path / "both").rglob("*train*array_record*")
    damage(path)
    with pytest.raises((UsageError, OSError)):
        open_builder("both", str(tmp_path), "train", "").train[0]


def test_reading_imports_no_tensorflow(folder):
    script = """
import sys
from resnet_jax.data.tfds import open_builder
data = open_builder("both", sys.argv[1], "train", "")
print(sum(len(data.train[i][0]) for i in range(len(data.train))))
print([name for name in ("tensorflow", "torch", "jax") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == [str(sum(len(content) for content, _ in SPLITS["train"])), "[]", ""], done.stderr
