"""ResNet-20 on CIFAR-10, the recipe of section 4.2; the paper's Table 6 has 8.75% test error.

    python -m resnet_jax.main --config=configs/cifar_20.py

64k iterations of 128 images (164 epochs), about 10 hours on two CPU cores. The archive is downloaded once;
--config.data.dir=FOLDER_OR_ARCHIVE takes it from there. For a folder of images (train/<class>/*, test/<class>/*)
add --config.data.source=image_folder.
"""

from resnet_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "cifar_resnet20"
    config.model.batch_norm = "group:64"  # Batches of 128 on two GPUs.
    config.data.source = "cifar"
    config.data.name = "cifar10"
    config.data.mean = "pixel"
    config.data.std = "none"
    config.data.pad = 4
    config.data.flip = True
    config.batch_size = 128
    config.steps = 64_000
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.1
    config.schedule.boundaries = (32_000, 48_000)
    config.eval.every = 1000
    return config
