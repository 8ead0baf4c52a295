"""Faster R-CNN: images per second, and the time in NMS and in RoI ops, beside torchvision's or NumPy's, in one run.

    python benchmarks/detection.py --image_size=320 --batch=1 --seconds=0
    python benchmarks/detection.py --batch=8 --seconds=3 --json=detection.json
    python benchmarks/detection.py --config=detection/voc --config.model.name=resnet18 --config.model.width=0.25

The first is for two CPU cores (some minutes), the second for a GPU (images of the config's size). One device is used.
Weights, images and boxes are drawn; nothing is read. torchvision, where it is installed and sees the same kind of
device, is given the same network (``TORCHVISION_DIFFERS`` is what it does not have), sizes and numbers of proposals;
else NMS and RoI ops stand beside NumPy's. Contenders take turns, --repeats times, each as often as fits in --seconds
and at least once; medians are printed (least-most). All operations are checked before the clock starts: ours must give
NumPy's results and torchvision's, or nothing is measured.

--config.model.name, --config.model.width, --config.detection.neck and all other fields change what is measured.
"""

from collections.abc import Callable, Sequence
import datetime
import functools
import importlib.util
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import ml_collections
import numpy as np

from resnet_jax import cli, config as config_lib
from resnet_jax.errors import UsageError

OURS, TORCHVISION, NUMPY = "ours", "torchvision", "NumPy"
WORK = ("train", "inference", "nms", "roi")

cli.define_config_flags()
flags.FLAGS.set_default("config", "detection/coco_fpn")
flags.DEFINE_integer("image_size", 0, "Shorter side of the 4:3 images, pixels; 0: the config's last.", lower_bound=0)
flags.DEFINE_integer("batch", 2, "Images a step.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Turns of each contender.", lower_bound=1)
flags.DEFINE_float("seconds", 1.0, "A turn goes on for so long, and for one call at least.", lower_bound=0)
flags.DEFINE_list("only", list(WORK), "What is measured.")
flags.DEFINE_list("peers", [TORCHVISION, NUMPY], "With whom ours is compared, those of them that are there.")
flags.DEFINE_string("json", None, "File that all turns are written to.")
FLAGS = flags.FLAGS

CLASSES = 80  # COCO's, without background, whatever the config's data have.
TRUTH = 8  # Annotated boxes an image: COCO has 7.
CANDIDATES = 400  # Detections an image above the score threshold, of all classes: what a trained network has.
# Nothing is to be learnt: weights that ran away would change how many proposals there are.
LEARNING_RATE = 1e-9
# Of a block's last BN. Without statistics every block would double its input, and of random logits in the thousands
# hardly any proposal is left.
RESIDUAL_SCALE = 0.25

STRIDES = {"c4": (16,), "fpn": (4, 8, 16, 32, 64)}
REGION_LEVELS = 4  # Of FPN's five: regions are pooled from the first four.
FPN_WIDTH = 256

TORCHVISION_DIFFERS = (
    "its RoIAlign is not aligned (half a cell off, RoIs of at least one cell), ours is; as many samples a bin",
    "its anchors are rounded to whole pixels and centred on a cell's corner",
    "its RPN's smooth L1 has a beta of 1/9 and its head's of 1/9, whatever the config says",
    "it has box codes of the background too (81 classes' for 80)",
    "ours masks the padding of canvases in every layer, and computes the norms of gradients and weights",
    "ours pools every region from every level (shapes are static), it from the region's own",
    "it runs eagerly; on CPUs its threads wait without spinning (OMP_WAIT_POLICY=PASSIVE, unless that is set)",
    "of random weights no score reaches the threshold: in inference the last NMS has nothing to do in either",
)


class Contender(NamedTuple):
    """Who does the work; ``call`` returns when it is done."""

    name: str
    call: Callable[[], Any]


class Row(NamedTuple):
    """A measured piece of work: seconds a call of each contender, turn by turn; ``images`` where images count.

    ``cpu`` are those that all cores spent on it.
    """

    what: str
    images: int
    turns: dict[str, list[float]]
    cpu: dict[str, list[float]]


def measure(what: str, contenders: Sequence[Contender], images: int = 0) -> Row:
    """Lets contenders take turns; each has been called before: compiled and warm."""
    turns: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(FLAGS.repeats):
        for name, call in contenders:
            begun, spent, calls = time.perf_counter(), time.process_time(), 0
            while not calls or time.perf_counter() - begun < FLAGS.seconds:
                call()
                calls += 1
            turns[name].append((time.perf_counter() - begun) / calls)
            cpu[name].append((time.process_time() - spent) / calls)
    middle = {name: [1e3 * statistics.median(seconds[name]) for seconds in (turns, cpu)] for name in turns}
    found = ", ".join(f"{name} {wall:.1f} ms (CPU {own:.1f})" for name, (wall, own) in middle.items())
    print(f"{what}: {found}", file=sys.stderr, flush=True)
    return Row(what, images, turns, cpu)


def require(right: bool, message: str) -> None:
    """Ends the program: wrong results are not measured."""
    if not right:
        print(f"WRONG: {message}", file=sys.stderr)
        sys.exit(1)


