"""What a value in a config may be: tests, and what is said when one fails."""

from collections.abc import Callable
import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limit:
    """A test of a value, and what is said when it fails."""

    test: Callable[[Any], bool]
    message: str


POSITIVE = Limit(lambda value: value > 0, "must be positive")
NOT_NEGATIVE = Limit(lambda value: value >= 0, "must not be negative")
SHARE = Limit(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
PART = Limit(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
ITERATIONS = Limit(
    lambda steps: all(isinstance(step, int) and step > 0 for step in steps), "must be whole numbers above zero"
)
SCALES = Limit(
    lambda sides: len(sides) > 1 and min(sides) > 0 and list(sides) == sorted(set(sides)),
    "must be two whole numbers or more, rising",
)
STRIDES = Limit(lambda value: value in (1, 2), "must be 1 or 2")
TWO = Limit(lambda values: len(values) == 2 and min(values) > 0, "must be two whole numbers above zero")
POSITIVES = Limit(lambda values: values and all(value > 0 for value in values), "must be numbers above zero")
FOUR_POSITIVES = Limit(
    lambda values: len(values) == 4 and all(value > 0 for value in values), "must be four numbers above zero"
)
STEPS = Limit(
    lambda text: not text or bool((found := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(found[1]) <= int(found[2])),
    "must be as 10:15, which means from step 10 to step 15",
)
SEED = Limit(lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32")  # Of JAX's keys.
