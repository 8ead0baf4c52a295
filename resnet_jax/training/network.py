"""From the config's section ``model`` to a network's settings."""

from typing import Any

import ml_collections


def model_settings(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """``create_model``'s arguments as ``config.model`` says."""
    names = ("name", "dtype", "init_fan", "batch_norm", "batch_norm_momentum")
    # Only residual networks know these.
    residual = {name: model[name] for name in ("zero_init_last", "freeze_at", "space_to_depth") if model[name]}
    return {name: model[name] for name in names} | residual | width_setting(model)


def width_setting(model: ml_collections.ConfigDict) -> dict[str, float]:
    """``width`` where it is not the paper's: whoever has the weights alone needs to know it."""
    return {} if model.width == 1 else {"width": model.width}
