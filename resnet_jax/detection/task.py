"""Detection as a task of the training loop."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
import hashlib
import io
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from resnet_jax import distributed
from resnet_jax.data.sources import worker_count
from resnet_jax.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.data.stream import Rows
from resnet_jax.detection import steps
from resnet_jax.detection.annotations import Detections
from resnet_jax.detection.batches import Resizing, evaluation_batches, room_for_boxes, training_batches
from resnet_jax.detection.draw import contact_sheet, draw_large
from resnet_jax.detection.evaluation import as_arrays, collect, figures
from resnet_jax.detection.faster_rcnn import FasterRCNN
from resnet_jax.detection.inference import inputs, make_inference_step
from resnet_jax.detection.result_files import coco_file, voc_files
from resnet_jax.detection.settings import make_settings
from resnet_jax.detection.sources import Split, describe_splits, read_splits
from resnet_jax.detection.start import make_model, starting_variables
from resnet_jax.distributed import shard_batch
from resnet_jax.errors import UsageError
from resnet_jax.models.layers import storage_dtype
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing
from resnet_jax.training import update
from resnet_jax.training.network import width_setting
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.prefetch import Prefetch
from resnet_jax.training.state import TrainState
from resnet_jax.training.task import Evaluation
from resnet_jax.training.workdir import CENTER

MULTI_SCALE = "multi_scale"
_PROTOCOLS = (CENTER, MULTI_SCALE)
_SHOWN, _COLUMNS, _SURE = 12, 4, 0.5  # Pictures in a run's ``found.png``, and the least score of what they show.
_AHEAD = 2  # Batches that evaluation gives the devices before it waits for their results.


class Detection:
    """Boxes around objects: Faster R-CNN. See ``training.task.Task`` for the interface."""

    objective, sign = "map", -1
    streams, validation = True, "test"

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: jax.sharding.Mesh,
        start: Pretrained | None = None,
        explicit: Collection[str] = (),
    ):
        """Reads the annotations, builds the detector and checks that they fit each other and the devices.

        Args:
          config: the whole config.
          mesh: the devices, in force (``jax.set_mesh``).
          start: weights to begin with: a detector's, or a classification network's for its backbone.
          explicit: names of the config's fields that ``start`` does not change.

        Raises:
          UsageError: they don't fit.
        """
        self._config, self._mesh, self._start = config, mesh, start
        _check(config)
        distributed.check_batch("batch_size", config.batch_size, mesh)
        self.settings = make_settings(config.detection)
        self.model = make_model(config, num_classes=1, start=start)  # Its mistakes are cheaper to find than the data.
        self._splits = read_splits(config)
        train = self._splits["train"].annotations
        self.classes = train.classes
        if distributed.leads():
            print(describe_splits(self._splits), flush=True)
        if config.model.num_classes not in (0, len(self.classes)):
            raise UsageError(f"model.num_classes={config.model.num_classes}, but the data have {len(self.classes)}")
        self.model = self.model.clone(num_classes=len(self.classes))
        self.resizing = Resizing(config.detection.shorter, config.detection.longer)
        self._optimizer = make_optimizer(config.optimizer)
        state = jax.eval_shape(self._new_state)
        self._weights = None
        if start and start.variables:
            wanted = {"params": state.params, "batch_stats": state.batch_stats}
            self._weights = starting_variables(start, wanted, config, self.classes)
        self._views(config.eval.protocol)
        self._steps: dict[str, Callable[..., Any]] = {}  # By protocol, jitted.
        self._mean, self._std = _pixel_statistics(config, start, explicit)
        dtype = storage_dtype(self.model.backbone.dtype)

        self.name = f"{config.model.name} ({config.detection.neck})"
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self.examples_per_step = config.batch_size
        self.examples_per_epoch = len(train)
        self.total_steps = config.steps or math.ceil(config.epochs * len(train) / config.batch_size)
        statistics = {"mean": self._mean.astype(dtype), "std": self._std.astype(dtype)}
        self.resident = distributed.replicate(mesh, statistics | {"seed": np.uint32(config.seed)})
        self.broken: dict[str, str] = {}  # An image that can't be read ends the run: its boxes would be missed.
        self.train_step = steps.make_train_step(self.model, self._optimizer, config, self.settings, self.total_steps)

    def _new_state(self) -> TrainState:
        return steps.initial_state(self.model, self._optimizer, self._config)

    def initial_state(self) -> TrainState:
        state = jax.jit(self._new_state, out_shardings=distributed.replicated(self._mesh))()
        return update.start_from(self._mesh, state, self._weights) if self._weights else state

    @property
    def description(self) -> dict[str, Any]:
        """What a run remembers of its data; see ``training.task.Task``. ``category_ids`` are COCO's numbers."""
        preprocessing = Preprocessing(
            tuple(self._mean.tolist()), tuple(self._std.tolist()), self._config.detection.shorter[-1], None
        )
        return {
            "classes": list(self.classes),
            "category_ids": list(self._splits["train"].annotations.category_ids),
            "examples": self.examples_per_epoch,
            "preprocessing": preprocessing.to_json(),
            "settings": (self._start.settings if self._start else {}) | width_setting(self._config.model),
            "mean_image": None,
        }

    def fingerprint(self) -> dict[str, str]:
        """Tells data apart: each split's images and boxes, and what is subtracted."""
        splits = {f"{name} images": f"{len(s.annotations)}, {_hash(s)}" for name, s in self._splits.items()}
        return splits | {"mean and deviation": repr((self._mean, self._std)), "classes": repr(self.classes)}

    def batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        split, config = self._splits["train"], self._config
        return training_batches(
            split.annotations,
            self.resizing,
            config.seed,
            self._rows(config.batch_size),
            first_step,
            self.total_steps,
            pixels=split.pixels,
            flip=config.data.flip,
            **self._reading,
        )

    def _rows(self, batch: int) -> Rows:
        return Rows(batch, jax.process_index(), jax.process_count())

    @property
    def _reading(self) -> dict[str, Any]:
        data = self._config.data
        return {"workers": worker_count(data.workers), "processes": data.worker_type == "process"}

    def inference_step(self, models: Sequence[FasterRCNN], protocol: str) -> Callable[..., dict[str, jax.Array]]:
        """The jitted step of ``inference.make_inference_step`` for these models by a test protocol."""
        return jax.jit(make_inference_step(models, self.settings, self._views(protocol)))

    def _views(self, protocol: str) -> tuple[int, ...]:
        if protocol not in _PROTOCOLS:
            raise UsageError(f"eval.protocol={protocol}: of task=detection it is {' or '.join(_PROTOCOLS)}")
        return tuple(self._config.detection.test_scales) if protocol == MULTI_SCALE else ()

    def look(
        self,
        infer: Callable[..., dict[str, jax.Array]],
        split: str,
        protocol: str,
        poll: Callable[[], None] = lambda: None,
    ) -> list[Detections]:
        """What an inference step (of a batch) finds in each image of a split, in their order."""
        annotations, pixels = self._splits[split].annotations, self._splits[split].pixels
        devices, views = self._mesh.size, self._views(protocol)
        batch_size = math.ceil(min(self._config.eval.batch_size, len(annotations)) / devices) * devices
        read = evaluation_batches(
            annotations,
            self.resizing,
            self._rows(batch_size),
            pixels=pixels,
            room=room_for_boxes(annotations),
            views=views,
            **self._reading,
        )
        outputs: list[Any] = []
        with Prefetch(read, partial(shard_batch, self._mesh), self._config.data.prefetch) as batches:
            for batch in batches:
                poll()
                found = infer(inputs(batch)) | {name: batch[name] for name in ("index", "real")}
                outputs.append(distributed.gather(self._mesh, found))
                if len(outputs) > _AHEAD:
                    outputs[-1 - _AHEAD] = jax.device_get(outputs[-1 - _AHEAD])
        return collect(jax.device_get(outputs), len(annotations))

    def judge(self, split: str, detections: list[Detections]) -> dict[str, float]:
        """The metrics of what was found in the images of a split."""
        annotations, asked = self._splits[split].annotations, self._config.detection
        metrics = figures(annotations, detections, asked.average_precision) if asked.labelled else {}
        return metrics | {"examples": len(annotations), "detections": sum(map(len, detections))}

    def result_files(self, split: str, detections: list[Detections]) -> dict[str, bytes]:
        """What COCO's and (of images with names) VOC's test servers take: name -> content."""
        annotations, image_set = self._splits[split].annotations, self._splits[split].image_set
        files = {"detections.json": coco_file(annotations, detections)}
        if image_set:
            found = voc_files(image_set, annotations, detections)
            files |= {f"voc/{name}": content for name, content in found.items()}
        return files

    def evaluate(self, state: TrainState, split: str, poll: Callable[[], None], protocol: str = CENTER) -> Evaluation:
        if protocol not in self._steps:
            self._steps[protocol] = self.inference_step((self.model,), protocol)
        step = self._steps[protocol]
        detections = self.look(lambda batch: step((state.variables,), batch, (self.resident,)), split, protocol, poll)
        files = {**self.result_files(split, detections), "found.png": self._sheet(split, detections)}
        return Evaluation(self.judge(split, detections), as_arrays(detections), files)

    def _sheet(self, split: str, detections: list[Detections]) -> bytes:
        """The first pictures of a split with what was found in them, as a PNG file."""
        annotations, pixels = self._splits[split].annotations, self._splits[split].pixels
        drawn = []
        for image, found in zip(annotations.images[:_SHOWN], detections, strict=False):
            sure = found.scores >= _SURE
            boxes, labels, scores = (part[sure] for part in (found.boxes, found.labels, found.scores))
            drawn.append(draw_large(pixels(image), boxes, labels, self.classes, scores))
        file = io.BytesIO()
        Image.fromarray(contact_sheet(drawn, _COLUMNS)).save(file, "PNG")
        return file.getvalue()

    def after_evaluation(self, state: TrainState, error: float) -> TrainState:
        return update.after_evaluation(self._mesh, state, self._config.schedule, error)


