"""What a trained network says of pictures: classes, features, and where it looks."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import importlib.resources
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image

from resnet_jax.data.ilsvrc import class_numbers
from resnet_jax.data.pictures import read_upright
from resnet_jax.errors import UsageError
from resnet_jax.models.fold import fold
from resnet_jax.models.registry import create_model
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is said of one picture.

    Attributes:
      path: its file.
      pixels: what the network saw of it, uint8 [S, S, C].
      probabilities: float32 [classes].
      features: the last stage's output averaged over positions, float32 [channels].
      heatmap: how much each position speaks for the likeliest class, float32 [h, w], or None (see ``activation_map``).
    """

    path: str
    pixels: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray
    heatmap: np.ndarray | None


def class_names(weights: Pretrained) -> tuple[str, ...]:
    """Names in the order of the logits: the weights' own, ImageNet's for a thousand, else numbers."""
    count, wordnet = weights.num_classes, imagenet_names()
    if weights.classes:
        return tuple(wordnet.get(name, name) for name in weights.classes)
    return tuple(wordnet.values()) if count == len(wordnet) else tuple(map(str, range(count)))


@functools.cache
def imagenet_names() -> dict[str, str]:
    """ImageNet's thousand classes, in the order of their numbers: WordNet id -> WordNet's first word for it."""
    text = importlib.resources.files("resnet_jax.pretrained").joinpath("imagenet_classes.txt").read_text()
    return dict(line.split(" ", 1) for line in text.splitlines())


def challenge_numbers(kit: str, weights: Pretrained) -> list[int]:
    """The challenge's number of each class, in the order of the logits; its test server wants those.

    Args:
      kit: ILSVRC 2012's development kit, as of ``data.ilsvrc.class_numbers``.
      weights: of a network for ImageNet's classes.

    Raises:
      UsageError: the kit can't be read, or the classes are others.
    """
    numbers, classes = class_numbers(pathlib.Path(kit).expanduser()), weights.classes or tuple(imagenet_names())
    if len(classes) != weights.num_classes or not set(classes) <= set(numbers):
        raise UsageError(f"--submission: the network's {weights.num_classes} classes are not ImageNet's")
    return [numbers[wnid] for wnid in classes]


def read_view(path: str, preprocessing: Preprocessing, channels: int) -> np.ndarray:
    """What the network sees of a file, upright (EXIF): uint8 [size, size, channels].

    Raises:
      UsageError: it can't be read.
    """
    pixels = read_upright(path)
    pixels = preprocessing.view(pixels, np.empty(0))
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def predict(model: str, weights: Pretrained, paths: Sequence[str], batch: int = 32) -> Iterator[Prediction]:
    """Predicts files in batches of one size, so that the network is compiled once.

    Args:
      model: our name of the network.
      weights: with their preprocessing.
      paths: the files.
      batch: how many at a time.

    Raises:
      UsageError: the weights' preprocessing is not known, or a file can't be read.
    """
    preprocessing = weights.preprocessing
    if preprocessing is None:
        raise UsageError("the weights say nothing of their preprocessing (mean, deviation, size)")
    head = weights.variables["params"]["head"]
    module, variables = fold(create_model(model, weights.num_classes, **weights.settings), weights.variables)
    last = f"stage{len(module.blocks)}"
    mapped = has_map(model, weights)

    @jax.jit
    def run(images: jax.Array) -> dict[str, jax.Array]:
        features = module.apply(variables, preprocessing.normalise(images), method="features")[last]
        logits = module.apply(variables, features, method="classify")
        outputs = {"probabilities": jax.nn.softmax(logits), "features": features.mean((1, 2), dtype=jnp.float32)}
        if mapped:
            outputs["heatmap"] = activation_map(features, head["kernel"], logits.argmax(-1))
        return outputs

    for start in range(0, len(paths), batch):
        chosen = paths[start : start + batch]
        pixels = np.stack([read_view(path, preprocessing, len(preprocessing.mean)) for path in chosen])
        padded = np.concatenate([pixels, np.zeros((min(batch, len(paths)) - len(chosen), *pixels.shape[1:]), np.uint8)])
        outputs = jax.device_get(run(padded))
        for i, path in enumerate(chosen):
            heatmap = outputs["heatmap"][i] if mapped else None
            yield Prediction(path, pixels[i], outputs["probabilities"][i], outputs["features"][i], heatmap)


def has_map(model: str, weights: Pretrained) -> bool:
    """Whether the classifier reads an average over positions, as ResNets' do and VGG's doesn't."""
    return weights.variables["params"]["head"]["kernel"].shape[0] == create_model(model, dtype="float32").widths[-1]


def activation_map(features: jax.Array, kernel: jax.Array, label: jax.Array) -> jax.Array:
    """Class activation maps (Zhou et al., 2016): what each position adds to a class's logit.

    The network averages over positions and then is linear, so the map's average is the logit without its bias, exactly.

    Args:
      features: the last stage's output [N, h, w, C].
      kernel: the classifier's [C, classes].
      label: the classes, int [N].

    Returns:
      float32 [N, h, w].
    """
    chosen = jnp.asarray(kernel).T[label]
    return jnp.einsum("nhwc,nc->nhw", features.astype(jnp.float32), chosen, precision="highest")


def draw_heatmap(prediction: Prediction) -> Image.Image:
    """The map over what the network saw: red where it speaks most for the class."""
    image = Image.fromarray(prediction.pixels.squeeze()).convert("RGB")
    low, high = prediction.heatmap.min(), prediction.heatmap.max()
    share = Image.fromarray((255 * (prediction.heatmap - low) / max(high - low, 1e-9)).astype(np.uint8))
    share = np.asarray(share.resize(image.size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    mixed = np.asarray(image) * (1 - 0.6 * share) + np.array([255, 0, 0]) * 0.6 * share
    return Image.fromarray(np.rint(mixed).clip(0, 255).astype(np.uint8))
