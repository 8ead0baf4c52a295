"""What a detector begins with: the network that a config describes, and (a localizer too) weights from elsewhere."""

from collections.abc import Collection, Mapping
from typing import Any

from flax import traverse_util
import ml_collections

from resnet_jax.detection.network import FasterRCNN, create_detector
from resnet_jax.detection.settings import make_settings
from resnet_jax.errors import UsageError
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.training.network import model_settings

# By what a network was trained for: the layers whose outputs are its classes.
_OUTPUTS = {
    "classification": (("params", "backbone", "head"),),
    "detection": (("params", "head"),),
    "localization": (("params", "rpn", "scores"), ("params", "rpn", "boxes")),
}


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
    """What of ``start`` a network takes: a classification's layers but for its head, or a whole network of its task.

    Args:
      start: with variables, of classification or of the network's own task.
      wanted: shapes of the network's ``params`` and ``batch_stats``; what images go through first is ``backbone``.
      config: the whole config; ``init.head=replace`` leaves a whole network's outputs behind.
      classes: the data's.

    Raises:
      UsageError: the first array that is missing, too many or of another shape; or other classes.
    """
    where = f"init.weights={config.init.weights}"
    whole, new_head = start.task != "classification", config.init.head == "replace"
    if whole and not new_head and start.classes != tuple(classes):
        raise UsageError(
            f"{where} has the classes {_some(start.classes or ())}, and the data have {_some(classes)};"
            " --config.init.head=replace gives it new outputs"
        )
    variables = start.variables if whole else {part: {"backbone": tree} for part, tree in start.variables.items()}
    needed, given = (traverse_util.flatten_dict(dict(tree)) for tree in (wanted, variables))
    if new_head or not whole:
        left_behind = _OUTPUTS[start.task]
        needed, given = (
            {path: array for path, array in arrays.items() if not any(path[: len(to)] == to for to in left_behind)}
            for arrays in (needed, given)
        )
    if not whole:
        needed = {path: array for path, array in needed.items() if path[1] == "backbone"}
    for path in sorted(needed.keys() ^ given.keys()):
        what = "missing" if path in needed else "not part of the network"
        raise UsageError(f"{where} does not fit model.name={config.model.name}: {'/'.join(path)} is {what}")
    for path, array in needed.items():
        if given[path].shape != array.shape:
            raise UsageError(f"{where} does not fit model.name={config.model.name}: {'/'.join(path)} has shape"
                             f" {given[path].shape}, not {array.shape}")  # fmt: skip
    return traverse_util.unflatten_dict(given)


def _some(names: Collection[str]) -> str:
    shown = list(names)[:3]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''} ({len(names)})"
