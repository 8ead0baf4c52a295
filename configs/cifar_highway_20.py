"""A gated ResNet-20 on CIFAR-10: Highway shortcuts y = T(x) F(x) + (1 - T(x)) x in the place of identities.

    python -m resnet_jax.main --config=configs/cifar_highway_20.py

Not the Highway-19 of Table 6 (7.54% test error), which is another network. About 11 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_20")
    config.model.name = "cifar_highway20"
    return config
