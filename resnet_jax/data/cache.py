"""Examples kept in the host's memory: decoded where all of them fit, else as they are encoded, as many as fit."""

import threading

import numpy as np

from resnet_jax.data.crops import Crop, Encoded, Views
from resnet_jax.data.decode import BrokenImage, decode, jpeg_shape
from resnet_jax.data.sources import Examples

_SAMPLE = 64  # Examples whose size says what fits.


class Budget:
    """Bytes that may be used."""

    def __init__(self, gigabytes: float):
        self.left = int(gigabytes * 1e9)
        self._lock = threading.Lock()

    def reserve(self, size: int) -> "Budget":
        """A budget of its own, of ``size`` bytes and a tenth more, or of all there are."""
        own = Budget(0)
        own.left = min(self.left, size + size // 10)
        self.left -= own.left
        return own

    def take(self, size: int) -> bool:
        """Takes ``size`` bytes if there are so many."""
        with self._lock:
            if size > self.left:
                return False
            self.left -= size
            return True

    def give_back(self, size: int) -> None:
        """Gives ``size`` bytes back."""
        with self._lock:
            self.left += size


class CachedViews(Views):
    """Views of examples, each remembered once it was read, while the budget lasts. For threads alone.

    What is remembered never changes a pixel: a JPEG that the crop may decode at a reduced scale stays encoded, and of
    a crop without random numbers the result is kept.
    """

    def __init__(self, examples: Examples, crop: Crop, budget: Budget):
        """Takes a look at some examples to see what fits."""
        super().__init__(examples, crop)
        self._kept: dict[int, tuple[Encoded, int]] = {}
        encoded, decoded = [], []
        for i in np.linspace(0, len(examples) - 1, min(_SAMPLE, len(examples))).astype(int):
            try:
                content, _ = examples[int(i)]
                decoded.append(_bytes(self._decode(content)))
                encoded.append(len(content))
            except (OSError, BrokenImage):  # Told when its turn comes.
                continue
        needed = [len(examples) * float(np.mean(sizes or [0])) for sizes in (encoded, decoded)]
        self.decodes = needed[1] <= budget.left
        self._budget = budget.reserve(int(needed[self.decodes]))
        share = min(1.0, self._budget.left / max(1.0, needed[self.decodes]))
        form = "decoded" if self.decodes else "encoded"
        self.description = (
            f"{share:.0%} of {len(examples)} images, {form} ({share * needed[self.decodes] / 1e9:.2g} GB)"
        )

    def _decode(self, content: bytes) -> Encoded:
        if not self.crop.draws:
            return self.crop(content, np.empty(0))
        shape = jpeg_shape(content)
        return content if shape and min(shape) >= self.crop.reducible_from else decode(content)

    def __call__(self, i: int, uniforms: np.ndarray) -> tuple[np.ndarray, int]:
        known = self._kept.get(i)
        if known is None:
            content, label = self.examples[i]
            known = (self._decode(content) if self.decodes else content), label
            # Another thread may have kept it meanwhile.
            if self._budget.take(_bytes(known[0])) and self._kept.setdefault(i, known) is not known:
                self._budget.give_back(_bytes(known[0]))
        value, label = known
        done = self.decodes and not self.crop.draws
        return (value if done else self.crop(value, uniforms)), label


def _bytes(value: Encoded) -> int:
    return len(value) if isinstance(value, bytes) else value.nbytes
