"""How JAX compiles for CPUs, and what it has compiled: kept between commands, in a folder of the user's."""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import time
import warnings

from resnet_jax.download import cache_folder

_FOLDER, _SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_WORTH_KEEPING = 0.3  # Seconds of compiling; to look a program up and load it takes some hundredths.
_NAME = "compiled"  # The default folder, in the user's cache.
_DAYS, _BYTES = 30, 4 << 30  # What is older, or beyond so much in all, is removed.

_LIBRARY = "--xla_cpu_experimental_ynn_fusion_type"  # What XLA:CPU leaves to YNNPACK.
_OWN = f"{_LIBRARY}=-individual_convolution"
_KNOWN = ((0, 10, 2), (0, 13))  # From this version of jaxlib and below that; a flag that others don't know ends them.
_PLUGINS = ("PJRT_NAMES_AND_LIBRARY_PATHS", "TPU_LIBRARY_PATH")  # By which JAX finds compilers, besides packages.


def use_own_convolutions() -> None:
    """Has XLA:CPU compute convolutions itself, which some versions leave to YNNPACK.

    That takes up to four times as long for kernels' gradients (``benchmarks/RESULTS.md``). Nothing is changed where
    accelerators may be, whose compilers read the same variable, or where that says already what to leave, or names a
    file. To be called before JAX starts, as commands do.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    if _LIBRARY in given or (given and not given.startswith("-")):
        return
    if os.environ.get("JAX_PLATFORMS") != "cpu" and _accelerators():
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3])
        if _KNOWN[0] <= version < _KNOWN[1]:
            os.environ["XLA_FLAGS"] = f"{given} {_OWN}".strip()


def leave_convolutions() -> None:
    """Takes back what ``use_own_convolutions`` has said, where a compiler of another version will read it."""
    if _OWN in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(_OWN, "").strip()


def _accelerators() -> bool:
    """Whether JAX may find any."""
    packages = importlib.metadata.entry_points(group="jax_plugins") or any(
        importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")
    )
    return bool(packages) or any(name in os.environ for name in _PLUGINS)


def keep_programs() -> None:
    """Has JAX keep what takes a while to compile: in ``$JAX_COMPILATION_CACHE_DIR``, by default in the user's cache.

    An empty variable turns it off; so does a default folder that can't be written. JAX knows programs again by their
    code, its own version, flags and devices.
    """
    folder = os.environ.get(_FOLDER)
    if folder is None:
        folder = _own_folder()
    # JAX reads its environment when it is imported, which would take a while here and may have been done before.
    os.environ.pop(_FOLDER, None)  # An empty one it would take for the current folder.
    if folder:
        os.environ[_FOLDER] = folder
    seconds = os.environ.setdefault(_SECONDS, str(_WORTH_KEEPING))
    jax = sys.modules.get("jax")
    if jax:
        jax.config.update(_FOLDER.lower(), folder or None)
        jax.config.update(_SECONDS.lower(), float(seconds))


def keep_shared_programs() -> None:
    """For a run of several processes: nothing is kept but in a folder that was named, which is for all hosts to share.

    JAX has process 0 alone write. GPUs' programs are tuned by all processes together while they compile: where one has
    the program and others don't, these would wait for it.
    """
    jax = sys.modules["jax"]
    with contextlib.suppress(RuntimeError):  # No home.
        if jax.config.jax_compilation_cache_dir == str(cache_folder() / _NAME):
            jax.config.update(_FOLDER.lower(), None)


def _own_folder() -> str:
    """The default folder, made and tidied; empty where it can't be used."""
    try:
        folder = cache_folder() / _NAME
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tidy(folder)
    except (OSError, RuntimeError):  # No home, or one that can't be written.
        return ""
    if not os.access(folder, os.W_OK):
        return ""
    # A full disk, or an entry that another process is writing: it is compiled as ever.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    # On CPUs that gather slowly (Intel's from Skylake to Tiger Lake) XLA says of each program that it loads that it may
    # be of another machine, taking a preference for an ability: https://github.com/openxla/xla/issues/44565
    # Without accelerators, whose errors it would hide.
    if os.environ.get("JAX_PLATFORMS") == "cpu" and _gathers_slowly():
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return str(folder)


def _gathers_slowly() -> bool:
    """Whether this CPU has the bug that Linux calls ``gds``, whose cure makes it slow at gathering."""
    try:
        found = re.search(r"^bugs\s*:(.*)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(found) and "gds" in found[1].split()


def tidy(folder: pathlib.Path, days: float = _DAYS, size: int = _BYTES) -> None:
    """Removes files of a folder that are older than ``days``, and the oldest beyond ``size`` bytes in all.

    Age counts from writing, not from reading: an entry that a killed process left half written goes in time too.
    """
    found = []
    for path in folder.iterdir():
        try:
            if path.is_file():
                found.append((path.stat(), path))
        except FileNotFoundError:  # Another process tidies too.
            continue
    kept = 0
    for status, path in sorted(found, key=lambda one: one[0].st_mtime, reverse=True):
        kept += status.st_size
        if kept > size or status.st_mtime < time.time() - 86400 * days:
            path.unlink(missing_ok=True)
