"""What a trained network is like inside: layer responses, what each block is worth, a slice of its loss.

Each probe is a step over single views (``Classification.single_view``) and what the host makes of its outputs.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn, traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from resnet_jax.classification.steps import Batch, Resident, cross_entropy, label_rank, take_images
from resnet_jax.data import augment
from resnet_jax.models.blocks import Block
from resnet_jax.models.layers import Conv
from resnet_jax.models.normalisation import BatchNorm

Step = Callable[..., dict[str, jax.Array]]
_WHOLE = ("none", "gated")  # Shortcuts beside which nothing can be taken away but the block as a whole.


def _inputs(batch: Batch, resident: Resident) -> tuple[jax.Array, jax.Array]:
    images, labels = take_images(batch, resident)
    return augment.normalise(images, resident["mean"], resident["std"]), labels


def response_layers(model: nn.Module, variables: Any, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Names of the 3x3 layers in their order, as ``stage1/block1/conv2``."""
    names: list[str] = []
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jax.eval_shape(lambda v, x: _responses(model, v, x, names), variables, images)
    return tuple(names)


def make_response_step(model: nn.Module) -> Step:
    """Builds ``step(variables, batch, resident)``: each example's ``mean`` and ``variance`` of each 3x3 layer's output.

    Outputs are after BN and before the ReLU or the addition (section 4.2, figure 7), float32 [n, layers].
    """

    def step(variables: Any, batch: Batch, resident: Resident) -> dict[str, jax.Array]:
        images, _ = _inputs(batch, resident)
        outputs = [y.astype(jnp.float32) for y in _responses(model, variables, images, [])]
        axes = (1, 2, 3)
        return {
            "mean": jnp.stack([y.mean(axes) for y in outputs], axis=-1),
            "variance": jnp.stack([y.var(axes) for y in outputs], axis=-1),
        }

    return step


def response_deviations(found: dict[str, np.ndarray]) -> np.ndarray:
    """Standard deviation of each layer's output over all examples, positions and channels: float64 [layers].

    Args:
      found: ``mean`` and ``variance`` [N, layers] of each example, of ``make_response_step``.
    """
    mean, variance = (found[name].astype(np.float64) for name in ("mean", "variance"))
    # A layer's outputs are as many for every example, so the whole variance is the mean one and that of the means.
    return np.sqrt(variance.mean(0) + mean.var(0))


def _responses(model: nn.Module, variables: Any, images: jax.Array, names: list[str]) -> list[jax.Array]:
    """The output of BN after each 3x3 convolution; their names are added to ``names``."""
    outputs: list[jax.Array] = []
    waiting: set[tuple[str, ...]] = set()

    def listen(layer: Any, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        y, module = layer(*arguments, **keywords), context.module
        if isinstance(module, Conv) and module.size == 3 and context.method_name == "__call__":
            waiting.add(module.path)
        elif isinstance(module, BatchNorm) and context.method_name == "__call__":
            conv = (*module.path[:-1], module.path[-1].replace("bn", "conv"))
            if conv in waiting:
                waiting.remove(conv)
                names.append("/".join(conv))
                outputs.append(y)
        return y

    with nn.intercept_methods(listen):
        model.apply(variables, images)
    return outputs


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks that can be removed, as ``stage1/block1``; plain ones that change the shape can't."""
    return tuple(
        f"stage{stage}/block{block}"
        for stage, count in enumerate(model.blocks, start=1)
        for block in range(1, count + 1)
        if model.shortcut not in _WHOLE or block > 1 or (stage == 1 and model.stem_width == model.widths[0])
    )


def make_removal_step(model: nn.Module) -> Step:
    """Builds ``step(variables, batch, resident, removed)``: each example's ``rank`` and ``loss`` without some blocks.

    Of a residual block the shortcut stays (Veit et al., 2016); of a plain or a gated one its input. ``removed`` is bool
    [blocks], in the order of ``block_names``, so that all of them share a compilation.
    """
    numbers = {name: i for i, name in enumerate(block_names(model))}
    last = "bn3" if model.bottleneck else "bn2"

    def step(variables: Any, batch: Batch, resident: Resident, removed: jax.Array) -> dict[str, jax.Array]:
        def remove(
            layer: Any, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext
        ) -> Any:
            y, module = layer(*arguments, **keywords), context.module
            if context.method_name != "__call__":
                return y
            whole = model.shortcut in _WHOLE
            wanted = isinstance(module, Block) if whole else module.path[-1:] == (last,)
            number = numbers.get("/".join(module.path[:2]))
            if not wanted or number is None:
                return y
            return jnp.where(removed[number], arguments[0] if whole else jnp.zeros_like(y), y)

        images, labels = _inputs(batch, resident)
        with nn.intercept_methods(remove):
            logits = model.apply(variables, images)
        return {"rank": label_rank(logits, labels), "loss": cross_entropy(logits, labels)}

    return step


def random_direction(params: Any, seed: int) -> Any:
    """A random direction in the space of weights, each filter as long as the network's own (Li et al., 2018).

    Biases and BN's scales and shifts stay where they are: their direction is zero.

    Args:
      params: the network's, nested NumPy or JAX arrays; the last axis of kernels counts filters.
      seed: of the draw.
    """
    random, direction = np.random.default_rng(seed), {}
    for path, array in traverse_util.flatten_dict(params).items():
        array = np.asarray(array)
        if path[-1] != "kernel":
            direction[path] = np.zeros_like(array)
            continue
        drawn = random.standard_normal(array.shape).astype(array.dtype)
        axes = tuple(range(array.ndim - 1))
        own, length = (np.sqrt(np.square(one).sum(axes, keepdims=True)) for one in (array, drawn))
        direction[path] = drawn * own / np.maximum(length, 1e-12)
    return traverse_util.unflatten_dict(direction)
