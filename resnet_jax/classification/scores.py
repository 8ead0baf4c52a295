"""Probabilities of examples: brought together, and judged."""

from collections.abc import Sequence

import numpy as np

Scores = dict[str, np.ndarray]  # ``index`` and ``label``, int32 [N], and ``probabilities``, float32 [N, classes].


def label_ranks(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many other classes score at least the label's: [N, classes], int [N] -> int [N]; ties and NaNs count."""
    score = np.take_along_axis(probabilities, labels[:, None], axis=-1)
    return (~(probabilities < score)).sum(-1) - 1


def judge(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Each example's ``rank`` and ``loss`` (nats)."""
    chosen = np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]
    loss = -np.log(np.maximum(chosen.astype(np.float64), np.finfo(np.float32).tiny))
    return {"rank": label_ranks(probabilities, labels), "loss": loss}


def mean_scores(passes: Sequence[Scores]) -> Scores:
    """The mean of each example's probabilities over several looks, with its ``rank`` and ``loss``, in order of index.

    Args:
      passes: looks at examples; each example is in the same number of them, but for those that some could not read,
        which are left out.
    """
    index = np.concatenate([one["index"] for one in passes])
    known, first, times = np.unique(index, return_index=True, return_counts=True)
    labels = np.concatenate([one["label"] for one in passes])[first]
    sums = np.zeros((len(known), passes[0]["probabilities"].shape[1]))
    for one in passes:  # In none of them is an example twice.
        sums[np.searchsorted(known, one["index"])] += one["probabilities"]
    whole = times == times.max(initial=0)
    probabilities, labels = (sums / times[:, None])[whole].astype(np.float32), labels[whole]
    return {"index": known[whole], "label": labels, "probabilities": probabilities} | judge(probabilities, labels)
