"""Who detection.py lets compete: our network and ops, and torchvision's of the same sizes."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from detection_cases import CLASSES, FPN_WIDTH, Regions, Scene, Suppression
import ml_collections
import numpy as np

# Nothing is to be learnt: weights that ran away would change how many proposals there are.
LEARNING_RATE = 1e-9
# Of a block's last BN. Without statistics every block would double its input, and of random logits in the thousands
# hardly any proposal is left.
RESIDUAL_SCALE = 0.25

TORCHVISION_DIFFERS = (
    "its RoIAlign is not aligned (half a cell off, RoIs of at least one cell), ours is; as many samples a bin",
    "its anchors are rounded to whole pixels and centred on a cell's corner",
    "its RPN's smooth L1 has a beta of 1/9 and its head's of 1/9, whatever the config says",
    "it has box codes of the background too (81 classes' for 80)",
    "ours masks the padding of canvases in every layer, and computes the norms of gradients and weights",
    "on GPUs ours pools every region from every level (shapes are static), it from the region's own",
    "it runs eagerly; on CPUs its threads wait without spinning (OMP_WAIT_POLICY=PASSIVE, unless that is set)",
    "of random weights no score reaches the threshold: in inference the last NMS has nothing to do in either",
)


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
    resident["seed"] = np.uint32(0)
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


def our_suppression(case: Suppression) -> Callable[[], list[np.ndarray]]:
    """The indices that are kept of each image, by falling score."""
    import jax

    from resnet_jax.detection.nms import classwise_nms, nms

    arrays = jax.device_put([x for x in case[:3] if x is not None])

    @jax.jit
    @jax.vmap
    def suppress(boxes, scores, *classes):
        chosen = classwise_nms if classes else nms
        return chosen(boxes, scores, *classes, scores >= case.least, case.threshold, case.keep)

    def run():
        kept, valid = jax.device_get(suppress(*arrays))
        return [row[real] for row, real in zip(kept, valid, strict=True)]

    return run


def torch_suppression(case: Suppression, device: str) -> Callable[[], list[np.ndarray]]:
    """The same of torchvision."""
    import torch
    from torchvision.ops import batched_nms, nms

    tensors = [torch.from_numpy(x).to(device) for x in case[:3] if x is not None]

    def run():
        kept = []
        for boxes, scores, *classes in zip(*tensors, strict=True):
            candidates = torch.where(scores >= case.least)[0]
            chosen = [x[candidates] for x in (boxes, scores, *classes)]
            indices = (batched_nms if classes else nms)(*chosen, case.threshold)
            kept.append(candidates[indices[: case.keep]])
        return [indices.cpu().numpy() for indices in kept]

    return run


def our_regions(op: str, case: Regions) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward and backward: pooled [n, R, s, s, C], and the maps' gradients."""
    import jax
    from jax import numpy as jnp

    from resnet_jax.detection.faster_rcnn import POOLINGS, pool_levels

    kind = {"RoIAlign": "align", "RoI pooling": "pool"}[op]

    @jax.vmap
    def pool(maps, boxes, levels):  # As the networks with a pyramid and without do.
        if len(maps) == 1:
            return POOLINGS[kind](maps[0], boxes, case.size, 1 / case.strides[0])
        extents = [jnp.array(features.shape[:2]) for features in maps]
        return pool_levels(maps, extents, boxes, case.strides, kind, case.size, levels)

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
