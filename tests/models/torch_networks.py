"""The paper's networks in PyTorch, an independent implementation to compare ours with.

Written from sections 3.2 to 3.4 and 4.2 of the paper. Names are torchvision's: ``conv1``, ``bn1``,
``layer1.0.conv1``, ``layer2.0.downsample.0``, ``fc``; gated blocks have a ``gate`` besides.
"""

from collections.abc import Iterator, Sequence
import re
from typing import Any

from flax import linen, traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class OptionA(nn.Module):
    """Identity shortcut where the shape changes: subsampled pixels and zero channels, no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, zeros: str):
        super().__init__()
        added = out_channels - in_channels
        self.before = {"end": 0, "both": added // 2}[zeros]
        self.after = added - self.before
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(x, kernel_size=1, stride=self.stride)
        n, _, h, w = x.shape
        return torch.cat([x.new_zeros(n, self.before, h, w), x, x.new_zeros(n, self.after, h, w)], dim=1)


def make_shortcut(option: str, in_channels: int, out_channels: int, stride: int, zeros: str) -> nn.Module | None:
    """What is added to the residual branch: options A, B, C, ``plain`` (nothing) or ``gated`` (as A)."""
    if option == "plain":
        return None
    changes_shape = stride != 1 or in_channels != out_channels
    if option == "C" or (option == "B" and changes_shape):
        projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        return nn.Sequential(projection, nn.BatchNorm2d(out_channels))
    return OptionA(in_channels, out_channels, stride, zeros) if changes_shape else nn.Identity()


class Block(nn.Module):
    """How the residual branch and the shortcut meet; the subclasses are the branches."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str, zeros: str):
        super().__init__()
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, zeros)
        self.gate = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride) if shortcut == "gated" else None

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x)
        if self.gate is not None:
            y = torch.lerp(self.downsample(x), y, torch.sigmoid(self.gate(x)))
        elif self.downsample is not None:
            y = y + self.downsample(x)
        return F.relu(y)


class BasicBlock(Block):
    """Two 3x3 convolutions (figure 5, left)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str, zeros: str):
        super().__init__(in_channels, out_channels, stride, shortcut, zeros)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions (figure 5, right), the stride in the first (v1)."""

    strides = staticmethod(lambda stride: (stride, 1))

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str, zeros: str):
        super().__init__(in_channels, out_channels, stride, shortcut, zeros)
        width = out_channels // 4
        stride_1x1, stride_3x3 = self.strides(stride)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, stride=stride_1x1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride_3x3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class BottleneckV15(Bottleneck):
    """The bottleneck with its stride in the 3x3 convolution."""

    strides = staticmethod(lambda stride: (1, stride))


BLOCKS = {"basic": BasicBlock, "bottleneck v1": Bottleneck, "bottleneck v1.5": BottleneckV15}


