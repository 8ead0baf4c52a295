"""From a config to a network and its optimizer, without data."""

from flax import linen as nn
import ml_collections

from resnet_jax.errors import UsageError
from resnet_jax.models.layers import count_groups


def rate_factors(config: ml_collections.ConfigDict, model: nn.Module) -> dict[str, float]:
    """By what the learning rate of each of the network's modules is multiplied, where that is not 1."""
    frozen, parts = config.model.freeze_at, model.parts
    if frozen > len(parts):
        raise UsageError(f"model.freeze_at={frozen}: {config.model.name} has {len(parts)} parts: {', '.join(parts)}")
    head = {} if config.optimizer.head_rate == 1 else {"head": config.optimizer.head_rate}
    return dict.fromkeys(parts[:frozen], 0.0) | head


def check_groups(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises a UsageError where the BN groups don't divide what is normalised at once."""
    groups, parts = config.model.batch_norm, config.optimizer.accumulate
    # A group that spans devices would have other members in a part of the batch than in the whole.
    spans = devices if parts > 1 and groups.startswith("group:") else 1
    count_groups(groups, config.batch_size // (parts * spans))
