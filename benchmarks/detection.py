"""Faster R-CNN: images per second, and the time in NMS and in RoI ops, beside torchvision's or NumPy's, in one run.

    python benchmarks/detection.py --image_size=320 --batch=1 --seconds=0
    python benchmarks/detection.py --batch=8 --seconds=3 --json=detection.json
    python benchmarks/detection.py --config=detection/voc --config.model.name=resnet18 --config.model.width=0.25

The first is for two CPU cores (some minutes), the second for a GPU (images of the config's size). One device is used.
Weights, images and boxes are drawn; nothing is read. torchvision, where it is installed and sees the same kind of
device, is given the same network (``TORCHVISION_DIFFERS`` is what it does not have), sizes and numbers of proposals;
else NMS and RoI ops stand beside NumPy's. Contenders take turns, --repeats times, each as often as fits in --seconds
and at least once; medians are printed (least-most). All operations are checked before the clock starts: ours must give
NumPy's results and torchvision's, or nothing is measured.

--config.model.name, --config.model.width, --config.detection.neck and all other fields change what is measured.
"""

from collections.abc import Sequence
import functools
import importlib.util
import math
import statistics
from typing import Any

from absl import flags
from detection_cases import (
    Regions,
    detections_of,
    make_scene,
    numpy_regions,
    numpy_suppression,
    proposals_of,
    regions_of,
)
from detection_contenders import (
    LEARNING_RATE,
    TORCHVISION_DIFFERS,
    compute_dtype,
    lacks,
    our_network,
    our_regions,
    our_suppression,
    torch_network,
    torch_regions,
    torch_suppression,
)
import numpy as np
import turns
from turns import Contender, Row, require, spread

from resnet_jax import cli, config as config_lib
from resnet_jax.errors import UsageError

OURS, TORCHVISION, NUMPY = "ours", "torchvision", "NumPy"
WORK = ("train", "inference", "nms", "roi")

cli.define_config_flags()
flags.FLAGS.set_default("config", "detection/coco_fpn")
flags.DEFINE_integer("image_size", 0, "Shorter side of the 4:3 images, pixels; 0: the config's last.", lower_bound=0)
flags.DEFINE_integer("batch", 2, "Images a step.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Turns of each contender.", lower_bound=1)
flags.DEFINE_float("seconds", 1.0, "A turn goes on for so long, and for one call at least.", lower_bound=0)
flags.DEFINE_list("only", list(WORK), "What is measured.")
flags.DEFINE_list("peers", [TORCHVISION, NUMPY], "With whom ours is compared, those of them that are there.")
flags.DEFINE_string("json", None, "File that all turns are written to.")
FLAGS = flags.FLAGS


def measure(what: str, contenders: Sequence[Contender], images: int = 0) -> Row:
    """``turns.measure`` as the flags say."""
    return turns.measure(what, contenders, FLAGS.repeats, FLAGS.seconds, images)


def measure_networks(config, work: Sequence[str], peers: Sequence[str], device: str) -> tuple[list[Row], list[str]]:
    """Training and inference."""
    scene = make_scene(config, FLAGS.batch)
    networks, notes = {OURS: our_network(config, scene)}, []
    if TORCHVISION in peers:
        missing = lacks(config)
        if missing:
            notes.append(f"torchvision has no such network ({missing})")
        else:
            networks[TORCHVISION] = torch_network(config, scene, device)
    rows = []
    said = {"train": ("training", "loss of the first step"), "inference": ("inference", "detections in the batch")}
    for name in (name for name in ("train", "inference") if name in work):
        first = {who: network[name]() for who, network in networks.items()}
        require(all(map(math.isfinite, first.values())), f"{said[name][1]}: {first}")
        notes.append(f"{said[name][1]}: {', '.join(f'{who} {value:.4g}' for who, value in first.items())}")
        what = f"{said[name][0]}, {compute_dtype(config)}"
        rows.append(measure(what, [Contender(who, network[name]) for who, network in networks.items()], FLAGS.batch))
    if TORCHVISION in networks:
        notes += [f"torchvision: {difference}" for difference in TORCHVISION_DIFFERS]
    return rows, notes


