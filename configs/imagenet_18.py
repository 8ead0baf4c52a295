"""ResNet-18 (option B) on ImageNet, the recipe of section 3.4. With option A, as in Table 2: imagenet_18_a.

    python -m resnet_jax.main --config=configs/imagenet_18.py

600k iterations of 256 images (120 epochs). Reads TFDS's imagenet2012 where it is prepared as ArrayRecord; for
  a folder (train/<class>/*, and val/<class>/* or ImageNet's flat val with its labels beside it):
      --config.data.source=image_folder --config.data.dir=FOLDER
  what python -m resnet_jax.prepare wrote: --config.data.source=array_record --config.data.dir=FOLDER
  the official tar files as they are: --config.data.source=ilsvrc --config.data.dir=FOLDER
The mean image is computed once, over all training images, where the source does not know it.

The paper drops the rate "when the error plateaus" and prints no iterations: 150k and 300k are where its figure 4 shows
the drops. The rule itself: --config.schedule.name=plateau, which looks at the error at each eval.every.
"""

from resnet_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "resnet18"
    config.model.num_classes = 1000
    config.model.batch_norm = "group:32"  # Batches of 256 on eight GPUs.
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.crop = "scale"
    config.data.scales = (256, 480)
    config.data.mean = "pixel"
    config.data.std = "none"
    config.data.flip = True
    config.data.color_noise = 0.1
    config.batch_size = 256
    config.steps = 600_000
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.1
    config.schedule.boundaries = (150_000, 300_000)
    config.eval.every = 5000
    config.eval.batch_size = 500
    return config
