"""Weights of any known format into one of our networks: every array is used, or the one that isn't is named."""

import base64
import dataclasses
import io
import json
import pathlib
import sys
from typing import Any

import numpy as np

from resnet_jax.errors import UsageError
from resnet_jax.models.registry import MODELS, create_model, default_input
from resnet_jax.models.resnet import ResNet
from resnet_jax.pretrained import preprocessing as preprocessing_lib
from resnet_jax.pretrained.caffe import read_mean
from resnet_jax.pretrained.files import Arrays, read_arrays
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
      task: what the network was trained for.
    """

    settings: dict[str, Any]
    variables: dict[str, Any] | None
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    title: str
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: str = "classification"

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


def read_pretrained(path: pathlib.Path, model: str | None) -> tuple[str, Pretrained]:
    """Reads a file of weights.

    Args:
      path: the file.
      model: our name of the network; None takes the one that the file says it is of, or that alone has its arrays.

    Returns:
      The network's name and its weights.

    Raises:
      UsageError: no such file, it does not say which network it is of, or its arrays are not exactly those of the
        network.
    """
    arrays, metadata = read_arrays(path)
    if metadata.get("format") == FORMAT:
        model = model or metadata.get("model")
        if not model:
            raise UsageError(f"{path}: does not say which network it is of: --model=NAME is needed")
        return model, _read_ours(path, arrays, metadata, model)
    if all(name.startswith("module.") for name in arrays):  # Of torch's DataParallel.
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    known = recognise(arrays)
    if known is None:
        some = ", ".join(sorted(arrays)[:3]) or "none at all"
        titles = ", ".join(dict.fromkeys(row.title for row in FORMATS))
        raise UsageError(f"{path}: names of no known format ({some}, ...); known are {titles}")
    timm = None if known.bgr else preprocessing_lib.beside(path)
    model = model or (timm.model if timm else _only_model(arrays, known))
    if not model:
        raise UsageError(f"{path}: does not say which network it is of: --model=NAME is needed")
    if timm and timm.model != model:
        raise UsageError(f"{path}: holds {timm.model} (says config.json beside it), not {model}")
    settings = _settings(path, arrays, known, model)
    variables = fit(path, arrays, known, model, settings)
    preprocessing = timm.preprocessing if timm else known.preprocessing
    if preprocessing is None:
        preprocessing = preprocessing_lib.usual(default_input(model)[0])
        if preprocessing == preprocessing_lib.CIFAR:  # Of ImageNet's networks nearly all agree.
            print(f"{path}: says nothing of its preprocessing; taken is that of akamaster's networks (mean"
                  f" {preprocessing.mean}, deviation {preprocessing.std})", file=sys.stderr, flush=True)  # fmt: skip
    if known.mean_file and path.with_name(known.mean_file).is_file():
        image = read_mean(path.with_name(known.mean_file), preprocessing.image_size)
        preprocessing = dataclasses.replace(preprocessing, mean_image=image)
    classes = (timm.classes if timm else None) or known.classes
    found = Pretrained(
        settings, variables, preprocessing, classes, known.title, {"source": f"{path.name} ({known.title})"}
    )
    fits = found.classes is None or len(found.classes) == found.num_classes
    return model, (found if fits else dataclasses.replace(found, classes=None))


def _read_ours(path: pathlib.Path, arrays: Arrays, metadata: dict[str, str], model: str) -> Pretrained:
    if metadata.get("model") != model:
        raise UsageError(f"{path}: holds {metadata.get('model', 'an unnamed network')}, not {model}")
    try:
        settings, preprocessing, classes, history = (
            json.loads(metadata.get(name, "null")) for name in ("settings", "preprocessing", "classes", "history")
        )
        preprocessing = Preprocessing.from_json(preprocessing) if preprocessing else None
        if "mean_image" in metadata:
            image = np.load(io.BytesIO(base64.b64decode(metadata["mean_image"])), allow_pickle=False)
            preprocessing = dataclasses.replace(preprocessing, mean_image=image)
        settings, classes = dict(settings or {}), tuple(map(str, classes)) if classes else None
        channels = len(preprocessing.mean) if preprocessing else 3
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: its metadata is damaged or another version's ({error})") from error
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    names = None if any(name.startswith("params/") for name in arrays) else recognise(arrays)
    return Pretrained(
        settings,
        fit(path, arrays, names, model, settings, channels),
        preprocessing,
        classes,
        "a file of ours",
        history or {"source": path.name},
    )


def _only_model(arrays: Arrays, known: Format) -> str | None:
    """The one network that such arrays can be of; None where several have the same (plain nets, and option A)."""
    if known.model:
        return known.model
    blocks, bottleneck, shortcuts = _blocks(arrays, known)
    name = _name_of(blocks, bottleneck, known.stride_in, plain=False)
    return name if name in MODELS and len(blocks) == 4 and 0 < shortcuts <= len(blocks) else None


def _settings(path: pathlib.Path, arrays: Arrays, known: Format, model: str) -> dict[str, Any]:
    """What the names say of the network; a UsageError where they are another network's than ``model``."""
    module = create_model(model, dtype="float32")
    if known.model:
        if known.model != model:
            raise UsageError(f"{path}: holds {known.model}, not {model}")
        return {}
    blocks, bottleneck, shortcuts = _blocks(arrays, known)
    shortcut = getattr(module, "shortcut", None)
    name = _name_of(blocks, bottleneck, known.stride_in, plain=shortcut == "none")
    fits = isinstance(module, ResNet) and (module.blocks, module.bottleneck) == (blocks, bottleneck)
    if not fits or shortcut == "gated":  # Of gates there are arrays, which none of these formats has.
        raise UsageError(f"{path}: holds {name}, not {model}")
    if bottleneck and module.stride_in != known.stride_in:
        version = {"first": "v1", "middle": "v1.5"}[known.stride_in]
        raise UsageError(f"{path}: {known.title} are {version}: ask for {name}, not {model}")
    zeros = known.settings.get("shortcut_zeros", "end")
    settings = {name: value for name, value in known.settings.items() if name != "shortcut_zeros"}
    if len(blocks) == 4 or shortcut == "none":
        return settings
    if shortcuts:
        return settings | {"shortcut": "C" if shortcuts == sum(blocks) else "B"}
    return settings | {"shortcut": "A", "shortcut_zeros": zeros}


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


def _name_of(blocks: tuple[int, ...], bottleneck: bool, stride_in: str, plain: bool) -> str:
    """The name of the network that has these blocks, or their description; ``plain`` nets have the same arrays."""
    if len(blocks) == 3 and len(set(blocks)) == 1:
        return f"cifar_{'plain' if plain else 'resnet'}{6 * blocks[0] + 2}"
    for name, row in MODELS.items():
        settings = row.keywords
        if plain != (settings.get("shortcut") == "none"):
            continue
        if settings.get("blocks") == blocks and settings.get("bottleneck", False) == bottleneck:
            return f"{name}_v1_5" if bottleneck and stride_in == "middle" else name
    kind = "bottleneck" if bottleneck else "basic"
    return f"a network of {', '.join(map(str, blocks))} {kind} blocks" if blocks else "no blocks of a network"
