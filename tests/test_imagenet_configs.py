"""The ImageNet configs against the recipes that the paper and its sources print."""

import pytest

from resnet_jax.config import load_config, shipped_configs, validate
from resnet_jax.models.registry import create_model

# The paper's networks: config -> (blocks of each stage, shortcut). VGG-16 and the pods have recipes of their own.
NETWORKS = {
    "imagenet_18": ((2, 2, 2, 2), "B"),
    "imagenet_18_a": ((2, 2, 2, 2), "A"),
    "imagenet_34": ((3, 4, 6, 3), "B"),
    "imagenet_34_a": ((3, 4, 6, 3), "A"),
    "imagenet_34_c": ((3, 4, 6, 3), "C"),
    "imagenet_50": ((3, 4, 6, 3), "B"),
    "imagenet_101": ((3, 4, 23, 3), "B"),
    "imagenet_152": ((3, 8, 36, 3), "B"),
    "imagenet_plain_18": ((2, 2, 2, 2), "none"),
    "imagenet_plain_34": ((3, 4, 6, 3), "none"),
}
PODS = [f"imagenet_{depth}_pod" for depth in (18, 34, 50, 101, 152)]


def test_every_imagenet_config_is_looked_at_here():
    assert {name for name in shipped_configs() if name.startswith("imagenet")} == {
        *NETWORKS,
        *PODS,
        "imagenet_50_lars",
        "imagenet_vgg_16",
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_the_papers_recipe_is_that_of_section_3_4(name):
    config = load_config(name)
    validate(config)
    network = create_model(config.model.name)
    assert (network.blocks, network.shortcut) == NETWORKS[name]
    assert network.bottleneck == (name in ("imagenet_50", "imagenet_101", "imagenet_152"))
    assert getattr(network, "stride_in", "first") == "first"  # v1: the paper's.
    assert config.model.batch_norm == "group:32"  # 256 on eight GPUs.
    data, optimizer, schedule = config.data, config.optimizer, config.schedule
    assert (data.crop, data.scales, data.image_size, data.flip) == ("scale", (256, 480), 224, True)
    assert (data.mean, data.color_noise, data.pad) == ("pixel", 0.1, 0)
    assert (config.eval.resize, config.data.holdout) == (256, 0)
    assert (config.batch_size, config.steps, config.epochs) == (256, 600_000, 0)
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay, optimizer.decay) == (
        0.9,
        False,
        1e-4,
        "all",
    )
    assert (schedule.name, schedule.learning_rate, schedule.factor) == ("steps", 0.1, 0.1)
    assert schedule.boundaries == (150_000, 300_000)  # Figure 4.
    assert (config.loss.label_smoothing, optimizer.ema) == (0, 0)
    schedule.name = "plateau"  # The rule that the paper states.
    validate(config)


@pytest.mark.parametrize("name", PODS)
def test_pods_scale_the_rate_with_the_batch_and_warm_up_as_goyal_et_al(name):
    config = load_config(name)
    validate(config)
    network = create_model(config.model.name)
    assert network.bottleneck is False or network.stride_in == "middle"
    data = config.data
    # Section 5.1: scale and aspect ratio augmentation, mirrors, mean and deviation of the channels.
    assert (data.crop, data.smallest_area, data.flip, data.color_noise) == ("inception", 0.08, True, 0)
    assert (data.mean, data.std, data.image_size) == ("imagenet", "imagenet", 224)
    steps_per_epoch = 1_281_167 / config.batch_size
    assert config.schedule.learning_rate == pytest.approx(0.1 * config.batch_size / 256)
    assert config.steps == pytest.approx(90 * steps_per_epoch, abs=1)
    assert config.schedule.warmup_steps == pytest.approx(5 * steps_per_epoch, abs=1)
    assert config.schedule.boundaries == tuple(pytest.approx(e * steps_per_epoch, abs=1) for e in (30, 60, 80))
    assert (config.model.zero_init_last, config.optimizer.decay, config.model.batch_norm) == (
        True,
        "kernels",
        "group:32",
    )


def test_vgg_16_has_the_recipe_of_its_own_paper():
    config = load_config("imagenet_vgg_16")
    validate(config)
    assert create_model(config.model.name).dropout == 0.5
    assert (config.batch_size, config.steps, config.optimizer.weight_decay) == (256, 370_000, 5e-4)
    assert (config.schedule.name, config.schedule.learning_rate) == ("plateau", 0.01)
    assert config.data.scales == (256, 512)


def test_lars_has_the_values_of_mlperfs_reference_convergence_points():
    config = load_config("imagenet_50_lars")
    validate(config)
    assert create_model(config.model.name).stride_in == "middle"
    optimizer, schedule, epoch = config.optimizer, config.schedule, 1_281_167 / config.batch_size
    assert (config.batch_size, config.steps, config.model.batch_norm) == (32_768, 2_267, "group:128")
    assert (optimizer.name, optimizer.trust, optimizer.momentum, optimizer.weight_decay, optimizer.decay) == (
        "lars",
        0.001,
        0.94,
        2.5e-5,
        "kernels",
    )
    assert (schedule.name, schedule.power, schedule.learning_rate, schedule.end_rate) == ("polynomial", 2, 21.2, 1e-4)
    assert schedule.warmup_steps == pytest.approx(16 * epoch, abs=1)
    assert config.steps == pytest.approx(58 * epoch, abs=1)
    assert (optimizer.momentum_style, optimizer.nesterov, config.loss.label_smoothing) == ("caffe", False, 0.1)
