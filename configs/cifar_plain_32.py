"""Plain-32 on CIFAR-10: ResNet-32 without shortcuts (figure 6, left).

    python -m resnet_jax.main --config=configs/cifar_plain_32.py

About 17 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_32")
    config.model.name = "cifar_plain32"
    return config
