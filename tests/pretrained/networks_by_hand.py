"""The authors' bottleneck network from its description, in 64 bits, channels first; a small one at random."""

from collections.abc import Callable
import dataclasses
import math

import numpy as np

# The paper's stage (conv1 is stage 1), the block, and its convolution, where 0 is the shortcut's.
Place = tuple[int, int, int]
STEM: Place = (1, 1, 1)
BLOCKS, WIDTHS, STEM_WIDTH, CLASSES = (1, 2, 2, 1), (8, 16, 24, 32), 4, 5
MEAN = np.array((103.939, 116.779, 123.68))  # Blue, green, red.


@dataclasses.dataclass
class Layer:
    """A convolution and the normalisation after it: kernel [O, I, H, W], all else [O], float32."""

    kernel: np.ndarray
    bias: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


@dataclasses.dataclass
class Network:
    """Layers by place, and the classifier [O, I] with its bias [O]."""

    layers: dict[Place, Layer]
    head: np.ndarray
    head_bias: np.ndarray


def draw(seed: int, biased: Callable[[Place], bool]) -> Network:
    """A network of ``BLOCKS`` and ``WIDTHS``; some running variances are so small that epsilon matters."""
    random, layers = np.random.default_rng(seed), {}

    def add(place: Place, outside: int, inside: int, size: int) -> None:
        var = 10 ** random.uniform(-6, 0.3, outside)
        deviation = np.sqrt(var)  # Of what the convolution gives, so that activations stay of size 1.
        kernel = random.normal(0, math.sqrt(2 / (inside * size * size)), (outside, inside, size, size))
        kernel *= deviation[:, None, None, None] / (64 if place == STEM else 1)
        arrays = {
            "kernel": kernel,
            "bias": random.normal(0, 1, outside) * deviation,
            "mean": random.normal(0, 0.5, outside) * deviation,
            "var": var,
            "scale": random.uniform(0.5, 1.5, outside),
            "shift": random.normal(0, 0.3, outside),
        }
        layer = Layer(**{name: array.astype(np.float32) for name, array in arrays.items()})
        layers[place] = layer if biased(place) else dataclasses.replace(layer, bias=None)

    add(STEM, STEM_WIDTH, 3, 7)
    inside = STEM_WIDTH
    for stage, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=2):
        for block in range(1, blocks + 1):
            if block == 1:
                add((stage, block, 0), width, inside, 1)
            add((stage, block, 1), width // 4, inside, 1)
            add((stage, block, 2), width // 4, width // 4, 3)
            add((stage, block, 3), width, width // 4, 1)
            inside = width
    head, bias = random.normal(0, 1, (CLASSES, inside)), random.normal(0, 1, CLASSES)
    return Network(layers, head.astype(np.float32), bias.astype(np.float32))


def network_input(images: np.ndarray, mean: np.ndarray = MEAN) -> np.ndarray:
    """What Caffe's and Keras's networks see of uint8 RGB images: blue, green, red, 0 to 255, without the mean."""
    return images[..., ::-1].astype(np.float64) - mean


def forward(network: Network, inputs: np.ndarray, epsilon: float, pool: Callable) -> dict[str, np.ndarray]:
    """``stem``, ``stage1``, ... [N, H, W, C], and ``logits`` of inputs [N, H, W, 3]."""

    def apply(place: Place, x: np.ndarray, stride: int = 1) -> np.ndarray:
        layer, column = network.layers[place], (slice(None), None, None)
        y = convolve(x, layer.kernel.astype(np.float64), stride)
        if layer.bias is not None:
            y += layer.bias[column]
        y = (y - layer.mean[column]) / np.sqrt(layer.var.astype(np.float64) + epsilon)[column]
        return y * layer.scale[column] + layer.shift[column]

    x = pool(relu(apply(STEM, inputs.transpose(0, 3, 1, 2), stride=2)))
    outputs = {"stem": x}
    for number, blocks in enumerate(BLOCKS, start=1):
        stage = number + 1
        for block in range(1, blocks + 1):
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = apply((stage, block, 0), x, stride) if block == 1 else x
            y = relu(apply((stage, block, 1), x, stride))
            y = relu(apply((stage, block, 2), y))
            x = relu(apply((stage, block, 3), y) + shortcut)
        outputs[f"stage{number}"] = x
    outputs = {name: array.transpose(0, 2, 3, 1) for name, array in outputs.items()}
    outputs["logits"] = x.mean((2, 3)) @ network.head.T.astype(np.float64) + network.head_bias
    return outputs


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """[N, I, H, W] with [O, I, size, size]; half a kernel of zeros on every side."""
    size = kernel.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, kernel, optimize=True)


def caffe_pool(x: np.ndarray) -> np.ndarray:
    """Max of 3x3/2 without padding; ``ceil((size - 3) / 2) + 1`` outputs, of which the last may see less."""
    rows, columns = (math.ceil((size - 3) / 2) + 1 for size in x.shape[2:])
    outputs = [[x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((2, 3)) for j in range(columns)] for i in range(rows)]
    return np.array(outputs).transpose(2, 3, 0, 1)


def keras_pool(x: np.ndarray) -> np.ndarray:
    """A pixel of zeros on every side, then max of whole 3x3 windows, every second of them."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3)).max((4, 5))[:, :, ::2, ::2]
