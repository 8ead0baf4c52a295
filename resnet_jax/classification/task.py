"""Classification as a task of the training loop."""

from collections.abc import Callable, Iterator
from functools import partial
import math
from typing import Any

import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from resnet_jax import distributed
from resnet_jax.classification import steps
from resnet_jax.data.augment import pixel_statistics
from resnet_jax.data.order import Order, holdout_split
from resnet_jax.data.sources import Images, load_dataset
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import count_groups, storage_dtype
from resnet_jax.models.registry import create_model
from resnet_jax.training import schedules
from resnet_jax.training.checkpoints import load_run_weights
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation


class Classification:
    """Images in classes, small enough to lie on the devices. See ``training.task.Task`` for the interface."""

    objective = "top1_error"

    def __init__(self, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, weights: bool = True):
        """Reads the data, builds the network and checks that they fit each other and the devices.

        Args:
          config: the whole config.
          mesh: the devices, in force (``jax.set_mesh``).
          weights: whether to begin with ``init.weights``; a run that goes on from a checkpoint doesn't need them.

        Raises:
          UsageError: they don't fit.
        """
        self._config, self._mesh = config, mesh
        distributed.check_batch("batch_size", config.batch_size, mesh, config.optimizer.accumulate)
        _check_groups(config, mesh.size)
        create_model(**_model_settings(config.model))  # Its mistakes are cheaper to find than the data.
        dataset = load_dataset(config.data)
        splits = self._split(dataset.train) | {"test": dataset.test}
        classes = config.model.num_classes or len(dataset.classes)
        if classes != len(dataset.classes):
            raise UsageError(
                f"model.num_classes={classes}, but {config.data.source} has {len(dataset.classes)} classes"
                f" ({', '.join(dataset.classes[:3])}, ...)"
            )
        self._model = create_model(num_classes=classes, **_model_settings(config.model))
        self._image_shape = splits["train"].images.shape[1:]
        self._lengths = {name: len(images) for name, images in splits.items()}
        self._optimizer = make_optimizer(config.optimizer)
        shapes = self._shapes()
        self._weights = load_run_weights(config.init.weights) if weights and config.init.weights else None
        if self._weights:
            check_weights(self._weights, shapes, config)
        self._resident = self._place(splits)
        self._eval_step = jax.jit(steps.make_eval_step(self._model))

        self.name = config.model.name
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        self.examples_per_step = config.batch_size
        self.examples_per_epoch = self._lengths["train"]
        self.total_steps = config.steps or math.ceil(config.epochs * self.examples_per_epoch / config.batch_size)
        self.resident = self._resident["train"]
        self.validation = "holdout" if config.data.holdout else "test"
        self.train_step = steps.make_train_step(self._model, self._optimizer, config, self.total_steps, mesh.size)

    def _place(self, splits: dict[str, Images]) -> dict[str, dict[str, jax.Array]]:
        """Every split on every device, with the training set's mean and deviation."""
        needed = sum(part.images.nbytes for part in splits.values())
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # CPUs don't say.
        if memory and needed > 0.8 * memory:
            raise UsageError(
                f"the images take {needed / 2**30:.1f} GiB, and a device has {memory / 2**30:.1f} GiB of memory;"
                " a smaller data.image_size takes less"
            )
        data, dtype = self._config.data, storage_dtype(self._model.dtype)
        mean, std = pixel_statistics(splits["train"].images, data.mean, data.std)
        statistics = {"mean": mean.astype(dtype), "std": std.astype(dtype)}
        return {
            name: distributed.replicate(self._mesh, {"images": part.images, "labels": part.labels} | statistics)
            for name, part in splits.items()
        }

    def _shapes(self) -> TrainState:
        """The state's shapes; a UsageError where the images are too small for the network."""
        height, width, channels = self._image_shape
        too_small = f"model.name={self._config.model.name}: images of {width}x{height} pixels are too small for it"
        try:
            shapes = jax.eval_shape(self._new_state)
            images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
            features = jax.eval_shape(partial(self._model.apply, method="features"), _weights_of(shapes), images)
        except ZeroDivisionError as error:  # An empty map has no fan.
            raise UsageError(too_small) from error
        if not all(feature.size for feature in features.values()):
            raise UsageError(too_small)
        return shapes

    def _split(self, train: Images) -> dict[str, Images]:
        held_out = self._config.data.holdout
        if not held_out:
            return {"train": train}
        if held_out >= len(train):
            raise UsageError(f"data.holdout={held_out} leaves nothing of {len(train)} training images")
        kept, validation = holdout_split(len(train), held_out)
        return {"train": train[kept], "holdout": train[validation]}

    def _new_state(self) -> TrainState:
        return steps.initial_state(self._model, self._optimizer, self._config, self._image_shape)

    def initial_state(self) -> TrainState:
        state = jax.jit(self._new_state, out_shardings=distributed.replicated(self._mesh))()
        if not self._weights:
            return state
        weights = jax.tree.map(lambda new, old: new.astype(old.dtype), self._weights, _weights_of(state))
        average = distributed.replicate(self._mesh, weights) if state.average else None
        return state.replace(**distributed.replicate(self._mesh, weights), average=average)

    def batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        order = Order(self._config.seed, self._lengths["train"])
        step = first_step
        while True:
            yield order.batch(step, self._config.batch_size)
            step += 1

    def evaluate(self, state: TrainState, split: str, poll: Callable[[], None]) -> Evaluation:
        examples, devices = self._lengths[split], self._mesh.size
        batch = math.ceil(min(self._config.eval.batch_size, examples) / devices) * devices
        outputs = []
        for start in range(0, examples, batch):
            poll()
            # The last batch is filled up with its own first example, whose surplus results are cut off below.
            index = np.arange(start, start + batch, dtype=np.int32)
            index[index >= examples] = start
            index = distributed.shard_batch(self._mesh, {"index": index})
            outputs.append(self._eval_step(state.variables, index, self._resident[split]))
        joined = {name: np.concatenate([np.asarray(out[name]) for out in outputs])[:examples] for name in outputs[0]}
        assert len(joined["rank"]) == examples
        labels = np.asarray(self._resident[split]["labels"])
        metrics = {
            "top1_error": 100 * float(np.mean(joined["rank"] >= 1)),
            "top5_error": 100 * float(np.mean(joined["rank"] >= 5)),
            "loss": float(np.mean(joined["loss"], dtype=np.float64)),
            "examples": examples,
        }
        index = np.arange(examples, dtype=np.int32)
        return Evaluation(metrics, {"index": index, "label": labels, "probabilities": joined["probabilities"]})

    def after_evaluation(self, state: TrainState, error: float) -> TrainState:
        schedule = schedules.after_evaluation(self._config.schedule, state.schedule, error)
        if schedule is state.schedule:
            return state
        return state.replace(schedule=distributed.replicate(self._mesh, schedule))


