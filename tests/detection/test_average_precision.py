"""VOC's average precision: cases worked by hand, and random ones against the devkit's definition in loops."""

import numpy as np
import pytest

from resnet_jax.detection.annotations import Annotations, Detections, annotated_image
from resnet_jax.detection.average_precision import (
    area_ap,
    eleven_point_ap,
    match,
    precision_recall,
    voc_average_precision,
)

A, B, C, D = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60), (70, 70, 80, 80)


def data_set(*images: list, classes: int = 1) -> Annotations:
    """Each image is a list of (box, label, difficult)."""
    annotated = [
        annotated_image(
            str(i), "", 100, 100, [b for b, _, _ in boxes], [c for _, c, _ in boxes], [d for _, _, d in boxes]
        )
        for i, boxes in enumerate(images)
    ]
    return Annotations(tuple("abcdef"[:classes]), tuple(range(1, classes + 1)), tuple(annotated))


def found(*detections: tuple) -> Detections:
    """Each is (box, label, score)."""
    boxes, labels, scores = zip(*detections, strict=True) if detections else ((), (), ())
    return Detections(np.float32(boxes).reshape(-1, 4), np.int32(labels), np.float32(scores))


def test_a_case_worked_by_hand_with_difficult_and_duplicate_detections():
    annotations = data_set([(A, 0, False), (B, 0, True)], [(A, 0, False), (C, 0, False)])
    detections = [
        found((A, 0, 0.8), (A, 0, 0.9), (B, 0, 0.7), (B, 0, 0.65)),  # Again, right, difficult, difficult again.
        found((D, 0, 0.5), (A, 0, 0.6)),  # Nothing there, right; C is missed.
    ]
    result = voc_average_precision(annotations, detections)
    (curve,) = result.curves
    assert curve.positives == 3
    np.testing.assert_allclose(curve.scores, np.float32([0.9, 0.8, 0.7, 0.65, 0.6, 0.5]))
    np.testing.assert_allclose(curve.recall, [1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 1 / 2, 1 / 2, 2 / 3, 1 / 2])
    # Recalls 0, .1, .2, .3 are reached with precision 1, .4, .5, .6 with 2/3, the rest not at all.
    np.testing.assert_allclose(result.eleven_point, [(4 * 1 + 3 * 2 / 3) / 11])
    np.testing.assert_allclose(result.area, [1 / 3 * 1 + 1 / 3 * 2 / 3])


def test_pixels_are_counted_inclusively():
    # In VOC's XML: 1..10 by 1..10, and half of these 100 pixels. Without the +1 the IoU would be 36/81.
    annotations = data_set([((0, 0, 10, 10), 0, False)])
    half, less = (0, 0, 10, 5), (0, 0, 10, 4.99)
    assert voc_average_precision(annotations, [found((half, 0, 1))]).mean_area == 1
    assert voc_average_precision(annotations, [found((less, 0, 1))]).mean_area == 0


def test_a_detection_looks_only_at_the_box_it_overlaps_most():
    truth = np.float32([(0, 0, 10, 10), (0, 0, 10, 8)])
    boxes = np.float32([(0, 0, 10, 9.5), (0, 0, 10, 10)])
    # The surer one takes the first box; the other would fit the second box, but overlaps the first more.
    verdicts = match(boxes, np.array([0.8, 0.9]), truth, np.zeros(2, bool))
    assert verdicts.tolist() == [-1, 1]


def test_of_equal_scores_the_first_comes_first():
    verdicts = match(np.float32([A, A]), np.array([0.5, 0.5]), np.float32([A]), np.zeros(1, bool))
    assert verdicts.tolist() == [1, -1]
    curve = precision_recall(np.array([0.5, 0.5]), verdicts, 1)
    assert curve.precision.tolist() == [1, 0.5]


def test_other_classes_and_other_images_do_not_count():
    annotations = data_set([(A, 0, False)], [(B, 1, False)], classes=2)
    result = voc_average_precision(annotations, [found((A, 1, 0.9), (B, 1, 0.8)), found((A, 0, 0.9))])
    assert result.area.tolist() == [0, 0]


@pytest.mark.parametrize(("reached", "points"), [(1, 2), (2, 3), (3, 3), (4, 5), (6, 7), (7, 8), (10, 11)])
def test_eleven_points_are_matlabs(reached, points):
    # Of 10 boxes; a recall of 3/10 falls short of MATLAB's third step of 0.1, which is 0.30000000000000004.
    curve = precision_recall(np.arange(reached, 0, -1.0), np.ones(reached, np.int8), 10)
    assert eleven_point_ap(curve.recall, curve.precision) == pytest.approx(points / 11)
    assert area_ap(curve.recall, curve.precision) == pytest.approx(reached / 10)