def _check(config: ml_collections.ConfigDict) -> None:
    fresh = not config.init.weights
    if config.model.batch_norm == "frozen" and fresh:
        raise UsageError("model.batch_norm=frozen keeps the statistics that weights come with: set init.weights, or"
                         " from scratch model.batch_norm=group_norm (or global, group:N)")  # fmt: skip
    if config.model.freeze_at and fresh:
        raise UsageError(f"model.freeze_at={config.model.freeze_at} keeps layers as weights come: set init.weights, or"
                         " from scratch model.freeze_at=0")  # fmt: skip
    if config.optimizer.accumulate > 1 or config.schedule.warmup_error:
        field = "optimizer.accumulate" if config.optimizer.accumulate > 1 else "schedule.warmup_error"
        raise UsageError(f"{field} is a setting of classification, and this is task=detection")
    if not config.detection.labelled and (config.eval.every or config.schedule.name == "plateau"):
        raise UsageError("eval.every looks at figures that a test set without boxes (detection.labelled=false) has not")


def _pixel_statistics(
    config: ml_collections.ConfigDict, start: Pretrained | None, explicit: Collection[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel, float32 [3]: the weights', but for what the command line has set."""
    known = {
        "mean": {"imagenet": IMAGENET_MEAN, "none": (0.0,) * 3},
        "std": {"imagenet": IMAGENET_STD, "none": (1.0,) * 3},
    }
    found = []
    for name, values in known.items():
        given = start.preprocessing if start else None
        if given is not None and f"data.{name}" not in explicit:
            chosen = getattr(given, name)
        elif config.data[name] in values:
            chosen = values[config.data[name]]
        else:
            raise UsageError(f"data.{name}={config.data[name]}: of task=detection it is {' or '.join(values)}")
        found.append(np.array(chosen, np.float32))
    return found[0], found[1]


def _hash(split: Split) -> str:
    digest = hashlib.sha256()
    for image in split.annotations.images:
        digest.update(repr((image.id, image.width, image.height)).encode())
        for field in ("boxes", "labels", "difficult", "crowd"):
            digest.update(getattr(image, field).tobytes())
    return digest.hexdigest()[:16]
