"""Our training step against PyTorch's cross-entropy, autograd and SGD, from the same random weights."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
import ml_collections
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
import torch_networks  # noqa: E402
from torch_networks import load_variables, random_variables, to_torch  # noqa: E402

from resnet_jax import distributed  # noqa: E402
from resnet_jax.classification.steps import make_train_step  # noqa: E402
from resnet_jax.config import default_config  # noqa: E402
from resnet_jax.models.layers import BATCH_AXIS  # noqa: E402
from resnet_jax.models.resnet import ResNet  # noqa: E402
from resnet_jax.training.optimizer import make_optimizer  # noqa: E402
from resnet_jax.training.schedules import initial_schedule_state  # noqa: E402
from resnet_jax.training.state import TrainState  # noqa: E402

torch.set_num_threads(1)

BLOCKS = {
    "basic": {"bottleneck": False},
    "bottleneck v1": {"bottleneck": True, "stride_in": "first"},
    "bottleneck v1.5": {"bottleneck": True, "stride_in": "middle"},
}
# ||ours - torch's|| / ||torch's|| of every array.
TOLERANCE = 1e-4
CLASSES = 10
# Which of the 20 images each of the two steps takes.
BATCHES = np.array([[3, 17, 8, 0, 11, 5, 14, 6], [1, 12, 19, 4, 7, 16, 2, 9]], np.int32)


@dataclasses.dataclass
class Trained:
    """Two steps of training: dicts hold arrays by torch's names and in its layouts.

    Attributes:
      losses: of each step's batch, [2].
      gradients: of the first step.
      params: parameters after both.
      batch_stats: running means and biased variances after both.
      logits: of all images after both, with the running statistics.
    """

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    batch_stats: dict[str, np.ndarray]
    logits: np.ndarray


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def random_data(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        "images": rng.integers(0, 256, (20, size, size, 3), np.uint8),
        "labels": rng.integers(0, CLASSES, 20, np.int32),
        "mean": np.float32([0.5, 0.4, 0.45]),
        "std": np.float32([0.3, 0.25, 0.2]),
    }


def keep_gradients() -> optax.GradientTransformation:
    """Passes gradients on unchanged; its state is the last ones."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )


def compile_quickly(function: Callable) -> Callable:
    """jit without the optimisations that take XLA:CPU several seconds for every network."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(function, compiler_options=options if jax.default_backend() == "cpu" else None)


def train_ours(
    model: ResNet, variables: Any, data: dict[str, np.ndarray], config: ml_collections.ConfigDict
) -> Trained:
    optimizer = optax.chain(keep_gradients(), make_optimizer(config.optimizer))
    state = TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        schedule=initial_schedule_state(),
        average=None,
    )
    mesh = jax.make_mesh((1,), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    state, data = distributed.replicate(mesh, (state, data))
    losses, gradients = [], []
    with jax.set_mesh(mesh):
        step = compile_quickly(make_train_step(model, optimizer, config, total_steps=len(BATCHES)))
        for index in BATCHES:
            state, metrics = step(state, {"index": index, "epoch": np.zeros_like(index)}, data)
            losses.append(metrics["loss"])
            gradients.append(to_torch(state.opt_state[0]))
        images = (data["images"] / np.float32(255) - data["mean"]) / data["std"]
        logits = compile_quickly(model.apply)(state.variables, images)
    return Trained(
        losses=np.stack(losses),
        gradients=gradients[0],
        params=to_torch(state.params),
        batch_stats=to_torch(state.batch_stats),
        logits=np.asarray(logits),
    )


def count_values(network: torch.nn.Module) -> dict[torch.nn.Module, int]:
    """How many values of a channel each BN layer takes its batch statistics over; filled in by a forward pass."""
    counts = {}

    def count(norm, inputs):
        counts[norm] = inputs[0].numel() // inputs[0].shape[1]

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(count)
    return counts


def make_variances_biased(initial: dict[torch.nn.Module, torch.Tensor], counts: dict[torch.nn.Module, int]) -> None:
    """Turns torch's running variances into averages of biased batch variances.

    Torch's batch variances are n / (n - 1) times the biased ones; what is left of the initial variance has no
    such factor.
    """
    for norm, n in counts.items():
        kept = (1 - norm.momentum) ** len(BATCHES) * initial[norm]
        norm.running_var.copy_(kept + (norm.running_var - kept) * (n - 1) / n)


def train_torch(
    network: torch.nn.Module,
    data: dict[str, np.ndarray],
    optimizer: torch.optim.Optimizer,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    rate_drop: float = 1.0,
) -> Trained:
    """``rate_drop`` multiplies the rate after each step."""
    images = torch.tensor(data["images"]).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    labels = torch.tensor(data["labels"], dtype=torch.int64)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, rate_drop)
    counts = count_values(network)
    variances = {module: module.running_var.clone() for module in network.modules() if hasattr(module, "running_var")}
    losses, gradients = [], []
    for index in BATCHES:
        loss = F.cross_entropy(network.train()(images[index]), labels[index], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.numpy().copy() for name, parameter in network.named_parameters()})
        if clip_norm:
            assert torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm) > clip_norm
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        make_variances_biased(variances, counts)
        logits = network.eval()(images).numpy()
    return Trained(
        losses=np.stack(losses),
        gradients=gradients[0],
        params={name: parameter.detach().numpy() for name, parameter in network.named_parameters()},
        batch_stats={name: buffer.numpy() for name, buffer in network.named_buffers() if "running" in name},
        logits=logits,
    )


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """||ours - theirs|| / ||theirs||; where theirs is zero, 0 if ours is and infinite if not."""
    assert ours.shape == theirs.shape
    difference, norm = np.linalg.norm(np.subtract(ours, theirs, dtype=np.float64)), np.linalg.norm(theirs)
    return difference / norm if norm else math.inf * (difference > 0 or 0)


def differing(ours: Trained, theirs: Trained) -> dict[str, float]:
    """The relative error of every array that is off by more than the tolerance."""
    errors = {}
    for kind, expected in vars(theirs).items():
        found = getattr(ours, kind)
        if isinstance(expected, dict):
            assert set(found) == set(expected)
            errors |= {f"{kind} {name}": relative_error(found[name], expected[name]) for name in expected}
        else:
            errors[kind] = relative_error(found, expected)
    print(sorted([(float(v), k) for k, v in errors.items()])[-4:])
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


def make_config() -> ml_collections.ConfigDict:
    """The default recipe (rate 0.1, momentum 0.9, weight decay 1e-4) without augmentation."""
    config = default_config()
    config.data.pad, config.data.flip = 0, False
    return config


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("block", BLOCKS)
def test_two_training_steps_are_torchs(block, shortcut):
    layers, widths = (1, 1, 1, 1), (16, 32, 64, 128)
    ours = ResNet(layers, widths, CLASSES, shortcut=shortcut, stem_width=16, **BLOCKS[block])
    theirs = torch_networks.ResNet(block, layers, widths, CLASSES, shortcut, stem_width=16)
    data = random_data(size=48)
    variables = random_variables(ours, data["images"].shape[1:], seed=0)
    load_variables(theirs, variables)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert not differing(train_ours(ours, variables, data, make_config()), train_torch(theirs, data, sgd))
