"""The networks and steps of train_step.py, inference.py and cifar.py in PyTorch, as its users write them."""

from collections.abc import Callable, Mapping
import copy
from typing import Any

from flax import traverse_util
import ml_collections
import numpy as np
from our_contenders import Shape
import torch
from torch import nn
from torch.nn import functional as F
from turns import Contender

_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_ORDERS = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


class Block(nn.Module):
    """A residual block; additions and ReLUs are in place, as torchvision's."""

    def __init__(self, channels: int, features: int, stride: int, like: Shape):
        super().__init__()
        width = features // 4
        first, middle = (stride, 1) if like.stride_in == "first" else (1, stride)
        bottleneck = [(width, 1, first), (width, 3, middle), (features, 1, 1)]
        layers = bottleneck if like.bottleneck else [(features, 3, stride), (features, 3, 1)]
        self.count, self.stride, self.added = len(layers), stride, features - channels
        self.projects = like.shortcut == "C" or (like.shortcut == "B" and (stride > 1 or self.added > 0))
        if self.projects:
            self.shortcut_conv = nn.Conv2d(channels, features, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(features)
        for number, (out, size, step) in enumerate(layers, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, out, size, step, size // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
            channels = out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.count:
                y = F.relu(y, inplace=True)
        if self.projects:
            x = self.shortcut_bn(self.shortcut_conv(x))
        elif self.stride > 1 or self.added:  # Option A.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        y += x
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """The same network as ours of shape ``like``: images [N, 3, H, W] -> logits [N, classes]. Names are ours."""

    def __init__(self, like: Shape):
        super().__init__()
        large, channels = like.stem == "imagenet", like.stem_width
        self.stem = nn.Module()
        self.stem.conv = nn.Conv2d(3, channels, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
        self.stem.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stages = len(like.blocks)
        for number, (count, features) in enumerate(zip(like.blocks, like.widths, strict=True), start=1):
            stage = nn.Sequential()
            for block in range(1, count + 1):
                stride = 2 if block == 1 and number > 1 else 1
                stage.add_module(f"block{block}", Block(channels, features, stride, like))
                channels = features
            self.add_module(f"stage{number}", stage)
        self.head = nn.Linear(channels, like.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.stem.bn(self.stem.conv(images)), inplace=True))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"stage{number}")(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def make_network(like: Shape, variables: Mapping[str, Any], device: str) -> ResNet:
    """The same network with the same weights, channels last.

    Args:
      like: of our network.
      variables: its ``params`` and ``batch_stats``, NumPy arrays, each block under its own name.
      device: ``cpu`` or ``cuda``.
    """
    network, arrays = ResNet(like), {}
    for path, array in traverse_util.flatten_dict(variables).items():
        name = ".".join([*path[1:-1], _NAMES[path[-1]]])
        arrays[name] = torch.from_numpy(np.array(array.transpose(_ORDERS[array.ndim])))
    missing, unknown = network.load_state_dict(arrays, strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in missing), (unknown, missing)
    return network.to(device, memory_format=torch.channels_last)


def put_images(images: np.ndarray, device: str) -> torch.Tensor:
    """[N, H, W, 3] -> [N, 3, H, W], channels last, on the device."""
    moved = torch.from_numpy(np.array(np.moveaxis(images, -1, 1))).to(device)
    return moved.contiguous(memory_format=torch.channels_last)


def put_labels(labels: np.ndarray, device: str) -> torch.Tensor:
    """int [N] on the device, in the type that torch wants."""
    return torch.from_numpy(np.array(labels)).to(device, torch.int64)


def crop(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Crops [N, C, size, size] of padded images [N, C, H, W] from corners int64 [N], mirrored where ``flip``, bool [N].

    Channels last, as they are gathered.
    """
    count = torch.arange(size, device=images.device)
    rows = top[:, None] + count
    columns = left[:, None] + torch.where(flip[:, None], size - 1 - count, count)
    examples = torch.arange(len(images), device=images.device)[:, None, None]
    return images[examples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmented(
    arrays: Mapping[str, np.ndarray], batch: int, pad: int, flip: bool, device: str
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """What gives random batches of data that lies on the device, cropped from ``pad`` zeros around and mirrored.

    ``arrays`` are ``images`` uint8 [N, H, H, 3], ``labels`` [N], ``mean`` [H, H, 3] or [3], and ``std`` [3].
    """
    images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(arrays["images"], -1, 1))).to(device)
    labels, size = put_labels(arrays["labels"], device), images.shape[-1]
    mean, std = (np.broadcast_to(arrays[name], arrays["images"].shape[1:]) for name in ("mean", "std"))
    mean, std = (torch.from_numpy(np.array(np.moveaxis(x, -1, 0), np.float32)).to(device) for x in (mean, std))

    def take() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(images), (batch,), device=device)
        padded = F.pad((images[chosen].float() / 255 - mean) / std, (pad,) * 4)
        top, left = torch.randint(2 * pad + 1, (2, batch), device=device)
        mirrored = torch.rand(batch, device=device) < (0.5 if flip else 0)
        return crop(padded, top, left, mirrored, size), labels[chosen]

    return take


@torch.no_grad()
def logits_of(network: nn.Module, images: np.ndarray, train: bool) -> np.ndarray:
    """Logits [N, classes] of normalised images [N, H, W, 3], by a copy of the network in float64 on the CPU."""
    exact = copy.deepcopy(network).cpu().double().train(train)
    return exact(put_images(images, "cpu").double()).numpy()


def waiting(device: str) -> Callable[[], None]:
    """What returns when the device has done all that it was asked for."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def trainer(
    name: str,
    network: nn.Module,
    batches: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    config: ml_collections.ConfigDict,
    device: str,
    dtype: str,
    compile_mode: str | None,
) -> tuple[Contender, Callable[[], float]]:
    """A training step with the update that ``config.optimizer`` asks for.

    Args:
      name: the contender's.
      network: as made by ``make_network``; it is trained.
      batches: gives images float [N, 3, H, W] and labels int64 [N] on the device.
      config: the whole config.
      device: ``cpu`` or ``cuda``.
      dtype: ``bfloat16`` (autocast) or ``float32``.
      compile_mode: torch.compile's; None is eager.

    Returns:
      The contender, and what gives its latest loss.
    """
    network.train()
    settings = config.optimizer
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.schedule.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=device == "cuda",
    )
    precision = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    apply = torch.compile(network, mode=compile_mode) if compile_mode else network
    latest = torch.zeros(())

    def call() -> None:
        nonlocal latest
        images, labels = batches()
        with precision:
            loss = F.cross_entropy(apply(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        latest = loss.detach()

    return Contender(name, call, waiting(device)), lambda: float(latest)


def predictor(
    name: str, network: nn.Module, images: np.ndarray, device: str, dtype: str, compile_mode: str | None
) -> tuple[Contender, Callable[[], np.ndarray]]:
    """Inference in the network's own ``dtype``, and what gives its latest logits; the rest as in ``trainer``."""
    precise = getattr(torch, dtype)
    network = network.eval().to(precise)
    apply = torch.compile(network, mode=compile_mode) if compile_mode else network
    shown, latest = put_images(images, device).to(precise), torch.zeros(())

    @torch.inference_mode()
    def call() -> None:
        nonlocal latest
        latest = apply(shown)

    return Contender(name, call, waiting(device)), lambda: latest.float().cpu().numpy()
