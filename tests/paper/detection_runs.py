"""Work directories of detection as runs would leave them."""

import json
import pathlib

import numpy as np

from resnet_jax.config import flatten, load_config
from resnet_jax.detection.voc import CLASSES as VOC

SHAPES = ("circle", "square")
COCO = tuple(f"class {number}" for number in range(80))
# COCO's numbers of its 80 classes: ten of the 90 were never used.
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
PAPER_S_COCO = {"data.train_split": "train2014", "data.test_split": "val2014"}
WEIGHTS = {"init.weights": "/weights/resnet101.safetensors"}


def write_run(
    folder: pathlib.Path, config: str, step: int, classes=VOC, examples=4952, found=None, protocol="center", **changes
) -> pathlib.Path:
    """A detection run's work directory as the run would leave it; ``found`` are the summary's figures."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(flatten(load_config(config)) | changes))
    ids = COCO_IDS if len(classes) == 80 else list(range(1, len(classes) + 1))
    (folder / "data.json").write_text(json.dumps({"classes": classes, "category_ids": ids, "examples": 16_551}))
    results = folder if protocol == "center" else folder / "eval" / protocol
    results.mkdir(parents=True, exist_ok=True)
    summary = {"step": step, "train_top1_error": None, "seconds": 600.0, "images_per_second": 4.0, "examples": examples}
    (results / "summary.json").write_text(json.dumps(summary | (found or {})))
    lines = [{"step": at, "train_loss": 2.0 - at, "train_rpn_objectness_loss": 0.5} for at in (1, 2, 3)]
    lines += [{"step": at, "test_map": 30.0 * at} for at in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    # Detections, of other arrays than a classification's.
    np.savez(folder / "predictions.npz", index=np.zeros(1), boxes=np.zeros((1, 4)))
    return folder


def voc(folder: pathlib.Path, mean: float, step: int = 110_000, examples: int = 4952, **changes) -> pathlib.Path:
    found = {"map": mean, "ap50_11_point": mean, "ap50": mean + 1}
    return write_run(folder, "detection/voc", step, VOC, examples, found, **WEIGHTS | changes)


def coco(folder: pathlib.Path, ap50: float, ap: float, protocol: str = "center", **changes) -> pathlib.Path:
    found = {"map": ap, "coco/AP": ap, "coco/AP50": ap50, "ap50": ap50, "ap50_11_point": ap50}
    changes = WEIGHTS | PAPER_S_COCO | changes
    return write_run(folder, "detection/coco", 320_000, COCO, 40_504, found, protocol, **changes)


def shapes(folder: pathlib.Path, **changes) -> pathlib.Path:
    found = {"map": 84.8, "ap50": 84.8, "ap50_11_point": 81.1, "ap50/circle": 94.8, "ap50/square": 74.8}
    return write_run(folder, "detection/shapes", 800, SHAPES, 300, found, **changes)


def evaluated(run: pathlib.Path, name: str, protocol: str = "center", step: int | None = None, settings=None, **found):
    """A later evaluation of the run, with other test-time settings, and the figures that are others then."""
    summary = json.loads((run / "summary.json").read_text()) | found | {"protocol": protocol}
    summary |= {"evaluated_with": settings} if settings else {}
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | ({} if step is None else {"step": step})))
