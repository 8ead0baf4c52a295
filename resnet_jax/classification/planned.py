"""The training step without its data: the shapes of all it takes, to be compiled for any devices."""

from collections.abc import Callable
import dataclasses
from functools import partial
import math
from typing import Any

import jax
from jax import numpy as jnp
import ml_collections

from resnet_jax import distributed
from resnet_jax.classification import network, steps
from resnet_jax.data.feed import streams
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import storage_dtype
from resnet_jax.planning.estimate import Compiled, Estimate, compile_step, estimate
from resnet_jax.planning.memory import group_of, largest_that_fits, unit_of
from resnet_jax.planning.topology import Topology
from resnet_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Known:
    """A data set as far as it is known unread: training images, classes, and (H, W, C) where all have the same."""

    examples: int | None
    classes: int
    shape: tuple[int, int, int] | None = None


_IMAGENET = Known(1_281_167, 1000)
_DIGITS = Known(1438, 10, (8, 8, 1))
_CIFAR = {"cifar10": Known(50_000, 10, (32, 32, 3)), "cifar100": Known(50_000, 100, (32, 32, 3))}


def known_data(config: ml_collections.ConfigDict) -> Known:
    """What is known of a config's data set; its number of classes is the config's where that is set.

    Raises:
      UsageError: neither says how many classes there are.
    """
    data, classes = config.data, config.model.num_classes
    match data.source:
        case "digits":
            known = _DIGITS
        case "cifar":
            known = _CIFAR.get(data.name or "cifar10")
        case "ilsvrc":
            known = _IMAGENET
        case "tfds":
            known = _IMAGENET if data.name.startswith("imagenet2012") else _CIFAR.get(data.name)
        case _:
            known = None
    if known is None and not classes:
        name = f"data.source={data.source}{f' data.name={data.name}' if data.name else ''}"
        raise UsageError(f"{name}: how many classes it has is not known without reading it;"
                         " set --config.model.num_classes")  # fmt: skip
    known = known or Known(None, classes)
    left = known.examples and known.examples - data.holdout
    return dataclasses.replace(known, classes=classes or known.classes, examples=left)


def abstract_step(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
    """The training step that a config means, and the shapes of its state, batch and resident arrays.

    Args:
      config: the whole config. Weights that it starts from are taken to have the network's own shapes.
      mesh: the devices, in force (``jax.set_mesh``).

    Returns:
      ``step`` of ``make_train_step`` and its three arguments as trees of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      UsageError: network, batch and devices don't fit each other, or the shapes follow from the data alone.
    """
    data, known = config.data, known_data(config)
    distributed.check_batch("batch_size", config.batch_size, mesh, config.optimizer.accumulate)
    network.check_groups(config, mesh.size)
    model = network.make_model(config, known.classes)
    optimizer = make_optimizer(config.optimizer, network.rate_factors(config, model))
    step = steps.make_train_step(model, optimizer, config, _total_steps(config, known) or 1)

    shape = known.shape
    if streams(data) or shape is None:
        if not data.image_size:
            raise UsageError(f"data.source={data.source}: the images' size is not known without reading them;"
                             " set --config.data.image_size")  # fmt: skip
        shape = (data.image_size, data.image_size, 3)
    dtype, sharding = storage_dtype(model.dtype), distributed.batch_sharding(mesh)
    whole = partial(jax.ShapeDtypeStruct, sharding=distributed.replicated(mesh))
    split = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
    resident = {"mean": whole(shape if data.mean == "pixel" or data.mean_image else shape[-1:], dtype)}
    resident |= {"std": whole(shape[-1:], dtype), "seed": whole((), jnp.uint32)}
    batch = {"index": split(), "epoch": split()}
    if streams(data):
        batch |= {"images": split(*shape, dtype=jnp.uint8), "labels": split()}
    elif known.examples is None:
        raise UsageError(f"data.source={data.source}: how many images lie on the devices is not known without reading"
                         " them; set --config.data.placement=stream")  # fmt: skip
    else:
        resident["images"] = whole((known.examples, *shape), jnp.uint8)
        resident["labels"] = whole((known.examples,), jnp.int32)
    state = jax.eval_shape(lambda: steps.initial_state(model, optimizer, config, shape))
    state = jax.tree.map(lambda leaf: whole(leaf.shape, leaf.dtype), state)
    return step, (state, batch, resident)


def _total_steps(config: ml_collections.ConfigDict, known: Known) -> int | None:
    if config.steps:
        return config.steps
    return known.examples and math.ceil(config.epochs * known.examples / config.batch_size)


def plan(
    config: ml_collections.ConfigDict,
    topology: Topology,
    batch_per_device: int | None,
    price: float | None,
    progress: Callable[[str], None],
) -> Estimate:
    """Compiles the config's step for a topology and says what it comes to; looks for a batch that fits if it does not.

    Args:
      config: the whole config; its length is the same number of images whatever the batch.
      topology: the devices.
      batch_per_device: images a step of each; None takes the config's ``batch_size`` over all of them.
      price: of a chip and hour; None if unknown.
      progress: is told what takes time.

    Raises:
      UsageError: as ``abstract_step``.
    """
    config = config.copy_and_resolve_references()
    known = known_data(config)
    total = _total_steps(config, known)
    train_images = total and total * config.batch_size
    mesh = distributed.make_mesh(topology.devices)
    if batch_per_device is None and config.batch_size % (mesh.size * config.optimizer.accumulate):
        raise UsageError(f"batch_size={config.batch_size} does not divide over the {mesh.size} devices of"
                         f" {topology.name}; --batch_per_chip=N makes it N times {mesh.size}")  # fmt: skip

    def compiled_of(size: int) -> Compiled:
        config.batch_size = size * mesh.size
        with jax.set_mesh(mesh):
            step, arguments = abstract_step(config, mesh)
            progress(f"{config.model.name} on {topology.name}: {topology.chips} chips, {size} images a device")
            return compile_step(step, arguments, topology.memory_limit, progress)

    size = batch_per_device or config.batch_size // mesh.size
    compiled, largest = compiled_of(size), None
    if not compiled.fits:
        parts = config.optimizer.accumulate
        unit = unit_of(group_of(config.model.batch_norm), size // parts, mesh.size, parts) * parts
        progress(f"does not fit; looking for the largest multiple of {unit} that does")
        tried = list(largest_that_fits(lambda smaller: compiled_of(smaller).fits, size, unit))
        largest = max((smaller for smaller, fits in tried if fits), default=0)
    return estimate(config.model.name, topology, size * mesh.size, compiled, train_images, price, largest)
