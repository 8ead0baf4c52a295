"""A gated ResNet-32 on CIFAR-10: Highway shortcuts y = T(x) F(x) + (1 - T(x)) x in the place of identities.

    python -m resnet_jax.main --config=configs/cifar_highway_32.py

Not the Highway-32 of Table 6 (8.80% test error), which is another network. About 18 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_32")
    config.model.name = "cifar_highway32"
    return config