class Scene(NamedTuple):
    """What the networks are given.

    Attributes:
      size: (height, width) of the images, pixels.
      canvas: likewise, padded to a multiple of 32, as both libraries do.
      images: uint8 [n, H, W, 3].
      boxes: float32 [n, G, 4].
      labels: int32 [n, G], classes from 0.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def make_scene(config: ml_collections.ConfigDict, batch: int) -> Scene:
    """Images of the config's size in COCO's commonest shape, 480 x 640."""
    from resnet_jax.detection.resize import scaled_size

    size = scaled_size(480, 640, config.detection.shorter[-1], config.detection.longer).size
    canvas = tuple(-(-side // 32) * 32 for side in size)
    rng = np.random.default_rng(0)
    images = np.zeros((batch, *canvas, 3), np.uint8)
    # Smooth, as photos are.
    coarse = rng.integers(0, 256, (batch, -(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
    images[:, : size[0], : size[1]] = coarse.repeat(8, 1).repeat(8, 2)[:, : size[0], : size[1]]
    boxes = np.stack([objects(rng, TRUTH, size, (min(size) / 8, min(size) / 3)) for _ in range(batch)])
    return Scene(size, canvas, images, boxes, rng.integers(0, CLASSES, (batch, TRUTH), np.int32))


def objects(rng: np.random.Generator, count: int, size: tuple[int, int], sides: Sequence[float]) -> np.ndarray:
    """Boxes [count, 4] within an image, with sides about those given: whole pixels, so that areas are exact."""
    limits = np.array([size[1], size[0]])
    side = rng.choice(sides, (count, 1)) * np.exp(rng.normal(0, 0.3, (count, 2)))
    center = rng.uniform(0, 1, (count, 2)) * limits
    return corners(center, side, limits)


def around(rng: np.random.Generator, boxes: np.ndarray, count: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes [count, 4], each a little beside one of ``boxes``: what a network proposes."""
    chosen = boxes[rng.integers(len(boxes), size=count)]
    side = chosen[:, 2:] - chosen[:, :2]
    center = chosen[:, :2] + side * (0.5 + rng.normal(0, 0.15, (count, 2)))
    return corners(center, side * np.exp(rng.normal(0, 0.15, (count, 2))), np.array([size[1], size[0]]))


