"""The paper's ImageNet localization (appendix C): a per-class RPN on a classification network.

    python -m resnet_jax.main --config=detection/localization --config.data.dir=FOLDER \
      --config.init.weights=resnet101.safetensors

FOLDER is VOC's layout or COCO's, each image with the boxes of one class. The true class is given to the test, unless
--config.localization.predictions=runs/imagenet_101/predictions.npz says a classification's. The paper, ResNet-101:
13.3% top-5 error by one crop of the true class, 11.7% densely (--config.eval.protocol=multi_scale), 14.4% of predicted
classes; not yet trained here.
"""

from resnet_jax.config import default_config


def get_config():
    config = default_config()
    config.task = "localization"
    config.model.name = "resnet101"
    config.model.batch_norm = "frozen"
    config.data.source = "folder"
    config.data.image_size = 224
    config.data.scales = (256, 480)
    config.data.mean = "imagenet"
    config.data.std = "imagenet"
    config.data.flip = True
    config.batch_size = 256
    config.epochs = 10.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.01
    config.schedule.warmup_steps = 500
    config.eval.batch_size = 128
    return config