def measure_nms(config, peers: Sequence[str], device: str) -> tuple[list[Row], list[str]]:
    """NMS of proposals and of detections."""
    rows, notes = [], []
    cases = {"proposals": proposals_of(config, FLAGS.batch), "detections": detections_of(config, FLAGS.batch)}
    for name, case in cases.items():
        found = {OURS: our_suppression(case), NUMPY: numpy_suppression(case)}
        if TORCHVISION in peers:
            found[TORCHVISION] = torch_suppression(case, device)
        results = {who: call() for who, call in found.items()}
        for who in set(results) - {OURS}:
            for mine, other in zip(results[OURS], results[who], strict=True):
                # torchvision may compare with the threshold in other bits: a pair in thousands lies just on it.
                differing = len(np.setxor1d(mine, other))
                most = 0 if who == NUMPY else max(2, len(mine) // 200)
                require(differing <= most, f"NMS of {name}: {differing} of {len(mine)} kept are not {who}'s")
        counted = int((case.scores >= case.least).sum(1).mean())
        kept = statistics.mean(map(len, results[OURS]))
        of = "" if case.classes is None else f", {len(np.unique(case.classes))} classes"
        of = of.replace("classes", "levels") if name == "proposals" else of
        what = f"NMS of {name}: {counted:,} boxes an image{of}, at most {case.keep:,} kept"
        rows.append(measure(what, [Contender(who, found[who]) for who in found if who in (OURS, *peers)]))
        notes.append(f"NMS of {name}: {kept:.0f} kept an image, the same in all")
    return rows, notes


def check_regions(op: str, case: Regions, found: dict[str, Any]) -> list[str]:
    """Ours against the others, values and gradients; what is said of them."""
    pooled, gradients = found[OURS]
    pooled, gradients = np.asarray(pooled), [np.asarray(x) for x in gradients]
    said = []
    for who in (who for who in found if who != OURS):
        values, slopes = found[who]
        if who == TORCHVISION:
            values = np.moveaxis(values.cpu().numpy().reshape(*case.levels.shape, -1, case.size, case.size), 2, -1)
            slopes = [np.moveaxis(x.cpu().numpy(), 1, -1) for x in slopes]
        if who == TORCHVISION and op == "RoI pooling":
            # Its bins are computed in floating point, and some have a row or column more than they should.
            share = (values != pooled).mean()
            require((values >= pooled).all() and share < 0.1, f"{op}: {share:.1%} of the values are not {who}'s")
            sums = [[x.sum((0, 1, 2), dtype=np.float64) for x in each] for each in (gradients, slopes)]
            worst = np.abs(np.array(sums[0]) - sums[1]).max()
            require(worst < 1e-2, f"{op}: the gradient's sums are not {who}'s, by {worst:.2g}")
            said.append(
                f"{op}: {share:.1%} of {who}'s values are larger (bins with a row or column more), others equal"
            )
            continue
        pairs = zip([pooled, *gradients], [values, *slopes], strict=True)
        worst = max(np.abs(mine - x).max() / max(np.abs(x).max(), 1e-3) for mine, x in pairs)
        require(worst < 1e-4, f"{op} is not {who}'s: values or gradients differ by {worst:.2g} of the largest")
        said.append(f"{op}: values and gradients are {who}'s within {worst:.1g} of the largest")
    return said


def measure_regions(config, peers: Sequence[str], device: str) -> tuple[list[Row], list[str]]:
    """RoIAlign and RoI pooling, forward and with gradients."""
    case, rows, notes = regions_of(config, FLAGS.batch), [], ["RoI ops are in float32, whatever the networks are in"]
    channels, regions = case.maps[0].shape[-1], case.boxes.shape[1]
    strides = ", ".join(map(str, case.strides))
    for op in ("RoIAlign", "RoI pooling"):
        calls = {OURS: our_regions(op, case), NUMPY: numpy_regions(op, case)}
        if TORCHVISION in peers:
            calls[TORCHVISION] = torch_regions(op, case, device)
        notes += check_regions(op, case, {who: both() for who, (_, both) in calls.items()})
        for number, what in enumerate(("forward", "forward and backward")):
            for call in calls.values():
                call[number]()
            what = f"{op}, {what}: {regions} RoIs an image to {case.size}x{case.size}x{channels}, strides {strides}"
            rows.append(measure(what, [Contender(who, calls[who][number]) for who in calls if who in (OURS, *peers)]))
    return rows, notes


def table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Markdown: images a second, or milliseconds a batch, and of each peer how many times as fast ours is."""
    head = ["work", "unit", OURS]
    for peer in peers:
        head += [peer, f"ours is so many times as fast as {peer}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        shown = {who: [row.images / x if row.images else 1e3 * x for x in turns] for who, turns in row.turns.items()}
        cells = [row.what, "images/s" if row.images else "ms a batch", spread(shown[OURS])]
        for peer in peers:
            if peer not in row.turns:
                cells += ["-", "-"]
                continue
            ratios = [theirs / mine for mine, theirs in zip(row.turns[OURS], row.turns[peer], strict=True)]
            cells += [spread(shown[peer]), spread(ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choose_peers(backend: str) -> tuple[list[str], str, list[str]]:
    """Who is there of --peers, torch's name of the device, and notes."""
    unknown = set(FLAGS.peers) - {TORCHVISION, NUMPY}
    if unknown:
        raise UsageError(f"--peers={','.join(FLAGS.peers)}: {unknown.pop()} is unknown: {TORCHVISION}, {NUMPY}")
    peers, device, notes = list(FLAGS.peers), "", []
    if TORCHVISION in peers:
        there = importlib.util.find_spec("torchvision")
        device, reason = turns.torch_device(backend) if there else ("", "is not installed")
        if reason:
            peers.remove(TORCHVISION)
            notes.append(f"torchvision {reason}: not compared with")
        elif flags.FLAGS["peers"].using_default_value:
            peers.remove(NUMPY)
    return peers, device, notes


def main(overrides: list[tuple[str, str]]) -> int:
    """Measures and prints the table."""
    turns.share_the_machine()
    config = config_lib.load_config(FLAGS.config)
    for name, value in overrides:
        config_lib.override(config, name, value)
    config_lib.validate(config)
    if config.task != "detection":
        raise UsageError(f"--config={FLAGS.config} is of task={config.task}; this measures detection")
    if FLAGS.image_size:
        config.detection.shorter = (FLAGS.image_size,)
    config.schedule.learning_rate = LEARNING_RATE
    if unknown := set(FLAGS.only) - set(WORK):
        raise UsageError(f"--only={','.join(FLAGS.only)}: {unknown.pop()} is unknown: {', '.join(WORK)}")
    work = FLAGS.only

    import jax

    from resnet_jax import distributed

    peers, device, notes = choose_peers(jax.default_backend())
    rows: list[Row] = []
    with jax.set_mesh(distributed.make_mesh(jax.devices()[:1])):
        steps = [
            (functools.partial(measure_networks, config, work), {"train", "inference"}),
            (functools.partial(measure_nms, config), {"nms"}),
            (functools.partial(measure_regions, config), {"roi"}),
        ]
        for step, names in steps:
            if names & set(work):
                found, said = step(peers, device)
                rows, notes = rows + found, notes + said
    size = make_scene(config, 1)
    said = (
        f"{config.model.name}, neck {config.detection.neck}, {FLAGS.batch} images of {size.size[0]}x{size.size[1]} on"
        f" {size.canvas[0]}x{size.canvas[1]}; medians of {FLAGS.repeats} turns (least-most)."
    )
    packages = ("jax", "jaxlib", "flax", "numpy", *(("torch", "torchvision") if TORCHVISION in peers else ("scipy",)))
    content = {"rows": [row._asdict() for row in rows]}
    turns.report(said, turns.versions(packages), table(rows, peers), notes, FLAGS.json, content)
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__)
