"""COCO's twelve figures, by pycocotools (the extra ``detection``), which is the protocol."""

from collections.abc import Sequence
import contextlib
import io
from typing import Any

import numpy as np

from resnet_jax.detection.annotations import Annotations, Detections
from resnet_jax.detection.result_files import coco_results
from resnet_jax.errors import UsageError

# In pycocotools' order. AP: mean over IoU .50:.05:.95; s, m, l: boxes whose area is below 32^2, below 96^2, above;
# AR: the best recall with 1, 10, 100 detections of a class in an image.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco_metrics(annotations: Annotations, detections: Sequence[Detections]) -> dict[str, float]:
    """COCO's figures of a whole test set, for any data set.

    VOC's difficult boxes count as crowds: what lies in them is not judged.

    Args:
      annotations: the test set.
      detections: one per image; of a class in an image, pycocotools takes the 100 surest.

    Returns:
      The figures by ``NAMES``, 1 is perfect; -1 where there was nothing of that size to be found.

    Raises:
      UsageError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UsageError("COCO's figures need pycocotools: pip install 'resnet_jax[detection]'") from error

    head = {
        # Equal scores are taken in the order of the images' ids, so these must stay.
        "images": [{"id": _image_id(annotations, i)} for i in range(len(annotations))],
        "categories": [{"id": number} for number in annotations.category_ids],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = {**head, "annotations": _truth(annotations)}
        found.dataset = {**head, "annotations": _found(annotations, detections)}
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, map(float, evaluation.stats), strict=True))


def _image_id(annotations: Annotations, i: int) -> int:
    """COCO's id; names of other data sets are numbered."""
    id = annotations.images[i].id
    return id if isinstance(id, int) else i


def _truth(annotations: Annotations) -> list[dict[str, Any]]:
    entries = []
    for i, image in enumerate(annotations.images):
        boxes = image.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for box, label, crowd, area in zip(
            boxes.tolist(), image.labels, image.crowd | image.difficult, image.area.tolist(), strict=True
        ):
            # Numbered from 1: to pycocotools a match with number 0 is none.
            entries.append(
                {
                    "id": len(entries) + 1,
                    "image_id": _image_id(annotations, i),
                    "category_id": annotations.category_ids[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return entries


def _found(annotations: Annotations, detections: Sequence[Detections]) -> list[dict[str, Any]]:
    """As pycocotools' loadRes makes them of a result file, which must have an entry; here none is no mistake."""
    number = {image.id: _image_id(annotations, i) for i, image in enumerate(annotations.images)}
    return [
        {
            **entry,
            "id": i,
            "image_id": number[entry["image_id"]],
            "area": entry["bbox"][2] * entry["bbox"][3],
            "iscrowd": 0,
        }
        for i, entry in enumerate(coco_results(annotations, detections), start=1)
    ]
