"""ResNet-1202 on CIFAR-10, the recipe of section 4.2; the paper's Table 6 has 7.93% test error.

    python -m resnet_jax.main --config=configs/cifar_1202.py

Warmed up as ResNet-110. For an accelerator: 70 times the work of ResNet-20.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_110")
    config.model.name = "cifar_resnet1202"
    return config
