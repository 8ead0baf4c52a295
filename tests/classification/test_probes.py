"""Layer responses, removed blocks and random directions, against captured outputs, other weights and loops."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax import distributed
from resnet_jax.classification import probes
from resnet_jax.classification.task import Classification
from resnet_jax.config import default_config
from resnet_jax.models.blocks import Block
from resnet_jax.models.normalisation import BatchNorm
from resnet_jax.models.registry import MODELS, create_model
from resnet_jax.models.resnet import ResNet

CLASSES, SIDE = 4, 12
_cifar = functools.partial(ResNet, stem="cifar", num_classes=CLASSES)
_small = functools.partial(_cifar, blocks=(2, 2), widths=(4, 8), stem_width=4)
NETWORKS = {
    "residual": _small(shortcut="A"),
    "projections": _small(shortcut="B"),
    "plain": _small(shortcut="none"),
    "gated": _small(shortcut="gated"),
    "bottleneck": _cifar(blocks=(1, 2), widths=(8, 16), stem_width=4, bottleneck=True),
}
# Of each network the 3x3 layers in the order that an image meets them.
BASIC = ["stem/conv", *(f"stage{s}/block{b}/conv{c}" for s in (1, 2) for b in (1, 2) for c in (1, 2))]
LAYERS = dict.fromkeys(("residual", "projections", "plain", "gated"), BASIC)
LAYERS["bottleneck"] = ["stem/conv", "stage1/block1/conv2", "stage2/block1/conv2", "stage2/block2/conv2"]


def random_variables(model, channels: int = 3):
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, channels)))

    def draw(path, leaf):
        name, fan = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
        if name == "kernel":
            return jnp.asarray(random.normal(0, np.sqrt(2 / fan), leaf.shape), jnp.float32)
        uniform = name in ("scale", "var")
        drawn = random.uniform(0.4, 2, leaf.shape) if uniform else random.normal(0, 0.5, leaf.shape)
        return jnp.asarray(drawn, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def examples():
    """Bright and dark images, so that their means differ from one another."""
    random = np.random.default_rng(1)
    light = random.uniform(0.2, 1, (17, 1, 1, 3))
    images = (random.integers(0, 256, (17, SIDE, SIDE, 3)) * light).astype(np.uint8)
    return images, random.integers(0, CLASSES, 17).astype(np.int32)


RESIDENT = {"mean": np.float32([0.3, 0.4, 0.2]), "std": np.float32([0.2, 0.3, 0.25])}


def normalised(images: np.ndarray) -> np.ndarray:
    return ((images / 255 - RESIDENT["mean"]) / RESIDENT["std"]).astype(np.float32)


def outputs_of_norms(model, variables, images: np.ndarray) -> dict[str, np.ndarray]:
    """What flax captures of every BN: path of the convolution before it -> [N, H, W, C], float64."""
    capture = jax.jit(
        functools.partial(
            model.apply,
            mutable=["intermediates"],
            capture_intermediates=lambda module, method: isinstance(module, BatchNorm),
        )
    )
    _, captured = capture(variables, images)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(captured["intermediates"]):
        names = [part.key for part in path if hasattr(part, "key")]
        layer = [names[-2].replace("bn", "conv")]
        found["/".join([*names[:-2], *layer])] = np.asarray(leaf, np.float64)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_responses_are_the_deviation_over_all_examples_positions_and_channels_at_once(name, examples):
    model, (images, labels) = NETWORKS[name], examples
    variables = random_variables(model)
    assert list(probes.response_layers(model, variables, (SIDE, SIDE, 3))) == LAYERS[name]
    step, parts = jax.jit(probes.make_response_step(model)), []
    for rows in (slice(0, 9), slice(8, 17)):  # One example is in both, and counted once.
        found = step(variables, {"images": images[rows], "labels": labels[rows]}, RESIDENT)
        parts.append({key: np.asarray(value) for key, value in found.items()})
    found = {key: np.concatenate([parts[0][key], parts[1][key][1:]]) for key in ("mean", "variance")}
    assert found["mean"].shape == (17, len(LAYERS[name]))
    deviations = probes.response_deviations(found)
    outputs = outputs_of_norms(model, variables, normalised(images))
    np.testing.assert_allclose(deviations, [outputs[layer].std() for layer in LAYERS[name]], rtol=1e-5)
    # The mean of the examples' own deviations would be another number.
    own = [outputs[layer].std((1, 2, 3)).mean() for layer in LAYERS[name]]
    assert np.abs(deviations / own - 1).max() > 1e-3


@pytest.mark.parametrize("devices", [1, 8])
def test_responses_over_a_test_set_that_batches_do_not_divide(devices, monkeypatch):
    row = functools.partial(ResNet, blocks=(1, 1), widths=(4, 8), shortcut="none", stem="cifar", stem_width=4)
    monkeypatch.setitem(MODELS, "tiny", row)
    config = default_config()
    config.model.name, config.steps, config.eval.batch_size = "tiny", 1, 100
    mesh = distributed.make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        task = Classification(config, mesh)
        state = task.initial_state()
        step = jax.jit(probes.make_response_step(task.model))
        found = task.look(task.single_view(step, "test"), "test", state)
        variables = jax.device_get(state.variables)
        images, mean, std = (np.asarray(task._feeds["test"].resident[name]) for name in ("images", "mean", "std"))
        layers = probes.response_layers(task.model, variables, task.image_shape)
    np.testing.assert_array_equal(found["index"], np.arange(359))
    outputs = outputs_of_norms(task.model, variables, ((images / 255 - mean) / std).astype(np.float32))
    expected = [outputs[layer].std() for layer in layers]
    np.testing.assert_allclose(probes.response_deviations(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "side", "count"), [("cifar_resnet20", 32, 19), ("cifar_plain32", 32, 31), ("resnet18", 64, 16),
                                ("resnet50", 64, 16), ("resnet18_c", 64, 16)]
)  # fmt: skip
def test_the_paper_s_networks_have_so_many_3x3_layers(name, side, count):
    model = create_model(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    layers = probes.response_layers(model, variables, (side, side, 3))
    assert len(layers) == len(set(layers)) == count
    assert ("stem/conv" in layers) == name.startswith("cifar")  # The other stem is 7x7.
    assert list(layers) == sorted(layers, key=lambda layer: (layer != "stem/conv", layer))
    assert all(layer.endswith("conv2") for layer in layers) or name != "resnet50"


def judged(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank and loss of each example by loops."""
    ranks, losses = [], []
    for row, label in zip(np.float64(logits), labels, strict=True):
        ranks.append(sum(row[other] >= row[label] for other in range(CLASSES) if other != label))
        losses.append(np.log(np.exp(row - row[label]).sum()))
    return np.array(ranks), np.array(losses)


