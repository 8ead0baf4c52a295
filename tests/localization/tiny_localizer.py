"""A localizer of few channels, weights with which it says something, and annotations made by hand."""

import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.detection.annotations import Annotations, annotated_image
from resnet_jax.localization.network import Localizer, initialise
from resnet_jax.localization.settings import make_settings
from resnet_jax.models.resnet import ResNet

CLASSES = 3
SETTINGS = make_settings(anchor_sizes=(24, 48), anchor_ratios=(0.5, 1.0), rpn_width=16, candidates=6)
RESIDENT = {"mean": np.full(3, 0.5, np.float32), "std": np.full(3, 0.25, np.float32), "seed": np.uint32(0)}


def tiny_localizer(dtype=jnp.float32, freeze_at=0, batch_norm="frozen", stages=4) -> Localizer:
    backbone = ResNet(
        blocks=(1,) * stages, widths=(8, 8, 16, 16)[:stages], stem_width=8, num_classes=5, freeze_at=freeze_at,
        batch_norm=batch_norm, dtype=dtype,
    )  # fmt: skip
    return Localizer(backbone, CLASSES, SETTINGS.anchor_sizes, SETTINGS.anchor_ratios, SETTINGS.rpn_width)


def random_variables(model: Localizer):
    """Random weights and statistics: outputs differ from anchor to anchor and class to class."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: initialise(model, key), jax.random.key(0))

    def draw(path, leaf):
        name, fan = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
        if path[-2].key in ("scores", "boxes"):
            fan, gain = leaf.shape[1], {"scores": 4.0, "boxes": 0.02}[path[-2].key]
        else:
            gain = 2.0
        drawn = {
            "kernel": lambda: random.normal(0, np.sqrt(gain / fan), leaf.shape),
            "scale": lambda: random.uniform(0.7, 1.3, leaf.shape),
            "var": lambda: random.uniform(0.5, 2, leaf.shape),
        }.get(name, lambda: random.normal(0, 0.2, leaf.shape))
        return np.asarray(drawn(), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def training_batch(count: int, size: int = 96) -> dict[str, np.ndarray]:
    """Crops of noise with up to two boxes each, of the shape that ``batches.training_batches`` has them."""
    random = np.random.default_rng(3)
    corner = random.uniform(0, size / 2, (count, 2, 2))
    boxes = np.concatenate([corner, corner + random.uniform(size / 5, size / 2, (count, 2, 2))], axis=-1).astype(
        np.float32
    )
    return {
        "images": random.integers(0, 256, (count, size, size, 3)).astype(np.uint8),
        "labels": random.integers(0, CLASSES, count).astype(np.int32),
        "boxes": np.pad(boxes, ((0, 0), (0, 1), (0, 0))),
        "valid": np.tile([True, True, False], (count, 1)),
        "partial": np.zeros((count, 3), bool),
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }


def rectangle(number: int, height: int, width: int, box: tuple[int, int, int, int], label: int = 0):
    """An annotated dark image with a white rectangle, and its pixels."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return annotated_image(number, f"made/{number}", width, height, [box], [label]), pixels


class Made:
    """Annotations of white rectangles on black, and where their pixels come from."""

    def __init__(self, *rectangles):
        images, self._pixels = zip(*rectangles, strict=True)
        names = tuple(f"class{i}" for i in range(CLASSES))
        self.annotations = Annotations(names, tuple(range(1, CLASSES + 1)), tuple(images))

    def content(self, image):
        return self._pixels[image.id]


def bounds(image: np.ndarray) -> np.ndarray:
    """(left, top, right, bottom) of the pixels that are brighter than grey; zeros where none is."""
    bright = image[..., 0] > 127
    columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else np.zeros(4, int)
