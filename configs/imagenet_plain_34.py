"""Plain-34 on ImageNet; the paper's Table 2 has 28.54% top-1 error (10-crop): worse than plain-18.

    python -m resnet_jax.main --config=configs/imagenet_plain_34.py

The recipe of section 3.4 to the letter. Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_18")
    config.model.name = "plain34"
    return config