class Removal:
    """One network with its removal step, compiled once."""

    def __init__(self, name: str, examples):
        self.model = NETWORKS[name]
        self.variables = random_variables(self.model)
        self.names = probes.block_names(self.model)
        self.images, self.labels = examples
        self._step = jax.jit(probes.make_removal_step(self.model))
        self.apply = jax.jit(self.model.apply)

    def without(self, *blocks: str) -> tuple[np.ndarray, np.ndarray]:
        assert set(blocks) <= set(self.names)
        removed = np.array([name in blocks for name in self.names])
        batch = {"images": self.images, "labels": self.labels}
        found = self._step(self.variables, batch, RESIDENT, removed)
        return np.asarray(found["rank"]), np.asarray(found["loss"])

    def check(self, blocks: tuple[str, ...], logits: np.ndarray) -> None:
        ranks, losses = judged(np.asarray(logits), self.labels)
        found = self.without(*blocks)
        np.testing.assert_allclose(found[1], losses, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[0], ranks)


ALL = ("stage1/block1", "stage1/block2", "stage2/block1", "stage2/block2")


@pytest.mark.parametrize("name", ["residual", "projections", "bottleneck"])
def test_a_removed_residual_block_is_one_whose_last_norm_is_zero(name, examples):
    removal = Removal(name, examples)
    existing = tuple(block for block in ALL if block != "stage1/block2" or name != "bottleneck")
    assert removal.names == existing
    inputs = normalised(examples[0])
    last = "bn3" if name == "bottleneck" else "bn2"
    whole = removal.apply(removal.variables, inputs)
    removal.check((), whole)
    for blocks in (*((block,) for block in existing), existing[:2]):
        params = jax.tree.map(lambda x: x, removal.variables["params"])
        for stage, block in (one.split("/") for one in blocks):
            params[stage][block][last] = jax.tree.map(jnp.zeros_like, params[stage][block][last])
        logits = removal.apply(removal.variables | {"params": params}, inputs)
        assert np.abs(logits - whole).max() > 1e-2
        removal.check(blocks, logits)


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_a_removed_plain_or_gated_block_is_skipped(name, examples):
    removal = Removal(name, examples)
    assert removal.names == ("stage1/block1", "stage1/block2", "stage2/block2")  # The other changes the shape.
    model, variables = removal.model, removal.variables
    inputs = normalised(examples[0])

    @jax.jit
    def stem(images):
        return model.apply(variables, images, method="features")["stem"]

    def composed(skipped: tuple[str, ...]) -> np.ndarray:
        x = stem(inputs)
        for stage, block in (one.split("/") for one in ALL):
            if f"{stage}/{block}" in skipped:
                continue
            part = {kind: variables[kind][stage][block] for kind in ("params", "batch_stats")}
            features, stride = (4, 1) if stage == "stage1" else (8, 2 if block == "block1" else 1)
            x = _apply_block(Block(features, stride, shortcut=model.shortcut), part, x)
        return np.asarray(model.apply(variables, x, method="classify"))

    whole = removal.apply(variables, inputs)
    np.testing.assert_allclose(composed(()), whole, rtol=1e-4, atol=1e-4)
    removal.check((), whole)
    for blocks in (*((block,) for block in removal.names), removal.names):
        logits = composed(blocks)
        assert np.abs(logits - whole).max() > 1e-2
        removal.check(blocks, logits)


