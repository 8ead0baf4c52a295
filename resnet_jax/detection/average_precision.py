"""PASCAL VOC's average precision, as VOCdevkit's VOCevaldet.m computes it.

The devkit counts pixels inclusively (the +1 in its widths), 1-based. In continuous coordinates that is the plain area:
(xmin, ymin, xmax, ymax) is our (xmin - 1, ymin - 1, xmax, ymax), and xmax - xmin + 1 our right - left.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from resnet_jax.detection.annotations import Annotations, Detections, check_detections

# MATLAB's 0:0.1:1 counts from both ends. Its 0.3 is 3 * 0.1, a little more: a recall of exactly 3/10 does not reach it.
_ELEVEN_RECALLS = np.concatenate([np.arange(6) * 0.1, 1 - np.arange(4, -1, -1) * 0.1])


@dataclasses.dataclass(frozen=True)
class Curve:
    """Precision over recall of one class, as detections are taken in, the surest first.

    Attributes:
      recall, precision: float64 [n]; recall is NaN where there is no box to be found, precision 0 before the first
        detection that counts.
      scores: float64 [n], falling.
      positives: how many boxes there were to find, without difficult ones.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    positives: int


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """VOC's figures; 1 is perfect.

    A class with no box to be found (none, or difficult ones alone) has AP NaN and is left out of the means. The devkit
    does not provide for it: its 11-point AP is then 0, its area 0 or NaN.

    Attributes:
      eleven_point: AP of every class as of VOC2007, float64 [C].
      area: AP of every class as from VOC2010 on, float64 [C].
      curves: one per class.
    """

    eleven_point: np.ndarray
    area: np.ndarray
    curves: tuple[Curve, ...]

    @property
    def mean_eleven_point(self) -> float:
        """VOC2007's mAP; NaN where no class has a box."""
        return _mean(self.eleven_point)

    @property
    def mean_area(self) -> float:
        """The mAP from VOC2010 on; NaN where no class has a box."""
        return _mean(self.area)


def voc_average_precision(
    annotations: Annotations, detections: Sequence[Detections], overlap: float = 0.5
) -> AveragePrecision:
    """VOC's figures of a whole test set; COCO's crowd boxes count as difficult ones.

    Args:
      annotations: the test set.
      detections: one per image.
      overlap: the least IoU of a box that is found.
    """
    check_detections(annotations, detections)
    curves = []
    for label in range(len(annotations.classes)):
        scores, hits, positives = [np.zeros(0)], [np.zeros(0, np.int8)], 0
        for image, found in zip(annotations.images, detections, strict=True):
            theirs, mine = image.labels == label, found.labels == label
            ignored = (image.difficult | image.crowd)[theirs]
            positives += int(np.sum(~ignored))
            if mine.any():
                scores.append(found.scores[mine].astype(np.float64))
                hits.append(match(found.boxes[mine], scores[-1], image.boxes[theirs], ignored, overlap))
        curves.append(precision_recall(np.concatenate(scores), np.concatenate(hits), positives))
    none = [curve.positives == 0 for curve in curves]
    return AveragePrecision(
        np.where(none, np.nan, [eleven_point_ap(curve.recall, curve.precision) for curve in curves]),
        np.where(none, np.nan, [area_ap(curve.recall, curve.precision) for curve in curves]),
        tuple(curves),
    )


def match(
    boxes: np.ndarray, scores: np.ndarray, truth: np.ndarray, difficult: np.ndarray, overlap: float = 0.5
) -> np.ndarray:
    """Judges the detections of one class in one image.

    A detection looks only at the box that it overlaps most, the first of several: if that one was taken by a surer
    detection, it is wrong, even if another box overlaps it enough.

    Args:
      boxes: detections [n, 4].
      scores: [n]; of equal ones the first is the surer.
      truth: boxes [m, 4].
      difficult: bool [m].
      overlap: the least IoU of a box that is found.

    Returns:
      int8 [n]: 1 right, -1 wrong, 0 neither (the box is difficult).
    """
    verdicts = np.full(len(boxes), -1, np.int8)
    if len(truth) == 0:
        return verdicts
    ious = overlaps(boxes[:, None], truth)
    best = ious.argmax(1)
    order = np.argsort(-np.asarray(scores), kind="stable")
    reached = order[ious[order, best[order]] >= overlap]
    verdicts[reached[difficult[best[reached]]]] = 0
    counted = reached[~difficult[best[reached]]]
    _, first = np.unique(best[counted], return_index=True)
    verdicts[counted[first]] = 1
    return verdicts


def precision_recall(scores: np.ndarray, verdicts: np.ndarray, positives: int) -> Curve:
    """Recall and precision after each detection of a class, over all images.

    Args:
      scores: [n]; equal ones stay in their order.
      verdicts: [n], of ``match``.
      positives: boxes to be found.
    """
    order = np.argsort(-scores, kind="stable")
    right, wrong = np.cumsum(verdicts[order] == 1), np.cumsum(verdicts[order] == -1)
    recall = right / positives if positives else np.full(len(scores), np.nan)
    # While only difficult boxes were found the devkit's precision is 0/0, which its maxima pass over, as over 0.
    return Curve(recall, right / np.maximum(right + wrong, 1), scores[order], positives)


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2007's: the mean, over recalls 0, .1, ... 1, of the best precision at that recall or beyond."""
    return float(np.mean([precision[recall >= least].max(initial=0) for least in _ELEVEN_RECALLS]))


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2010's: the area under the best precision at each recall or beyond."""
    recall = np.concatenate([[0], recall, [1]])
    precision = np.concatenate([precision, [0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes [..., 4] with others [..., 4], shapes that broadcast: [...]; 0 where either is empty or inverted.

    In float64, so that an IoU of one half is one half, as in MATLAB.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    least, most = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    both = (most - least).clip(0).prod(-1)
    areas = [(some[..., 2:] - some[..., :2]).prod(-1) for some in (boxes, others)]
    return np.divide(both, areas[0] + areas[1] - both, out=np.zeros_like(both), where=both > 0)


def _mean(figures: np.ndarray) -> float:
    known = figures[~np.isnan(figures)]
    return float(known.mean()) if len(known) else float("nan")
