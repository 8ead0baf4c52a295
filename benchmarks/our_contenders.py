"""Ours, as ``resnet_jax.main`` runs it, and what the others need to be the same network on the same images."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from resnet_jax import distributed
from resnet_jax.classification import network, planned, steps
from resnet_jax.data import augment
from resnet_jax.data.statistics import IMAGENET_MEAN
from resnet_jax.errors import UsageError
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stacking import SHORTEST_RUN, per_block
from resnet_jax.training.optimizer import make_optimizer

CLASSES = 1000  # ImageNet's.
RESIDUAL_SCALE = 0.25


class Shape(NamedTuple):
    """The attributes of a network of ours that others are built from."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    bottleneck: bool
    shortcut: str
    stride_in: str
    stem: str
    stem_width: int
    dtype: Any


def shape_of(model: nn.Module) -> Shape:
    """The shape of a residual network.

    Raises:
      UsageError: it is none of those that the others have.
    """
    if not isinstance(model, ResNet) or model.shortcut not in ("A", "B", "C"):
        raise UsageError("the others have residual networks with shortcuts of option A, B or C alone; see --model")
    return Shape(*(getattr(model, name) for name in Shape._fields))


def loops(model: ResNet) -> bool:
    """Whether the network runs blocks as a loop, whose body XLA counts once."""
    return model.scan and model.stacked and max(model.blocks) > SHORTEST_RUN


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images and labels.

    Attributes:
      images: uint8 [B, H, W, 3].
      labels: int32 [B].
      normalised: the images as float32.
    """

    images: np.ndarray
    labels: np.ndarray
    normalised: np.ndarray


def make_batch(count: int, size: int, classes: int) -> Batch:
    """Random images, smooth as photos are."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, -(-size // 8), -(-size // 8), 3), np.uint8)
    images = coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size]
    normalised = np.asarray(augment.normalise(jnp.asarray(images), jnp.asarray(IMAGENET_MEAN, jnp.float32), 1.0))
    return Batch(images, rng.integers(0, classes, count, np.int32), normalised)


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our training step for a mesh, and its arguments as shapes.

    Attributes:
      model: the network.
      step: ``step(state, batch, resident) -> state, metrics``.
      arguments: what it takes, trees of ``jax.ShapeDtypeStruct``.
      start: makes a state.
    """

    model: nn.Module
    step: Callable[..., Any]
    arguments: tuple[Any, Any, Any]
    start: Callable[[], Any]


def make_ours(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Ours:
    """The step that ``resnet_jax.main`` would run with this config, whose images come with the batch."""
    step, arguments = planned.abstract_step(config, mesh)
    model = network.make_model(config, planned.known_data(config).classes)
    optimizer = make_optimizer(config.optimizer, network.rate_factors(config, model))
    shape = arguments[1]["images"].shape[1:]
    start = jax.jit(
        lambda: steps.initial_state(model, optimizer, config, shape), out_shardings=distributed.replicated(mesh)
    )
    return Ours(model, step, arguments, start)


def fill(shapes: tuple[Any, Any, Any], batch: Batch, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The batch and the resident arrays of a step's arguments, on the devices."""
    count = len(batch.labels)
    host = {
        "images": batch.images,
        "labels": batch.labels,
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }
    known = {"mean": np.array(IMAGENET_MEAN), "std": np.ones(3), "seed": np.uint32(0)}
    resident = {name: np.broadcast_to(known[name], x.shape).astype(x.dtype) for name, x in shapes[2].items()}
    return distributed.shard_batch(mesh, host), distributed.replicate(mesh, resident)


def named_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Parameters and BN statistics as NumPy arrays, each block under its own name."""
    return jax.tree.map(np.asarray, per_block({name: variables[name] for name in ("params", "batch_stats")}))


def logits_of(model: nn.Module, variables: dict[str, Any], images: np.ndarray, train: bool) -> np.ndarray:
    """Logits [N, classes] of normalised images [N, H, W, 3], of ours or of flax's layers, without TF32."""

    @jax.jit
    def apply(variables, images):
        return model.apply(variables, images, train, mutable=["batch_stats"])[0]

    with jax.default_matmul_precision("highest"):
        return np.asarray(apply(variables, images), np.float32)


def with_statistics(model: nn.Module, images: np.ndarray) -> dict[str, Any]:
    """Weights with the BN statistics of normalised images [N, H, W, 3], float32: activations stay moderate.

    Each block's last BN has a small scale, as in trained networks: else what bfloat16 rounds grows from layer to layer.
    """
    exact = model.clone(dtype=jnp.float32, batch_norm_momentum=0.0)
    last = f"bn{3 if model.bottleneck else 2}"

    def moderate(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        return RESIDUAL_SCALE * array if path[-2].key == last and path[-1].key == "scale" else array

    @jax.jit
    def start(images):
        variables = jax.tree.map_with_path(moderate, exact.init(jax.random.key(0), images[:1]))
        _, updated = exact.apply(variables, images, train=True, mutable=["batch_stats"])
        return variables | updated

    return start(images)
