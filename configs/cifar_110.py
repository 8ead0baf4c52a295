"""ResNet-110 on CIFAR-10, the recipe of section 4.2; the paper's Table 6 has 6.43% test error (mean 6.61 of five runs).

    python -m resnet_jax.main --config=configs/cifar_110.py

Section 4.2 warms deep nets up at 0.01 until the training error is below 80%. About 60 hours on two CPU cores.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("cifar_20")
    config.model.name = "cifar_resnet110"
    config.schedule.warmup_rate = 0.01
    config.schedule.warmup_error = 80.0
    return config
