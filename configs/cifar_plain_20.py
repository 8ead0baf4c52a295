"""Plain-20 on CIFAR-10: ResNet-20 without shortcuts (figure 6, left).

    python -m resnet_jax.main --config=configs/cifar_plain_20.py

About 10 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_20")
    config.model.name = "cifar_plain20"
    return config
