"""Faster R-CNN on ResNet-101 for COCO (Table 8: 27.2% AP, 48.4% at an IoU of .5, trained on 80k images, on val).

    python -m resnet_jax.main --config=detection/coco --config.data.dir=COCO --config.init.weights=resnet101.safetensors

COCO holds annotations/instances_train2017.json, train2017/, ... --config.data.train_split=train2014
--config.data.test_split=val2014 are the paper's splits; 2017's, the default, have 118k images to train. 240,000 steps
at 0.001, 80,000 at 0.0001, 8 images a step and anchors of 64 pixels are the paper's; not yet trained here. A few boxes
of train2017 are empty: they are left out and named.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("detection/voc")
    config.data.source = "coco"
    config.data.train_split = "train2017"
    config.data.test_split = "val2017"
    config.data.on_error = "skip"
    config.batch_size = 8
    config.steps = 320_000
    config.schedule.boundaries = (240_000,)
    config.detection.anchor_sizes = (64, 128, 256, 512)
    config.detection.roi_low = 0.0
    config.detection.average_precision = "coco"
    return config
