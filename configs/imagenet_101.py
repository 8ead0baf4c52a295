"""ResNet-101 on ImageNet; the paper's Table 3 has 21.75% top-1 error (10-crop), Table 4 19.87% (dense).

    python -m resnet_jax.main --config=configs/imagenet_101.py

The recipe of section 3.4 to the letter. Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_18")
    config.model.name = "resnet101"
    return config