def _model_settings(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """``create_model``'s arguments as ``config.model`` says."""
    names = ("name", "dtype", "init_fan", "batch_norm", "batch_norm_momentum")
    # Only residual networks know zero_init_last.
    return {name: model[name] for name in names} | ({"zero_init_last": True} if model.zero_init_last else {})


def _check_groups(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises a UsageError where the BN groups don't divide what is normalised at once."""
    groups, parts = config.model.batch_norm, config.optimizer.accumulate
    # A group that spans devices would have other members in a part of the batch than in the whole.
    spans = devices if parts > 1 and groups.startswith("group:") else 1
    count_groups(groups, config.batch_size // (parts * spans))


def _weights_of(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def check_weights(weights: dict[str, Any], state: TrainState, config: ml_collections.ConfigDict) -> None:
    """Raises a UsageError that names the first array of ``weights`` which does not fit the network's ``state``."""
    given, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (weights, _weights_of(state))
    )
    where = f"init.weights={config.init.weights} does not fit model.name={config.model.name}"
    for name in sorted(wanted.keys() ^ given.keys()):
        raise UsageError(f"{where}: {name} is {'missing' if name in wanted else 'not part of the network'}")
    for name, array in wanted.items():
        if given[name].shape != array.shape:
            raise UsageError(f"{where}: {name} has shape {given[name].shape}, not {array.shape}")
