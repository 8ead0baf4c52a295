"""Plain-110 on CIFAR-10: ResNet-110 without shortcuts (figure 6, left). The paper's run ended above 60% test error.

    python -m resnet_jax.main --config=configs/cifar_plain_110.py

About 60 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_110")
    config.model.name = "cifar_plain110"
    return config
