"""Every network by its name. The tables are the paper's; a name is a row with at most one setting changed."""

import fnmatch
import functools
import re
from typing import Any

from flax import linen as nn

from resnet_jax.errors import UsageError, did_you_mean
from resnet_jax.models.layers import resolve_dtype
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

# The paper's Table 1: depth -> (bottleneck blocks?, blocks in conv2_x .. conv5_x).
IMAGENET = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
# Section 4.2: 6n + 2 layers, n blocks of two layers in each of three stages. Any n works; these are listed.
CIFAR_DEPTHS = {"resnet": (20, 32, 44, 56, 110, 1202), "plain": (20, 32, 44, 56, 110), "highway": (20, 32)}
CIFAR_SHORTCUTS = {"resnet": "A", "plain": "none", "highway": "gated"}
# Very Deep Convolutional Networks, Table 1: convolutions in each stage.
VGG_BLOCKS = {16: (2, 2, 3, 3, 3)}


def _imagenet(depth: int, **settings: Any) -> functools.partial:
    bottleneck, blocks = IMAGENET[depth]
    widths = (256, 512, 1024, 2048) if bottleneck else (64, 128, 256, 512)
    return functools.partial(ResNet, blocks=blocks, widths=widths, bottleneck=bottleneck, **settings)


def _cifar(kind: str, depth: int) -> functools.partial:
    blocks = ((depth - 2) // 6,) * 3
    shortcut = CIFAR_SHORTCUTS[kind]
    return functools.partial(ResNet, blocks=blocks, widths=(16, 32, 64), shortcut=shortcut, stem="cifar", stem_width=16)


def _vgg(depth: int, **settings: Any) -> functools.partial:
    return functools.partial(VGG, blocks=VGG_BLOCKS[depth], widths=(64, 128, 256, 512, 512), **settings)


def _rows() -> dict[str, functools.partial]:
    rows = {}
    for depth, (bottleneck, _) in IMAGENET.items():
        rows[f"resnet{depth}"] = _imagenet(depth)
        if bottleneck:
            rows[f"resnet{depth}_v1_5"] = _imagenet(depth, stride_in="middle")
        else:
            rows[f"plain{depth}"] = _imagenet(depth, shortcut="none")
        for option in "ABC":  # B is the plain name's too.
            rows[f"resnet{depth}_{option.lower()}"] = _imagenet(depth, shortcut=option)
    for kind, depths in CIFAR_DEPTHS.items():
        for depth in depths:
            rows[f"cifar_{kind}{depth}"] = _cifar(kind, depth)
    rows["vgg16"] = _vgg(16)
    rows["vgg16_bn"] = _vgg(16, normalise=True)
    return rows


MODELS = _rows()


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern; CIFAR nets exist for every depth 6n + 2 besides."""
    return fnmatch.filter(MODELS, pattern)


def default_input(name: str) -> tuple[int, int]:
    """(image size in pixels, number of classes) the paper uses the network with."""
    return (32, 10) if name.startswith("cifar_") else (224, 1000)


def create_model(
    name: str, num_classes: int | None = None, dtype: str = "auto", width: float = 1.0, **overrides: Any
) -> nn.Module:
    """Builds a network by its name.

    Args:
      name: one of ``list_models()``, or ``cifar_{resnet,plain,highway}<6n + 2>`` for any n.
      num_classes: length of the logits; the paper's (1000, CIFAR 10) when not given.
      dtype: compute dtype, ``auto``, ``bfloat16``, ``float32`` or ``float64``. ``auto`` is
        bfloat16 on TPU and GPU and float32 on CPU. Parameters and statistics are float32 (float64).
      width: channels of a residual net's layers, times the paper's, rounded to multiples of 4 (what a bottleneck
        divides by).
      **overrides: any other attribute of ``ResNet`` or ``VGG``, such as ``batch_norm="group:32"``.

    Returns:
      A flax module; ``module.init(key, images)`` and ``module.apply(variables, images, train=False)``.

    Raises:
      UsageError: unknown name, attribute or value.
    """
    row = MODELS.get(name) or _cifar_of_any_depth(name)
    if row is None:
        raise UsageError(f"model {name!r} is unknown{did_you_mean(name, MODELS)} (resnet_jax.list_models() has all)")
    known = [field for field in row.func.__dataclass_fields__ if field not in ("parent", "name")]
    for field in overrides:
        if field not in known:
            raise UsageError(f"model {name!r} has no setting {field!r}{did_you_mean(field, known)}")
    if width != 1:
        if row.func is not ResNet:
            raise UsageError(f"model {name!r} has one width alone")
        channels = {
            "widths": row.keywords["widths"],
            "stem_width": (row.keywords.get("stem_width", ResNet.stem_width),),
        }
        channels = {
            field: tuple(max(4, 4 * round(width * c / 4)) for c in counts) for field, counts in channels.items()
        }
        overrides = {"widths": channels["widths"], "stem_width": channels["stem_width"][0]} | overrides
    num_classes = default_input(name)[1] if num_classes is None else num_classes
    return row(num_classes=num_classes, dtype=resolve_dtype(dtype), **overrides)


def _cifar_of_any_depth(name: str) -> functools.partial | None:
    match = re.fullmatch(r"cifar_(resnet|plain|highway)(\d+)", name)
    if not match:
        return None
    kind, depth = match[1], int(match[2])
    if depth < 8 or (depth - 2) % 6:
        near = max(8, round((depth - 2) / 6) * 6 + 2)
        raise UsageError(f"model {name!r}: CIFAR nets have 6n + 2 layers; the nearest is 'cifar_{kind}{near}'")
    return _cifar(kind, depth)
