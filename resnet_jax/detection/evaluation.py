"""What becomes of detections: figures, and arrays for files."""

from collections.abc import Sequence

import numpy as np

from resnet_jax.detection.annotations import Annotations, Detections
from resnet_jax.detection.average_precision import voc_average_precision
from resnet_jax.detection.coco_metrics import coco_metrics


def figures(annotations: Annotations, detections: Sequence[Detections], average_precision: str) -> dict[str, float]:
    """The metrics of a test set, in %.

    Args:
      annotations: the test set.
      detections: one per image.
      average_precision: what ``map`` is: ``voc07``, ``voc`` or ``coco``; see ``detection.average_precision``.

    Returns:
      ``map``; VOC's ``ap50`` (area under the curve) and ``ap50_11_point``; with ``coco`` its twelve as ``coco/AP``,
      ...; ``ap50/<class>``. What has no figure, since nothing of the kind is to be found, is left out.
    """
    voc = voc_average_precision(annotations, detections)
    found = {"ap50": voc.mean_area, "ap50_11_point": voc.mean_eleven_point}
    if average_precision == "coco":
        found |= {f"coco/{name}": figure for name, figure in coco_metrics(annotations, detections).items()}
    main = {"voc07": "ap50_11_point", "voc": "ap50", "coco": "coco/AP"}[average_precision]
    found = {"map": found[main]} | found
    found |= {f"ap50/{name}": ap for name, ap in zip(annotations.classes, voc.area.tolist(), strict=True)}
    # Classes and sizes that don't occur have none: NaN in VOC, -1 in COCO.
    return {name: 100 * figure for name, figure in found.items() if figure >= 0}


def collect(outputs: list[dict[str, np.ndarray]], images: int) -> list[Detections]:
    """The detections of each image, in the images' order, from the inference step's outputs batch by batch."""
    found: dict[int, Detections] = {}
    for out in outputs:
        for row in np.flatnonzero(out["real"]):
            valid = out["valid"][row]
            boxes, labels, scores = (out[name][row][valid] for name in ("boxes", "labels", "scores"))
            found[int(out["index"][row])] = Detections(boxes.astype(np.float32), labels, scores.astype(np.float32))
    assert sorted(found) == list(range(images))  # Every image exactly once.
    return [found[i] for i in range(images)]


def as_arrays(detections: Sequence[Detections]) -> dict[str, np.ndarray]:
    """``index`` int32 [N] (the image), ``boxes`` [N, 4], ``labels`` [N] and ``scores`` [N] of all detections."""
    joined = {name: np.concatenate([getattr(d, name) for d in detections]) for name in ("boxes", "labels", "scores")}
    return {"index": np.repeat(np.arange(len(detections), dtype=np.int32), [len(d) for d in detections])} | joined
