"""Faster R-CNN with FPN on ResNet-50 for COCO, laid out and trained as detectron2's R50-FPN 1x (its AP: 37.9%).

    python -m resnet_jax.main --config=detection/coco_fpn --config.data.dir=COCO \
      --config.init.weights=resnet50.safetensors

16 images a step, 90,000 steps, shorter sides from 640 to 800; not yet trained here.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("detection/coco")
    config.model.name = "resnet50_v1_5"
    config.detection.neck = "fpn"
    config.detection.anchor_sizes = (32, 64, 128, 256, 512)
    config.detection.rpn_width = 256
    config.detection.anchor_border = -1.0
    config.detection.anchor_beta = 1e-4  # Smooth L1 without its smooth part.
    config.detection.roi_beta = 1e-4
    config.detection.train_before_nms = 2000
    config.detection.train_after_nms = 1000
    config.detection.test_before_nms = 1000
    config.detection.test_after_nms = 1000
    config.detection.rois_sampled = 512
    config.detection.detection_nms = 0.5
    config.detection.shorter = (640, 672, 704, 736, 768, 800)
    config.detection.longer = 1333
    config.optimizer.weight_decay = 1e-4
    config.batch_size = 16
    config.steps = 90_000
    config.schedule.learning_rate = 0.02
    config.schedule.boundaries = (60_000, 80_000)
    config.schedule.warmup_steps = 1000
    return config
