"""What train_step.py, inference.py and cifar.py share: flags, peers, the check before the clock starts, the report."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags
import ml_collections
import numpy as np
import turns

from resnet_jax import cli, config as config_lib
from resnet_jax.errors import UsageError

if TYPE_CHECKING:  # JAX starts after its settings.
    from bounds import Cost, Peaks

OURS, EAGER, COMPILED, FLAX = "ours", "torch eager", "torch.compile", "flax's layers"
PEERS = {"torch": EAGER, "torch_compile": COMPILED, "flax": FLAX}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
# Of the largest logit: in float32, whose sums are in another order in each library.
TOLERANCE = 2e-3
FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # They are those of the benchmark that asks for them.


class Entry(NamedTuple):
    """A contender that is ready.

    Attributes:
      contender: who works.
      result: what its latest call came to: a loss, or logits [N, classes].
      logits: float32 [N, classes] of images that all are asked about; None of who can't be asked.
      cost: what XLA counts in a call; None where it does not.
    """

    contender: turns.Contender
    result: Callable[[], Any]
    logits: np.ndarray | None = None
    cost: "Cost | None" = None


def define_flags(config: str, model: str, batch: int, peers: Sequence[str]) -> None:
    """The flags that all have, with these defaults."""
    cli.define_config_flags()
    FLAGS.set_default("config", config)
    flags.DEFINE_string("model", model, "The network; empty: the config's.")
    flags.DEFINE_integer("batch", batch, "Images a step (and device); 0: the config's.", lower_bound=0)
    flags.DEFINE_string("dtype", "auto", "Compute dtype: auto (bfloat16, on CPUs float32), bfloat16 or float32.")
    flags.DEFINE_integer("repeats", 5, "Turns of each contender.", lower_bound=1)
    flags.DEFINE_float("seconds", 2.0, "A turn is about so long, and one call at least.", lower_bound=0)
    flags.DEFINE_list("peers", list(peers), "With whom ours is compared, those of them that are there.")
    flags.DEFINE_bool("torch_compile", False, "Let torch.compile compete on CPUs too.")
    flags.DEFINE_string("compile_mode", "default", "torch.compile's mode.")
    flags.DEFINE_string("json", None, "File that all turns are written to.")


def check_peers(known: Sequence[str]) -> None:
    """Raises a UsageError where --peers has a name that is not among ``known``."""
    if unknown := sorted(set(FLAGS.peers) - set(known)):
        raise UsageError(f"--peers={','.join(FLAGS.peers)}: {unknown[0]} is unknown: {', '.join(known)}")


def torch_peers(backend: str, notes: list[str]) -> tuple[list[tuple[str, str | None]], str]:
    """Those of torch's that --peers wants and that are there; adds to ``notes`` why others are not.

    Returns:
      (name, torch.compile's mode or None) of each, and torch's name of the device.
    """
    wanted = [peer for peer in ("torch", "torch_compile") if peer in FLAGS.peers]
    device, reason = turns.torch_device(backend) if wanted else ("", "")
    if reason:
        notes.append(f"torch {reason}: not compared with")
        return [], ""
    if "torch_compile" in wanted and device == "cpu" and not FLAGS.torch_compile:
        notes.append("torch.compile is left out on CPUs; --torch_compile lets it compete")
        wanted.remove("torch_compile")
    return [(PEERS[peer], FLAGS.compile_mode if peer == "torch_compile" else None) for peer in wanted], device


def settings(overrides: Sequence[tuple[str, str]], changes: Mapping[str, Any]) -> dict[str, str]:
    """The fields in which a config differs from --config, by name.

    Args:
      overrides: fields that the command line sets.
      changes: fields that a benchmark sets, unless the command line does.
    """
    shared = {"model.name": FLAGS.model, "batch_size": FLAGS.batch, "model.dtype": FLAGS.dtype}
    given = dict(changes) | {name: value for name, value in shared.items() if value} | dict(overrides)
    return {name: str(value) for name, value in given.items()}


def make_config(fields: Mapping[str, str]) -> ml_collections.ConfigDict:
    """--config with other ``fields``, a classification's."""
    config = config_lib.load_config(FLAGS.config)
    for field, value in fields.items():
        config_lib.override(config, field, value)
    config_lib.validate(config)
    if config.task != "classification":
        raise UsageError(f"--config={FLAGS.config} is of task={config.task}; this measures classification")
    return config


def differs(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far logits are apart, as a share of the largest of ours."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def check_logits(entries: Sequence[Entry], what: str) -> str:
    """Ends the program where logits are not those of the first entry's; else a note."""
    first, *others = (entry for entry in entries if entry.logits is not None)
    most = 0.0
    for entry in others:
        apart = differs(first.logits, entry.logits)
        turns.require(
            apart < TOLERANCE, f"logits of {entry.contender.name} are not ours, by {apart:.2g} of the largest"
        )
        most = max(most, apart)
    return f"logits of the same weights in float32, {what}: at most {most:.1g} of the largest apart"


def warm(entries: Sequence[Entry]) -> dict[str, Any]:
    """Lets each work once; what it came to, by name."""
    for entry in entries:
        if entry.contender.call:
            entry.contender.call()
            entry.contender.wait()
    return {entry.contender.name: entry.result() for entry in entries if entry.contender.call}


def finish(row: turns.Row, entries: Sequence[Entry], peaks: "Peaks | None", said: str, notes: Sequence[str]) -> None:
    """Prints the table, with the bound of each entry that has a cost, and writes all turns to --json."""
    import bounds

    costs = {entry.contender.name: entry.cost for entry in entries if entry.cost}
    cells = {
        name: bounds.cells(cost, peaks, row.images, float(np.median(row.turns[name]))) for name, cost in costs.items()
    }
    table = turns.contender_table(row, OURS, cells, bounds.COLUMNS)
    said = f"{said}; medians of {FLAGS.repeats} turns (least-most)."
    content = row._asdict() | {"costs": {name: cost._asdict() for name, cost in costs.items()}}
    content["peaks"] = peaks and peaks._asdict()
    turns.report(said, turns.versions(PACKAGES), table, [*notes, bounds.describe(peaks)], FLAGS.json, content)
