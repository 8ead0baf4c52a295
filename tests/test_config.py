"""The config tree: fields, files, overrides, checks, and what makes two recipes differ."""

import json
import pathlib
import textwrap

import ml_collections
import pytest

from resnet_jax import config as config_lib
from resnet_jax.config import (
    FIELDS,
    default_config,
    describe_fields,
    find_config,
    flatten,
    load_config,
    override,
    recipe_changes,
    shipped_configs,
    validate,
)
from resnet_jax.errors import UsageError

NAN, INF = float("nan"), float("inf")


def write_config(path: pathlib.Path, body: str) -> pathlib.Path:
    """A config file whose get_config starts from the defaults and runs ``body``."""
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    path.write_text(
        "from resnet_jax.config import default_config, load_config\n\n\n"  # Lines 1 to 3.
        f"def get_config():\n    config = default_config()\n{lines}\n    return config\n"
    )
    return path


def get(config: ml_collections.ConfigDict, name: str):
    """The field ``a.b``, by hand."""
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_has_a_type_that_can_be_read_and_a_sentence(field):
    assert type(field.default) in (int, float, bool, str, tuple)
    assert field.text.strip().endswith(".")
    assert len(field.text.split()) >= 2
    assert field.name == field.name.strip().lower()
    assert field.name.count(".") <= 1


def test_no_field_is_given_twice_or_is_a_section_too():
    names = [field.name for field in FIELDS]
    assert len(set(names)) == len(names)
    assert not {name.split(".")[0] for name in names if "." in name} & set(names)


def test_the_default_config_has_every_field_at_its_default():
    config = default_config()
    for field in FIELDS:
        assert get(config, field.name) == field.default
        assert type(get(config, field.name)) is type(field.default)


def test_unknown_fields_can_not_be_added():
    config = default_config()
    with pytest.raises(AttributeError):
        config.optimiser = 1
    with pytest.raises(AttributeError):
        config.optimizer.lr = 0.1
    with pytest.raises(KeyError):
        config.optimizer["lr"] = 0.1


def test_values_of_another_type_can_not_be_set():
    config = default_config()
    with pytest.raises(TypeError):
        config.batch_size = "128"
    with pytest.raises(TypeError):
        config.batch_size = 12.5
    config.epochs = 40  # A whole number is a number.
    assert config.epochs == 40.0


def test_two_default_configs_share_nothing():
    config = default_config()
    config.model.name = "cifar_resnet110"
    assert default_config().model.name == "cifar_resnet20"


def test_the_help_names_every_field_with_default_unit_and_sentence():
    lines = describe_fields().splitlines()
    for field in FIELDS:
        (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"--config.{field.name}=")]
        assert lines[at].strip() == f"--config.{field.name}={field.default!r} {field.unit}".strip()
        assert lines[at + 1].strip() == field.text
    assert len(lines) == 1 + 2 * len(FIELDS)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch_size", "256", 256),
        ("schedule.learning_rate", "0.05", 0.05),
        ("optimizer.weight_decay", "5e-4", 0.0005),
        ("schedule.learning_rate", "1", 1.0),
        ("data.flip", "true", True),
        ("data.flip", "True", True),
        ("data.flip", "1", True),
        ("log.tensorboard", "false", False),
        ("log.tensorboard", "0", False),
        ("model.name", "resnet50", "resnet50"),
        ("data.dir", "/a path/with=equals", "/a path/with=equals"),
        ("data.dir", "", ""),
        ("model.batch_norm", "group:32", "group:32"),
        ("schedule.boundaries", "32000,48000", (32000, 48000)),
        ("schedule.boundaries", "(32000, 48000)", (32000, 48000)),
        ("schedule.boundaries", "[400]", (400,)),
        ("schedule.boundaries", "", ()),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(name, text, value):
    config = default_config()
    override(config, name, text)
    assert get(config, name) == value
    assert type(get(config, name)) is type(value)
    # And nothing else changes.
    before, now = flatten(default_config()), flatten(config)
    assert {key for key in now if now[key] != before[key]} <= {name}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("batch_size", "12.5", "a whole number"),
        ("batch_size", "1e3", "a whole number"),
        ("batch_size", "", "a whole number"),
        ("schedule.learning_rate", "fast", "a number"),
        ("schedule.learning_rate", "0,1", "a number"),
        ("data.flip", "yes", "true or false"),
        ("schedule.boundaries", "32k,48k", "whole numbers separated by commas"),
    ],
)
def test_an_override_of_another_type_says_what_was_expected(name, text, expected):
    with pytest.raises(UsageError) as error:
        override(default_config(), name, text)
    assert str(error.value) == f"--config.{name}={text}: expected {expected}"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("batch_siz", "batch_size"),
        ("schedule.learning_rte", "schedule.learning_rate"),
        ("optimiser.momentum", "optimizer.momentum"),
        ("learning_rate", "schedule.learning_rate"),  # The section left out.
        ("momentum", "optimizer.momentum"),
        ("model.learning_rate", "schedule.learning_rate"),
    ],
)
def test_an_unknown_field_names_the_nearest(name, near):
    with pytest.raises(UsageError) as error:
        override(default_config(), name, "1")
    assert str(error.value) == f"--config.{name}: no such field; did you mean {near!r}?"


