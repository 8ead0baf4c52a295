"""ResNet-50 on ImageNet with batches of 32,768 and LARS, for a large pod: 58 epochs, 24.1% top-1 error in its source.

    python -m resnet_jax.main --config=configs/imagenet_50_lars.py --workdir=gs://BUCKET/imagenet_50_lars

2,267 steps; on TPU v5e some 12 chip-hours, 3 minutes on 256 chips once compiled (computed, not run here). LARS is You,
Gitman and Ginsburg (2017), "Large Batch Training of Convolutional Networks": each kernel's gradient is scaled to the
kernel's norm (coefficient 0.001), the rate lies inside the velocity. Its values at this batch are those of MLPerf
training v1.0's reference convergence points (resnet_ref_32768; mlcommons/logging, rcps_resnet.json): rate 21.2, 16
epochs of warm-up from zero, then decay with power 2 to 0.0001, momentum 0.94, weight decay 2.5e-5 of kernels alone,
label smoothing 0.1, BN over 128 images. Ten runs reached 75.9% top-1 accuracy (centre crop) after 55 to 57 epochs;
its 2,267 steps are read as the length of the whole training. Else as imagenet_50_pod.py (MLPerf's crops go down to 5%
of an image's area, here 8%). Where the data comes from: imagenet_18.py.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("imagenet_50_pod")
    config.model.batch_norm = "group:128"
    config.batch_size = 32_768
    config.steps = 2_267
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "lars"
    config.optimizer.trust = 0.001
    config.optimizer.momentum = 0.94
    config.optimizer.momentum_style = "caffe"
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 2.5e-5
    config.schedule.name = "polynomial"
    config.schedule.power = 2.0
    config.schedule.learning_rate = 21.2
    config.schedule.boundaries = ()
    config.schedule.end_rate = 1e-4
    config.schedule.warmup_steps = 626  # 16 epochs.
    config.eval.every = 156  # 4 epochs.
    return config
