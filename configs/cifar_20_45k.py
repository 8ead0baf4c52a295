"""ResNet-20 on 45,000 of CIFAR-10's training images, 5,000 held out: the split of section 4.2.

    python -m resnet_jax.main --config=configs/cifar_20_45k.py

The held-out images say what is best as training goes; the test set is looked at once, at the end. The same split for
any other depth is --config.data.holdout=5000. As long as cifar_20.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_20")
    config.data.holdout = 5000
    return config