def corners(center: np.ndarray, side: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """float32 [n, 4] of whole coordinates, at least a pixel wide, clipped to (width, height)."""
    low = np.clip(np.floor(center - side / 2), 0, limits - 1)
    high = np.clip(np.ceil(center + side / 2), low + 1, limits)
    return np.concatenate([low, high], axis=1).astype(np.float32)


# The networks.


def our_network(config: ml_collections.ConfigDict, scene: Scene) -> dict[str, Callable[[], Any]]:
    """Our training step and inference step on the scene; each returns what it computed, as NumPy arrays."""
    from flax import traverse_util
    import jax
    from jax import numpy as jnp

    from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD
    from resnet_jax.detection import steps
    from resnet_jax.detection.inference import inputs, make_inference_step
    from resnet_jax.detection.settings import make_settings
    from resnet_jax.detection.start import make_model
    from resnet_jax.training.optimizer import make_optimizer

    settings = make_settings(config.detection)
    model, optimizer = make_model(config, CLASSES, None), make_optimizer(config.optimizer)

    def last_bn(path: tuple[str, ...], paths: Any) -> bool:
        norms = [other[-2] for other in paths if other[:-2] == path[:-2] and other[-2].startswith("bn")]
        return len(path) > 3 and path[-1] == "scale" and path[-2] == max(norms, default=None)

    @jax.jit
    def start():
        state = steps.initial_state(model, optimizer, config)
        flat = traverse_util.flatten_dict(state.params)
        flat = {path: x * RESIDUAL_SCALE if last_bn(path, flat) else x for path, x in flat.items()}
        return state.replace(params=traverse_util.unflatten_dict(flat))

    count = len(scene.images)
    batch = {
        "images": scene.images,
        "extent": np.tile(np.array(scene.size, np.int32), (count, 1)),
        "scale": np.ones((count, 2), np.float32),
        "boxes": scene.boxes,
        "labels": scene.labels,
        "valid": np.ones(scene.labels.shape, bool),
        "crowd": np.zeros(scene.labels.shape, bool),
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }
    resident = {"mean": np.array(IMAGENET_MEAN, np.float32), "std": np.array(IMAGENET_STD, np.float32)}
    batch, resident = jax.device_put((batch, resident))
    step = jax.jit(steps.make_train_step(model, optimizer, config, settings, 1000), donate_argnums=0)
    infer = jax.jit(make_inference_step([model], settings))
    shown = inputs(batch)
    state = start()
    variables = jax.tree.map(jnp.copy, state.variables)  # The step takes its own away.

    def train() -> float:
        nonlocal state
        state, metrics = step(state, batch, resident)
        return float(metrics["loss"])

    def inference() -> int:
        return int(jax.device_get(infer([variables], shown, [resident]))["valid"].sum())

    return {"train": train, "inference": inference}


def torch_network(config: ml_collections.ConfigDict, scene: Scene, device: str) -> dict[str, Callable[[], Any]]:
    """torchvision's Faster R-CNN in eager mode, as its references train it, on the same scene."""
    import torch
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

    from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD

    torch.manual_seed(0)
    numbers, pooled = config.detection, config.detection.pooled or 7
    frozen = config.model.batch_norm == "frozen"
    backbone = resnet_fpn_backbone(
        backbone_name=config.model.name.removesuffix("_v1_5"),
        weights=None,
        norm_layer=FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d,
        trainable_layers=5 - config.model.freeze_at,
    )
    levels = len(numbers.anchor_sizes)
    model = FasterRCNN(
        backbone,
        1 + CLASSES,
        min_size=min(scene.size),
        max_size=max(scene.size),
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in numbers.anchor_sizes), (tuple(numbers.anchor_ratios),) * levels
        ),
        rpn_pre_nms_top_n_train=numbers.train_before_nms,
        rpn_pre_nms_top_n_test=numbers.test_before_nms,
        rpn_post_nms_top_n_train=numbers.train_after_nms,
        rpn_post_nms_top_n_test=numbers.test_after_nms,
        rpn_nms_thresh=numbers.proposal_nms,
        rpn_fg_iou_thresh=numbers.anchor_high,
        rpn_bg_iou_thresh=numbers.anchor_low,
        rpn_batch_size_per_image=numbers.anchors_sampled,
        rpn_positive_fraction=numbers.anchors_foreground,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], pooled, sampling_ratio=0),
        box_score_thresh=numbers.score_threshold,
        box_nms_thresh=numbers.detection_nms,
        box_detections_per_img=numbers.detections,
        box_fg_iou_thresh=numbers.roi_high,
        box_bg_iou_thresh=numbers.roi_high,
        box_batch_size_per_image=numbers.rois_sampled,
        box_positive_fraction=numbers.rois_foreground,
        bbox_reg_weights=tuple(1 / std for std in numbers.box_stds),
    ).to(device)
    model.transform.resize = lambda image, target: (image, target)  # They have their size.
    with torch.no_grad():  # The initial weights have our deviations: as many proposals shall be left.
        for layer in (model.roi_heads.box_head.fc6, model.roi_heads.box_head.fc7):
            torch.nn.init.kaiming_uniform_(layer.weight, a=1)
            layer.bias.zero_()
        for layer, deviation in (
            (model.roi_heads.box_predictor.cls_score, 0.01),
            (model.roi_heads.box_predictor.bbox_pred, 0.001),
        ):
            layer.weight.normal_(0, deviation)
            layer.bias.zero_()
        for block in model.backbone.body.modules():
            if hasattr(block, "downsample"):
                (block.bn3 if hasattr(block, "bn3") else block.bn2).weight.fill_(RESIDUAL_SCALE)

    height, width = scene.size
    images = torch.from_numpy(scene.images[:, :height, :width]).to(device).permute(0, 3, 1, 2).contiguous()
    targets = [
        {"boxes": torch.from_numpy(boxes).to(device), "labels": torch.from_numpy(labels + 1).long().to(device)}
        for boxes, labels in zip(scene.boxes, scene.labels, strict=True)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = {"lr": LEARNING_RATE, "momentum": config.optimizer.momentum, "weight_decay": config.optimizer.weight_decay}
    optimizer = torch.optim.SGD(trained, **rates)
    precision = torch.autocast(device, torch.bfloat16, enabled=compute_dtype(config) == "bfloat16")

    def train() -> float:
        model.train()
        with precision:
            losses = model(list(images.float() / 255), targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    @torch.inference_mode()
    def inference() -> int:
        model.eval()
        with precision:
            found = model(list(images.float() / 255))
        return sum(len(each["boxes"].cpu()) for each in found)

    return {"train": train, "inference": inference}


def lacks(config: ml_collections.ConfigDict) -> str:
    """Why torchvision has no such network; empty where it has."""
    name, numbers = config.model.name.removesuffix("_v1_5"), config.detection
    reasons = {
        f"model.name={config.model.name}": name not in ("resnet18", "resnet34") and name == config.model.name,
        f"model.width={config.model.width}": config.model.width != 1,
        f"model.batch_norm={config.model.batch_norm}": config.model.batch_norm not in ("frozen", "global"),
        f"detection.neck={numbers.neck}": numbers.neck != "fpn",
        f"detection.roi={numbers.roi}": numbers.roi != "align",
        f"detection.rpn_width={numbers.rpn_width}": numbers.rpn_width != FPN_WIDTH,
        "detection.context": numbers.context,
        "detection.refine": numbers.refine,
    }
    return ", ".join(name for name, lacking in reasons.items() if lacking)


def compute_dtype(config: ml_collections.ConfigDict) -> str:
    """``bfloat16`` or ``float32``: what the network computes in."""
    import jax

    if config.model.dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.model.dtype


def measure_networks(config, work: Sequence[str], peers: Sequence[str], device: str) -> tuple[list[Row], list[str]]:
    """Training and inference."""
    scene = make_scene(config, FLAGS.batch)
    networks, notes = {OURS: our_network(config, scene)}, []
    if TORCHVISION in peers:
        missing = lacks(config)
        if missing:
            notes.append(f"torchvision has no such network ({missing})")
        else:
            networks[TORCHVISION] = torch_network(config, scene, device)
    rows = []
    said = {"train": ("training", "loss of the first step"), "inference": ("inference", "detections in the batch")}
    for name in (name for name in ("train", "inference") if name in work):
        first = {who: network[name]() for who, network in networks.items()}
        require(all(map(math.isfinite, first.values())), f"{said[name][1]}: {first}")
        notes.append(f"{said[name][1]}: {', '.join(f'{who} {value:.4g}' for who, value in first.items())}")
        what = f"{said[name][0]}, {compute_dtype(config)}"
        rows.append(measure(what, [Contender(who, network[name]) for who, network in networks.items()], FLAGS.batch))
    if TORCHVISION in networks:
        notes += [f"torchvision: {difference}" for difference in TORCHVISION_DIFFERS]
    return rows, notes


# Non-maximum suppression.


class Suppression(NamedTuple):
    """Boxes of n images to be suppressed among their own class (or level of a pyramid).

    Attributes:
      boxes: float32 [n, N, 4].
      scores: float32 [n, N], no two of an image that count equal.
      classes: int32 [n, N], or None: all are of one.
      least: scores below don't count.
      threshold: of the IoU.
      keep: how many are wanted.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray | None
    least: float
    threshold: float
    keep: int


def proposals_of(config: ml_collections.ConfigDict, batch: int) -> Suppression:
    """What the RPN hands to NMS in training: the best of every level, around a few dozen objects."""
    numbers, scene, rng = config.detection, make_scene(config, 1), np.random.default_rng(1)
    strides = STRIDES[numbers.neck]
    sizes = [(size,) for size in numbers.anchor_sizes] if len(strides) > 1 else [tuple(numbers.anchor_sizes)]
    boxes, levels = [], []
    for level, (stride, own) in enumerate(zip(strides, sizes, strict=True)):
        cells = math.prod(-(-side // stride) for side in scene.canvas)
        count = min(numbers.train_before_nms, cells * len(own) * len(numbers.anchor_ratios))
        images = [around(rng, objects(rng, 40, scene.size, own), count, scene.size) for _ in range(batch)]
        boxes.append(np.stack(images))
        levels.append(np.full((batch, count), level, np.int32))
    boxes, levels = np.concatenate(boxes, 1), np.concatenate(levels, 1)
    scores = np.stack([distinct(rng, boxes.shape[1]) for _ in range(batch)])
    classes = levels if len(strides) > 1 else None
    return Suppression(boxes, scores, classes, 0.0, numbers.proposal_nms, numbers.train_after_nms)


def detections_of(config: ml_collections.ConfigDict, batch: int) -> Suppression:
    """What the head hands to NMS in test: every class of every proposal, of which few have a score that counts."""
    numbers, size, rng = config.detection, make_scene(config, 1).size, np.random.default_rng(2)
    count = numbers.test_after_nms * CLASSES
    boxes = np.zeros((batch, count, 4), np.float32)
    scores = np.zeros((batch, count), np.float32)
    for row in range(batch):
        own = objects(rng, 20, size, (min(size) / 8, min(size) / 3))
        labels = rng.choice(CLASSES, 6, replace=False)
        regions = rng.choice(numbers.test_after_nms, CANDIDATES, replace=True)
        chosen = np.unique(regions * CLASSES + rng.choice(labels, CANDIDATES))
        boxes[row] = around(rng, own, count, size)
        scores[row, chosen] = numbers.score_threshold + (1 - numbers.score_threshold) * distinct(rng, len(chosen))
    classes = np.tile(np.arange(CLASSES, dtype=np.int32), (batch, numbers.test_after_nms))
    least = max(numbers.score_threshold, 1e-6)
    return Suppression(boxes, scores, classes, least, numbers.detection_nms, numbers.detections)


def distinct(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count] in (0, 1), no two equal: libraries sort equal ones differently."""
    return ((rng.permutation(count) + 0.5) / count).astype(np.float32)


def numpy_nms(boxes, scores, classes, least: float, threshold: float, keep: int) -> np.ndarray:
    """The indices that are kept of one image's boxes: greedy, each kept box against all that are left."""
    order = np.flatnonzero(scores >= least)
    order = order[np.argsort(-scores[order], kind="stable")]
    sides = boxes[:, 2:] - boxes[:, :2]
    areas, kept = sides[:, 0] * sides[:, 1], []
    while len(order) and len(kept) < keep:
        best, order = order[0], order[1:]
        kept.append(best)
        low = np.maximum(boxes[order, :2], boxes[best, :2])
        high = np.minimum(boxes[order, 2:], boxes[best, 2:])
        shared = np.maximum(high - low, 0).prod(1)
        close = shared / (areas[order] + areas[best] - shared) > threshold
        order = order[~(close if classes is None else close & (classes[order] == classes[best]))]
    return np.array(kept, int)


def suppressors(case: Suppression, peers: Sequence[str], device: str) -> dict[str, Callable[[], list[np.ndarray]]]:
    """Who suppresses; each returns the indices that it keeps of each image, by falling score."""
    import jax

    from resnet_jax.detection.nms import classwise_nms, nms

    arrays = [case.boxes, case.scores] + ([] if case.classes is None else [case.classes])
    on_device = jax.device_put(arrays)

    @jax.jit
    @jax.vmap
    def suppress(boxes, scores, *classes):
        chosen = classwise_nms if classes else nms
        return chosen(boxes, scores, *classes, scores >= case.least, case.threshold, case.keep)

    def ours():
        kept, valid = jax.device_get(suppress(*on_device))
        return [row[real] for row, real in zip(kept, valid, strict=True)]

    def plain():
        rows = zip(*arrays, strict=True)
        return [numpy_nms(*row[:2], row[2] if len(row) > 2 else None, *case[3:]) for row in rows]

    found = {OURS: ours, NUMPY: plain}
    if TORCHVISION in peers:
        import torch
        from torchvision.ops import batched_nms, nms as torch_nms

        tensors = [torch.from_numpy(array).to(device) for array in arrays]

        def theirs():
            kept = []
            for boxes, scores, *classes in zip(*tensors, strict=True):
                candidates = torch.where(scores >= case.least)[0]
                chosen = [x[candidates] for x in (boxes, scores, *classes)]
                indices = (batched_nms if classes else torch_nms)(*chosen, case.threshold)
                kept.append(candidates[indices[: case.keep]])
            return [indices.cpu().numpy() for indices in kept]

        found[TORCHVISION] = theirs
    return found


def measure_nms(config, peers: Sequence[str], device: str) -> tuple[list[Row], list[str]]:
    """NMS of proposals and of detections."""
    rows, notes = [], []
    cases = {"proposals": proposals_of(config, FLAGS.batch), "detections": detections_of(config, FLAGS.batch)}
    for name, case in cases.items():
        found = suppressors(case, peers, device)
        results = {who: call() for who, call in found.items()}
        for who in set(results) - {OURS}:
            for mine, other in zip(results[OURS], results[who], strict=True):
                # torchvision may compare with the threshold in other bits: a pair in thousands lies just on it.
                differing = len(np.setxor1d(mine, other))
                most = 0 if who == NUMPY else max(2, len(mine) // 200)
                require(differing <= most, f"NMS of {name}: {differing} of {len(mine)} kept are not {who}'s")
        counted = int((case.scores >= case.least).sum(1).mean())
        kept = statistics.mean(map(len, results[OURS]))
        of = "" if case.classes is None else f", {len(np.unique(case.classes))} classes"
        of = of.replace("classes", "levels") if name == "proposals" else of
        what = f"NMS of {name}: {counted:,} boxes an image{of}, at most {case.keep:,} kept"
        rows.append(measure(what, [Contender(who, found[who]) for who in found if who in (OURS, *peers)]))
        notes.append(f"NMS of {name}: {kept:.0f} kept an image, the same in all")
    return rows, notes


# RoI ops.


class Regions(NamedTuple):
    """Regions of n images, each to be pooled from its level of a pyramid.

    Attributes:
      maps: float32 [n, h, w, C], of each level.
      strides: of each.
      boxes: float32 [n, R, 4].
      levels: int32 [n, R].
      size: cells per side that they are pooled to.
      cotangent: float32 [n, R, size, size, C].
    """

    maps: list[np.ndarray]
    strides: tuple[int, ...]
    boxes: np.ndarray
    levels: np.ndarray
    size: int
    cotangent: np.ndarray


def regions_of(config: ml_collections.ConfigDict, batch: int) -> Regions:
    """The RoIs of a training step: of all sizes, each in its level (FPN, equation 1)."""
    numbers, scene, rng = config.detection, make_scene(config, 1), np.random.default_rng(3)
    pyramid = numbers.neck == "fpn"
    strides = STRIDES[numbers.neck][:REGION_LEVELS]
    channels = FPN_WIDTH if pyramid else int(1024 * config.model.width)
    size = numbers.pooled or (7 if pyramid else 14)
    shapes = [(batch, *(side // stride for side in scene.canvas), channels) for stride in strides]
    maps = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    sides = np.exp(rng.uniform(math.log(16), math.log(min(scene.size)), numbers.rois_sampled))
    # No whole pixels, as a network's: where a bin has exactly k cells, compiled division may ask for k + 1 samples.
    boxes = np.stack([objects(rng, numbers.rois_sampled, scene.size, sides) for _ in range(batch)])
    boxes += rng.uniform(-0.4, 0.4, boxes.shape).astype(np.float32)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    limits = np.array([112.0, 224.0, 448.0]) ** 2 if pyramid else np.zeros(0)
    levels = (areas[..., None] >= limits).sum(-1).astype(np.int32)
    cotangent = rng.normal(size=(*levels.shape, size, size, channels)).astype(np.float32)
    return Regions(maps, strides, boxes, levels, size, cotangent)


def our_regions(op: str, case: Regions) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward and backward: pooled [n, R, s, s, C], and the maps' gradients."""
    import jax
    from jax import numpy as jnp

    from resnet_jax.detection.roi import roi_align, roi_pool

    function = {"RoIAlign": roi_align, "RoI pooling": roi_pool}[op]

    @jax.vmap
    def pool(maps, boxes, levels):  # As the network does: every region from every level, empty where it is not its own.
        found = 0
        for level, (features, stride) in enumerate(zip(maps, case.strides, strict=True)):
            here = levels == level
            own = jnp.where(here[:, None], boxes, 0) if len(maps) > 1 else boxes
            found = jnp.where(here[:, None, None, None], function(features, own, case.size, 1 / stride), found)
        return found

    @jax.jit
    def both(maps, boxes, levels, cotangent):
        pooled, back = jax.vjp(lambda maps: pool(maps, boxes, levels), maps)
        return pooled, *back(cotangent)

    arrays = jax.device_put((case.maps, case.boxes, case.levels))
    cotangent = jax.device_put(case.cotangent)
    forward = jax.jit(pool)
    return lambda: jax.block_until_ready(forward(*arrays)), lambda: jax.block_until_ready(both(*arrays, cotangent))


def torch_regions(op: str, case: Regions, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of torchvision: [K, C, s, s] image by image, and gradients [n, C, h, w]."""
    import torch
    from torchvision import ops

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    count = len(case.boxes)
    maps = [put(np.moveaxis(x, -1, 1)) for x in case.maps]
    # Caffe's RoI pooling, which torchvision's is, names the last pixel of a box.
    boxes = case.boxes - (np.array([0, 0, 1, 1], np.float32) if op == "RoI pooling" else 0)
    image = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (*case.levels.shape, 1))
    rois = put(np.concatenate([image, boxes], -1).reshape(-1, 5))
    levels = put(case.levels.reshape(-1))
    cotangent = put(np.moveaxis(case.cotangent, -1, 2).reshape(len(rois), -1, case.size, case.size))
    function = functools.partial(ops.roi_align, aligned=True) if op == "RoIAlign" else ops.roi_pool

    def pool(maps: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(maps) == 1:
            return function(maps[0], rois, case.size, 1 / case.strides[0])
        found = cotangent.new_zeros(cotangent.shape)
        for level, (features, stride) in enumerate(zip(maps, case.strides, strict=True)):
            own = torch.where(levels == level)[0]
            found[own] = function(features, rois[own], case.size, 1 / stride)
        return found

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def forward():
        pooled = pool(maps)
        wait()
        return pooled

    def both():
        leaves = [x.detach().requires_grad_() for x in maps]
        pooled = pool(leaves)
        pooled.backward(cotangent)
        wait()
        return pooled.detach(), [leaf.grad for leaf in leaves]

    return forward, both


def numpy_regions(op: str, case: Regions) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same in NumPy (and SciPy's sparse matrices)."""
    pool = {"RoIAlign": numpy_align, "RoI pooling": numpy_pool}[op]

    def run(backward: bool):
        pooled = np.zeros_like(case.cotangent)
        gradients = [np.zeros_like(x) for x in case.maps] if backward else []
        for image in range(len(case.boxes)):
            for level, (features, stride) in enumerate(zip(case.maps, case.strides, strict=True)):
                own = np.flatnonzero(case.levels[image] == level)
                given = case.cotangent[image, own] if backward else None
                found, gradient = pool(features[image], case.boxes[image, own], case.size, 1 / stride, given)
                pooled[image, own] = found
                if backward:
                    gradients[level][image] = gradient
        return pooled, gradients

    return lambda: run(False)[0], lambda: run(True)


def numpy_align(features: np.ndarray, boxes: np.ndarray, size: int, scale: float, cotangent: np.ndarray | None):
    """RoIAlign [R, size, size, C] of features [h, w, C], and their gradient: a sparse matrix, and its transpose.

    Every sample reads the four cells around it.
    """
    from scipy import sparse

    height, width, channels = features.shape
    bins, cells, weights = [], [], []
    for number, box in enumerate(boxes):
        axes = []
        for low, high, extent in ((box[1], box[3], height), (box[0], box[2], width)):
            low, length = low * scale - 0.5, (high - low) * scale
            count = max(1, math.ceil(length / size))
            place = low + length / size * (np.arange(size * count) + 0.5) / count
            counts = (place >= -1) & (place <= extent)
            place = np.clip(place, 0, extent - 1)
            before = np.minimum(place.astype(int), extent - 1)
            after, part = np.minimum(before + 1, extent - 1), place - before
            of_bin = np.repeat(np.arange(size), count)
            # Of the cell before and of the one after: where, in which bin, how much.
            weight = np.concatenate([1 - part, part]) * np.tile(counts, 2) / count
            axes.append((np.concatenate([before, after]), np.tile(of_bin, 2), weight))
        (rows, down, row_weights), (columns, across, column_weights) = axes
        cells.append((rows[:, None] * width + columns).ravel())
        bins.append(((number * size + down[:, None]) * size + across).ravel())
        weights.append((row_weights[:, None] * column_weights).astype(np.float32).ravel())
    shape = (len(boxes) * size * size, height * width)
    if not len(boxes):
        return np.zeros((0, size, size, channels), np.float32), np.zeros_like(features)
    parts = (np.concatenate(weights), (np.concatenate(bins), np.concatenate(cells)))
    matrix = sparse.coo_matrix(parts, shape).tocsr()
    pooled = (matrix @ features.reshape(-1, channels)).reshape(len(boxes), size, size, channels)
    if cotangent is None:
        return pooled, None
    return pooled, (matrix.T @ cotangent.reshape(-1, channels)).reshape(features.shape)


def numpy_pool(features: np.ndarray, boxes: np.ndarray, size: int, scale: float, cotangent: np.ndarray | None):
    """RoI pooling [R, size, size, C] of features [h, w, C], and their gradient: bin after bin."""
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), size, size, channels), np.float32)
    gradient = None if cotangent is None else np.zeros((height * width, channels), np.float32)

    def edges(low: float, high: float, extent: int) -> list[tuple[int, int]]:
        first, last = (math.floor(np.float32(x) * np.float32(scale) + np.float32(0.5)) for x in (low, high - 1))
        cells = max(last - first + 1, 1)
        spans = ((first + i * cells // size, first - (-(i + 1) * cells // size)) for i in range(size))
        return [(min(max(start, 0), extent), min(max(end, 0), extent)) for start, end in spans]

    every = np.arange(channels)
    for number, (left, top, right, bottom) in enumerate(boxes):
        columns = edges(left, right, width)
        for i, (upper, lower) in enumerate(edges(top, bottom, height)):
            for j, (start, end) in enumerate(columns):
                if upper >= lower or start >= end:
                    continue
                cells = features[upper:lower, start:end].reshape(-1, channels)
                if cotangent is None:
                    pooled[number, i, j] = cells.max(0)
                    continue
                best = cells.argmax(0)
                pooled[number, i, j] = cells[best, every]
                place = (upper + best // (end - start)) * width + start + best % (end - start)
                gradient[place, every] += cotangent[number, i, j]  # Channels differ: no place twice.
    return pooled, None if gradient is None else gradient.reshape(features.shape)


def check_regions(op: str, case: Regions, found: dict[str, Any]) -> list[str]:
    """Ours against the others, values and gradients; what is said of them."""
    pooled, gradients = found[OURS]
    pooled, gradients = np.asarray(pooled), [np.asarray(x) for x in gradients]
    said = []
    for who in (who for who in found if who != OURS):
        values, slopes = found[who]
        if who == TORCHVISION:
            values = np.moveaxis(values.cpu().numpy().reshape(*case.levels.shape, -1, case.size, case.size), 2, -1)
            slopes = [np.moveaxis(x.cpu().numpy(), 1, -1) for x in slopes]
        if who == TORCHVISION and op == "RoI pooling":
            # Its bins are computed in floating point, and some have a row or column more than they should.
            share = (values != pooled).mean()
            require((values >= pooled).all() and share < 0.1, f"{op}: {share:.1%} of the values are not {who}'s")
            sums = [[x.sum((0, 1, 2), dtype=np.float64) for x in each] for each in (gradients, slopes)]
            worst = np.abs(np.array(sums[0]) - sums[1]).max()
            require(worst < 1e-2, f"{op}: the gradient's sums are not {who}'s, by {worst:.2g}")
            said.append(
                f"{op}: {share:.1%} of {who}'s values are larger (bins with a row or column more), others equal"
            )
            continue
        pairs = zip([pooled, *gradients], [values, *slopes], strict=True)
        worst = max(np.abs(mine - x).max() / max(np.abs(x).max(), 1e-3) for mine, x in pairs)
        require(worst < 1e-4, f"{op} is not {who}'s: values or gradients differ by {worst:.2g} of the largest")
        said.append(f"{op}: values and gradients are {who}'s within {worst:.1g} of the largest")
    return said


def measure_regions(config, peers: Sequence[str], device: str) -> tuple[list[Row], list[str]]:
    """RoIAlign and RoI pooling, forward and with gradients."""
    case, rows, notes = regions_of(config, FLAGS.batch), [], ["RoI ops are in float32, whatever the networks are in"]
    channels, regions = case.maps[0].shape[-1], case.boxes.shape[1]
    strides = ", ".join(map(str, case.strides))
    for op in ("RoIAlign", "RoI pooling"):
        calls = {OURS: our_regions(op, case), NUMPY: numpy_regions(op, case)}
        if TORCHVISION in peers:
            calls[TORCHVISION] = torch_regions(op, case, device)
        notes += check_regions(op, case, {who: both() for who, (_, both) in calls.items()})
        for number, what in enumerate(("forward", "forward and backward")):
            for call in calls.values():
                call[number]()
            what = f"{op}, {what}: {regions} RoIs an image to {case.size}x{case.size}x{channels}, strides {strides}"
            rows.append(measure(what, [Contender(who, calls[who][number]) for who in calls if who in (OURS, *peers)]))
    return rows, notes


# The table.


def spread(values: Sequence[float]) -> str:
    """Median (least-most), in three digits."""
    figures = (statistics.median(values), min(values), max(values))
    middle, least, most = (f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in figures)
    return f"{middle} ({least}-{most})"


def table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Markdown: images a second, or milliseconds a batch, and of each peer how many times as fast ours is."""
    head = ["work", "unit", OURS]
    for peer in peers:
        head += [peer, f"ours is so many times as fast as {peer}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        shown = {who: [row.images / x if row.images else 1e3 * x for x in turns] for who, turns in row.turns.items()}
        cells = [row.what, "images/s" if row.images else "ms a batch", spread(shown[OURS])]
        for peer in peers:
            if peer not in row.turns:
                cells += ["-", "-"]
                continue
            ratios = [theirs / mine for mine, theirs in zip(row.turns[OURS], row.turns[peer], strict=True)]
            cells += [spread(shown[peer]), spread(ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def versions(peers: Sequence[str]) -> str:
    """Machine, versions, date and load."""
    from importlib import metadata

    import jax

    packages = ["jax", "jaxlib", "flax", "numpy"] + (["torch", "torchvision"] if TORCHVISION in peers else ["scipy"])
    found = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    accelerator = "" if jax.default_backend() == "cpu" else f"{jax.devices()[0].device_kind}, "
    cores = len(os.sched_getaffinity(0))
    processor = platform.processor() or platform.machine()
    return (
        f"{accelerator}{processor}, {cores} cores (load {os.getloadavg()[1]:.1f}); Python {platform.python_version()},"
        f" {found}; {datetime.date.today()}"
    )


def choose_peers(backend: str) -> tuple[list[str], str, list[str]]:
    """Who is there of --peers, torch's name of the device, and notes."""
    unknown = set(FLAGS.peers) - {TORCHVISION, NUMPY}
    if unknown:
        raise UsageError(f"--peers={','.join(FLAGS.peers)}: {unknown.pop()} is unknown: {TORCHVISION}, {NUMPY}")
    peers, device, notes = list(FLAGS.peers), {"cpu": "cpu", "gpu": "cuda"}.get(backend, ""), []
    if TORCHVISION in peers:
        reason = "" if importlib.util.find_spec("torchvision") else "is not installed"
        if not reason:
            import torch

            if not device or (device == "cuda" and not torch.cuda.is_available()):
                reason = f"sees no {backend}"
            if device == "cuda":
                torch.backends.cudnn.benchmark = True
                torch.set_float32_matmul_precision("high")  # TF32, as JAX's default.
        if reason:
            peers.remove(TORCHVISION)
            notes.append(f"torchvision {reason}: not compared with")
        elif flags.FLAGS["peers"].using_default_value:
            peers.remove(NUMPY)
    return peers, device, notes


def main(overrides: list[tuple[str, str]]) -> int:
    """Measures and prints the table."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too.
    # Where cores are shared, torch's threads that spin while they wait make it five times as slow as it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = config_lib.load_config(FLAGS.config)
    for name, value in overrides:
        config_lib.override(config, name, value)
    config_lib.validate(config)
    if config.task != "detection":
        raise UsageError(f"--config={FLAGS.config} is of task={config.task}; this measures detection")
    if FLAGS.image_size:
        config.detection.shorter = (FLAGS.image_size,)
    config.schedule.learning_rate = LEARNING_RATE
    if unknown := set(FLAGS.only) - set(WORK):
        raise UsageError(f"--only={','.join(FLAGS.only)}: {unknown.pop()} is unknown: {', '.join(WORK)}")
    work = FLAGS.only

    import jax

    from resnet_jax import distributed

    peers, device, notes = choose_peers(jax.default_backend())
    rows: list[Row] = []
    with jax.set_mesh(distributed.make_mesh(jax.devices()[:1])):
        steps = [
            (functools.partial(measure_networks, config, work), {"train", "inference"}),
            (functools.partial(measure_nms, config), {"nms"}),
            (functools.partial(measure_regions, config), {"roi"}),
        ]
        for step, names in steps:
            if names & set(work):
                found, said = step(peers, device)
                rows, notes = rows + found, notes + said
    size = make_scene(config, 1)
    command = " ".join(["python", "benchmarks/detection.py", *sys.argv[1:]])
    print(
        f"`{command}`: {config.model.name}, neck {config.detection.neck}, {FLAGS.batch} images of"
        f" {size.size[0]}x{size.size[1]} on {size.canvas[0]}x{size.canvas[1]}; medians of {FLAGS.repeats} turns"
        f" (least-most).\n{versions(peers)}.\n\n{table(rows, peers)}\n"
    )
    print("\n".join(f"- {note}" for note in notes))
    if FLAGS.json:
        content = {"command": command, "versions": versions(peers), "notes": notes}
        content["rows"] = [row._asdict() for row in rows]
        pathlib.Path(FLAGS.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__)
