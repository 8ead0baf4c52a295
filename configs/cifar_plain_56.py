"""Plain-56 on CIFAR-10: ResNet-56 without shortcuts (figure 6, left).

    python -m resnet_jax.main --config=configs/cifar_plain_56.py

About 30 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_56")
    config.model.name = "cifar_plain56"
    return config
