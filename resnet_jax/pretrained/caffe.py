"""Caffe's files: trained networks (``.caffemodel``) and mean images (``.binaryproto``).

The messages are told to the protobuf library here, as far as they matter (field numbers: BVLC's ``caffe.proto``).
"""

import functools
import math
import pathlib
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
import numpy as np

from resnet_jax.errors import UsageError

_Field = descriptor_pb2.FieldDescriptorProto
# Message -> field -> (number, type, whether there may be many). Packed floats are read as the bytes they are.
_MESSAGES: dict[str, dict[str, tuple[int, str | int, bool]]] = {
    "BlobShape": {"dim": (1, _Field.TYPE_INT64, True)},
    "BlobProto": {
        "num": (1, _Field.TYPE_INT32, False),
        "channels": (2, _Field.TYPE_INT32, False),
        "height": (3, _Field.TYPE_INT32, False),
        "width": (4, _Field.TYPE_INT32, False),
        "data": (5, _Field.TYPE_BYTES, True),
        "shape": (7, "BlobShape", False),
    },
    "LayerParameter": {
        "name": (1, _Field.TYPE_STRING, False),
        "type": (2, _Field.TYPE_STRING, False),
        "blobs": (7, "BlobProto", True),
    },
    "NetParameter": {"name": (1, _Field.TYPE_STRING, False), "layer": (100, "LayerParameter", True)},
}
# What a layer's blobs are, by its type. BatchNorm's first two are sums, which the third divides.
_BLOBS = {
    "Convolution": ("weight", "bias"),
    "InnerProduct": ("weight", "bias"),
    "BatchNorm": ("running_mean", "running_var", "divisor"),
    "Scale": ("weight", "bias"),
}


@functools.cache
def message_classes() -> dict[str, Any]:
    """Classes of the messages by name."""
    file = descriptor_pb2.FileDescriptorProto(name="resnet_jax/caffe.proto", package="resnet_jax", syntax="proto2")
    for name, fields in _MESSAGES.items():
        described = file.message_type.add(name=name)
        for field, (number, kind, many) in fields.items():
            label = _Field.LABEL_REPEATED if many else _Field.LABEL_OPTIONAL
            made = described.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                made.type, made.type_name = _Field.TYPE_MESSAGE, f".resnet_jax.{kind}"
            else:
                made.type = kind
            if kind == _Field.TYPE_INT64:
                made.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"resnet_jax.{name}")) for name in _MESSAGES
    }


def read_caffemodel(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a trained network, float32, named ``layer.weight``, ``layer.running_mean``, ...

    Raises:
      UsageError: it can't be read, or a layer with weights is of another type.
    """
    arrays: dict[str, np.ndarray] = {}
    for layer in _parse(path, "NetParameter").layer:
        if not layer.blobs:
            continue
        names, where = _BLOBS.get(layer.type), f"{path}: layer {layer.name}"
        if names is None or len(layer.blobs) > len(names):
            raise UsageError(f"{where} ({layer.type}, {len(layer.blobs)} arrays) is of no known kind")
        found = {name: _array(where, blob) for name, blob in zip(names, layer.blobs, strict=False)}
        # Older files give every array four axes.
        axes = {("Convolution", "weight"): 4, ("InnerProduct", "weight"): 2}
        found = {name: _last_axes(where, array, axes.get((layer.type, name), 1)) for name, array in found.items()}
        if layer.type == "BatchNorm" and "divisor" in found:
            divisor = found.pop("divisor")
            if divisor.shape != (1,) or not np.isfinite(divisor[0]):
                raise UsageError(f"{where}: its divisor is one finite number, not {divisor.tolist()[:3]}")
            # Zero is what Caffe writes before it has learnt anything.
            factor = 1 / float(divisor[0]) if divisor[0] else 0.0
            found = {name: (array * factor).astype(np.float32) for name, array in found.items()}
        if any(f"{layer.name}.{name}" in arrays for name in found):
            raise UsageError(f"{where} is there twice, so that nobody can say which is meant")
        arrays |= {f"{layer.name}.{name}": array for name, array in found.items()}
    if not arrays:
        raise UsageError(
            f"{path}: holds no layers with weights (Caffe's own upgrade_net_proto_binary brings old files up to date)"
        )
    return arrays


def read_mean(path: pathlib.Path, size: int) -> np.ndarray:
    """A mean image, float32 [size, size, 3], red, green, blue, of images in [0, 1].

    Raises:
      UsageError: it can't be read, or is of another size.
    """
    array = _array(f"{path}: the mean image", _parse(path, "BlobProto"))
    if array.shape not in ((3, size, size), (1, 3, size, size)) or not np.isfinite(array).all():
        raise UsageError(f"{path}: expected a mean image of shape (3, {size}, {size}), all finite; it is {array.shape}")
    planes = array.reshape(3, size, size)  # Blue, green, red.
    return np.ascontiguousarray(planes[::-1].transpose(1, 2, 0) / np.float32(255))


def _parse(path: pathlib.Path, name: str) -> Any:
    try:
        return message_classes()[name].FromString(path.read_bytes())
    except (OSError, message.DecodeError) as error:
        raise UsageError(f"{path}: not a whole Caffe file ({error})") from error


def _array(where: str, blob: Any) -> np.ndarray:
    data = b"".join(blob.data)
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    if min(shape, default=0) < 0 or len(data) != 4 * math.prod(shape):
        raise UsageError(f"{where} has {len(data) / 4:g} values, and its shape {shape} says otherwise")
    return np.frombuffer(data, "<f4").reshape(shape)


def _last_axes(where: str, array: np.ndarray, axes: int) -> np.ndarray:
    if array.ndim < axes or array.shape[: array.ndim - axes] != (1,) * (array.ndim - axes):
        raise UsageError(f"{where} has an array of shape {array.shape}, where {axes} axes are known")
    return array.reshape(array.shape[array.ndim - axes :])
