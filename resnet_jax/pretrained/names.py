"""Names of parameters in other code bases: one table a format, our module -> theirs.

A ``#`` stands for a number; ours count stages and blocks from 1.
"""

from collections.abc import Callable
import dataclasses
import re

import numpy as np

from resnet_jax.models.registry import VGG_BLOCKS

Rows = dict[str, Callable[..., str]]

_RESNET: Rows = {
    "stem/conv": lambda: "conv1",
    "stem/bn": lambda: "bn1",
    "stage#/block#/conv#": lambda s, b, c: f"layer{s}.{b - 1}.conv{c}",
    "stage#/block#/bn#": lambda s, b, c: f"layer{s}.{b - 1}.bn{c}",
    "stage#/block#/shortcut_conv": lambda s, b: f"layer{s}.{b - 1}.downsample.0",
    "stage#/block#/shortcut_bn": lambda s, b: f"layer{s}.{b - 1}.downsample.1",
}


def _vgg(normalised: bool) -> Rows:
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
        "fc#": lambda number: f"classifier.{(number - 6) * 3}",
        "head": lambda: "classifier.6",
    }


@dataclasses.dataclass(frozen=True)
class Names:
    """A format of PyTorch's: convolutions are [O, I, H, W], linear layers [O, I].

    Attributes:
      title: what people call it.
      rows: our modules' names and theirs.
      classes: what the logits mean, where files of this format are of one data set.
    """

    title: str
    rows: Rows
    classes: tuple[str, ...] | None = None

    def theirs(self, path: str) -> str:
        """Their name of our array, as ``params/stage1/block1/conv1/kernel``."""
        collection, *module, leaf = path.split("/")
        ours = "/".join(module)
        numbers = [int(number) for number in re.findall(r"\d+", ours)]
        batch_norm = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        layer = {"kernel": "weight", "bias": "bias"}
        del collection
        return f"{self.rows[re.sub(r'[0-9]+', '#', ours)](*numbers)}.{(layer | batch_norm)[leaf]}"

    def their_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that our array has there."""
        if len(shape) == 4:
            height, width, inside, outside = shape
            flat = self.theirs(path).startswith("classifier.")  # VGG's fully connected layers read a flattened map.
            return (outside, inside * height * width) if flat else (outside, inside, height, width)
        return shape[::-1]

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their array in our layout."""
        if len(shape) == 4:
            height, width, inside, outside = shape
            return array.reshape(outside, inside, height, width).transpose(2, 3, 1, 0)
        return array.T

    def from_ours(self, path: str, array: np.ndarray) -> np.ndarray:
        """Our array in their layout."""
        shape = self.their_shape(path, array.shape)
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1).reshape(shape) if array.ndim == 4 else array.T)


TORCHVISION = Names("torchvision's and timm's ResNets", _RESNET | {"head": lambda: "fc"})
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
AKAMASTER = Names("akamaster's CIFAR ResNets", _RESNET | {"head": lambda: "linear"}, _CIFAR10)
VGG = Names("torchvision's VGG-16", _vgg(normalised=False))
VGG_BN = Names("torchvision's VGG-16 with BN", _vgg(normalised=True))