def test_a_class_without_boxes_is_nan_and_left_out_of_the_mean():
    boxes = [(A, 0, False), (B, 2, True), (C, 3, False)]
    annotations = data_set(boxes, [], classes=4)
    result = voc_average_precision(annotations, [found((A, 0, 0.9), (A, 1, 0.8), (B, 2, 0.7)), found()])
    np.testing.assert_array_equal(result.area, [1, np.nan, np.nan, 0])
    np.testing.assert_array_equal(result.eleven_point, [1, np.nan, np.nan, 0])
    assert result.mean_area == result.mean_eleven_point == 0.5
    assert np.isnan(voc_average_precision(data_set([]), [found()]).mean_area)


def test_crowds_count_as_difficult():
    crowd = annotated_image(1, "", 100, 100, [A, B], [0, 0], crowd=[True, False])
    result = voc_average_precision(Annotations(("a",), (1,), (crowd,)), [found((A, 0, 0.9), (B, 0, 0.8))])
    assert result.curves[0].positives == 1
    assert result.mean_area == 1


def test_detections_must_be_of_these_images():
    with pytest.raises(ValueError, match="2 images, but 1"):
        voc_average_precision(data_set([]), [found(), found()])


def by_definition(annotations: Annotations, detections: list[Detections], label: int, least: float) -> tuple:
    """(11-point AP, area AP) of a class as VOCevaldet.m goes about it, with 1-based inclusive pixels."""
    truth, positives = [], 0
    for image in annotations.images:
        mine = []
        for box, its_label, difficult in zip(image.boxes.tolist(), image.labels, image.difficult, strict=True):
            if its_label == label:
                mine.append({"box": (box[0] + 1, box[1] + 1, box[2], box[3]), "difficult": difficult, "taken": False})
                positives += not difficult
        truth.append(mine)
    listed = [
        (score, i, (box[0] + 1, box[1] + 1, box[2], box[3]))
        for i, one in enumerate(detections)
        for box, its_label, score in zip(one.boxes.tolist(), one.labels, one.scores.tolist(), strict=True)
        if its_label == label
    ]
    listed.sort(key=lambda item: -item[0])
    right = wrong = 0
    points = []
    for _, i, d in listed:
        most, best = -1.0, None
        for box in truth[i]:
            t = box["box"]
            across = min(d[2], t[2]) - max(d[0], t[0]) + 1
            down = min(d[3], t[3]) - max(d[1], t[1]) + 1
            if across > 0 and down > 0:
                union = (d[2] - d[0] + 1) * (d[3] - d[1] + 1) + (t[2] - t[0] + 1) * (t[3] - t[1] + 1) - across * down
                if across * down / union > most:
                    most, best = across * down / union, box
        if best is None or most < least:
            wrong += 1
        elif not best["difficult"]:
            right, wrong = (right, wrong + 1) if best["taken"] else (right + 1, wrong)
            best["taken"] = True
        if right + wrong:
            points.append((right / positives if positives else np.nan, right / (right + wrong)))
    if not positives:
        return np.nan, np.nan
    thresholds = [0, 0.1, 0.2, 3 * 0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    eleven = sum(max((p for r, p in points if r >= t), default=0) for t in thresholds) / 11
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return eleven, area


@pytest.mark.parametrize("seed", range(30))
def test_random_cases_equal_the_definition(seed):
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        # Few whole numbers: equal overlaps and IoUs of exactly one half come up.
        corner = rng.integers(0, 6, (count, 2))
        return np.concatenate([corner, corner + rng.integers(1, 5, (count, 2))], 1)

    classes = 3
    images, detections = [], []
    for _ in range(12):
        drawn = boxes(rng.integers(0, 7)).tolist()
        images.append([(box, rng.integers(classes), rng.random() < 0.25) for box in drawn])
        near = [(np.add(box, rng.integers(0, 2, 4)).tolist(), label) for box, label, _ in images[-1] * 2]
        anywhere = [(box, rng.integers(classes)) for box in boxes(rng.integers(0, 5)).tolist()]
        detections.append(found(*((box, label, rng.integers(1, 40) / 40) for box, label in near + anywhere)))
    annotations = data_set(*images, classes=classes)
    for least in (0.5, 0.75):
        result = voc_average_precision(annotations, detections, least)
        expected = [by_definition(annotations, detections, label, least) for label in range(classes)]
        np.testing.assert_allclose(np.stack([result.eleven_point, result.area], 1), expected, rtol=1e-12, atol=1e-12)
        assert 0 < result.mean_area < 1
