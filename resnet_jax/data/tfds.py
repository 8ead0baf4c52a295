"""TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import pathlib
from typing import Any

from resnet_jax.data.sources import Dataset
from resnet_jax.errors import UsageError


class Prepared:
    """One split of a prepared builder: ``Examples``. Each process opens the files for itself."""

    def __init__(self, folder: pathlib.Path, split: str, image: str, label: str):
        """Takes the builder's own folder, and which of its features are the image and the label."""
        self._folder, self._split, self._image, self._label = folder, split, image, label
        self._source = self._open()

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._folder)
        return builder.as_data_source(self._split, decoders={self._image: tfds.decode.SkipDecoding()})

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._source = self._open()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        try:
            example = self._source[i]
        except RuntimeError as error:  # What the reader of a damaged or missing shard raises.
            raise OSError(f"damaged record ({' '.join(str(error).split())[:100]})") from error
        if example[self._image] is None or example[self._label] is None:
            raise OSError("damaged record")
        return example[self._image], int(example[self._label])

    def where(self, i: int) -> str:
        return f"{self._folder}, split {self._split}, example {i}"

    def fingerprint(self, stamps: bool) -> str:
        del stamps  # A prepared version does not change.
        return f"{self._folder} {self._split} {len(self)}"


def open_builder(name: str, folder: str, train_split: str, test_split: str) -> Dataset:
    """Opens a prepared image-classification builder.

    Args:
      name: as TFDS has it: ``imagenet2012``, ``cifar10``, ``my_dataset/config:1.0.0``.
      folder: TFDS's data_dir; empty for its default.
      train_split, test_split: split expressions, as ``train`` or ``train[:90%]``; an empty test split is ``test``, or
        ``validation`` where there is none.

    Raises:
      UsageError: unknown or not prepared as ArrayRecord, no such split, or not images with labels.
    """
    import tensorflow_datasets as tfds

    if not name:
        raise UsageError("data.source=tfds needs data.name, as imagenet2012")
    data_dir = str(pathlib.Path(folder).expanduser()) if folder else None
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, TypeError, OSError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"data.name={name}: no data set of TFDS in {data_dir or 'its default folder'} ({first})"
        ) from error
    path = pathlib.Path(str(builder.data_path))
    prepared = path.is_dir() and builder.info.splits
    if not prepared or builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        how = f"it holds {builder.info.file_format.value} files" if prepared else "nothing is prepared there"
        raise UsageError(
            f"data.name={name}: {path} is no data set prepared as ArrayRecord ({how}); make it with tfds build"
            " --file_format=array_record, or for ImageNet from its tar files with"
            " python -m resnet_jax.prepare --source=ilsvrc"
        )
    splits, features = builder.info.splits, builder.info.features
    test_split = test_split or next((split for split in ("test", "validation") if split in splits), "test")
    image, label = builder.info.supervised_keys or ("image", "label")
    if not (image in features and isinstance(features[image], tfds.features.Image)):
        raise UsageError(f"data.name={name}: no image classification, its feature {image!r} is no image")
    if not (label in features and isinstance(features[label], tfds.features.ClassLabel)):
        raise UsageError(f"data.name={name}: no image classification, its feature {label!r} is no class label")
    parts = []
    for split in (train_split, test_split):
        try:
            parts.append(Prepared(path, split, image, label))
        except (ValueError, KeyError, AssertionError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"data.name={name}: no split {split!r}; it has {', '.join(splits)} ({reason})") from error
    return Dataset(*parts, tuple(features[label].names))
