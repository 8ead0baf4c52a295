"""What belongs to weights beside the network: how images were made into its input."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalise
from resnet_jax.data.crops import CenterCrop, Whole
from resnet_jax.data.decode import INTERPOLATIONS
from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.errors import UsageError
from resnet_jax.models.registry import IMAGENET


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """RGB images in [0, 1] become ``(image - mean) / std``.

    Attributes:
      mean, std: of each channel.
      image_size: side of the square that the network sees, pixels.
      resize: shorter side before its centre is cut out, pixels; None where the whole image is made into the square.
      interpolation: ``bilinear`` or ``bicubic``, antialiased.
      mean_image: what is subtracted in place of ``mean``, float32 [image_size, image_size, C], or None.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int = 224
    resize: int | None = 256
    interpolation: str = "bilinear"
    mean_image: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def view(self) -> CenterCrop | Whole:
        """What the network sees of an image: a function from it to uint8 [image_size, image_size, 3]."""
        if self.resize is None:
            return Whole(self.image_size, self.interpolation)
        return CenterCrop(self.image_size, self.resize, self.interpolation)

    def normalise(self, images: Any) -> jax.Array:
        """The network's input, float32, of resized and cropped uint8 images [N, image_size, image_size, C]."""
        mean = np.array(self.mean if self.mean_image is None else self.mean_image, np.float32)
        return normalise(jnp.asarray(images), mean, np.array(self.std, np.float32))

    def to_json(self) -> dict[str, Any]:
        """As plain values; the mean image stays behind."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of ``to_json``."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


TORCHVISION = Preprocessing()
CIFAR = Preprocessing(image_size=32, resize=None)  # akamaster's: ImageNet's constants on CIFAR.


def usual(image_size: int) -> Preprocessing:
    """What nearly all weights for images of this size were trained with."""
    return CIFAR if image_size == CIFAR.image_size else TORCHVISION


# timm's architectures that we have too.
TIMM = {
    f"resnet{depth}": f"resnet{depth}{'_v1_5' if bottleneck else ''}" for depth, (bottleneck, _) in IMAGENET.items()
}
TIMM |= {"vgg16": "vgg16", "vgg16_bn": "vgg16_bn"}


@dataclasses.dataclass(frozen=True)
class Beside:
    """What timm's ``config.json`` beside weights says: our name of the network, and what else belongs to it."""

    model: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None


def beside(file: pathlib.Path) -> Beside | None:
    """What timm's ``config.json`` beside a file says; None where there is none.

    Raises:
      UsageError: it can't be understood, or is of a network that is none of ours.
    """
    path = file.parent / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        if "pretrained_cfg" not in values:  # Somebody else's.
            return None
        timm, architecture = values["pretrained_cfg"], values["architecture"]
        size = int(timm["input_size"][-1])
        # timm cuts the share crop_pct out of the shorter side.
        resize = math.floor(size / timm.get("crop_pct", 0.875))
        found = Preprocessing(tuple(timm["mean"]), tuple(timm["std"]), size, resize, timm["interpolation"])
        names = values.get("label_names") or timm.get("label_names")
        classes = tuple(map(str, names)) if isinstance(names, list) else None
        known = found.interpolation in INTERPOLATIONS and timm.get("crop_mode", "center") == "center"
    except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"{path}: no config of timm's ({error})") from error
    if architecture not in TIMM:  # Some have the same arrays and another computation.
        raise UsageError(f"{path}: is of timm's {architecture}, which is no network here")
    if not known:
        asked = f"interpolation {found.interpolation}, crop_mode {timm.get('crop_mode', 'center')}"
        raise UsageError(f"{path}: asks for {asked}; known are {', '.join(INTERPOLATIONS)}, and center")
    return Beside(TIMM[architecture], found, classes)
