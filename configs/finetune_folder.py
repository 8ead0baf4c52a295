"""Fine-tunes pretrained weights on a folder of images: train/<class>/*, val/<class>/* (or test).

    python -m resnet_jax.main --config=configs/finetune_folder.py --config.model.name=resnet50_v1_5 \
      --config.init.weights=resnet50.safetensors --config.data.dir=FOLDER

The weights, of any format that README names, bring their preprocessing; the classifier is replaced by a new
one for the folder's classes, which learns ten times as fast. Stops when three evaluations in a row are no better.
--config.model.freeze_at=2 leaves the stem and stage 1 as they came, --config.model.batch_norm=frozen BN's statistics.
"""

from resnet_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "resnet50_v1_5"
    config.data.source = "image_folder"
    config.data.image_size = 224
    config.data.crop = "inception"
    config.data.smallest_area = 0.25  # Closer to what the weights have seen than the 8% of a training from scratch.
    config.data.mean = "imagenet"
    config.data.std = "imagenet"
    config.data.flip = True
    config.init.head = "replace"
    config.batch_size = 64
    config.epochs = 20.0
    config.optimizer.nesterov = True
    config.optimizer.head_rate = 10.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.005
    config.schedule.warmup_steps = 100
    config.eval.every = 200
    config.eval.patience = 3
    config.eval.batch_size = 256
    config.log.every = 20
    return config
