"""The pure parts of the training and evaluation steps against NumPy, and divided batches against undivided ones."""

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from resnet_jax.classification import steps
from resnet_jax.config import default_config
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.optimizer import make_optimizer

NAN, INF = float("nan"), float("inf")


def rank_by_sorting(logits: np.ndarray, label: int) -> int:
    """The label's place from 0 when classes are sorted from the best, its equals and NaNs placed before it."""
    if np.isnan(logits[label]):
        return len(logits) - 1
    scores = [INF if np.isnan(score) else score for score in logits]
    places = sorted(range(len(scores)), key=lambda k: (-scores[k], k == label))
    return places.index(label)


def test_label_rank_is_the_place_in_sorted_order_ties_and_nans_counting_against_it():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 10)).astype(np.float32)
    logits[100:200] = rng.integers(0, 3, (100, 10))  # Many ties.
    logits[200:300][rng.random((100, 10)) < 0.2] = NAN
    logits[300:400][rng.random((100, 10)) < 0.2] = INF
    logits[350:400][rng.random((50, 10)) < 0.2] = -INF
    labels = rng.integers(0, 10, 400).astype(np.int32)
    ranks = steps.label_rank(jnp.array(logits), jnp.array(labels))
    assert ranks.dtype == jnp.int32
    expected = [rank_by_sorting(row, label) for row, label in zip(logits, labels, strict=True)]
    assert np.asarray(ranks).tolist() == expected


@pytest.mark.parametrize(
    ("logits", "rank"),
    [
        ([3, 1, 2], 0),
        ([1, 3, 2], 2),
        ([2, 3, 1], 1),
        ([2, 2, 1], 1),  # A tie is an error: the network has not decided.
        ([0, 0, 0], 2),  # So is a network that says nothing.
        ([NAN, 1, 2], 2),
        ([1, NAN, 0], 1),
        ([NAN, NAN, NAN], 2),
        ([INF, 0, 0], 0),
        ([INF, INF, 0], 1),
    ],
)
def test_label_rank_of_class_0_by_hand(logits, rank):
    assert int(steps.label_rank(jnp.array([logits], jnp.float32), jnp.array([0]))[0]) == rank


