"""What a network is, in figures: layers, parameters, multiply-adds and the sizes of its stages."""

from collections.abc import Iterable
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
from jax.extend.core import jaxprs_in_params

from resnet_jax.models.registry import create_model, default_input


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of one network at one image size.

    Attributes:
      name: the network's.
      image_size: side of the input, pixels.
      layers: weighted layers as the paper counts them: shortcuts and gates are left out.
      parameters: of all kinds, running statistics apart.
      multiply_adds: of convolutions and classifier for one image.
      output_sizes: side of each stage's output, pixels.
    """

    name: str
    image_size: int
    layers: int
    parameters: int
    multiply_adds: int
    output_sizes: dict[str, int]


def summarize(name: str, image_size: int | None = None, **overrides: Any) -> Summary:
    """Figures of a network by its name, computed from its shapes; nothing is allocated.

    Args:
      name: a name that ``create_model`` knows.
      image_size: side of the input in pixels; the paper's (224, CIFAR 32) when not given.
      **overrides: as for ``create_model``.
    """
    image_size = image_size or default_input(name)[0]
    model = create_model(name, **{"dtype": "float32"} | overrides)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    kernels = [path for path, _ in jax.tree.leaves_with_path(variables["params"]) if path[-1].key == "kernel"]
    beside = ("gate", "shortcut_conv")
    features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, images)
    return Summary(
        name=name,
        image_size=image_size,
        layers=sum(path[-2].key not in beside for path in kernels),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        multiply_adds=count_multiply_adds(model, variables, images),
        output_sizes={stage: features[stage].shape[1] for stage in sorted(features, key=lambda s: (s != "stem", s))},
    )


def count_multiply_adds(model: nn.Module, variables: Any, images: Any) -> int:
    """Multiplications of the convolutions and matrix products that ``model.apply`` traces to."""
    jaxpr = jax.make_jaxpr(model.apply)(variables, images)
    return _count(jaxpr.jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        output = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += output * math.prod(kernel) // features
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += output * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        for inner in jaxprs_in_params(equation.params):
            total += _count(inner)
    return total


# Width and heading of each column of the table for people; figures are set to the right.
_COLUMNS = ((-18, "name"), (6, "layers"), (12, "parameters"), (14, "multiply-adds"), (6, "image"), (-1, "output sizes"))


def format_heading() -> str:
    """The heading above ``format_row``."""
    return _format(heading for _, heading in _COLUMNS)


def format_row(summary: Summary) -> str:
    """One network's figures as a line of a table."""
    sizes = "  ".join(f"{stage} {size}" for stage, size in summary.output_sizes.items())
    millions = f"{summary.multiply_adds / 1e6:,.1f}M"
    figures = (f"{summary.layers}", f"{summary.parameters:,}", millions, f"{summary.image_size}")
    return _format((summary.name, *figures, sizes))


def _format(cells: Iterable[str]) -> str:
    pairs = zip(cells, (width for width, _ in _COLUMNS), strict=True)
    return "  ".join(cell.rjust(width) if width > 0 else cell.ljust(-width) for cell, width in pairs)
