"""Which images make up a batch, where all of a batch lie on canvases of one size.

Training deals the epochs' orders (``data.order``, put end to end) out to the canvases, and a step is due whenever a
canvas has received a whole batch. What a canvas has left at the end of an epoch, less than a batch, begins its next
one: no image is dropped, and each comes once with every epoch's number, whatever the batch. Canvases that few images
need are done without. Evaluation goes from canvas to canvas, and fills the last batch of each up.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from resnet_jax.data.order import epoch_order
from resnet_jax.data.stream import Rows
from resnet_jax.detection.resize import Size, canvas_of


class Group(NamedTuple):
    """The images, indices int32 [n] in increasing order, that are laid on canvases of one size."""

    canvas: Size
    members: np.ndarray


class Piece(NamedTuple):
    """A part of a batch: ``index`` (-1: nothing, the batch is only filled up) and ``epoch``, both int32 [n]."""

    canvas: Size
    index: np.ndarray
    epoch: np.ndarray


class CanvasPlan(Protocol):
    """Which images make up the pieces of batches."""

    rows: Rows

    def piece(self, number: int) -> Piece:
        """Piece ``number``, pieces counted from step 0."""


def group_by_canvas(sizes: Sequence[Size], canvases: Sequence[Size], least: int = 1) -> tuple[Group, ...]:
    """Gives each image the smallest canvas that holds it, but none to few images: it would cost a compilation.

    Fewer than ``least`` move to the next larger canvas in use that holds theirs. Where there is none, as many as are
    missing move to theirs from the next smaller ones. A few upright images among wide ones stay alone: they come
    together every few epochs then, some of them more than once in a batch.

    Args:
      sizes: of the images on the network's input, pixels.
      canvases: what ``resize.canvas_sizes`` gives.
      least: the size of a batch.

    Returns:
      The groups, sorted by canvas.

    Raises:
      ValueError: an image fits no canvas.
    """
    members: dict[Size, list[int]] = {}
    for i, size in enumerate(sizes):
        members.setdefault(canvases[canvas_of(size, canvases)], []).append(i)
    by_area = sorted(members, key=lambda canvas: (canvas[0] * canvas[1], canvas))
    for place, canvas in enumerate(by_area):
        larger = next((other for other in by_area[place + 1 :] if _holds(other, canvas)), None)
        if larger and len(members[canvas]) < least:
            members[larger] += members.pop(canvas)
    for canvas in reversed(by_area):
        for other in reversed([other for other in by_area if other != canvas and _holds(canvas, other)]):
            missing = least - len(members.get(canvas, ()))
            if canvas in members and other in members and missing > 0:
                moved = missing if len(members[other]) - missing >= least else len(members[other])
                members[canvas] += members[other][:moved]
                members[other] = members[other][moved:]
                if not members[other]:
                    del members[other]
    return tuple(Group(canvas, np.array(sorted(members[canvas]), np.int32)) for canvas in sorted(members))


def _holds(larger: Size, smaller: Size) -> bool:
    return larger[0] >= smaller[0] and larger[1] >= smaller[1]


class _Epoch(NamedTuple):
    """An epoch's order as it is dealt out (its examples by group), and its steps: (group, first position in it)."""

    orders: tuple[np.ndarray, ...]
    steps: tuple[tuple[int, int], ...]


class TrainingCanvases:
    """Steps of training, a function of (seed, step) alone; a ``CanvasPlan``."""

    def __init__(self, seed: int, groups: Sequence[Group], rows: Rows):
        self.groups, self.rows = tuple(groups), rows
        self._seed, self._examples = seed, sum(len(group.members) for group in groups)
        self._group_of = np.empty(self._examples, np.int32)
        for number, group in enumerate(groups):
            self._group_of[group.members] = number
        self._epochs: dict[int, _Epoch] = {}

    def piece(self, number: int) -> Piece:
        step, piece = divmod(number, self.rows.pieces)
        group, start = self._locate(step)
        count = len(self.groups[group].members)
        epochs, offsets = np.divmod(np.arange(start, start + self.rows.batch, dtype=np.int64), count)
        index = np.empty(self.rows.batch, np.int32)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            index[chosen] = self._epoch(int(epoch)).orders[group][offsets[chosen]]
        epochs = epochs.astype(np.int32)
        return Piece(self.groups[group].canvas, self.rows.cut(index, piece), self.rows.cut(epochs, piece))

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * len(group.members) // self.rows.batch for group in self.groups)

    def _locate(self, step: int) -> tuple[int, int]:
        """A step's group, and its first position in the group's epochs put end to end."""
        epoch = step * self.rows.batch // self._examples  # Or later, since canvases still hold images of that one.
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        return self._epoch(epoch).steps[step - self._steps_before(epoch)]

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is None:  # Threads may both come here, and find the same.
            known = self._deal(epoch)
            self._epochs = {epoch: known} | {key: value for key, value in self._epochs.items() if abs(key - epoch) < 4}
        return known

    def _deal(self, epoch: int) -> _Epoch:
        order, batch = epoch_order(self._seed, epoch, self._examples), self.rows.batch
        orders, due = [], []
        for number, group in enumerate(self.groups):
            places, count = np.flatnonzero(self._group_of[order] == number), len(group.members)
            orders.append(order[places])
            for k in range(epoch * count // batch, (epoch + 1) * count // batch):
                last = places[(k + 1) * batch - 1 - epoch * count]
                due.append((int(last), number, k * batch))
        return _Epoch(tuple(orders), tuple((number, start) for _, number, start in sorted(due)))


@dataclasses.dataclass(frozen=True)
class EvaluationCanvases:
    """Each image once, canvas after canvas; a ``CanvasPlan``."""

    groups: tuple[Group, ...]
    rows: Rows

    @property
    def batches(self) -> int:
        """How many there are."""
        return sum(-(-len(group.members) // self.rows.batch) for group in self.groups)

    def piece(self, number: int) -> Piece:
        batch, piece = divmod(number, self.rows.pieces)
        for canvas, members in self.groups:
            count = -(-len(members) // self.rows.batch)
            if batch < count:
                index = members[batch * self.rows.batch : (batch + 1) * self.rows.batch]
                index = np.pad(index, (0, self.rows.batch - len(index)), constant_values=-1)
                index = self.rows.cut(index, piece)
                return Piece(canvas, index, np.zeros_like(index))
            batch -= count
        raise IndexError(f"piece {number} of {self.batches * self.rows.pieces}")
