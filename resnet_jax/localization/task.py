"""Localization as a task of the training loop."""

from collections.abc import Callable, Collection, Iterator, Mapping
import hashlib
import math
from typing import Any

import jax
import ml_collections
import numpy as np

from resnet_jax import distributed
from resnet_jax.data.crops import ScaleCrop
from resnet_jax.data.sources import worker_count
from resnet_jax.data.stream import Rows
from resnet_jax.detection.start import starting_variables
from resnet_jax.distributed import shard_batch
from resnet_jax.errors import UsageError
from resnet_jax.localization import protocols, steps
from resnet_jax.localization.batches import training_batches
from resnet_jax.localization.data import Split, channel_statistics, read_splits
from resnet_jax.localization.metrics import localization_errors, right_guesses
from resnet_jax.localization.network import create_localizer
from resnet_jax.localization.settings import make_settings
from resnet_jax.models.layers import storage_dtype
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.pretrained.start import with_preprocessing
from resnet_jax.training import update
from resnet_jax.training.network import model_settings
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.prefetch import Prefetch
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation

_AHEAD = 2  # Batches that evaluation gives the devices before it waits for their results.


class Localization:
    """Where the object is. See ``training.task.Task`` for the interface."""

    objective, sign = "top5_localization_error", 1
    streams, validation = True, "test"

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: jax.sharding.Mesh,
        start: Pretrained | None = None,
        explicit: Collection[str] = (),
        splits: Mapping[str, Split] | None = None,
    ):
        """Reads the annotations, builds the network and checks that they fit each other and the devices.

        Args:
          config: the whole config.
          mesh: the devices, in force (``jax.set_mesh``).
          start: a classification's weights, whose classifier is left out, or a localization's, to begin with.
          explicit: names of the config's fields that ``start`` does not change.
          splits: ``train`` and ``test``; None: those of ``data.read_splits``.

        Raises:
          UsageError: they don't fit.
        """
        config, given = with_preprocessing(config, start, explicit)
        _check(config)
        distributed.check_batch("batch_size", config.batch_size, mesh)
        self._config, self._mesh = config, mesh
        self._settings = make_settings(config.localization)
        self._attributes = start.settings if start else {}
        splits = self._splits = read_splits(config) if splits is None else splits
        self.classes = splits["train"].annotations.classes
        if splits["test"].annotations.classes != self.classes:
            raise UsageError("the training set and the test set have different classes")
        if config.model.num_classes not in (0, len(self.classes)):
            raise UsageError(
                f"model.num_classes={config.model.num_classes}, but the data have {len(self.classes)} classes"
            )
        backbone = model_settings(config.model) | self._attributes
        own = {name: backbone.pop(name) for name in ("name", "dtype", "batch_norm", "freeze_at") if name in backbone}
        self.model = create_localizer(num_classes=len(self.classes), settings=self._settings, **own, **backbone)
        self._optimizer = make_optimizer(config.optimizer)
        shapes = jax.eval_shape(self._new_state)
        self._weights = None
        if start and start.variables:
            wanted = {"params": shapes.params, "batch_stats": shapes.batch_stats}
            self._weights = starting_variables(start, wanted, config, self.classes)
        self.resident = distributed.replicate(mesh, self._statistics(given) | {"seed": np.uint32(config.seed)})
        self._labels = {name: _labels(split) for name, split in splits.items()}
        self._guesses = None
        if self._settings.predictions:
            self._guesses = protocols.predicted_classes(
                self._settings.predictions, self._labels["test"], len(self.classes)
            )

        self.name = config.model.name
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        self.examples_per_step = config.batch_size
        self.examples_per_epoch = len(splits["train"].annotations)
        self.total_steps = config.steps or math.ceil(config.epochs * self.examples_per_epoch / config.batch_size)
        self.broken: dict[str, str] = {}
        self.train_step = steps.make_train_step(self.model, self._optimizer, config, self._settings, self.total_steps)
        self._infer = jax.jit(steps.make_inference_step(self.model, self._settings))

    def _new_state(self) -> TrainState:
        return steps.initial_state(self.model, self._optimizer, self._config)

    def _statistics(self, given: tuple[np.ndarray | None, np.ndarray | None]) -> dict[str, np.ndarray]:
        """``mean`` and ``std``, [3] each: the weights' own, or what the config says."""
        mean, std = given
        if mean is None or std is None:
            found = channel_statistics(self._config.data, self._splits["train"], protocols.centre_crop(self._config))
            mean, std = (found[i] if given[i] is None else given[i] for i in (0, 1))
        dtype = storage_dtype(self.model.backbone.dtype)
        mean = mean.mean((0, 1)) if mean.ndim == 3 else mean  # A mean image fits one size alone.
        return {"mean": np.asarray(mean, dtype), "std": np.asarray(std, dtype)}

    def initial_state(self) -> TrainState:
        state = jax.jit(self._new_state, out_shardings=distributed.replicated(self._mesh))()
        return update.start_from(self._mesh, state, self._weights) if self._weights else state

    @property
    def description(self) -> dict[str, Any]:
        """What a run remembers of its data."""
        mean, std = (tuple(np.asarray(self.resident[name]).tolist()) for name in ("mean", "std"))
        evaluated = self._config.eval.resize, self._config.eval.interpolation
        return {
            "classes": list(self.classes),
            "examples": self.examples_per_epoch,
            "preprocessing": Preprocessing(mean, std, self._config.data.image_size, *evaluated).to_json(),
            "settings": self._attributes,
            "mean_image": None,
        }

    def fingerprint(self) -> dict[str, str]:
        """Tells data apart: which images and boxes each split has, and what is subtracted."""
        mean = hashlib.sha256(np.asarray(self.resident["mean"]).tobytes()).hexdigest()
        return {f"{name} examples": self._identity(name) for name in self._splits} | {"mean": mean}

    def _identity(self, split: str) -> str:
        digest, images = hashlib.sha256(), self._splits[split].annotations.images
        for image in images:
            digest.update(repr((image.id, image.labels.tolist(), image.boxes.tolist())).encode())
        return f"{len(images)}, {digest.hexdigest()}"

    @property
    def _reading(self) -> dict[str, Any]:
        workers = worker_count(self._config.data.workers)
        return {"workers": workers, "processes": self._config.data.worker_type == "process"}

    def batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        config, split = self._config, self._splits["train"]
        crop = ScaleCrop(
            config.data.image_size, *config.data.scales, config.data.interpolation, config.data.reduced_dct
        )
        return training_batches(
            split.annotations, crop, config.seed,
            Rows(config.batch_size, jax.process_index(), jax.process_count()), first_step, self.total_steps,
            least_visible=self._settings.least_visible, content=split.content, flip=config.data.flip, **self._reading,
        )  # fmt: skip

    def evaluate(
        self, state: TrainState, split: str, poll: Callable[[], None], protocol: str = protocols.CENTER
    ) -> Evaluation:
        """The errors of the true class, and of the predicted ones where ``localization.predictions`` has some.

        Metrics: ``class_given_localization_error``, and ``top1_`` and ``top5_localization_error``, which are of the
        predicted classes, or are the same; all in %. Predictions: ``index``, ``label``, the guessed ``classes`` int32
        [N, k] with their ``boxes`` [N, k, 4], image's pixels, and ``scores`` [N, k].
        """
        images, labels = self._splits[split].annotations.images, self._labels[split]
        predicted = self._guesses if split == "test" else None
        asked = labels[:, None] if predicted is None else np.concatenate([labels[:, None], predicted], axis=1)
        place, devices = (jax.process_index(), jax.process_count()), self._mesh.size
        passes = protocols.make_passes(protocol, self._splits[split], self._config, place, devices, **self._reading)
        found = [self._look(batches, asked, state, poll) for batches in passes]
        candidates = (np.concatenate([one[name] for one in found], axis=2) for name in ("boxes", "scores"))
        boxes, scores = map(np.asarray, protocols.best_boxes(*candidates, self._settings.voting_iou))
        right = right_guesses(asked, boxes, labels, [image.boxes for image in images])
        guesses = slice(0, 1) if predicted is None else slice(1, None)
        metrics = localization_errors(right[:, guesses]) | {
            "class_given_localization_error": 100 * float(1 - right[:, 0].mean()),
            "examples": len(images),
        }
        predictions = {
            "index": np.arange(len(images), dtype=np.int32),
            "label": labels,
            "classes": asked[:, guesses],
            "boxes": boxes[:, guesses],
            "scores": scores[:, guesses],
            "test_set": np.array(self._identity(split)),
        }
        return Evaluation(metrics, predictions)

    def _look(
        self,
        batches: Callable[[], Iterator[dict[str, np.ndarray]]],
        asked: np.ndarray,
        state: TrainState,
        poll: Callable[[], None],
    ) -> dict[str, np.ndarray]:
        """The candidates of every image in one pass, in the annotations' order; classes ``asked``, int32 [N, k]."""
        outputs = []

        def place(host: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return shard_batch(self._mesh, host | {"classes": asked[np.maximum(host["index"], 0)]})

        with Prefetch(batches(), place, self._config.data.prefetch) as placed:
            for batch in placed:
                poll()
                inputs = {name: batch[name] for name in ("images", "extent", "frame", "classes")}
                about = {name: batch[name] for name in ("index", "real")}
                outputs.append(
                    distributed.gather(self._mesh, self._infer(state.variables, inputs, self.resident) | about)
                )
                if len(outputs) > _AHEAD:  # Images of all batches at once would fill the memory.
                    outputs[-1 - _AHEAD] = jax.device_get(outputs[-1 - _AHEAD])
        arrays = {name: np.concatenate([np.asarray(out[name]) for out in outputs]) for name in outputs[0]}
        real = arrays.pop("real")
        order = np.argsort(arrays["index"][real])
        arrays = {name: array[real][order] for name, array in arrays.items()}
        assert np.array_equal(arrays["index"], np.arange(len(asked)))  # Every image exactly once.
        return arrays

    def after_evaluation(self, state: TrainState, error: float) -> TrainState:
        return update.after_evaluation(self._mesh, state, self._config.schedule, error)


def _check(config: ml_collections.ConfigDict) -> None:
    protocols.check_protocol(config.eval.protocol, config)
    size, scales = config.data.image_size, config.data.scales
    if len(scales) != 2 or not size <= scales[0] <= scales[1]:
        raise UsageError(
            f"data.scales={scales}: the least and the largest shorter side, from data.image_size={size} on"
        )
    if config.optimizer.accumulate > 1 or config.schedule.warmup_error:
        field = "optimizer.accumulate" if config.optimizer.accumulate > 1 else "schedule.warmup_error"
        raise UsageError(f"{field} is a setting of classification, and this is localization")
    if config.model.batch_norm == "frozen" and not config.init.weights:
        raise UsageError("model.batch_norm=frozen keeps the statistics that weights come with: set init.weights")


def _labels(split: Split) -> np.ndarray:
    """The classes of images of one class each, int32 [N]."""
    return np.array([image.labels[0] for image in split.annotations.images], np.int32)
