"""ResNet-56 on CIFAR-10, the recipe of section 4.2; the paper's Table 6 has 6.97% test error.

    python -m resnet_jax.main --config=configs/cifar_56.py

About 30 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_20")
    config.model.name = "cifar_resnet56"
    return config
