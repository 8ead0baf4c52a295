"""Our training step against PyTorch's cross-entropy, autograd and SGD, from the same random weights."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
import torch_networks  # noqa: E402
from torch_networks import load_variables, random_variables, to_torch  # noqa: E402

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
TOLERANCE = 1e-4
CLASSES = 10
# Which of the 20 images each of the two steps takes.
BATCHES = np.array([[3, 17, 8, 0, 11, 5, 14, 6], [1, 12, 19, 4, 7, 16, 2, 9]], np.int32)


@dataclasses.dataclass
class Trained:
    """Two steps of training: arrays by torch's names and in its layouts.

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


def train_ours(model: ResNet, variables: Any, data: dict[str, np.ndarray], config) -> Trained:
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
    losses, gradients = [], []
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(model, optimizer, config, total_steps=len(BATCHES)))
        for index in BATCHES:
            state, metrics = step(state, {"index": index, "epoch": np.zeros_like(index)}, data)
            losses.append(metrics["loss"])
            gradients.append(to_torch(state.opt_state[0]))
    logits = model.apply(state.variables, (data["images"] / np.float32(255) - data["mean"]) / data["std"])
    return Trained(
        np.stack(losses), gradients[0], to_torch(state.params), to_torch(state.batch_stats), np.asarray(logits)
    )


def keep_biased_variances(network: torch.nn.Module) -> None:
    """Makes the running variances average biased batch variances: torch's own are n / (n - 1) times as large."""

    def before(norm, inputs):
        norm.kept = (1 - norm.momentum) * norm.running_var

    def after(norm, inputs, output):
        n = inputs[0].numel() / inputs[0].shape[1]
        if norm.training:
            norm.running_var.copy_(norm.kept + (norm.running_var - norm.kept) * (n - 1) / n)

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)


def train_torch(
    network: torch.nn.Module,
    data: dict[str, np.ndarray],
    optimizer: torch.optim.Optimizer,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Trained:
    keep_biased_variances(network)
    images = torch.tensor(data["images"]).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    labels = torch.tensor(data["labels"], dtype=torch.int64)
    losses, gradients = [], []
    for index in BATCHES:
        loss = F.cross_entropy(network(images[index]), labels[index], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.numpy().copy() for name, parameter in network.named_parameters()})
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
    params = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
    batch_stats = {name: buffer.numpy() for name, buffer in network.named_buffers() if "running" in name}
    with torch.no_grad():
        logits = network.eval()(images).numpy()
    return Trained(np.stack(losses), gradients[0], params, batch_stats, logits)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """||ours - theirs|| / ||theirs||, and 0 where both are zero."""
    difference = np.linalg.norm(np.subtract(ours, theirs, dtype=np.float64))
    return difference and difference / np.linalg.norm(theirs)


def errors(ours: Trained, theirs: Trained) -> dict[str, float]:
    """The relative error of every array."""
    found = {}
    for field in dataclasses.fields(Trained):
        mine, torchs = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(torchs, dict):
            assert set(mine) == set(torchs)
            found |= {f"{field.name} {name}": relative_error(mine[name], torchs[name]) for name in torchs}
        else:
            found[field.name] = relative_error(mine, torchs)
    print(sorted([(float(v), k) for k, v in found.items()])[-4:])
    return found

def make_config(**settings):
    config = default_config()
    config.data.pad, config.data.flip = 0, False
    config.schedule.name = "constant"
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
    config = make_config()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    found = errors(train_ours(ours, variables, data, config), train_torch(theirs, data, sgd))
    assert all(error <= TOLERANCE for error in found.values())