def cross_entropy_by_hand(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    """Szegedy et al. 2016, section 7: the share is spread over all classes, the label's among them."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    classes = logits.shape[1]
    targets = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return -(targets * log_softmax).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_that_of_the_smoothed_target(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(20, 7)).astype(np.float32), rng.integers(0, 7, 20)
    loss = steps.cross_entropy(jnp.array(logits), jnp.array(labels), smoothing)
    np.testing.assert_allclose(loss, cross_entropy_by_hand(logits, labels, smoothing), rtol=1e-5)


def test_cross_entropy_of_an_undecided_network_is_the_log_of_the_number_of_classes():
    loss = steps.cross_entropy(jnp.zeros((2, 1000)), jnp.array([0, 999]), 0.1)
    np.testing.assert_allclose(loss, 6.907755, rtol=1e-6)


def test_cross_entropy_of_large_logits_stays_finite():
    loss = steps.cross_entropy(jnp.array([[1000.0, 0.0], [0.0, 1000.0]]), jnp.array([0, 0]))
    np.testing.assert_allclose(loss, [0, 1000])


def test_merged_running_statistics_are_those_of_the_whole_batch():
    rng, momentum = np.random.default_rng(0), 0.9
    examples = 3 * rng.normal(size=(4, 6, 5)) + np.arange(4).reshape(4, 1, 1)  # 4 parts of 6, 5 channels.
    running_mean, running_var = rng.normal(size=5), rng.uniform(1, 2, 5)

    def after(mean, square):
        """The running statistics after a batch of these E[x] and E[x^2]."""
        var = square - mean**2
        return {"mean": momentum * running_mean + (1 - momentum) * mean,
                "var": momentum * running_var + (1 - momentum) * var}  # fmt: skip

    parts = [after(part.mean(0), np.square(part).mean(0)) for part in examples]
    stacked = {name: jnp.array([part[name] for part in parts]) for name in ("mean", "var")}
    merged = steps.merge_batch_stats({"stage1": {"bn1": stacked}, "bn": stacked}, momentum)

    whole = examples.reshape(-1, 5)
    expected = after(whole.mean(0), np.square(whole).mean(0))
    assert set(merged) == {"stage1", "bn"}
    for found in (merged["stage1"]["bn1"], merged["bn"]):
        assert set(found) == {"mean", "var"}
        for name in ("mean", "var"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_merging_nothing_gives_nothing():
    assert steps.merge_batch_stats({}, 0.9) == {}


@pytest.mark.parametrize(
    ("parts", "devices", "expected"),
    [
        (2, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 1, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        # Device 0 has examples 0 to 3, device 1 has 4 to 7; each part takes the next ones of both.
        (2, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (4, 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_a_divided_batch_has_each_example_once_and_leaves_it_on_its_device(parts, devices, expected):
    batch = {"index": jnp.arange(8), "images": jnp.arange(8 * 6).reshape(8, 2, 3)}
    divided = steps.split_batch(batch, parts, devices)
    assert np.asarray(divided["index"]).tolist() == expected
    np.testing.assert_array_equal(divided["images"], np.arange(48).reshape(8, 2, 3)[np.array(expected)])


class Bias(nn.Module):
    """Logits are an image's pixels plus a bias: gradients can be had by hand."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        flat = images.reshape(len(images), -1)
        return flat + self.param("bias", nn.initializers.zeros_init(), flat.shape[1:])


class Spy(nn.Module):
    """Keeps what it is shown among its statistics."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        self.variable("batch_stats", "seen", jnp.zeros, images.shape).value = images
        return jnp.zeros((len(images), 2)) + self.param("bias", nn.initializers.zeros_init(), (2,))


def prepare(model, images: np.ndarray, labels: np.ndarray, mean=0.0, std=1.0, dtype=np.float32, state=None, **settings):
    """A jitted training step of a small config, its first state (unless given) and the data."""
    config = default_config()
    config.batch_size, config.steps = 16, 10
    config.schedule.name = "constant"
    config.update_from_flattened_dict(settings)
    optimizer = make_optimizer(config.optimizer)
    channels = images.shape[-1]
    resident = {"images": jnp.array(images), "labels": jnp.array(labels, jnp.int32),
                "mean": jnp.full(channels, mean, dtype), "std": jnp.full(channels, std, dtype),
                "seed": jnp.uint32(config.seed)}  # fmt: skip
    state = state or jax.jit(lambda: steps.initial_state(model, optimizer, config, images.shape[1:]))()
    return jax.jit(steps.make_train_step(model, optimizer, config, total_steps=10)), state, resident


def batch_of(index: list[int], epoch: int = 0) -> dict[str, np.ndarray]:
    return {"index": np.array(index, np.int32), "epoch": np.full(len(index), epoch, np.int32)}


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_metrics_are_the_mean_loss_the_error_in_percent_the_rate_and_the_norm_of_the_gradient(smoothing):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 1, 1, 6), np.uint8), rng.integers(0, 6, 20)
    settings = {"loss.label_smoothing": smoothing, "schedule.learning_rate": 0.05, "optimizer.weight_decay": 0.1}
    step, state, resident = prepare(Bias(), images, labels, mean=0.5, std=0.1, **settings)
    index = [3, 1, 4, 15, 9, 2, 6, 5, 19, 0, 11, 7, 13, 8, 10, 12]
    after, metrics = step(state, batch_of(index), resident)

    logits, chosen = (images[index].reshape(16, 6) / 255 - 0.5) / 0.1, labels[index]
    targets = (1 - smoothing) * np.eye(6)[chosen] + smoothing / 6
    gradient = (softmax(logits) - targets).mean(0)
    expected = {
        "loss": cross_entropy_by_hand(logits, chosen, smoothing).mean(),
        "top1_error": 100 * np.mean([rank_by_sorting(*pair) > 0 for pair in zip(logits, chosen, strict=True)]),
        "learning_rate": 0.05,
        "gradient_norm": np.linalg.norm(gradient),  # Of the loss alone, without the weight decay.
        "weight_norm": 0.05 * np.linalg.norm(gradient),  # The only weights began at zero.
    }
    assert {name: (value.shape, float(value)) for name, value in metrics.items()} == {
        name: ((), pytest.approx(value, rel=1e-4)) for name, value in expected.items()
    }
    np.testing.assert_allclose(after.params["bias"], -0.05 * gradient, rtol=1e-3, atol=1e-7)
    assert int(after.step) == 1


def test_images_and_labels_are_taken_by_index():
    labels = np.array([2, 0, 1, 3, 2, 1, 0, 3])
    images = (255 * np.eye(4)[labels]).astype(np.uint8).reshape(8, 1, 1, 4)  # An image shows its label.
    step, state, resident = prepare(Bias(), images, labels, std=0.01)
    _, metrics = step(state, batch_of([7, 2, 2, 5]), resident)
    assert float(metrics["top1_error"]) == 0
    assert float(metrics["loss"]) < 1e-6


def test_the_network_is_shown_images_with_the_mean_subtracted_before_zeros_are_padded():
    white = np.full((64, 4, 4, 1), 255, np.uint8)
    step, state, resident = prepare(Spy(), white, np.zeros(64), mean=0.25, std=0.5, **{"data.pad": 2})
    after, _ = step(state, batch_of(list(range(64))), resident)
    values, counts = np.unique(np.asarray(after.batch_stats["seen"]), return_counts=True)
    assert values.tolist() == [0, 1.5]  # (1 - 0.25) / 0.5, and not -0.5, what black would be.
    # Of 4 pixels in a row 4 - |offset| are the image's, on average 2.8 of 4 in each direction: 0.49 of all.
    assert 0.4 < counts[1] / counts.sum() < 0.6


def test_an_example_is_shown_alike_wherever_it_stands_in_whatever_step():
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)
    step, state, resident = prepare(Spy(), images, np.zeros(16), **{"data.pad": 2, "data.flip": True})

    def seen(index: list[int], epoch: int, number: int) -> np.ndarray:
        after, _ = step(state.replace(step=jnp.int32(number)), batch_of(index, epoch), resident)
        return np.asarray(after.batch_stats["seen"])

    forwards = seen(list(range(16)), epoch=3, number=50)
    np.testing.assert_array_equal(seen(list(range(15, -1, -1)), epoch=3, number=7)[::-1], forwards)
    other_epoch = seen(list(range(16)), epoch=4, number=50)
    assert (other_epoch != forwards).any((1, 2, 3)).sum() > 10


PARTS = (1, 2, 4)
EMA = 0.8


@pytest.fixture(scope="module")
def runs():
    """Three steps of a small network with its batches worked through in 1, 2 and 4 parts, in 64 bits."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        images, labels = rng.integers(0, 256, (24, 8, 8, 3), np.uint8), rng.integers(0, 4, 24)
        model = ResNet(blocks=(1,), widths=(8,), num_classes=4, stem="cifar", stem_width=8, batch_norm="group:4",
                       dtype=jnp.float64)  # fmt: skip
        histories, first = {}, None
        for parts in PARTS:
            settings = {"optimizer.accumulate": parts, "optimizer.ema": EMA, "data.pad": 1, "data.flip": True,
                        "loss.label_smoothing": 0.1, "schedule.learning_rate": 0.1}  # fmt: skip
            step, state, resident = prepare(model, images, labels, 0.5, 0.25, np.float64, first, **settings)
            first = state
            order = np.random.default_rng(1)
            history = [(jax.device_get(state), None)]
            for number in range(3):
                batch = batch_of(order.permutation(24)[:16].tolist(), number)
                state, metrics = step(state, batch, resident)
                history.append(jax.device_get((state, metrics)))
            histories[parts] = history
        return histories


def assert_close(tree, expected, rtol=1e-9, atol=1e-12) -> None:
    leaves, others = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(expected)
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, left), (_, right) in zip(leaves, others, strict=True):
        np.testing.assert_allclose(left, right, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("parts", PARTS[1:])
def test_a_batch_in_parts_trains_as_the_undivided_one(runs, parts):
    for (whole, whole_metrics), (divided, metrics) in zip(runs[1], runs[parts], strict=True):
        assert_close(divided.params, whole.params)
        assert_close(divided.batch_stats, whole.batch_stats)
        assert_close(divided.opt_state, whole.opt_state)
        assert int(divided.step) == int(whole.step)
        if metrics is not None:
            assert set(metrics) == {"loss", "top1_error", "learning_rate", "gradient_norm", "weight_norm"}
            assert_close(metrics, whole_metrics)


def test_training_moves_every_parameter_and_statistic(runs):
    before, after = runs[1][0][0], runs[1][-1][0]
    for path, leaf in jax.tree.leaves_with_path((after.params, after.batch_stats)):
        start = dict(jax.tree.leaves_with_path((before.params, before.batch_stats)))[path]
        assert (leaf != start).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("parts", PARTS)
def test_the_averaged_weights_and_statistics_follow_theirs_step_by_step(runs, parts):
    states = [state for state, _ in runs[parts]]
    average = {"params": states[0].params, "batch_stats": states[0].batch_stats}
    assert_close(states[0].average, average, rtol=0, atol=0)
    for state in states[1:]:
        now = {"params": state.params, "batch_stats": state.batch_stats}
        average = jax.tree.map(lambda old, new: EMA * old + (1 - EMA) * new, average, now)
        assert_close(state.average, average)
        assert_close(state.variables, average)  # What is evaluated.


def test_without_an_average_the_weights_themselves_are_evaluated():
    _, state, _ = prepare(Spy(), np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2))
    assert state.average is None
    assert set(state.variables) == {"params", "batch_stats"}
    assert state.variables["params"] is state.params


def test_evaluation_gives_each_examples_loss_rank_and_probabilities():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 1, 1, 6), np.uint8), rng.integers(0, 6, 12)
    settings = {"loss.label_smoothing": 0.3, "data.pad": 1, "data.flip": True}  # Of training alone.
    _, _, resident = prepare(Bias(), images, labels, mean=0.5, std=0.2, **settings)
    bias = np.linspace(-1, 1, 6, dtype=np.float32)
    index = [11, 0, 5, 5]
    output = jax.jit(steps.make_eval_step(Bias()))({"params": {"bias": bias}}, {"index": np.array(index)}, resident)
    logits = (images[index].reshape(4, 6) / 255 - 0.5) / 0.2 + bias
    np.testing.assert_allclose(output["loss"], cross_entropy_by_hand(logits, labels[index], 0), rtol=1e-4)
    np.testing.assert_allclose(output["probabilities"], softmax(logits), rtol=1e-4)
    expected = [rank_by_sorting(*pair) for pair in zip(logits, labels[index], strict=True)]
    assert np.asarray(output["rank"]).tolist() == expected
