"""Weights of any known format into one of our networks: every array is used, or the one that isn't is named."""

import base64
import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np

from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS, create_model, default_input
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained import preprocessing as preprocessing_lib
from resnet_jax.pretrained.caffe import read_mean
from resnet_jax.pretrained.files import Arrays, read_arrays, read_metadata
from resnet_jax.pretrained.fit import fit
from resnet_jax.pretrained.formats import FORMATS, Format, recognise
from resnet_jax.pretrained.preprocessing import Preprocessing

FORMAT = "resnet_jax"  # In the metadata of our own files.


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights with what belongs to them.

    Attributes:
      settings: attributes of the network that the weights need, as ``shortcut_zeros``.
      variables: ``params`` and ``batch_stats``, nested, float32 NumPy arrays; None where a checkpoint has newer ones.
      preprocessing: how images are made into input; None where that is not known.
      classes: names in the order of the logits, where known.
      title: the format, for people.
      history: where they come from, for people: ``source``, and of a run ``config`` and ``metrics``.
    """

    settings: dict[str, Any]
    variables: dict[str, Any] | None
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    title: str
    history: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_run(cls, data: dict[str, Any], variables: dict[str, Any] | None) -> "Pretrained":
        """The weights of a run of ours, with what it remembers of its data (``Classification.description``)."""
        preprocessing, classes = data.get("preprocessing"), data.get("classes")
        if preprocessing:
            preprocessing = Preprocessing.from_json(preprocessing | {"mean_image": data.get("mean_image")})
        settings = data.get("settings", {})
        return cls(settings, variables, preprocessing, tuple(classes) if classes else None, "a run of ours")

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        return self.variables["params"]["head"]["bias"].shape[0]


def known_model(path: pathlib.Path) -> str | None:
    """The network that a file is of, where its metadata or a config beside it says so."""
    metadata = read_metadata(path)
    if metadata.get("format") == FORMAT:
        return metadata["model"]
    timm = preprocessing_lib.beside(path)
    return timm[0] if timm else None


def read_pretrained(path: pathlib.Path, model: str) -> Pretrained:
    """Reads a file of weights for the network ``model``.

    Raises:
      UsageError: no such file, or its arrays are not exactly those of the network.
    """
    arrays, metadata = read_arrays(path)
    if metadata.get("format") == FORMAT:
        return _read_ours(path, arrays, metadata, model)
    arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    known = recognise(arrays)
    if known is None:
        some = ", ".join(sorted(arrays)[:3]) or "none at all"
        titles = ", ".join(dict.fromkeys(row.title for row in FORMATS))
        raise UsageError(f"{path}: names of no known format ({some}, ...); known are {titles}")
    timm = preprocessing_lib.beside(path) if known.preprocessing is None else None
    if timm and timm[0] != model:
        raise UsageError(f"{path}: holds {timm[0]} (says config.json beside it), not {model}")
    settings = _settings(path, arrays, known, model)
    variables = fit(path, arrays, known, model, settings)
    preprocessing = known.preprocessing or (timm[1] if timm else preprocessing_lib.usual(default_input(model)[0]))
    if known.mean_file and path.with_name(known.mean_file).is_file():
        preprocessing = dataclasses.replace(
            preprocessing, mean_image=read_mean(path.with_name(known.mean_file), preprocessing.image_size)
        )
    found = Pretrained(
        settings, variables, preprocessing, known.classes, known.title, {"source": f"{path.name} ({known.title})"}
    )
    fits = found.classes is None or len(found.classes) == found.num_classes
    return found if fits else dataclasses.replace(found, classes=None)


def _read_ours(path: pathlib.Path, arrays: Arrays, metadata: dict[str, str], model: str) -> Pretrained:
    if metadata["model"] != model:
        raise UsageError(f"{path}: holds {metadata['model']}, not {model}")
    settings, preprocessing, classes, history = (
        json.loads(metadata.get(name, "null")) for name in ("settings", "preprocessing", "classes", "history")
    )
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    names = None if any(name.startswith("params/") for name in arrays) else recognise(arrays)
    preprocessing = Preprocessing.from_json(preprocessing) if preprocessing else None
    if "mean_image" in metadata:
        image = np.load(io.BytesIO(base64.b64decode(metadata["mean_image"])), allow_pickle=False)
        preprocessing = dataclasses.replace(preprocessing, mean_image=image)
    return Pretrained(
        settings,
        fit(path, arrays, names, model, settings),
        preprocessing,
        tuple(classes) if classes else None,
        "a file of ours",
        history or {"source": path.name},
    )


def _settings(path: pathlib.Path, arrays: Arrays, known: Format, model: str) -> dict[str, Any]:
    """What the names say of the network; a UsageError where they are another network's than ``model``."""
    module = create_model(model, dtype="float32")
    if known.model:
        if known.model != model:
            raise UsageError(f"{path}: holds {known.model}, not {model}")
        return {}
    blocks, bottleneck, shortcuts = _blocks(arrays, known)
    name = _name_of(blocks, bottleneck, known.stride_in)
    if not isinstance(module, ResNet) or (module.blocks, module.bottleneck) != (blocks, bottleneck):
        raise UsageError(f"{path}: holds {name}, not {model}")
    if bottleneck and module.stride_in != known.stride_in:
        version = {"first": "v1", "middle": "v1.5"}[known.stride_in]
        raise UsageError(f"{path}: {known.title} are {version}: ask for {name}, not {model}")
    if len(blocks) == 4 or module.shortcut == "none":
        return dict(known.settings)
    if shortcuts:
        return {"shortcut": "C" if shortcuts == sum(blocks) else "B"}
    return {"shortcut": "A", "shortcut_zeros": "both" if "linear.weight" in arrays else "end"}


def _blocks(arrays: Arrays, known: Format) -> tuple[tuple[int, ...], bool, int]:
    """Blocks of each stage, whether they are bottlenecks, and how many have a projection in their shortcut."""

    def has(*parts: str) -> bool:
        return any(known.theirs(f"params/{part}/{leaf}") in arrays for part in parts for leaf in ("kernel", "scale")
                   if ("bn" in part) == (leaf == "scale"))  # fmt: skip

    stages: list[int] = []
    bottleneck, shortcuts = False, 0
    while True:
        stage, count = len(stages) + 1, 0
        while has(*(f"stage{stage}/block{count + 1}/{kind}{i}" for kind in ("conv", "bn") for i in (1, 2))):
            count += 1
            bottleneck |= has(f"stage{stage}/block{count}/conv3")
            shortcuts += has(f"stage{stage}/block{count}/shortcut_conv")
        if not count:
            return tuple(stages), bottleneck, shortcuts
        stages.append(count)


def _name_of(blocks: tuple[int, ...], bottleneck: bool, stride_in: str) -> str:
    """The name of the network that has these blocks, or their description."""
    if len(blocks) == 3 and len(set(blocks)) == 1:
        return f"cifar_resnet{6 * blocks[0] + 2}"
    for name, row in MODELS.items():
        settings = row.keywords
        if settings.get("blocks") == blocks and settings.get("bottleneck", False) == bottleneck:
            return f"{name}_v1_5" if bottleneck and stride_in == "middle" else name
    kind = "bottleneck" if bottleneck else "basic"
    return f"a network of {', '.join(map(str, blocks))} {kind} blocks"
