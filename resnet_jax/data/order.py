"""The order in which training sees its examples: a function of seed and step, and of nothing else."""

import numpy as np


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """A permutation [examples], int32, of the examples for one epoch.

    It sorts raw Philox bits, whose values are fixed by the generator's definition: the same on every
    machine and with every version of NumPy.
    """
    bits = np.random.Philox(key=[seed, epoch]).random_raw(examples)
    return np.argsort(bits, kind="stable").astype(np.int32)


class Order:
    """The epochs' orders put end to end: step s takes positions s * batch to (s + 1) * batch - 1."""

    def __init__(self, seed: int, examples: int):
        self._seed, self._examples = seed, examples
        self._epochs: dict[int, np.ndarray] = {}

    def _epoch(self, epoch: int) -> np.ndarray:
        known = self._epochs.get(epoch)
        if known is None:  # Threads may both come here, and find the same.
            known = epoch_order(self._seed, epoch, self._examples)
            self._epochs = {epoch: known} | {key: value for key, value in self._epochs.items() if key == epoch - 1}
        return known

    def batch(self, step: int, size: int) -> dict[str, np.ndarray]:
        """``index`` and ``epoch``, both [size] int32, of the examples of one step (from 0)."""
        epochs, offsets = np.divmod(np.arange(step * size, (step + 1) * size, dtype=np.int64), self._examples)
        index = np.empty(size, np.int32)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            index[chosen] = self._epoch(int(epoch))[offsets[chosen]]
        return {"index": index, "epoch": epochs.astype(np.int32)}


def holdout_split(examples: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(examples) at random, the same for every run: (kept, held out), both sorted int32."""
    order = epoch_order(seed=0x5EED, epoch=0, examples=examples)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
