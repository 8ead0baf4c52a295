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
pytestmark = pytest.mark.torch

from torch.nn import functional as F  # noqa: E402
import torch_networks  # noqa: E402
from torch_networks import load_variables, random_variables, to_torch  # noqa: E402

from resnet_jax import distributed  # noqa: E402
from resnet_jax.classification.steps import make_train_step  # noqa: E402
from resnet_jax.config import default_config  # noqa: E402
from resnet_jax.distributed import BATCH_AXIS  # noqa: E402
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
# ||ours - torch's|| / ||torch's|| of every array. In float32 an activation near zero may fall on different sides of
# ReLU, so that all but one small network are compared in float64. Our learning rate is float32 in both.
TOLERANCES = {"float32": 1e-4, "float64": 1e-6}
CLASSES = 10
WIDTHS = (16, 32)
SIZE = 20  # pixels; the stem reads 20 and 10 of them, the strided convolution 5.
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


def random_data(dtype: str) -> dict[str, np.ndarray]:
    """Twenty images and the rest of what a step finds on the device."""
    rng = np.random.default_rng(2)
    return {
        "images": rng.integers(0, 256, (20, SIZE, SIZE, 3), np.uint8),
        "labels": rng.integers(0, CLASSES, 20, np.int32),
        "mean": np.array([0.5, 0.4, 0.45], dtype),
        "std": np.array([0.3, 0.25, 0.2], dtype),
        "seed": np.uint32(0),
    }


def keep_gradients() -> optax.GradientTransformation:
    """Passes gradients on unchanged; its state is the last ones."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )


def compile_quickly(function: Callable) -> Callable:
    """jit without the optimisations that take XLA:CPU several seconds for every network."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(function, compiler_options=options)


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
        images = (data["images"].astype(data["mean"].dtype) / 255 - data["mean"]) / data["std"]
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
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    images = (torch.tensor(data["images"]).permute(0, 3, 1, 2).to(mean.dtype) / 255 - mean) / std
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
    if not norm:
        return math.inf if difference else 0.0
    return difference / norm


def differing(ours: Trained, theirs: Trained, tolerance: float) -> dict[str, float]:
    """The relative error of every array that is off by more than ``tolerance``."""
    errors = {}
    for kind, expected in vars(theirs).items():
        found = getattr(ours, kind)
        if isinstance(expected, dict):
            assert set(found) == set(expected)
            errors |= {f"{kind} {name}": relative_error(found[name], expected[name]) for name in expected}
        else:
            errors[kind] = relative_error(found, expected)
    return {name: error for name, error in errors.items() if not error <= tolerance}


def make_config(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """Rate 0.1, momentum 0.9 and weight decay 1e-4, no augmentation; then ``settings``."""
    recipe = {"schedule.learning_rate": 0.1, "optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-4}
    config = default_config()
    config.update_from_flattened_dict(recipe | {"data.pad": 0, "data.flip": False} | settings)
    return config


def differences(
    block: str,
    shortcut: str,
    dtype: str = "float64",
    settings: dict[str, Any] | None = None,
    of_sgd: dict[str, Any] | None = None,
    of_training: dict[str, Any] | None = None,
) -> dict[str, float]:
    """What differs between the two after training both from the same random variables: the relative errors, by name.

    Args:
      block, shortcut: of the network, which has one block in each stage.
      dtype: of variables and computation.
      settings: our config's fields besides ``make_config``'s.
      of_sgd: torch.optim.SGD's arguments besides the same ones; ``params`` is a function of the network.
      of_training: ``train_torch``'s.
    """
    data, config = random_data(dtype), make_config(settings or {})
    layers = (1,) * len(WIDTHS)
    theirs = torch_networks.ResNet(block, layers, WIDTHS, CLASSES, shortcut, stem_width=16).to(getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        ours = ResNet(layers, WIDTHS, CLASSES, shortcut=shortcut, stem_width=16, dtype=dtype, **BLOCKS[block])
        variables = random_variables(ours, data["images"].shape[1:], seed=0)
        load_variables(theirs, variables)
        found = train_ours(ours, variables, data, config)
    of_sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "params": torch.nn.Module.parameters} | (of_sgd or {})
    sgd = torch.optim.SGD(**of_sgd | {"params": of_sgd["params"](theirs)})
    return differing(found, train_torch(theirs, data, sgd, **of_training or {}), TOLERANCES[dtype])


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("block", BLOCKS)
def test_two_training_steps_are_torchs(block, shortcut):
    assert not differences(block, shortcut)


def test_two_training_steps_in_float32_are_torchs():
    assert not differences("basic", "B", dtype="float32")


def kernels_and_others(network: torch.nn.Module) -> list[dict[str, Any]]:
    """Torch's parameter groups with weight decay on the weights of convolutions and linear layers alone."""
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    kernels = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, layers)}
    parameters = dict(network.named_parameters())
    return [
        {"params": [parameters[name] for name in kernels], "weight_decay": 0.1},
        {"params": [parameter for name, parameter in parameters.items() if name not in kernels], "weight_decay": 0},
    ]


# Our settings, torch.optim.SGD's and train_torch's.
VARIANTS = {
    "weight decay": ({"optimizer.weight_decay": 0.1}, {"weight_decay": 0.1}, {}),
    "weight decay of kernels": (
        {"optimizer.weight_decay": 0.1, "optimizer.decay": "kernels"},
        {"params": kernels_and_others},
        {},
    ),
    "Nesterov's momentum": ({"optimizer.nesterov": True}, {"nesterov": True}, {}),
    "label smoothing": ({"loss.label_smoothing": 0.1}, {}, {"label_smoothing": 0.1}),
    "clipped gradients": (
        {"optimizer.clip_norm": 0.5, "optimizer.weight_decay": 0.1},
        {"weight_decay": 0.1},
        {"clip_norm": 0.5},
    ),
    "a lower rate in the second step": (
        {"schedule.boundaries": (1,), "schedule.factor": 0.1},
        {},
        {"rate_drop": 0.1},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_training_steps_are_torchs_with(variant):
    assert not differences("basic", "B", "float64", *VARIANTS[variant])
