"""The networks against the paper's figures (Table 1, section 4.2) and VGG's published counts."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import resnet_jax
from resnet_jax.errors import UsageError

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet18_a": 11_515_688,
    "resnet34": 21_797_672,
    "resnet34_a": 21_623_848,
    "resnet34_b": 21_797_672,
    "resnet34_c": 22_716_840,
    "plain34": 21_623_848,
    "resnet50": 25_557_032,
    "resnet50_v1_5": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "cifar_resnet20": 269_722,
    "cifar_plain20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
}
MULTIPLY_ADDS = {"resnet18": 1.8e9, "resnet34": 3.6e9, "resnet50": 3.8e9, "resnet101": 7.6e9, "resnet152": 11.3e9}


def parameter_count(name: str) -> int:
    model = resnet_jax.create_model(name, dtype="float32")
    size = 32 if name.startswith("cifar_") else 224
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones_exactly(name):
    assert parameter_count(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_and_sizes_are_those_of_table_1(name):
    summary = resnet_jax.summarize(name)
    assert summary.multiply_adds == pytest.approx(MULTIPLY_ADDS[name], rel=0.03)
    assert summary.output_sizes == {"stem": 56, "stage1": 56, "stage2": 28, "stage3": 14, "stage4": 7}
    assert summary.layers == int(name.removeprefix("resnet"))


def test_v1_5_costs_what_torchvision_publishes():
    assert resnet_jax.summarize("resnet50_v1_5").multiply_adds == pytest.approx(4.09e9, rel=0.001)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain56", "cifar_highway32", "cifar_resnet14", "vgg16"])
def test_layers_are_counted_as_in_the_name(name):
    summary = resnet_jax.summarize(name)
    assert name.endswith(str(summary.layers))
    if name.startswith("cifar_"):
        assert summary.output_sizes == {"stem": 32, "stage1": 32, "stage2": 16, "stage3": 8}


def test_every_listed_name_builds():
    for name in resnet_jax.list_models():
        assert resnet_jax.create_model(name).num_classes == (10 if name.startswith("cifar_") else 1000)
    assert resnet_jax.list_models("cifar_plain*") == [f"cifar_plain{n}" for n in (20, 32, 44, 56, 110)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet51"}, "did you mean 'resnet50'"),
        ({"name": "cifar_resnet21"}, "the nearest is 'cifar_resnet20'"),
        ({"name": "resnet50", "shortcuts": "A"}, "did you mean 'shortcut'"),
        ({"name": "resnet50", "dtype": "bf16"}, "auto, bfloat16"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(arguments, message):
    with pytest.raises(UsageError, match=message):
        resnet_jax.create_model(**arguments)


def test_a_wrong_value_of_a_setting_is_named():
    with pytest.raises(UsageError, match="shortcut 'D' is unknown: A, B, C, none, gated"):
        resnet_jax.create_model("cifar_resnet8", shortcut="D").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.fixture(scope="module")
def small():
    model = resnet_jax.create_model("cifar_resnet8", num_classes=7, dtype="float32")
    images = jax.random.normal(jax.random.key(1), (2, 17, 23, 3))
    return model, model.init(jax.random.key(0), images), images


def test_stages_can_be_applied_alone(small):
    model, variables, images = small
    features = model.apply(variables, images, method="features")
    assert {name: f.shape[1:3] for name, f in features.items()} == {
        "stem": (17, 23), "stage1": (17, 23), "stage2": (9, 12), "stage3": (5, 6),
    }  # fmt: skip
    third = model.apply(variables, features["stage2"], 3, method="stage")
    np.testing.assert_array_equal(third, features["stage3"])
    logits = model.apply(variables, third, method="classify")
    np.testing.assert_array_equal(logits, model.apply(variables, images))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_and_logits_are_float32_whatever_the_compute_dtype(small, dtype):
    _, _, images = small
    model = resnet_jax.create_model("cifar_resnet8", dtype=dtype)
    variables = model.init(jax.random.key(0), images)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    assert model.apply(variables, images).dtype == jnp.float32
    assert model.apply(variables, images, method="features")["stage2"].dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(("init_fan", "fan"), [("fan_out", 9 * 64), ("fan_in", 9 * 32)])
def test_initial_kernels_have_he_s_variance(init_fan, fan):
    model = resnet_jax.create_model("cifar_resnet20", init_fan=init_fan)
    kernel = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["stage3"]["block1"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    assert np.var(kernel) == pytest.approx(2 / fan, rel=0.05)  # 18,432 draws: a standard error of 1%.


def test_zero_init_of_the_last_scale_makes_blocks_identities():
    model = resnet_jax.create_model("cifar_resnet14", zero_init_last=True)
    images = jnp.abs(jax.random.normal(jax.random.key(1), (1, 8, 8, 3)))
    variables = model.init(jax.random.key(0), images)
    features = model.apply(variables, images, method="features")
    np.testing.assert_array_equal(features["stage1"], features["stem"])


def test_gates_begin_nearly_closed():
    model = resnet_jax.create_model("cifar_highway20")
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert (variables["params"]["stage1"]["block1"]["gate"]["bias"] == -2).all()
