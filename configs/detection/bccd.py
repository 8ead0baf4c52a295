"""Faster R-CNN on photos of blood cells (BCCD), from scratch: 292 to train, 72 to test, three classes.

    python -m resnet_jax.main --config=detection/bccd --config.data.dir=BCCD

BCCD is VOC's layout: Annotations, ImageSets/Main/{trainval,test}.txt, JPEGImages. An accelerator's recipe; on two CPU
cores --config.model.width=0.5 --config.detection.shorter=240 --config.detection.longer=320 --config.steps=300
--config.schedule.warmup_steps=50, which gave 58% mAP.
"""

from resnet_jax.config import default_config


def get_config():
    config = default_config()
    config.task = "detection"
    config.model.name = "resnet18"
    config.data.source = "voc"
    config.data.train_split = "trainval"
    config.data.test_split = "test"
    config.data.mean = "imagenet"
    config.data.std = "imagenet"
    config.data.flip = True
    config.batch_size = 8
    config.steps = 6000
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 10.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.02
    config.schedule.warmup_steps = 200
    config.detection.shorter = (480,)
    config.detection.longer = 640
    config.detection.pooled = 10
    config.detection.anchor_sizes = (32, 64, 128, 256)
    config.detection.rpn_width = 256
    config.detection.roi_low = 0.0
    config.detection.rois_sampled = 64
    config.detection.test_after_nms = 150
    config.detection.train_before_nms = 2000
    config.detection.train_after_nms = 500
    config.detection.test_before_nms = 2000
    config.eval.every = 1000
    config.detection.test_scales = (320, 480, 640)
    config.detection.test_side = 128
    config.eval.batch_size = 8
    config.log.every = 20
    return config
