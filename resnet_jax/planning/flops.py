"""Floating-point operations of convolutions and matrix products in HLO, counted as XLA does: for loops' bodies.

XLA's own ``cost_analysis()`` counts a loop's body once; what its further trips add is counted here.
"""

import math
import re

from resnet_jax.planning.hlo import Instruction, Program, dimensions, instructions


def repeated_flops(program: Program) -> int:
    """What convolutions and matrix products take beyond the first time that each is run."""
    return sum(
        (times - 1) * matmul_flops(instruction, computation)
        for instruction, computation, times in instructions(program)
        if times > 1
    )


def matmul_flops(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Two operations for each product of a convolution or matrix product; 0 of any other instruction."""
    if instruction.opcode == "dot":
        left = dimensions(computation[instruction.operands[0]].shape)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis]
        return 2 * math.prod(dimensions(instruction.shape)) * math.prod(sizes)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    return 0


def _convolution_flops(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Products with the zeros of padding and dilation don't count."""
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    images, kernel = (dimensions(computation[name].shape) for name in instruction.operands[:2])
    output = dimensions(instruction.shape)
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    products = output[result.index("f")] * images[left.index("f")] * images[left.index("b")]
    products //= int(instruction.attribute(r"feature_group_count=(\d+)") or 1)
    products //= int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    axes = sorted(label for label in left if label.isdecimal())
    for axis, label in enumerate(axes):
        numbers = {name: value.split("x")[axis] for name, value in window.items()}
        products *= _overlaps(
            images[left.index(label)],
            kernel[right.index(label)],
            output[result.index(label)],
            stride=int(numbers.get("stride", 1)),
            low=int(numbers.get("pad", "0_0").split("_")[0]),
            image_dilation=int(numbers.get("lhs_dilate", 1)),
            kernel_dilation=int(numbers.get("rhs_dilate", 1)),
        )
    return 2 * products


def _overlaps(
    image: int, kernel: int, output: int, *, stride: int, low: int, image_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of a place of the kernel and one of the output that meet a pixel, along one axis."""
    length = (image - 1) * image_dilation + 1
    places = (o * stride + k * kernel_dilation - low for o in range(output) for k in range(kernel))
    return sum(0 <= place < length and place % image_dilation == 0 for place in places)
