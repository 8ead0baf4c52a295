"""A detector of few channels, pictures of plain rectangles for it, and weights with which it says something."""

import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.detection.faster_rcnn import FasterRCNN
from resnet_jax.detection.network import attach, initialise
from resnet_jax.detection.settings import make_settings
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

CLASSES = 2
# Fewer of everything than the paper's, and objects of the tiny pictures' size.
SETTINGS = make_settings(
    anchors_sampled=32,
    train_before_nms=60,
    train_after_nms=24,
    test_before_nms=60,
    test_after_nms=16,
    rois_sampled=16,
    roi_low=0.0,
    detections=8,
)
RESIDENT = {"mean": np.full(3, 0.5, np.float32), "std": np.full(3, 0.25, np.float32), "seed": np.uint32(0)}

# What differs between the tiny detectors of each kind, of the config's section ``detection``.
KINDS = {
    "c4": {"neck": "c4", "pooled": 6, "anchor_sizes": (16.0, 32.0)},
    "vgg": {"neck": "c4", "anchor_sizes": (16.0, 32.0)},
    "fpn": {"neck": "fpn", "anchor_sizes": (8.0, 16.0, 32.0, 64.0, 128.0)},
}


def tiny_detector(kind="c4", dtype=jnp.float32, freeze_at=1, batch_norm="frozen", **settings) -> FasterRCNN:
    shared = {"num_classes": 3, "freeze_at": freeze_at, "batch_norm": batch_norm, "dtype": dtype}
    if kind == "vgg":
        network = VGG(blocks=(1, 1, 1, 1, 2), widths=(8, 8, 8, 16, 16), fc_width=24, **shared)
    else:
        network = ResNet(blocks=(1, 1, 1, 1), widths=(8, 8, 16, 16), stem_width=8, **shared)
    model = attach(network, CLASSES, make_settings(rpn_width=16, **(KINDS[kind] | settings)), f"tiny {kind}")
    return model.clone(width=8, region_width=24) if kind == "fpn" else model


def random_variables(model: FasterRCNN):
    """Random weights and statistics: outputs differ from box to box and class to class."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: initialise(model, key), jax.random.key(0))

    def draw(path, leaf):
        name, fan = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
        gain = {"boxes": 0.02, "classes": 4.0}.get(path[-2].key, 2.0)
        drawn = {
            "kernel": lambda: random.normal(0, np.sqrt(gain / fan), leaf.shape),
            "scale": lambda: random.uniform(0.7, 1.3, leaf.shape),
            "var": lambda: random.uniform(0.5, 2, leaf.shape),
        }.get(name, lambda: random.normal(0, 0.2, leaf.shape))
        return np.asarray(drawn(), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def rectangles(count: int, canvas=(64, 80), room: int = 4) -> dict[str, np.ndarray]:
    """A batch of ``count`` pictures of two bright rectangles on noise, one of each class, told by colour."""
    random = np.random.default_rng(3)
    height, width = canvas
    images = random.integers(0, 60, (count, *canvas, 3)).astype(np.uint8)
    boxes, labels = np.zeros((count, room, 4), np.float32), np.zeros((count, room), np.int32)
    for row in range(count):
        first = int(random.integers(CLASSES))
        for place, left in enumerate((random.integers(2, 10), random.integers(width // 2, width // 2 + 6))):
            top = random.integers(2, height // 3)
            box = left, top, left + random.integers(16, 28), top + random.integers(18, 36)
            label = (first + place) % CLASSES
            images[row, box[1] : box[3], box[0] : box[2], 2 * label] = 230
            boxes[row, place], labels[row, place] = box, label
    valid = np.tile(np.arange(room) < 2, (count, 1))
    return {
        "images": images,
        "extent": np.tile(np.array(canvas, np.int32), (count, 1)),
        "scale": np.ones((count, 2), np.float32),
        "boxes": boxes,
        "labels": labels,
        "valid": valid,
        "crowd": np.zeros_like(valid),
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }


def padded(batch: dict[str, np.ndarray], down: int, right: int, boxes: int, rows: int = 0) -> dict[str, np.ndarray]:
    """The same images on a larger canvas, with room for more boxes, and ``rows`` more images; bright where padded."""
    pads = {"images": ((0, 0), (0, down), (0, right), (0, 0)), "boxes": ((0, 0), (0, boxes), (0, 0))}
    pads |= dict.fromkeys(("labels", "valid", "crowd"), ((0, 0), (0, boxes)))
    larger = {name: np.pad(x, pads.get(name, ((0, 0),) * x.ndim)) for name, x in batch.items()}
    height, width = batch["images"].shape[1:3]
    larger["images"][:, height:] = 255
    larger["images"][:, :, width:] = 255
    larger["boxes"][:, batch["boxes"].shape[1] :] = (5, 5, 40, 50)
    if rows:
        more = {name: x[::-1][:rows] for name, x in larger.items()}
        larger = {name: np.concatenate([x, more[name]]) for name, x in larger.items()}
    return larger
