"""Formats of weights: a table each of our modules and their names, and what else sets a format apart.

A ``#`` stands for a number; ours count stages and blocks from 1.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from resnet_jax.data.statistics import IMAGENET_STD
from resnet_jax.models.registry import VGG_BLOCKS
from resnet_jax.pretrained.preprocessing import CIFAR, Preprocessing

Rows = dict[str, Callable[..., str]]
EPSILON = 1e-5  # What our BN adds to the variance; torch's and Caffe's too.

_TORCH_LEAVES = {"kernel": ".weight", "bias": ".bias", "bn/scale": ".weight", "bn/bias": ".bias",
                 "bn/mean": ".running_mean", "bn/var": ".running_var"}  # fmt: skip
_KERAS_LEAVES = {"kernel": "/kernel", "bias": "/bias", "bn/scale": "/gamma", "bn/bias": "/beta",
                 "bn/mean": "/moving_mean", "bn/var": "/moving_variance"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """What sets one format's files apart.

    Attributes:
      title: what people call it.
      signature: patterns, each of which some name in such a file matches.
      rows: our modules' names and theirs.
      leaves: our arrays' names and what stands after their modules'.
      affine: their module of BN's scale and shift, by the one of its statistics.
      transposed: convolutions are [O, I, H, W] and matrices [O, I], not [H, W, I, O] and [I, O].
      model: the network, where a format has only one.
      stride_in: which convolution of its bottlenecks has the stride, as of ``ResNet``.
      settings: attributes that its networks have, as of ``ResNet``; ``shortcut_zeros`` where option A is used.
      epsilon: what its BN adds to the variance.
      bgr: its networks take 0 to 255 in the order blue, green, red, without a division by a deviation.
      preprocessing: what its weights were trained with; None where that depends on the network.
      mean_file: a per-pixel mean that may lie beside the weights.
      classes: what the logits mean, where files of this format are of one data set.
    """

    title: str
    signature: tuple[str, ...]
    rows: Rows
    leaves: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TORCH_LEAVES)
    affine: Callable[[str], str] = lambda name: name
    transposed: bool = True
    model: str | None = None
    stride_in: str = "middle"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epsilon: float = EPSILON
    bgr: bool = False
    preprocessing: Preprocessing | None = None
    mean_file: str | None = None
    classes: tuple[str, ...] | None = None

    def theirs(self, path: str) -> str:
        """Their name of our array, as ``params/stage1/block1/conv1/kernel``."""
        _, *module, leaf = path.split("/")
        ours = "/".join(module)
        name = self.rows[re.sub(r"\d+", "#", ours)](*map(int, re.findall(r"\d+", ours)))
        if "bn" in module[-1]:
            name, leaf = (self.affine(name) if leaf in ("scale", "bias") else name), f"bn/{leaf}"
        return name + self.leaves[leaf]

    def their_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that our array has there."""
        if not self.transposed:
            return shape
        if len(shape) == 4:
            height, width, inside, outside = shape
            flat = self.theirs(path).startswith("classifier.")  # torchvision's VGG reads a flattened map.
            return (outside, inside * height * width) if flat else (outside, inside, height, width)
        return shape[::-1]

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their array in our layout."""
        if not self.transposed:
            return array
        if len(shape) == 4:
            height, width, inside, outside = shape
            return array.reshape(outside, inside, height, width).transpose(2, 3, 1, 0)
        return array.T

    def from_ours(self, path: str, array: np.ndarray) -> np.ndarray:
        """Our array in their layout."""
        if not self.transposed:
            return array
        shape = self.their_shape(path, array.shape)
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1).reshape(shape) if array.ndim == 4 else array.T)


_RESNET: Rows = {
    "stem/conv": lambda: "conv1",
    "stem/bn": lambda: "bn1",
    "stage#/block#/conv#": lambda s, b, c: f"layer{s}.{b - 1}.conv{c}",
    "stage#/block#/bn#": lambda s, b, c: f"layer{s}.{b - 1}.bn{c}",
    "stage#/block#/shortcut_conv": lambda s, b: f"layer{s}.{b - 1}.downsample.0",
    "stage#/block#/shortcut_bn": lambda s, b: f"layer{s}.{b - 1}.downsample.1",
    "head": lambda: "fc",
}


def _vgg(normalised: bool, fully_connected: Callable[[int], str], head: str) -> Rows:
    """torchvision numbers the layers of ``features`` one after another: convolution, (BN,) ReLU, and pools."""
    numbers, at = {}, 0
    for stage, convolutions in enumerate(VGG_BLOCKS[16], start=1):
        for convolution in range(1, convolutions + 1):
            numbers[stage, convolution] = at
            at += 3 if normalised else 2
        at += 1
    return {
        "stage#/conv#": lambda s, c: f"features.{numbers[s, c]}",
        "stage#/bn#": lambda s, c: f"features.{numbers[s, c] + 1}",
        "fc#": fully_connected,
        "head": lambda: head,
    }


def _msra(block_name: Callable[[int, int], str]) -> Rows:
    """The authors' layers: ``res2a_branch2a``, its ``bn2a_branch2a`` and ``scale2a_branch2a``, ...

    Branch 1 is the shortcut; their stage 2 is our first. How the blocks of a stage are told apart depends on the depth.
    """

    def branch(kind: str, stage: int, block: int, rest: str) -> str:
        return f"{kind}{stage + 1}{block_name(stage, block)}_branch{rest}"

    return {
        "stem/conv": lambda: "conv1",
        "stem/bn": lambda: "bn_conv1",
        "stage#/block#/conv#": lambda s, b, c: branch("res", s, b, "2" + "abc"[c - 1]),
        "stage#/block#/bn#": lambda s, b, c: branch("bn", s, b, "2" + "abc"[c - 1]),
        "stage#/block#/shortcut_conv": lambda s, b: branch("res", s, b, "1"),
        "stage#/block#/shortcut_bn": lambda s, b: branch("bn", s, b, "1"),
        "head": lambda: "fc1000",
    }


def _letters(stage: int, block: int) -> str:
    return chr(ord("a") + block - 1)


def _numbers(stage: int, block: int) -> str:
    """Of 101 and 152 layers: a, b1, b2, ... in the long stages."""
    return _letters(stage, block) if stage in (1, 4) or block == 1 else f"b{block - 1}"


_KERAS: Rows = {
    "stem/conv": lambda: "conv1_conv",
    "stem/bn": lambda: "conv1_bn",
    "stage#/block#/conv#": lambda s, b, c: f"conv{s + 1}_block{b}_{c}_conv",
    "stage#/block#/bn#": lambda s, b, c: f"conv{s + 1}_block{b}_{c}_bn",
    "stage#/block#/shortcut_conv": lambda s, b: f"conv{s + 1}_block{b}_0_conv",
    "stage#/block#/shortcut_bn": lambda s, b: f"conv{s + 1}_block{b}_0_bn",
    "head": lambda: "predictions",
}

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BGR_MEAN = (103.939, 116.779, 123.68)
# The deviation is free, since the first convolution is scaled by it: the usual one keeps its weights of usual size.
_MSRA_INPUT = Preprocessing(tuple(value / 255 for value in _BGR_MEAN[::-1]), IMAGENET_STD)
_MSRA = {
    "leaves": _TORCH_LEAVES,
    "affine": lambda name: name.replace("bn", "scale", 1),
    "stride_in": "first",
    "settings": {"pool_padding": "end"},
    "bgr": True,
    "preprocessing": _MSRA_INPUT,
    "mean_file": "ResNet_mean.binaryproto",
}
_TORCH_BLOCK = r"layer1\.\d+\.(conv|bn)\d\."

AKAMASTER = Format("akamaster's CIFAR ResNets", (_TORCH_BLOCK, r"linear\."),
                   _RESNET | {"head": lambda: "linear"}, settings={"shortcut_zeros": "both"}, preprocessing=CIFAR,
                   classes=CIFAR10)  # fmt: skip
TORCHVISION = Format("torchvision's and timm's ResNets", (_TORCH_BLOCK,), _RESNET)
VGG_BN = Format("torchvision's VGG-16 with BN", (r"features\.1\.running_mean", r"classifier\."),
                _vgg(True, lambda n: f"classifier.{(n - 6) * 3}", "classifier.6"), model="vgg16_bn")  # fmt: skip
VGG = Format("torchvision's VGG-16", (r"features\.\d+\.", r"classifier\."),
             _vgg(False, lambda n: f"classifier.{(n - 6) * 3}", "classifier.6"), model="vgg16")  # fmt: skip
TIMM_VGG_BN = Format("timm's VGG-16 with BN", (r"features\.1\.running_mean", r"pre_logits\."),
                     _vgg(True, lambda n: f"pre_logits.fc{n - 5}", "head.fc"), model="vgg16_bn")  # fmt: skip
TIMM_VGG = Format("timm's VGG-16", (r"features\.\d+\.", r"pre_logits\."),
                  _vgg(False, lambda n: f"pre_logits.fc{n - 5}", "head.fc"), model="vgg16")  # fmt: skip
MSRA_DEEP = Format("the authors' ResNets (Caffe)", (r"res[34]b\d+_branch2[abc]\.",), _msra(_numbers), **_MSRA)
MSRA = Format("the authors' ResNets (Caffe)", (r"res2[abc]_branch2[abc]\.",), _msra(_letters), **_MSRA)
KERAS = Format("Keras applications' ResNets", (r"conv\d_block\d+_\d_(conv|bn)/",), _KERAS, _KERAS_LEAVES,
               transposed=False, stride_in="first", epsilon=1.001e-5, bgr=True, preprocessing=_MSRA_INPUT)  # fmt: skip

KERAS_PUBLISHED = dataclasses.replace(  # The published files' classifier has an older name.
    KERAS, signature=(*KERAS.signature, "probs/"), rows=_KERAS | {"head": lambda: "probs"}
)

# The first whose signature is there: what says more comes before what says less.
FORMATS = (AKAMASTER, TORCHVISION, VGG_BN, VGG, TIMM_VGG_BN, TIMM_VGG, MSRA_DEEP, MSRA, KERAS_PUBLISHED, KERAS)


def recognise(names: Iterable[str]) -> Format | None:
    """The format of a file by the names of its arrays; None for none of ``FORMATS``."""
    names = list(names)
    for known in FORMATS:
        if all(any(re.match(pattern, name) for name in names) for pattern in known.signature):
            return known
    return None
