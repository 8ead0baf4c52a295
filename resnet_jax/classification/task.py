"""Classification as a task of the training loop."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
import hashlib
import math
import sys
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from resnet_jax import distributed
from resnet_jax.classification import calibrate, protocols, steps
from resnet_jax.classification.network import check_groups, make_model, rate_factors
from resnet_jax.classification.scores import mean_scores
from resnet_jax.data.feed import make_feeds
from resnet_jax.distributed import shard_batch
from resnet_jax.errors import UsageError
from resnet_jax.models import stacking
from resnet_jax.models.layers import storage_dtype
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.start import with_preprocessing
from resnet_jax.training import update
from resnet_jax.training.network import width_setting
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.prefetch import Prefetch
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation

_AHEAD = 2  # Batches that evaluation gives the devices before it waits for their results.


class Classification:
    """Images in classes. See ``training.task.Task`` for the interface."""

    objective, sign = "top1_error", 1

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: jax.sharding.Mesh,
        start: Pretrained | None = None,
        explicit: Collection[str] = (),
    ):
        """Reads the data, builds the network and checks that they fit each other and the devices.

        Args:
          config: the whole config.
          mesh: the devices, in force (``jax.set_mesh``).
          start: the weights to begin with, and what belongs to them.
          explicit: names of the config's fields that ``start`` does not change.

        Raises:
          UsageError: they don't fit.
        """
        config, given = with_preprocessing(config, start, explicit)
        self._config, self._mesh = config, mesh
        self._settings = start.settings if start else {}
        distributed.check_batch("batch_size", config.batch_size, mesh, config.optimizer.accumulate)
        check_groups(config, mesh.size)
        # Its mistakes are cheaper to find than the data.
        self.model = make_model(config, None, self._settings)
        self._feeds, self.classes = make_feeds(config, mesh, storage_dtype(self.model.dtype), given)
        classes = config.model.num_classes or len(self.classes)
        if classes != len(self.classes):
            raise UsageError(
                f"model.num_classes={classes}, but {config.data.source} has {len(self.classes)} classes"
                f" ({', '.join(self.classes[:3])}, ...)"
            )
        self.model = self.model.clone(num_classes=classes)
        train = self._feeds["train"]
        self.image_shape = train.image_shape
        self._optimizer = make_optimizer(config.optimizer, rate_factors(config, self.model))
        shapes = self._shapes()
        self._weights = start.variables if start else None
        if self._weights:
            if config.init.head == "replace":
                kept = {name: part for name, part in self._weights["params"].items() if name != "head"}
                self._weights = {**self._weights, "params": kept}
                names = f"{', '.join(self.classes[:5])}{', ...' if classes > 5 else ''}"
                print(f"weights: {start.title}; a new head for {classes} classes ({names})", flush=True)
            elif start.classes and start.classes != tuple(self.classes):
                pairs = zip(start.classes, self.classes, strict=False)
                was, now = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
                print(f"warning: the weights' classes have other names than the data's ({was!r}, {now!r}, ...); their"
                      " order must be the same", file=sys.stderr, flush=True)  # fmt: skip
            check_weights(self._weights, shapes, config)
            wanted = _weights_of(shapes)
            self._weights = {name: stacking.stack(part, wanted[name]) for name, part in self._weights.items()}
        self._eval_step = jax.jit(steps.make_eval_step(self.model))

        self.name = config.model.name
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        self.examples_per_step = config.batch_size
        self.examples_per_epoch = train.examples
        self.total_steps = config.steps or math.ceil(config.epochs * train.examples / config.batch_size)
        self.resident = train.resident | distributed.replicate(mesh, {"seed": np.uint32(config.seed)})
        self.streams = "images" not in train.resident
        protocols.check_protocol(config.eval.protocol, config, self.streams)
        self.validation = "holdout" if config.data.holdout else "test"
        self.train_step = steps.make_train_step(self.model, self._optimizer, config, self.total_steps)

    def _shapes(self) -> TrainState:
        """The state's shapes; a UsageError where the images are too small for the network."""
        height, width, channels = self.image_shape
        too_small = f"model.name={self._config.model.name}: images of {width}x{height} pixels are too small for it"
        try:
            shapes = jax.eval_shape(self._new_state)
            images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
            features = jax.eval_shape(partial(self.model.apply, method="features"), _weights_of(shapes), images)
        except ZeroDivisionError as error:  # An empty map has no fan.
            raise UsageError(too_small) from error
        if not all(feature.size for feature in features.values()):
            raise UsageError(too_small)
        return shapes

    def _new_state(self) -> TrainState:
        return steps.initial_state(self.model, self._optimizer, self._config, self.image_shape)

    def share_data(self, other: "Classification") -> None:
        """Takes the data of another run's task, which are the same, and its evaluation instead of its own."""
        self._feeds, self._eval_step = other._feeds, other._eval_step
        self.resident = other.resident | {"seed": self.resident["seed"]}

    def initial_state(self) -> TrainState:
        state = jax.jit(self._new_state, out_shardings=distributed.replicated(self._mesh))()
        # A new head is not among those given.
        return update.start_from(self._mesh, state, self._weights) if self._weights else state

    @property
    def description(self) -> dict[str, Any]:
        """What a run remembers of its data: names of the classes, training examples, preprocessing, the network's
        attributes that the config does not say, and the mean image or None.
        """  # fmt: skip
        mean, std = (np.asarray(self.resident[name]) for name in ("mean", "std"))
        size, cut = self.image_shape[0], self._config.data.crop != "whole"
        means = tuple(mean.reshape(-1, mean.shape[-1]).mean(0).tolist())
        resize = self._config.eval.resize if cut else None
        # Images on the devices were resized once, as training's are.
        how = self._config.eval.interpolation if self.streams else self._config.data.interpolation
        return {
            "classes": list(self.classes),
            "examples": self.examples_per_epoch,
            "preprocessing": Preprocessing(means, tuple(std.tolist()), size, resize, how).to_json(),
            "settings": self._settings | width_setting(self._config.model),
            "mean_image": mean if mean.ndim == 3 else None,
        }

    def fingerprint(self) -> dict[str, str]:
        """Tells data apart: which examples each split has, and what is subtracted from them."""
        mean = hashlib.sha256(np.asarray(self.resident["mean"]).tobytes()).hexdigest()
        classes = hashlib.sha256(repr(self.classes).encode()).hexdigest()
        feeds = {f"{name} examples": f"{feed.examples}, {feed.identity()}" for name, feed in self._feeds.items()}
        return feeds | {"mean image": mean, "classes": classes}

    @property
    def test_examples(self) -> int:
        """How many examples the test set has."""
        return self._feeds["test"].examples

    @property
    def broken(self) -> dict[str, str]:
        # Copies: another thread adds to them.
        return {where: reason for feed in self._feeds.values() for where, reason in feed.broken.copy().items()}

    def batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        return self._feeds["train"].training(self._config.seed, self._config.batch_size, first_step, self.total_steps)

    def evaluate(
        self, state: TrainState, split: str, poll: Callable[[], None], protocol: str = protocols.CENTER
    ) -> Evaluation:
        feed, devices = self._feeds[split], self._mesh.size
        if protocol == protocols.CENTER:
            found = self.look(self.single_view(self._eval_step, split), split, state, poll)
        else:
            model, state = self.per_block(state)
            passes = protocols.make_passes(protocol, model, state.variables, feed, self._config, devices)
            found = mean_scores([self.look(one, split, state, poll) for one in passes])
        if not len(found["index"]):
            raise UsageError(f"none of the {feed.examples} images of the {split} set can be read")
        # Every example exactly once, but for those that were left out and said to be (perhaps by another process).
        assert np.array_equal(found["index"], np.unique(found["index"]))
        assert len(found["index"]) == feed.examples or self._config.data.on_error == "skip"
        metrics = {
            "top1_error": 100 * float(np.mean(found["rank"] >= 1)),
            "top5_error": 100 * float(np.mean(found["rank"] >= 5)),
            "loss": float(np.mean(found["loss"], dtype=np.float64)),
            "examples": len(found["index"]),
        }
        predictions = {name: found[name] for name in ("index", "label", "probabilities")}
        return Evaluation(metrics, predictions | {"test_set": np.array(feed.identity())})

    def single_view(self, step: Callable[..., Any], split: str, index: np.ndarray | None = None) -> protocols.Pass:
        """One look at every example of a split (of ``index``, where given), as evaluation sees it."""
        feed, devices = self._feeds[split], self._mesh.size
        examples = feed.examples if index is None else len(index)
        batch = math.ceil(min(self._config.eval.batch_size, examples) / devices) * devices
        return protocols.Pass(lambda: feed.evaluation(batch, index), feed.inputs, step)

    def look(
        self, one: protocols.Pass, split: str, state: TrainState, poll: Callable[[], None] = lambda: None
    ) -> dict[str, np.ndarray]:
        """The step's outputs for every readable example of a pass, [N, ...], with their ``index`` and ``label``."""
        resident, outputs = self._feeds[split].resident, []
        with Prefetch(one.batches(), partial(shard_batch, self._mesh), self._config.data.prefetch) as batches:
            for batch in batches:
                poll()
                found = one.step(state.variables, {name: batch[name] for name in one.inputs}, resident)
                about = {"index": batch["index"], "label": batch["labels"], "valid": batch["valid"]}
                outputs.append(distributed.gather(self._mesh, found | about))
                if len(outputs) > _AHEAD:  # Images of all batches at once would fill the memory.
                    outputs[-1 - _AHEAD] = jax.device_get(outputs[-1 - _AHEAD])
        arrays = {name: np.concatenate([np.asarray(out[name]) for out in outputs]) for name in outputs[0]}
        valid = arrays.pop("valid")
        return {name: array[valid] for name, array in arrays.items()}

    def per_block(self, state: TrainState) -> tuple[nn.Module, TrainState]:
        """The network and its state with each block's arrays under its own name, for all that looks at blocks."""
        if not getattr(self.model, "stacked", False):
            return self.model, state
        variables = distributed.replicate(self._mesh, stacking.per_block(jax.device_get(state.variables)))
        return self.model.clone(stacked=False, scan=False), state.replace(**variables, average=None)

    def calibrated(self, state: TrainState, poll: Callable[[], None]) -> TrainState:
        """The state with BN statistics that are averages over the training set; what is evaluated has them.

        Raises:
          UsageError: the training set is smaller than a batch, or there is no BN.
        """
        if not state.variables.get("batch_stats"):
            raise UsageError(f"--mode=calibrate: {self.name} has no BN")
        feed, batch = self._feeds["train"], self._config.batch_size
        index = calibrate.whole_batches(feed.examples, batch, self._config.seed)
        if not len(index):
            raise UsageError(f"--mode=calibrate: {feed.examples} training images don't fill a batch_size of {batch}")
        step = jax.jit(calibrate.make_statistics_step(self.model), out_shardings=distributed.replicated(self._mesh))

        def place(host: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            if not host["valid"].all():
                raise UsageError("--mode=calibrate needs every training image; some can't be read")
            return shard_batch(self._mesh, {name: host[name] for name in feed.inputs})

        def statistics() -> Iterator[Any]:
            with Prefetch(feed.evaluation(batch, index), place, self._config.data.prefetch) as batches:
                for arrays in batches:
                    poll()
                    yield step(state.variables, arrays, feed.resident)

        averaged = distributed.replicate(self._mesh, calibrate.average_statistics(statistics()))
        return state.replace(params=state.variables["params"], batch_stats=averaged, average=None)

    def after_evaluation(self, state: TrainState, error: float) -> TrainState:
        return update.after_evaluation(self._mesh, state, self._config.schedule, error)


def _weights_of(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def check_weights(weights: dict[str, Any], state: TrainState, config: ml_collections.ConfigDict) -> None:
    """Raises a UsageError that names the first array of ``weights`` which does not fit the network's ``state``."""
    given, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (weights, jax.eval_shape(stacking.per_block, _weights_of(state)))
    )
    where = f"init.weights={config.init.weights} does not fit model.name={config.model.name}"
    head = "params/head/bias"
    if config.init.head == "replace":
        wanted = {name: array for name, array in wanted.items() if not name.startswith("params/head/")}
    elif head in given and given[head].shape != wanted[head].shape:
        raise UsageError(f"init.weights={config.init.weights} has {len(given[head])} classes and the data have"
                         f" {wanted[head].shape[0]}; --config.init.head=replace gives it a new classifier")  # fmt: skip
    for name in sorted(wanted.keys() ^ given.keys()):
        raise UsageError(f"{where}: {name} is {'missing' if name in wanted else 'not part of the network'}")
    for name, array in wanted.items():
        if given[name].shape != array.shape:
            raise UsageError(f"{where}: {name} has shape {given[name].shape}, not {array.shape}")
