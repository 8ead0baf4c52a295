"""Faster R-CNN on ResNet-101, the paper's detector: VOC07 trainval + VOC12 trainval, tested on VOC07.

    python -m resnet_jax.main --config=detection/voc --config.data.dir=VOCdevkit \
      --config.init.weights=resnet101.safetensors

The paper: 76.4% mAP (Table 7; VGG-16 73.2%), not yet trained here. Its rate drops from 0.001 to 0.0001; joint training
for 80,000 and 30,000 steps of an image, as later public codes have it for 07+12, stands for its 4-step alternation,
whose lengths it does not say. --config.model.name=vgg16 is the baseline, --config.data.train_split=07++12
--config.data.test_split=12_test --config.detection.labelled=false the paper's VOC12, for the test server.
"""

from resnet_jax.config import default_config


def get_config():
    config = default_config()
    config.task = "detection"
    config.model.name = "resnet101"
    config.model.batch_norm = "frozen"
    config.model.freeze_at = 2
    config.data.source = "voc"
    config.data.train_split = "07+12"
    config.data.test_split = "07_test"
    config.data.mean = "imagenet"
    config.data.std = "imagenet"
    config.data.flip = True
    config.batch_size = 1
    config.steps = 110_000
    config.optimizer.weight_decay = 5e-4
    config.schedule.learning_rate = 0.001
    config.schedule.boundaries = (80_000,)
    config.detection.average_precision = "voc07"
    config.eval.batch_size = 8
    return config
