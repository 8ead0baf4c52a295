"""What belongs to weights beside the network: how images were made into its input."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """RGB images in [0, 1] become ``(image - mean) / std``.

    Attributes:
      mean, std: of each channel.
      image_size: side of the square that the network sees, pixels.
      resize: shorter side before its centre is cut out, pixels; equal to ``image_size`` where nothing is cut off.
      interpolation: ``bilinear`` or ``bicubic``, antialiased.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of ``to_json``."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


TORCHVISION = Preprocessing()
CIFAR = Preprocessing(image_size=32, resize=32)  # akamaster's: ImageNet's constants on CIFAR.


def beside(file: pathlib.Path) -> Preprocessing | None:
    """What timm's ``config.json`` beside a file says, or None where there is none.

    Raises:
      UsageError: it can't be understood.
    """
    path = file.parent / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        if "pretrained_cfg" not in values:  # Somebody else's.
            return None
        timm = values["pretrained_cfg"]
        size = int(timm["input_size"][-1])
        # timm cuts the share crop_pct out of the shorter side.
        resize = math.floor(size / timm.get("crop_pct", 0.875))
        return Preprocessing(tuple(timm["mean"]), tuple(timm["std"]), size, resize, timm["interpolation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no config of timm's ({error})") from error
