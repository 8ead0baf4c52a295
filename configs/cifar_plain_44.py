"""Plain-44 on CIFAR-10: ResNet-44 without shortcuts (figure 6, left).

    python -m resnet_jax.main --config=configs/cifar_plain_44.py

About 24 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_44")
    config.model.name = "cifar_plain44"
    return config
