"""What a detector begins with: the network that a config describes, and weights from elsewhere."""

from collections.abc import Collection, Mapping
from typing import Any

from flax import traverse_util
import ml_collections

from resnet_jax.detection.network import FasterRCNN, create_detector
from resnet_jax.detection.settings import make_settings
from resnet_jax.errors import UsageError
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.training.network import model_settings


def make_model(config: ml_collections.ConfigDict, num_classes: int, start: Pretrained | None) -> FasterRCNN:
    """The detector that a config describes, on the backbone that the weights need."""
    settings = model_settings(config.model) | (start.settings if start else {})
    named = {name: settings.pop(name) for name in ("name", "dtype", "batch_norm")}
    settings.pop("freeze_at", None)
    return create_detector(
        named["name"],
        num_classes,
        make_settings(config.detection),
        named["dtype"],
        named["batch_norm"],
        config.model.freeze_at,
        **settings,
    )


def starting_variables(
    start: Pretrained, wanted: Mapping[str, Any], config: ml_collections.ConfigDict, classes: tuple[str, ...]
) -> dict[str, Any]:
    """What of ``start`` a detector takes: a classification network's layers but for its head, or a whole detector.

    Args:
      start: with variables.
      wanted: shapes of the detector's ``params`` and ``batch_stats``.
      config: the whole config; ``init.head=replace`` leaves a detector's outputs behind.
      classes: the data's.

    Raises:
      UsageError: the first array that is missing, too many or of another shape; or other classes.
    """
    where = f"init.weights={config.init.weights}"
    detector, new_head = start.task == "detection", config.init.head == "replace"
    if detector and not new_head and start.classes != tuple(classes):
        raise UsageError(
            f"{where} has the classes {_some(start.classes or ())}, and the data have {_some(classes)};"
            " --config.init.head=replace gives it new outputs"
        )
    variables = start.variables if detector else {part: {"backbone": tree} for part, tree in start.variables.items()}
    needed, given = (traverse_util.flatten_dict(dict(tree)) for tree in (wanted, variables))
    left_behind = ("params", "head") if detector else ("params", "backbone", "head")
    if new_head or not detector:
        needed, given = (
            {path: array for path, array in arrays.items() if path[: len(left_behind)] != left_behind}
            for arrays in (needed, given)
        )
    if not detector:
        needed = {path: array for path, array in needed.items() if path[1] == "backbone"}
    for path in sorted(needed.keys() ^ given.keys()):
        what = "missing" if path in needed else "not part of the detector"
        raise UsageError(f"{where} does not fit model.name={config.model.name}: {'/'.join(path)} is {what}")
    for path, array in needed.items():
        if given[path].shape != array.shape:
            raise UsageError(f"{where} does not fit model.name={config.model.name}: {'/'.join(path)} has shape"
                             f" {given[path].shape}, not {array.shape}")  # fmt: skip
    return traverse_util.unflatten_dict(given)


def _some(names: Collection[str]) -> str:
    shown = list(names)[:3]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''} ({len(names)})"