class ResNet(nn.Module):
    """Images [N, 3, H, W] -> logits [N, classes].

    Args:
      block: a key of ``BLOCKS``.
      layers: blocks in each stage.
      widths: output channels of each stage.
      shortcut: ``A``, ``B``, ``C``, ``plain`` or ``gated``.
      zeros: where option A puts its zero channels, ``end`` or ``both``.
      stem: ``imagenet`` (Table 1) or ``cifar`` (section 4.2), of ``stem_width`` channels.
    """

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        widths: Sequence[int],
        classes: int,
        shortcut: str,
        zeros: str = "end",
        stem: str = "imagenet",
        stem_width: int = 64,
    ):
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, stem_width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, stem_width, kernel_size=3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(stem_width)
        channels = stem_width
        self.stages = [f"layer{number}" for number in range(1, len(layers) + 1)]
        for name, count, width in zip(self.stages, layers, widths, strict=True):
            stage = nn.Sequential()
            for number in range(count):
                stride = 2 if number == 0 and name != "layer1" else 1
                stage.append(BLOCKS[block](channels, width, stride, shortcut, zeros))
                channels = width
            self.add_module(name, stage)
        self.fc = nn.Linear(channels, classes)

    def features(self, images: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What leaves the stem, every stage and the classifier: (``stem``, ``stage1``, ..., ``logits``), in order."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        yield "stem", x
        for number, name in enumerate(self.stages, start=1):
            x = getattr(self, name)(x)
            yield f"stage{number}", x
        yield "logits", self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return dict(self.features(images))["logits"]


class VGG(nn.Module):
    """Images [N, 3, 28, 28] (two stages; 7 times 2 to the number of stages) -> logits [N, classes]."""

    def __init__(self, layers: Sequence[int], widths: Sequence[int], classes: int, batch_norm: bool):
        super().__init__()
        channels = 3
        for number, (count, width) in enumerate(zip(layers, widths, strict=True), start=1):
            stage = nn.Sequential()
            for i in range(1, count + 1):
                stage.add_module(f"conv{i}", nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if batch_norm:
                    stage.add_module(f"bn{i}", nn.BatchNorm2d(width))
                stage.add_module(f"relu{i}", nn.ReLU())
                channels = width
            stage.add_module("pool", nn.MaxPool2d(kernel_size=2, stride=2))
            self.add_module(f"stage{number}", stage)
        self.stages = [f"stage{number}" for number in range(1, len(layers) + 1)]
        self.fc6 = nn.Linear(channels * 7 * 7, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc = nn.Linear(4096, classes)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What leaves every stage (``stage1``, ...)."""
        outputs = {}
        for name in self.stages:
            images = outputs[name] = getattr(self, name)(images)
        return outputs

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of features [N, C, 7, 7], which the first fully connected layer reads channel by channel."""
        return self.fc(F.relu(self.fc7(F.relu(self.fc6(torch.flatten(features, 1))))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(images)[self.stages[-1]])


MODULES = {
    "stem.conv": "conv1",
    "stem.bn": "bn1",
    "shortcut_conv": "downsample.0",
    "shortcut_bn": "downsample.1",
    "head": "fc",
}
ARRAYS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Of kernels HWIO, matrices and vectors.
TRANSPOSITIONS = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def torch_name(name: str) -> str:
    """``stage1.block1.conv1.kernel`` -> ``layer1.0.conv1.weight``."""
    module, _, array = name.rpartition(".")
    module = re.sub(r"stage(\d+)\.block(\d+)", lambda match: f"layer{match[1]}.{int(match[2]) - 1}", module)
    for ours, theirs in MODULES.items():
        module = module.replace(ours, theirs)
    return f"{module}.{ARRAYS[array]}"


def to_torch(tree: Any) -> dict[str, np.ndarray]:
    """Our parameters, statistics or gradients (nested dicts) by torch's names and in torch's layouts."""
    arrays = {name: np.asarray(array) for name, array in traverse_util.flatten_dict(tree, sep=".").items()}
    return {torch_name(name): array.transpose(TRANSPOSITIONS[array.ndim]) for name, array in arrays.items()}


def load_variables(network: nn.Module, variables: dict[str, Any]) -> None:
    """Copies our ``params`` and ``batch_stats`` into a torch network, all of them and nothing else."""
    state = network.state_dict()
    own = {name for name in state if not name.endswith("num_batches_tracked")}
    arrays = {name: array for tree in variables.values() for name, array in to_torch(tree).items()}
    assert set(arrays) == own, sorted(set(arrays) ^ own)
    for name, array in arrays.items():
        tensor = torch.tensor(array)
        # VGG's first two fully connected layers are convolutions of ours.
        state[name] = tensor.flatten(1) if state[name].ndim == 2 else tensor
    network.load_state_dict(state)


def random_variables(model: linen.Module, image_shape: Sequence[int], seed: int) -> Any:
    """Random parameters and running statistics for one of our networks, BN's far from their initial ones and zeros."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape), model.dtype)))

    def draw(path, leaf):
        match path[-1].key:
            case "kernel":
                value = rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
            case "scale":
                value = rng.uniform(0.5, 1.5, leaf.shape)
            case "var":
                value = rng.uniform(1, 3, leaf.shape)
            case _:
                value = rng.normal(0, 0.3, leaf.shape)
        return value.astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)