@functools.partial(jax.jit, static_argnums=0)
def _apply_block(block: Block, variables, x):
    return block.apply(variables, x, False)


def test_a_plain_block_that_changes_the_width_alone_can_not_be_removed():
    wider = ResNet(blocks=(2, 1), widths=(8, 8), num_classes=CLASSES, shortcut="none", stem="cifar", stem_width=4)
    assert probes.block_names(wider) == ("stage1/block2",)


def test_a_direction_is_as_long_as_each_filter_random_and_zero_elsewhere():
    params = jax.tree.map(np.asarray, random_variables(NETWORKS["bottleneck"])["params"])
    found = probes.random_direction(params, seed=3)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    cosines = []
    for (path, direction), weights in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(params), strict=True
    ):
        assert direction.shape == weights.shape
        assert direction.dtype == weights.dtype
        if path[-1].key != "kernel":
            assert not direction.any()
            continue
        for number in range(weights.shape[-1]):
            one, own = direction[..., number].ravel(), weights[..., number].ravel()
            assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(own), rel=1e-5)
            if own.size >= 16:
                cosines.append(one @ own / np.linalg.norm(own) ** 2)
    # No more like the weights than chance has it.
    assert abs(np.mean(cosines)) < 0.15
    assert max(np.abs(cosines)) < 0.95


def test_a_direction_follows_from_its_seed_and_a_filter_of_zeros_has_none():
    params = {"conv": {"kernel": np.float32(np.arange(2 * 3 * 4).reshape(2, 3, 4))}, "bn": {"scale": np.ones(4)}}
    params["conv"]["kernel"][..., 1] = 0
    first, again, other = (probes.random_direction(params, seed)["conv"]["kernel"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert not first[..., 1].any()
    assert np.isfinite(first).all()
