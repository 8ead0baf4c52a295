"""What one process has compiled the next one finds, in the user's cache; none where that is turned off."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from processes import ROOT, run
import pytest

from resnet_jax import compilation
from resnet_jax.compilation import tidy

# Compiles one function and prints what came of it, and how often the cache had what was asked for.
PROGRAM = """
import sys
if "early" in sys.argv: import jax
from resnet_jax.compilation import keep_programs
keep_programs()
import jax, json
found = []
jax.monitoring.register_event_listener(lambda name, **unused: found.append(name))
y = jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4)) / 3)
bits = jax.device_get(y).tobytes().hex()
print(json.dumps({"hits": found.count("/jax/compilation_cache/cache_hits"), "bits": bits}))
"""


def start(cache_home: pathlib.Path | str, *arguments: str, **variables: str) -> dict:
    own = ("JAX_COMPILATION_CACHE_DIR", "PYTHONWARNINGS")
    environ = {name: value for name, value in os.environ.items() if name not in own} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(cache_home),
    }
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environ | variables, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_the_next_process_finds_what_one_has_compiled_and_computes_the_same_bits(tmp_path):
    first = start(tmp_path)
    assert first["hits"] == 0
    assert any((tmp_path / "resnet_jax/compiled").iterdir())
    for arguments in ([], ["early"]):  # Also where JAX has read its environment already.
        again = start(tmp_path, *arguments)
        assert again["hits"] > 0
        assert again["bits"] == first["bits"]


def test_an_entry_that_was_left_half_written_is_compiled_again_without_a_word(tmp_path):
    first = start(tmp_path)
    for path in (tmp_path / "resnet_jax/compiled").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    again = start(tmp_path)
    assert again == first


def test_it_can_be_put_elsewhere_and_turned_off(tmp_path):
    start(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert any((tmp_path / "mine").iterdir())
    start(tmp_path / "home", JAX_COMPILATION_CACHE_DIR="")
    assert not (tmp_path / "home").exists()


def test_a_home_that_can_t_be_written_is_passed_over_without_a_word(tmp_path):
    (tmp_path / "file").touch()
    assert start(tmp_path / "file")["hits"] == 0


def test_the_old_and_what_is_too_much_go(tmp_path):
    now = time.time()
    for name, size, days in [("today", 30, 0), ("week", 30, 7), ("fortnight", 30, 14), ("last_year", 1, 365)]:
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, (now, now - 86400 * days))  # Read just now.
    tidy(tmp_path, 30, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"today", "week", "fortnight"}
    tidy(tmp_path, 30, 70)
    assert {path.name for path in tmp_path.iterdir()} == {"today", "week"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("named", [False, True])
def test_a_second_start_compiles_nothing_and_trains_to_the_same_bits(tmp_path, monkeypatch, processes, named):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    own, other = tmp_path / "resnet_jax/compiled", tmp_path / "named"
    if named:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(other))
    compiled = []
    for name in ("one", "two"):
        ends = run(processes, f"--workdir={tmp_path / name}", "--config.steps=4")
        assert [end.status for end in ends] == [0] * processes, ends
        compiled.append({path.name for path in (other if named else own).iterdir()})
    assert compiled[1] == compiled[0]
    # Each host has its own, which several processes leave alone.
    assert any("step" in name for name in compiled[0]) == (named or processes == 1)
    with np.load(tmp_path / "one/predictions.npz") as a, np.load(tmp_path / "two/predictions.npz") as b:
        assert a["probabilities"].tobytes() == b["probabilities"].tobytes()


KERNELS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


@pytest.mark.parametrize(
    ("version", "plugins", "variables", "expected"),
    [
        ("0.10.2", False, {}, KERNELS),
        ("0.10.2", True, {"JAX_PLATFORMS": "cpu"}, KERNELS),
        ("0.12.0.1", False, {"XLA_FLAGS": "--xla_dump_to=x"}, f"--xla_dump_to=x {KERNELS}"),
        ("0.10.2", False, {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type="},
         "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.10.2", False, {"XLA_FLAGS": "flags.txt"}, "flags.txt"),  # Where more flags would be part of the name.
        ("0.9.3", False, {}, None),
        ("0.13.0", False, {}, None),
        ("0.10.2", True, {}, None),
        ("0.10.2", True, {"JAX_PLATFORMS": "cuda"}, None),
        ("0.10.2", False, {"TPU_LIBRARY_PATH": "libtpu.so"}, None),
    ],
)  # fmt: skip
def test_cpus_compute_convolutions_by_kernels_of_their_own(version, plugins, variables, expected, monkeypatch):
    found = ["cuda"] if plugins else []
    monkeypatch.setattr(compilation.importlib.metadata, "version", lambda name: {"jaxlib": version}[name])
    monkeypatch.setattr(compilation.importlib.metadata, "entry_points", lambda group: {"jax_plugins": found}[group])
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "TPU_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    compilation.use_own_convolutions()
    assert os.environ.get("XLA_FLAGS") == expected
    compilation.leave_convolutions()
    assert KERNELS not in os.environ.get("XLA_FLAGS", "")


def test_this_jax_does_as_it_is_told():
    program = """
from resnet_jax.compilation import use_own_convolutions
use_own_convolutions()
import jax
shapes = jax.ShapeDtypeStruct((128, 32, 32, 16), "float32"), jax.ShapeDtypeStruct((3, 3, 16, 16), "float32")
convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
gradient = jax.jit(jax.grad(lambda k, x: jax.numpy.sin(convolve(x, k)).sum()))
print("ynn" in gradient.lower(*shapes[::-1]).compile().as_text())
"""

    def uses_the_library(**variables: str) -> str:
        environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert uses_the_library() == "False"
    # Else there is nothing to be said to it any more.
    assert uses_the_library(XLA_FLAGS=KERNELS.replace("-individual", "+individual")) == "True"
