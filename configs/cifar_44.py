"""ResNet-44 on CIFAR-10, the recipe of section 4.2; the paper's Table 6 has 7.17% test error.

    python -m resnet_jax.main --config=configs/cifar_44.py

About 24 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_20")
    config.model.name = "cifar_resnet44"
    return config
