"""Several networks' predictions together: averaged probabilities (the paper's Table 5), of all or of a chosen few."""

from collections.abc import Sequence
import io
import zipfile
import zlib

import numpy as np

from resnet_jax.buckets import Folder, is_folder, open_folder
from resnet_jax.classification.scores import Scores, judge
from resnet_jax.errors import UsageError
from resnet_jax.training.workdir import results_folder

_ARRAYS = {"index": 1, "label": 1, "probabilities": 2}  # Name -> axes.


def predictions_file(run: str, protocol: str) -> Folder:
    """Where a run's predictions by a test protocol lie; a ``.npz`` is taken as it is.

    Raises:
      UsageError: no such run.
    """
    path = open_folder("--runs", run)
    if path.suffix == ".npz":
        return path
    if not is_folder(path):
        raise UsageError(f"{run}: {'neither a work directory nor a .npz' if path.exists() else 'no such folder'}")
    if not (path / "config.json").is_file():
        raise UsageError(f"{run}: no work directory of a run (no config.json in it)")
    return results_folder(path, protocol) / "predictions.npz"


def read_predictions(file: Folder) -> Scores:
    """What an evaluation wrote, in the order of ``index``.

    Raises:
      UsageError: it is not there, or damaged.
    """
    if not file.is_file():
        way = "--mode=calibrate does it" if "calibrated" in file.parent.name else "--mode=eval does it, or --evaluate"
        raise UsageError(f"{file}: not there, since this run was never evaluated so; {way}")
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            found = {name: stored[name] for name in _ARRAYS}
            test_set = stored["test_set"] if "test_set" in stored else np.array("")  # Of an older version.
    except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise UsageError(f"{file}: no whole file of predictions ({error})") from error
    wrong = _what_is_wrong(found)
    if wrong:
        shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in found.items())
        raise UsageError(f"{file}: no file of predictions: {wrong} ({shapes})")
    order = np.argsort(found["index"], kind="stable")
    return {name: array[order] for name, array in found.items()} | {"test_set": test_set}


def _what_is_wrong(found: Scores) -> str | None:
    index, label, probabilities = (found[name] for name in _ARRAYS)
    if any(found[name].ndim != axes for name, axes in _ARRAYS.items()) or len({len(x) for x in found.values()}) != 1:
        return "the arrays don't belong together"
    if index.dtype.kind not in "iu" or label.dtype.kind not in "iu" or probabilities.dtype.kind != "f":
        return "values of another kind"
    if not len(index) or len(np.unique(index)) != len(index):
        return "examples missing or twice"
    if not 0 <= label.min() <= label.max() < probabilities.shape[1]:
        return "labels without a probability"
    return None if np.isfinite(probabilities).all() else "probabilities that are not finite"


def check_same_examples(names: Sequence[str], members: Sequence[Scores]) -> None:
    """Raises a UsageError that names the first member whose examples, labels or classes are others than the first's."""
    first = members[0]
    for name, member in zip(names[1:], members[1:], strict=True):
        if member["probabilities"].shape[1] != first["probabilities"].shape[1]:
            raise UsageError(f"{name} has {member['probabilities'].shape[1]} classes, {names[0]} has"
                             f" {first['probabilities'].shape[1]}")  # fmt: skip
        if len(member["index"]) != len(first["index"]):
            raise UsageError(f"{name} was evaluated on {len(member['index'])} examples, {names[0]} on"
                             f" {len(first['index'])}: not the same test set")  # fmt: skip
        (kind, _, mine), (other, _, theirs) = (str(one.get("test_set", "")).partition(":") for one in (member, first))
        if kind == other and mine != theirs:
            raise UsageError(f"{name} and {names[0]} were not evaluated on the same test set: its images are others")
        for what in ("index", "label"):
            if not np.array_equal(member[what], first[what]):
                at = int(np.flatnonzero(member[what] != first[what])[0])
                raise UsageError(f"{name} and {names[0]} were not evaluated on the same test set: example {at} has"
                                 f" {what} {member[what][at]} in one and {first[what][at]} in the other")  # fmt: skip


def combine(members: Sequence[Scores]) -> Scores:
    """The mean of the members' probabilities; a member that is named twice counts twice."""
    total = np.zeros(members[0]["probabilities"].shape)
    for member in members:
        total += member["probabilities"]
    return members[0] | {"probabilities": (total / len(members)).astype(np.float32)}


def errors(scores: Scores, chosen: np.ndarray | None = None) -> dict[str, float]:
    """``top1_error`` and ``top5_error`` in %, ``loss`` in nats and ``examples``, of the ``chosen`` rows (bool [N])."""
    rows = slice(None) if chosen is None else chosen
    judged = judge(scores["probabilities"][rows], scores["label"][rows])
    return {
        "top1_error": 100 * float(np.mean(judged["rank"] >= 1)),
        "top5_error": 100 * float(np.mean(judged["rank"] >= 5)),
        "loss": float(np.mean(judged["loss"])),
        "examples": len(judged["rank"]),
    }


def hold_out(examples: int, share: float) -> np.ndarray:
    """A random part of the examples, the same every time: bool [examples]."""
    chosen = np.zeros(examples, bool)
    chosen[np.random.default_rng(0).permutation(examples)[: round(share * examples)]] = True
    return chosen


def select_greedily(members: Sequence[Scores], chosen: np.ndarray) -> list[int]:
    """Members that together err least on the ``chosen`` examples (Caruana et al., 2004): their numbers, some repeated.

    It starts with the best one and adds, as long as that helps, whichever helps most; less loss decides between equal
    errors.
    """
    taken: list[int] = []
    total, best = np.zeros_like(members[0]["probabilities"][chosen], np.float64), (np.inf, np.inf)
    labels = members[0]["label"][chosen]
    while True:
        tried = []
        for i, member in enumerate(members):
            judged = judge((total + member["probabilities"][chosen]) / (len(taken) + 1), labels)
            tried.append((float(np.mean(judged["rank"] >= 1)), float(np.mean(judged["loss"])), i))
        *figures, number = min(tried)
        if tuple(figures) >= best or len(taken) >= 5 * len(members):
            return taken
        best = tuple(figures)
        total += members[number]["probabilities"][chosen]
        taken.append(number)
