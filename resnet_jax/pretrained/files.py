"""Files of named arrays: what kind they are is in their names' endings."""

from collections.abc import Callable
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open

from resnet_jax.errors import UsageError
from resnet_jax.pretrained.caffe import read_caffemodel
from resnet_jax.pretrained.keras import read_h5

Arrays = dict[str, np.ndarray]


def read_arrays(path: pathlib.Path) -> tuple[Arrays, dict[str, str]]:
    """Arrays by name, and the file's metadata.

    Raises:
      UsageError: not there, damaged, of an unknown kind, or not weights alone.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _READERS:
        return _READERS[path.suffix](path), {}
    if path.suffix == ".stablehlo":
        raise UsageError(f"{path}: is a program with weights inside; jax.export.deserialize reads it")
    raise UsageError(
        f"{path}: weights are files (.safetensors, .pth, .th, .caffemodel, .h5) or work directories of runs"
    )


def _read_safetensors(path: pathlib.Path) -> tuple[Arrays, dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a whole .safetensors file ({' '.join(str(error).split())})") from error


def _read_torch(path: pathlib.Path) -> Arrays:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{path}: torch files need torch: pip install 'resnet_jax[torch]'; .safetensors do not"
        ) from error
    try:
        # Never more than arrays and plain containers: a pickle may hold any program.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # It raises whatever its parts raise.
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__  # Its advice is not ours.
        raise UsageError(f"{path}: not a whole torch file of weights alone ({reason[:160]})") from error
    for wrapping in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) and value.layout == torch.strided and not value.is_quantized
        for name, value in content.items()
    ):
        raise UsageError(f"{path}: holds no state dict (names with plain arrays)")
    arrays = {name: value.detach() for name, value in content.items()}
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in arrays.items()
    }


_READERS: dict[str, Callable[[pathlib.Path], Arrays]] = {
    **dict.fromkeys((".pth", ".th", ".pt", ".tar", ".bin"), _read_torch),
    ".caffemodel": read_caffemodel,
    **dict.fromkeys((".h5", ".hdf5"), read_h5),
}