def test_a_field_like_no_other_names_none():
    with pytest.raises(UsageError) as error:
        override(default_config(), "zzzzzz", "1")
    assert str(error.value) == "--config.zzzzzz: no such field"


def test_a_section_is_no_field():
    with pytest.raises(UsageError, match=r"--config\.schedule is a section"):
        override(default_config(), "schedule", "cosine")


def test_on_the_command_line_the_last_of_epochs_and_steps_counts():
    config = load_config("cifar_20")
    assert (config.epochs, config.steps) == (0, 64_000)
    override(config, "epochs", "2.5")
    assert (config.epochs, config.steps) == (2.5, 0)
    validate(config)
    override(config, "steps", "100")
    assert (config.epochs, config.steps) == (0, 100)
    assert type(config.epochs) is float
    validate(config)


def test_setting_one_length_to_zero_leaves_the_other():
    config = default_config()
    override(config, "steps", "100")
    override(config, "epochs", "0")
    assert config.steps == 100


def test_in_a_file_both_of_epochs_and_steps_are_a_mistake(tmp_path):
    both = load_config(
        str(write_config(tmp_path / "both.py", "config = load_config('cifar_20')\nconfig.epochs = 10.0"))
    )
    with pytest.raises(UsageError, match="the length of the training is epochs or steps; both are set"):
        validate(both)
    neither = load_config(str(write_config(tmp_path / "neither.py", "config.batch_size = 64")))
    with pytest.raises(UsageError, match="the length of the training is epochs or steps; neither is set"):
        validate(neither)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_loads_and_is_valid(name):
    config = load_config(name)
    validate(config)
    assert set(flatten(config)) == {field.name for field in FIELDS}


def test_a_config_is_found_by_bare_name_and_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = shipped_configs()["cifar_20"]
    assert path.is_file()
    assert path.is_absolute()
    expected = flatten(load_config(str(path)))
    assert expected["steps"] == 64_000
    for name in ("cifar_20", "cifar_20.py", "configs/cifar_20", "configs/cifar_20.py"):
        assert find_config(name) == path
        assert flatten(load_config(name)) == expected


def test_a_file_of_ones_own_is_found_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    path = write_config(tmp_path / "mine" / "small.py", "config.batch_size = 32")
    assert load_config(str(path)).batch_size == 32
    assert load_config("mine/small.py").batch_size == 32


def test_a_file_here_comes_before_a_shipped_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "cifar_20.py", "config.batch_size = 7")
    assert load_config("cifar_20.py").batch_size == 7
    assert load_config("cifar_20").batch_size == 128


def test_a_variant_starts_from_a_shipped_config(tmp_path):
    path = write_config(tmp_path / "v.py", "config = load_config('cifar_20')\nconfig.model.name = 'cifar_resnet110'")
    config = load_config(str(path))
    assert (config.model.name, config.schedule.boundaries) == ("cifar_resnet110", (32_000, 48_000))
    assert load_config("cifar_20").model.name == "cifar_resnet20"


def test_an_unknown_config_names_the_nearest():
    with pytest.raises(
        UsageError, match=r"--config=cifra_20: no such file or shipped config; did you mean 'cifar_20'\?"
    ):
        load_config("cifra_20")
    with pytest.raises(UsageError, match=r"--config=nowhere/mine\.py: no such file"):
        load_config("nowhere/mine.py")


BAD_BODIES = [
    ("config.batch_size = 1\nconfig.batch_siz = 3", 7, "AttributeError: .*batch_siz"),
    ("config.batch_size = '3'", 6, "TypeError: .*batch_size"),
    ("config.steps = undefined", 6, "NameError: .*undefined"),
    ("if True\n    pass", 6, "SyntaxError"),
    ("raise ValueError", 6, "ValueError"),
]


@pytest.mark.parametrize(("body", "line", "message"), BAD_BODIES)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, body, line, message):
    path = write_config(tmp_path / "bad.py", body)
    with pytest.raises(UsageError, match=rf"^{path}:{line}: {message}") as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_file_named_by_a_relative_path_has_its_line_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "bad.py", "config.batch_siz = 3")
    with pytest.raises(UsageError, match=r"bad\.py:6: AttributeError"):
        load_config("bad.py")


