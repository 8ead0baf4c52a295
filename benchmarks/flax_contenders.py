"""The network and training step written with flax.linen's own layers and optax, as flax's ImageNet example has them.

Theirs: nn.Conv with SAME padding, nn.BatchNorm over each device's own examples, all layers in the compute dtype, the
classifier too, weight decay as a penalty in the loss, Nesterov's momentum. Not theirs: the names, which are ours so
that weights can be given from one to the other, and the strides and shortcuts, of the network it stands beside.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
import optax
from our_contenders import Ours, Shape

from resnet_jax.distributed import BATCH_AXIS, replicated
from resnet_jax.models.stacking import per_block

WEIGHT_DECAY = 1e-4
DIFFERS = f"Nesterov's momentum, a decay of {WEIGHT_DECAY} for kernels alone, SAME padding, no normalisation or mirrors"


class Block(nn.Module):
    """A residual block of nn.Conv and nn.BatchNorm; ``like`` is our network's shape, ``pad`` as in ``ResNet``."""

    features: int
    stride: int
    like: Shape
    pad: int | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        like, features, stride = self.like, self.features, self.stride
        conv, norm = layers(like.dtype, train)
        first, middle = (stride, 1) if like.stride_in == "first" else (1, stride)
        bottleneck = [(features // 4, 1, first), (features // 4, 3, middle), (features, 1, 1)]
        convolutions = bottleneck if like.bottleneck else [(features, 3, stride), (features, 3, 1)]
        y = x
        for number, (width, size, step) in enumerate(convolutions, start=1):
            padding = "SAME" if self.pad is None or size == 1 else self.pad
            y = conv(width, (size, size), (step, step), padding=padding, name=f"conv{number}")(y)
            last = number == len(convolutions)
            y = norm(name=f"bn{number}")(y)
            y = y if last else nn.relu(y)
        if x.shape != y.shape and like.shortcut == "A":
            x = jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(0, features - x.shape[-1])])
        elif x.shape != y.shape or like.shortcut == "C":
            x = conv(features, (1, 1), (stride, stride), name="shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class Stem(nn.Module):
    """The first convolution, and the pooling of the ImageNet nets."""

    like: Shape
    pad: int | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = layers(self.like.dtype, train)
        large = self.like.stem == "imagenet"
        shape = ((7, 7), (2, 2)) if large else ((3, 3), (1, 1))
        x = conv(self.like.stem_width, *shape, padding=3 if large else "SAME", name="conv")(x)
        x = nn.relu(norm(name="bn")(x))
        pads = "SAME" if self.pad is None else [(self.pad, self.pad)] * 2
        return nn.max_pool(x, (3, 3), (2, 2), pads) if large else x


class Stage(nn.Module):
    """The blocks of one width."""

    blocks: int
    features: int
    stride: int
    like: Shape
    pad: int | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for number in range(1, self.blocks + 1):
            stride = self.stride if number == 1 else 1
            x = Block(self.features, stride, self.like, self.pad, name=f"block{number}")(x, train)
        return x


class ResNet(nn.Module):
    """The same network as ours of shape ``like``: images [N, H, W, C] -> logits [N, classes] in its dtype.

    ``pad`` is None for the example's SAME padding, or 1 for ours where that differs (strided layers).
    """

    like: Shape
    pad: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        like = self.like
        x = Stem(like, self.pad, name="stem")(images.astype(like.dtype), train)
        for number, (count, features) in enumerate(zip(like.blocks, like.widths, strict=True), start=1):
            x = Stage(count, features, 1 if number == 1 else 2, like, self.pad, name=f"stage{number}")(x, train)
        return nn.Dense(like.num_classes, dtype=like.dtype, name="head")(x.mean((1, 2)))


def layers(dtype: Any, train: bool) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Convolutions and BN as the example sets them."""
    conv = functools.partial(nn.Conv, use_bias=False, dtype=dtype)
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)
    return conv, norm


def initial_state(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """Parameters, BN statistics and velocities."""
    return variables | {"opt_state": optimizer.init(variables["params"])}


def make_optimizer(rate: float) -> optax.GradientTransformation:
    """The example's."""
    return optax.sgd(rate, 0.9, nesterov=True)


def make_train_step(network: ResNet, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """``step(state, images, labels) -> state, loss`` over the mesh in force; the loss is without the penalty.

    As under the example's ``pmap``: BN statistics are each device's own, gradients are averaged.
    """

    def loss_of(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = network.apply(variables, images, train=True, mutable=["batch_stats"])
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        return loss + 0.5 * WEIGHT_DECAY * squares, (loss, updated["batch_stats"])

    def step(state: dict[str, Any], images: jax.Array, labels: jax.Array):
        gradient = jax.grad(loss_of, has_aux=True)
        grads, (loss, stats) = gradient(state["params"], state["batch_stats"], images, labels)
        grads, loss = jax.lax.pmean((grads, loss), BATCH_AXIS)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "batch_stats": stats, "opt_state": opt_state}, loss

    whole, split = PartitionSpec(), PartitionSpec(BATCH_AXIS)
    return jax.shard_map(step, in_specs=(whole, split, split), out_specs=(whole, whole), check_vma=False)


def abstract_step(ours: Ours, like: Shape, rate: float, mesh: jax.sharding.Mesh) -> tuple[Callable[..., Any], Any]:
    """The step for the same network, batch and devices as our own, and its arguments as shapes."""
    optimizer, whole = make_optimizer(rate), replicated(mesh)
    state, batch, _ = ours.arguments
    variables = jax.eval_shape(per_block, {"params": state.params, "batch_stats": state.batch_stats})
    start = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), variables)
    start = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), start)
    images = jax.ShapeDtypeStruct(batch["images"].shape, like.dtype, sharding=batch["images"].sharding)
    return make_train_step(ResNet(like), optimizer), (start, images, batch["labels"])
