"""Detections in files: COCO's result format, which its test server takes, and VOC's, which its devkit does.

Both hold what was found bit for bit: figures computed from the file are those of the run.
"""

from collections.abc import Sequence
import json
import math
import pathlib
from typing import Any

import numpy as np

from resnet_jax.detection.annotations import Annotations, Detections, check_detections
from resnet_jax.detection.coco import box_corners, load_json
from resnet_jax.errors import UsageError

NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32))


def detections_from(found: Sequence[tuple[Sequence[float], int, float]]) -> Detections:
    """``Detections`` from a list of (box, label, score)."""
    boxes, labels, scores = zip(*found, strict=True) if found else ((), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int32), np.array(scores, np.float32)
    )


def coco_results(annotations: Annotations, detections: Sequence[Detections]) -> list[dict[str, Any]]:
    """The entries of COCO's result format: image_id, category_id, bbox [left, top, width, height], score.

    Args:
      annotations: the images that ``detections`` are of; ids that are names (VOC's) stay so.
      detections: one per image.
    """
    check_detections(annotations, detections)
    entries = []
    for image, found in zip(annotations.images, detections, strict=True):
        # In float64 the widths are exact, and so is the way back.
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for box, label, score in zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True):
            category = annotations.category_ids[label]
            entries.append({"image_id": image.id, "category_id": category, "bbox": box, "score": score})
    return entries


def coco_file(annotations: Annotations, detections: Sequence[Detections]) -> bytes:
    """A JSON file in COCO's result format."""
    entries = coco_results(annotations, detections)
    lines = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
    return f"[{lines}]\n".encode()


def read_coco_results(path: str, annotations: Annotations) -> list[Detections]:
    """Reads a file in COCO's result format.

    Returns:
      One per image of ``annotations``, each image's in the order of the file.

    Raises:
      UsageError: malformed, or of other images or categories: the entry.
    """
    file = pathlib.Path(path)
    entries = load_json(file)
    if not isinstance(entries, list):
        raise UsageError(f"{file}: not COCO's result format (expected a list)")
    label = {number: i for i, number in enumerate(annotations.category_ids)}
    found: dict[Any, list] = {image.id: [] for image in annotations.images}
    for i, entry in enumerate(entries):
        where = f"{file}: entry {i}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where} is no object")
        image, category, score = (entry.get(key) for key in ("image_id", "category_id", "score"))
        if not isinstance(image, str | int) or image not in found:
            raise UsageError(f"{where}: there is no image {json.dumps(image)}")
        if not isinstance(category, int) or category not in label:
            raise UsageError(f"{where}: category {json.dumps(category)} is not in the list")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UsageError(f"{where}: score is {json.dumps(score)}, not a number")
        found[image].append((box_corners(where, entry.get("bbox")), label[category], score))
    return [detections_from(found[image.id]) for image in annotations.images]


def voc_files(
    image_set: str, annotations: Annotations, detections: Sequence[Detections], competition: str = "comp4"
) -> dict[str, bytes]:
    """The devkit's detection files, one per class: lines ``image score xmin ymin xmax ymax``.

    Args:
      image_set: its name: ``test``.
      annotations: the images that ``detections`` are of.
      detections: one per image.
      competition: ``comp3`` if trained on VOC alone, ``comp4`` otherwise, as with ImageNet weights.

    Returns:
      Name, ``comp4_det_<image set>_<class>.txt`` -> content.

    Raises:
      UsageError: a class whose name can't be part of a file's.
    """
    check_detections(annotations, detections)
    files = {}
    for label, name in enumerate(annotations.classes):
        lines = []
        for image, found in zip(annotations.images, detections, strict=True):
            mine = found.labels == label
            for (left, top, right, bottom), score in zip(
                found.boxes[mine].astype(np.float64).tolist(), found.scores[mine].tolist(), strict=True
            ):
                lines.append(f"{image.id} {score!r} {left + 1!r} {top + 1!r} {right!r} {bottom!r}\n")
        files[_voc_name(image_set, name, competition)] = "".join(lines).encode()
    return files


def read_voc_results(
    folder: str, image_set: str, annotations: Annotations, competition: str = "comp4"
) -> list[Detections]:
    """Reads the devkit's detection files; the arguments as in ``voc_files``; ``folder`` holds them.

    Returns:
      One per image of ``annotations``, each image's by class and then in the order of the file.

    Raises:
      UsageError: a file that is missing or malformed, or names another image: file and line.
    """
    found: dict[str, list] = {str(image.id): [] for image in annotations.images}
    for label, name in enumerate(annotations.classes):
        path = pathlib.Path(folder) / _voc_name(image_set, name, competition)
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not a readable text file ({error})") from error
        for number, line in enumerate(lines, start=1):
            # From the right: names of one's own images may have spaces in them.
            words = line.rsplit(maxsplit=5)
            try:
                score, left, top, right, bottom = map(float, words[1:])
                finite = all(map(math.isfinite, (score, left, top, right, bottom)))
            except ValueError:
                finite = False
            if not finite:
                raise UsageError(f"{path}, line {number}: expected: image score xmin ymin xmax ymax")
            if words[0] not in found:
                raise UsageError(f"{path}, line {number}: there is no image {words[0]}")
            found[words[0]].append(((left - 1, top - 1, right, bottom), label, score))
    return [detections_from(found[str(image.id)]) for image in annotations.images]


def _voc_name(image_set: str, name: str, competition: str) -> str:
    if "/" in name or "\0" in name:
        raise UsageError(f"class {name!r} can't be part of a file's name, as VOC's result files have it")
    return f"{competition}_det_{image_set}_{name}.txt"
