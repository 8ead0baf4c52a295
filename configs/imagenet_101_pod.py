"""ResNet-101 on ImageNet with batches of 8,192, for a pod: the recipe of Goyal et al. (2017), see imagenet_50_pod.py.

python -m resnet_jax.main --config=configs/imagenet_101_pod.py
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_50_pod")
    config.model.name = "resnet101_v1_5"
    return config
