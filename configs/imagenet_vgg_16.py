"""VGG-16 on ImageNet, the baseline of the paper's Table 3 (28.07% top-1 error, 10-crop).

    python -m resnet_jax.main --config=configs/imagenet_vgg_16.py

The recipe of its own paper (Simonyan and Zisserman, 2014, section 3.1): 370k iterations of 256 images, rate 0.01
divided by 10 when the validation error stops improving, weight decay 5e-4, shorter side from [256, 512]. It started
from shallower nets; here He initialisation takes their place, and the deviation is divided out, for want of BN.
Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_18")
    config.model.name = "vgg16"
    config.model.batch_norm = "global"  # It has none.
    config.data.scales = (256, 512)
    config.data.mean = "channel"
    config.data.std = "channel"
    config.steps = 370_000
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "plateau"
    config.schedule.learning_rate = 0.01
    config.schedule.boundaries = ()
    return config
