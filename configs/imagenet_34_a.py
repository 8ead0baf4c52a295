"""ResNet-34 with option A on ImageNet; the paper's Tables 2 and 3 have 25.03% top-1 error (10-crop).

    python -m resnet_jax.main --config=configs/imagenet_34_a.py

The recipe of section 3.4 to the letter. Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_18")
    config.model.name = "resnet34_a"
    return config
