"""All tests run on eight virtual CPU devices; those of one device take a mesh of one.

What several tests, or the processes that they start, compile alike is compiled once: one folder is all pytest's.
Tests compile without LLVM's optimizations, which would take most of the time; those marked slow, and the processes that
tests start, with them: they compute for longer than they compile.
"""

import os
import shutil
import tempfile

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_runtest_setup(item):
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("slow") is None)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the environment.
        folder = tempfile.mkdtemp(prefix="resnet_jax_compiled_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            # Of what another process is just writing, or was killed while it wrote.
            "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache",
        }
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