def test_a_mistake_in_a_file_is_said_in_a_line_that_can_be_read(tmp_path):
    path = write_config(tmp_path / "bad.py", "config.batch_siz = 3")
    with pytest.raises(UsageError, match=r"batch_siz.*[Dd]id you mean .batch_size.") as error:
        load_config(str(path))
    assert len(str(error.value)) < len(str(path)) + 200


def test_a_file_whose_get_config_returns_no_config_is_a_mistake(tmp_path):
    path = tmp_path / "dict.py"
    path.write_text("def get_config():\n    return {'batch_size': 3}\n")
    with pytest.raises(UsageError, match=r"dict\.py: get_config\(\) returned dict, not a config"):
        load_config(str(path))


def test_a_file_without_get_config_is_a_mistake(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(UsageError, match=r"empty\.py:.*get_config"):
        load_config(str(path))


def valid(**values) -> ml_collections.ConfigDict:
    config = default_config()
    config.steps = 10
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


def test_the_defaults_with_a_length_are_valid():
    validate(valid())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.mean", "image", "data.mean=image is unknown: pixel, channel, imagenet, none"),
        ("data.std", "pixel", "data.std=pixel is unknown: channel, imagenet, none"),
        ("optimizer.momentum_style", "Torch", "optimizer.momentum_style=Torch is unknown: torch, caffe"),
        ("optimizer.name", "adam", "optimizer.name=adam is unknown: sgd, lars"),
        ("optimizer.trust", 0.0, "optimizer.trust=0.0 must be positive"),
        ("optimizer.decay", "none", "optimizer.decay=none is unknown: all, kernels"),
        ("schedule.name", "exp", "schedule.name=exp is unknown: constant, steps, linear, cosine, polynomial, plateau"),
        ("batch_size", 0, "batch_size=0 must be positive"),
        ("batch_size", -128, "batch_size=-128 must be positive"),
        ("eval.batch_size", 0, "eval.batch_size=0 must be positive"),
        ("log.every", 0, "log.every=0 must be positive"),
        ("checkpoint.keep", 0, "checkpoint.keep=0 must be positive"),
        ("optimizer.accumulate", 0, "optimizer.accumulate=0 must be positive"),
        ("schedule.learning_rate", 0.0, "schedule.learning_rate=0.0 must be positive"),
        ("schedule.patience", 0, "schedule.patience=0 must be positive"),
        ("loss.label_smoothing", 1.0, "loss.label_smoothing=1.0 must be at least 0 and below 1"),
        ("optimizer.momentum", 1.0, "optimizer.momentum=1.0 must be at least 0 and below 1"),
        ("optimizer.momentum", -0.1, "optimizer.momentum=-0.1 must be at least 0 and below 1"),
        ("optimizer.ema", 1.0, "optimizer.ema=1.0 must be at least 0 and below 1"),
        ("model.batch_norm_momentum", 1.0, "model.batch_norm_momentum=1.0 must be at least 0 and below 1"),
        ("data.holdout", -1, "data.holdout=-1 must not be negative"),
        ("data.pad", -1, "data.pad=-1 must not be negative"),
        ("steps", -1, "steps=-1 must not be negative"),
        ("epochs", -0.5, "epochs=-0.5 must not be negative"),
        ("eval.every", -1, "eval.every=-1 must not be negative"),
        ("checkpoint.minutes", -1.0, "checkpoint.minutes=-1.0 must not be negative"),
        ("schedule.warmup_steps", -1, "schedule.warmup_steps=-1 must not be negative"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_would_be_right(name, value, message):
    with pytest.raises(UsageError) as error:
        validate(valid(**{name: value}))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value"), [("schedule.learning_rate", NAN), ("optimizer.momentum", NAN), ("epochs", NAN), ("seed", -1)]
)
def test_what_is_no_number_or_no_seed_is_refused(name, value):
    with pytest.raises(UsageError, match=f"^{name}={value} must"):
        validate(valid(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer.momentum", 0.0), ("optimizer.momentum", 0.999), ("loss.label_smoothing", 0.0), ("batch_size", 1),
     ("checkpoint.minutes", 0.0), ("optimizer.weight_decay", 0.0), ("schedule.end_rate", 0.0)],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_valid(name, value):
    validate(valid(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.weight_decay", -1e-4),
        ("optimizer.weight_decay", NAN),
        ("optimizer.clip_norm", -1.0),  # Would turn the gradient round.
        ("schedule.factor", -0.1),
        ("schedule.end_rate", -0.1),
        ("schedule.end_step", -1),
        ("schedule.warmup_rate", -0.01),
        ("schedule.warmup_error", -80.0),
        ("schedule.threshold", NAN),
        ("schedule.boundaries", (-1,)),
        ("schedule.learning_rate", INF),
        ("checkpoint.minutes", INF),
    ],
)
def test_nonsense_in_the_recipe_is_refused(name, value):
    with pytest.raises(UsageError, match=name):
        validate(valid(**{name: value}))


def test_a_training_without_an_end_is_refused():
    with pytest.raises(UsageError, match="epochs"):
        validate(valid(steps=0, epochs=INF))


def test_a_seed_beyond_32_bits_is_refused():
    with pytest.raises(UsageError, match="seed"):
        validate(valid(seed=2**32))


def test_nesterov_goes_only_with_torchs_momentum():
    with pytest.raises(UsageError, match=r"optimizer\.nesterov=true goes with optimizer\.momentum_style=torch"):
        validate(valid(**{"optimizer.nesterov": True, "optimizer.momentum_style": "caffe"}))
    validate(valid(**{"optimizer.nesterov": True}))


def test_lars_decays_kernels_alone():
    with pytest.raises(UsageError, match=r"optimizer\.name=lars .*set optimizer\.decay=kernels"):
        validate(valid(**{"optimizer.name": "lars"}))
    for style in ("torch", "caffe"):
        validate(valid(**{"optimizer.name": "lars", "optimizer.decay": "kernels", "optimizer.momentum_style": style}))


def test_a_config_survives_json():
    config = load_config("cifar_20")
    stored = json.loads(json.dumps(flatten(config)))
    assert stored == flatten(config)
    assert stored["schedule.boundaries"] == [32_000, 48_000]
    assert recipe_changes(stored, flatten(config)) == []


def test_recipe_changes_are_listed_as_before_and_now():
    before = flatten(valid())
    now = flatten(valid(**{"batch_size": 256, "schedule.boundaries": (5,), "model.name": "cifar_resnet56"}))
    assert recipe_changes(before, now) == [
        "model.name: cifar_resnet20 -> cifar_resnet56",
        "batch_size: 128 -> 256",
        "schedule.boundaries: [] -> [5]",
    ]


def test_a_run_may_go_on_longer_elsewhere_and_be_logged_otherwise():
    free = {"steps": 20, "data.dir": "/elsewhere", "data.workers": 3, "data.cache_dir": "/tmp", "log.every": 7,
            "log.tensorboard": False, "checkpoint.every": 5, "checkpoint.minutes": 1.0, "checkpoint.keep": 3,
            "eval.batch_size": 50, "model.scan": "true", "model.remat": True, "profile.steps": "3:4"}  # fmt: skip
    assert recipe_changes(flatten(valid()), flatten(valid(**free))) == []


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_the_length_is_part_of_the_recipe_where_the_rate_ends_with_it(name):
    def changes(end_step: int) -> list[str]:
        run = {"schedule.name": name, "schedule.end_step": end_step}
        return recipe_changes(flatten(valid(**run)), flatten(valid(steps=20, **run)))

    assert changes(end_step=0) == ["steps: 10 -> 20"]
    assert changes(end_step=10) == []


def test_whatever_reaches_the_weights_is_part_of_the_recipe():
    recipe = {field.name for field in FIELDS if field.recipe}
    sections = ("model.", "loss.", "optimizer.", "schedule.")
    rounding = {"model.scan", "model.remat", "model.space_to_depth"}  # The same arithmetic in another order.
    assert recipe >= {field.name for field in FIELDS if field.name.startswith(sections)} - rounding
    assert recipe >= {"seed", "batch_size", "data.source", "data.name", "data.labels", "data.holdout",
                      "data.image_size", "data.mean", "data.std", "data.pad", "data.flip", "init.weights"}  # fmt: skip


def test_a_field_that_is_newer_than_the_run_counts_as_its_default():
    before = flatten(valid())
    del before["optimizer.ema"], before["schedule.boundaries"]
    assert recipe_changes(before, flatten(valid())) == []
    (change,) = recipe_changes(before, flatten(valid(**{"optimizer.ema": 0.9})))
    assert change.startswith("optimizer.ema: ")
    assert change.endswith(" -> 0.9")


def test_configs_come_from_the_package_where_it_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "resnet_jax"
    (package / "configs" / "detection").mkdir(parents=True)
    monkeypatch.setattr(config_lib, "__file__", str(package / "config.py"))
    write_config(package / "configs" / "one.py", "pass")
    write_config(package / "configs" / "detection" / "two.py", "pass")
    assert sorted(shipped_configs()) == ["detection/two", "one"]


def test_an_evaluation_asks_nothing_of_the_training_s_length():
    config = default_config()
    config.epochs, config.schedule.name = 40.0, "cosine"
    before = flatten(config)
    config.epochs = 8.0
    assert recipe_changes(before, flatten(config)) == ["epochs: 40.0 -> 8.0"]
    assert recipe_changes(before, flatten(config), training=False) == []
