"""The plan of a training: of the very step that is trained, for the devices here and for TPUs that nobody has."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from resnet_jax.classification.planned import abstract_step, plan
from resnet_jax.classification.task import Classification
from resnet_jax.config import load_config
from resnet_jax.distributed import make_mesh, shard_batch
from resnet_jax.errors import UsageError
from resnet_jax.planning import estimate as estimate_lib, topology as topology_lib
from resnet_jax.planning.chips import CHIPS, GIB
from resnet_jax.planning.estimate import Compiled
from resnet_jax.planning.links import scaling_table
from resnet_jax.planning.memory import Memory
from resnet_jax.planning.report import describe, describe_scaling
from resnet_jax.planning.topology import Topology, open_topology

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_plan(*flags: str, devices: int = 8, cwd=None) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # As these tests compile.
    command = [sys.executable, "-m", "resnet_jax.plan", *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)


TINY = ("--config=digits_20", "--config.model.name=cifar_resnet8", "--topology=local", "--json")


def digits(batch_norm: str):
    config = load_config("digits_20")
    config.model.name, config.model.batch_norm, config.batch_size = "cifar_resnet8", batch_norm, 64
    return config


def test_the_plan_is_of_the_step_that_is_trained(tmp_path):
    found = run_plan(*TINY, "--config.model.batch_norm=group:8", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    planned = json.loads(found.stdout)
    assert not list(tmp_path.iterdir())

    mesh = make_mesh()
    with jax.set_mesh(mesh):
        task = Classification(digits("group:8"), mesh)
        batch = shard_batch(mesh, next(iter(task.batches(0))))
        arguments = (task.initial_state(), batch, task.resident)
        compiled = jax.jit(task.train_step, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert planned["flops"] == compiled.cost_analysis()["flops"]
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert planned["memory_bytes"] == total - memory.alias_size_in_bytes
    assert planned["chips"] == planned["devices"] == 8
    assert planned["batch_size"] == 64
    assert planned["batch_per_device"] == 8
    assert planned["train_images"] == task.total_steps * 64
    unknown = ("estimated_cycles", "images_per_second", "memory_limit_bytes", "hours", "cost", "peak_share")
    assert [planned[name] for name in unknown] == [None] * len(unknown)
    assert planned["trace_seconds"] > 0
    assert planned["compile_seconds"] > 0
    assert found.stderr.count("\n") == 3  # What it is doing.


@pytest.mark.parametrize(
    ("batch_norm", "accumulate", "least", "most"),
    [
        ("group:4", 1, 1, 16),
        pytest.param("per_device", 1, 1, 16, marks=pytest.mark.slow),
        pytest.param("group:4", 2, 1, 16, marks=pytest.mark.slow),
        ("global", 1, 17, 1000),
    ],
)
def test_layers_exchange_nothing_where_a_device_holds_whole_groups(batch_norm, accumulate, least, most):
    config = digits(batch_norm)
    config.model.name = "cifar_resnet14"  # 13 BN layers.
    config.optimizer.accumulate = accumulate
    found = plan(config, open_topology("local"), 8, None, lambda line: None)
    assert least <= found.collectives <= most
    gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(config)[0].params))
    # Statistics and metrics are little besides. On CPUs parts are no loop, and each part's gradients are exchanged.
    assert gradients <= found.collective_bytes < 1.03 * accumulate * gradients


def abstract(config, devices: int = 8):
    mesh = make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return abstract_step(config, mesh)[1]


@pytest.mark.parametrize("source", ["digits", "cifar"])
def test_the_shapes_without_data_are_those_with(source, monkeypatch):
    config = digits("global")
    if source == "cifar":
        config.data.source = "cifar"
        config.data.mean = "pixel"
        config.data.holdout = 5000
        rng = np.random.default_rng(0)
        from resnet_jax.data import cifar
        from resnet_jax.data.sources import Dataset, Images

        parts = [Images(np.broadcast_to(rng.integers(0, 256, (1, 32, 32, 3), np.uint8), (n, 32, 32, 3)),
                        np.zeros(n, np.int32)) for n in (50_000, 10)]  # fmt: skip
        monkeypatch.setattr(cifar, "load", lambda *_: Dataset(*parts, tuple("abcdefghij")))
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        real = task.initial_state(), shard_batch(mesh, next(iter(task.batches(0)))), task.resident
    describe_tree = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert describe_tree(abstract(config, 1)) == describe_tree(real)


def test_streams_bring_their_images():
    config = load_config("imagenet_50_pod")
    config.model.name = "resnet18"
    config.batch_size = 32
    state, batch, resident = abstract(config)
    shapes = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in batch.items()}
    assert shapes == {
        "images": ((32, 224, 224, 3), "uint8"),
        **dict.fromkeys(("labels", "index", "epoch"), ((32,), "int32")),
    }
    assert {name: leaf.shape for name, leaf in resident.items()} == {"mean": (3,), "std": (3,), "seed": ()}
    assert state.params["head"]["kernel"].shape == (512, 1000)
    assert batch["images"].sharding.shard_shape((32, 224, 224, 3)) == (4, 224, 224, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "image_folder"}, "set --config.model.num_classes"),
        ({"data.source": "image_folder", "model.num_classes": 5}, "set --config.data.image_size"),
        ({"data.source": "image_folder", "model.num_classes": 5, "data.image_size": 32}, "data.placement=stream"),
        ({"batch_size": 20}, "batch_size=20 does not divide over the 8 devices of local; --batch_per_chip=N"),
        ({"model.batch_norm": "group:48"}, "does not divide into groups of 48"),
        ({"model.name": "resnet51"}, "did you mean 'resnet50'"),
    ],
)
def test_what_can_t_be_planned_is_one_line_that_says_what_would_be_right(changes, message):
    config = digits("global")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UsageError, match=message):
        plan(config, open_topology("local"), None, None, lambda line: None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", "no such chip; did you mean 'v5[ep]'.*v5e:2x2.* or local"),
        ("gpu", "no such chip; names are as v3:2x2"),
        ("v5e:4x4x4", "v5e has 2 axes; names are as v5e:2x2"),
        ("v4:4x4", "v4 has 3 axes"),
        ("v5e", "v5e has 2 axes"),
        ("v5e:0x4", "v5e has 2 axes"),
    ],
)
def test_an_unknown_topology_is_one_line(name, message):
    with pytest.raises(UsageError, match=message):
        open_topology(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'resnet_jax\[tpu\]'"):
        open_topology("v5e:2x2")


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "ABORTED: Internal error when accessing libtpu lockfile.",
            "another process has the TPU compiler",
        ),
        (
            'INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible',
            "no such slice .INVALID.* not divisible",
        ),
    ],
)
def test_what_the_compiler_refuses_is_one_line(reason, message, monkeypatch):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError(reason)

    monkeypatch.setattr(topology_lib.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topology_lib.topologies, "get_topology_desc", refuse)
    with pytest.raises(UsageError, match=message):
        open_topology("v5e:3x5")


def fake_topology(chip: str, shape: tuple[int, ...]) -> Topology:
    devices = CHIPS[chip].devices * int(np.prod(shape))
    return Topology(f"{chip}:{'x'.join(map(str, shape))}", [None] * devices, CHIPS[chip], shape)


COMPILED = Compiled(
    fits=True, memory=Memory(1 * GIB, 4 * GIB), flops=1_000_000_000_000, bytes_accessed=12_800_000,
    collectives={"all-reduce": 2}, collective_bytes=100_000_000, estimated_cycles=94_000_000, trace_seconds=1.0,
    compile_seconds=60.0,
)  # fmt: skip


def test_the_figures_follow_from_the_compiler_s():
    found = estimate_lib.estimate("net", fake_topology("v3", (2, 2)), 1024, COMPILED, 1_281_167 * 90, price=2.0)
    assert (found.chips, found.devices, found.batch_per_device) == (4, 8, 128)
    assert found.memory_bytes == 8 * GIB  # Two cores.
    assert found.memory_limit_bytes == 32 * GIB
    assert found.compute_seconds == pytest.approx(0.1)  # 94 million cycles of 0.94 GHz.
    # Each of four chips sends 1.5 times the bytes over two links of 82 GB/s, and four hops twice.
    assert found.collective_seconds == pytest.approx(0.15e9 / 164e9 + 8e-6)
    seconds = found.compute_seconds + found.collective_seconds
    assert found.images_per_second == pytest.approx(1024 / seconds)
    assert found.peak_share == pytest.approx(8e12 / seconds / (4 * 123e12))
    assert found.hours == pytest.approx(1_281_167 * 90 / 3600 / found.images_per_second)
    assert found.cost == pytest.approx(found.hours * 4 * 2.0)
    assert found.bytes_accessed_per_image == 100_000
    text = "\n".join(describe(found, "group:32"))
    assert "8.00 of 32.0 GiB a chip (25%)" in text
    assert "2 a step, 100.0 MB (2 all-reduce)" in text
    assert "a cost model, not a measurement" in text


def test_what_is_unknown_is_none():
    blank = Compiled(True, None, collectives={}, collective_bytes=0, trace_seconds=1.0, compile_seconds=1.0)
    topology = Topology("local", jax.devices(), None, None)
    found = estimate_lib.estimate("net", topology, 64, blank, None, price=2.0)
    for name in ("memory_bytes", "flops", "estimated_cycles", "images_per_second", "hours", "cost", "peak_share"):
        assert getattr(found, name) is None
    assert describe(found, "global")


class Compiler:
    """In the compiler's place: needs 1 GiB and an eighth of one for each image of a device; says what it is asked."""

    def __init__(self):
        self.sizes = []

    def __call__(self, step, arguments, memory_limit, progress):
        images = arguments[1]["index"]
        size = images.sharding.shard_shape(images.shape)[0]
        self.sizes.append(size)
        memory = Memory(1 * GIB, (8 + size) * GIB // 8)
        return Compiled(memory.total <= memory_limit, memory, trace_seconds=1.0, compile_seconds=1.0)


def test_where_it_does_not_fit_the_largest_that_does_is_found(monkeypatch):
    compiler = Compiler()
    monkeypatch.setattr("resnet_jax.classification.planned.compile_step", compiler)
    monkeypatch.setattr(Topology, "memory_limit", 16 * GIB)
    topology = Topology("v5e:2x4", jax.devices(), CHIPS["v5e"], (2, 4))
    found = plan(digits("group:32"), topology, 512, None, lambda line: None)
    assert not found.fits
    assert found.largest_batch_per_device == 96  # 120 would fit: three whole groups.
    assert compiler.sizes == [512, 256, 128, 64, 96]
    (_, line) = describe(found, "group:32")
    assert line == (
        "does not fit: needs 65.0 GiB of the 16.0 GiB a chip has; the largest found that does is --batch_per_chip=96"
        " (group:32 kept whole)"
    )


def test_the_scaling_table_says_what_it_assumes():
    rows = scaling_table(CHIPS["v5e"], compute_seconds=0.07, images=128, size=1e8, collectives=2)
    text = describe_scaling(rows)
    assert text[-1].startswith("- ")
    assert any("8 of 16x16" in line for line in text)
    assert any("half of a ring's speed" in line for line in text)


def test_flags_that_are_missing_or_wrong_end_with_2(tmp_path):
    for flags, message in (
        (["--config=digits_20"], "--topology is needed"),
        (["--config=digits_20", "--topology=v9:2x2"], "no such chip"),
        ([*TINY[:-1], "--scaling"], "--scaling needs a TPU topology"),
    ):
        found = run_plan(*flags, cwd=tmp_path)
        assert found.returncode == 2
        assert message in found.stderr
        assert found.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_tpu_is_compiled_for_without_one(tmp_path):
    pytest.importorskip("libtpu")
    flags = ("--config=cifar_20", "--topology=v5e:2x2", "--batch_per_chip=128", "--scaling", "--json")
    found = run_plan(*flags, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    planned = json.loads(found.stdout)
    assert planned["chips"] == planned["devices"] == 4
    assert planned["batch_size"] == 512
    assert planned["memory_limit_bytes"] == 16 * GIB
    assert 150e6 < planned["memory_bytes"] < 2 * GIB  # The training images alone are 153.6 MB.
    # 41 million multiply-adds an image; the backward pass is two more, but for the images' gradient.
    assert planned["flops"] / 128 == pytest.approx(3 * 2 * 40.8e6, rel=0.1)
    assert 1 <= planned["collectives"] <= 16
    # bfloat16 gradients of 270 thousand parameters, and statistics in float32.
    assert planned["collective_bytes"] == pytest.approx(2 * 269_722, rel=0.1)
    assert planned["images_per_second"] > 10_000
    assert len(planned["scaling"]) == 9


@pytest.mark.slow
def test_every_chip_of_the_table_is_one_the_compiler_knows(tmp_path):
    pytest.importorskip("libtpu")
    program = """
import os
from resnet_jax.planning.chips import CHIPS, ENVIRONMENT
os.environ |= ENVIRONMENT
from resnet_jax.planning.topology import open_topology
for chip in CHIPS.values():
    found = open_topology(chip.example)
    assert {device.device_kind for device in found.devices} == {chip.kind}, found.devices
    assert found.chips == 4, found.devices
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
