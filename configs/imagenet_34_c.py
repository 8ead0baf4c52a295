"""ResNet-34 with option C on ImageNet; the paper's Table 3 has 24.19% top-1 error (10-crop).

    python -m resnet_jax.main --config=configs/imagenet_34_c.py

The recipe of section 3.4 to the letter. Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_18")
    config.model.name = "resnet34_c"
    return config
