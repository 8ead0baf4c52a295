"""ResNet-50 on ImageNet with batches of 8,192, for a pod: 90 epochs, 23.74% top-1 error (centre crop) in its source.

    python -m resnet_jax.main --config=configs/imagenet_50_pod.py

The source is Goyal et al. (2017), "Accurate, Large Minibatch SGD": the rate grows with the batch (0.1 per 256 images),
warms up over 5 epochs, drops at 30, 60 and 80 epochs; BN over 32 images, its last scale in each block started at zero;
weight decay of kernels alone, Nesterov momentum; Inception-style crops; stride in the 3x3 convolution. It warms up
from 0.1, here from zero. Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_18")
    config.model.name = "resnet50_v1_5"
    config.model.zero_init_last = True
    config.data.crop = "inception"
    config.data.color_noise = 0.0
    config.data.mean = "imagenet"
    config.data.std = "imagenet"
    config.batch_size = 8192
    config.steps = 14_076  # 90 epochs of 1,281,167 images.
    config.optimizer.nesterov = True
    config.optimizer.decay = "kernels"
    config.schedule.learning_rate = 0.1 * config.batch_size / 256
    config.schedule.boundaries = (4_692, 9_384, 12_511)
    config.schedule.warmup_steps = 782
    config.eval.every = 782
    config.eval.batch_size = 8192
    config.log.every = 20
    return config
