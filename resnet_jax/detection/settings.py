"""The numbers of Faster R-CNN's training and test, the paper's as defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Paper, section 4.3 and appendix A; Faster R-CNN, sections 3.1 and 3.3; Fast R-CNN, section 2.3.

    Attributes:
      anchor_border: pixels by which trained anchors may reach beyond the image; infinity: all are trained
        (detectron2).
      anchor_high: IoU from which an anchor is foreground; each box's best ones are so in any case.
      anchor_low: IoU below which it is background.
      anchors_sampled: trained in each image.
      anchors_foreground: at most this share of them.
      anchor_beta: where the RPN's smooth L1 turns linear.
      proposal_nms: IoU above which proposals suppress each other.
      train_before_nms: proposals of highest objectness that NMS sees in training.
      train_after_nms: proposals that are left, from which RoIs are drawn.
      test_before_nms: likewise in test.
      test_after_nms: likewise.
      proposal_side: pixels; proposals with a shorter side are dropped. 0 as in detectron2; py-faster-rcnn took 16
        pixels of the image.
      roi_high: IoU from which an RoI is foreground, and below which it is background.
      roi_low: IoU below which it is neither: .1 on VOC, 0 on COCO.
      rois_sampled: trained in each image.
      rois_foreground: at most this share of them.
      roi_beta: where the head's smooth L1 turns linear.
      box_stds: what box targets of the head are divided by.
      crowd_share: what lies in a crowd region by this part of its area is no background; above 1: crowds are ignored.
      score_threshold: detections of a lower score are dropped.
      detection_nms: IoU above which detections of a class suppress each other.
      detections: at most so many an image.
      refine: boxes are pooled once more where they came to lie, and both predictions count (appendix B).
      voting_iou: with ``refine``, detections of a class vote on where a box is from this IoU on; above 1: no voting.
    """

    anchor_border: float = 0.0
    anchor_high: float = 0.7
    anchor_low: float = 0.3
    anchors_sampled: int = 256
    anchors_foreground: float = 0.5
    anchor_beta: float = 1 / 9
    proposal_nms: float = 0.7
    train_before_nms: int = 12000
    train_after_nms: int = 2000
    test_before_nms: int = 6000
    test_after_nms: int = 300
    proposal_side: float = 0.0
    roi_high: float = 0.5
    roi_low: float = 0.1
    rois_sampled: int = 128
    rois_foreground: float = 0.25
    roi_beta: float = 1.0
    box_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    crowd_share: float = 0.7
    score_threshold: float = 0.05
    detection_nms: float = 0.3
    detections: int = 100
    refine: bool = False
    voting_iou: float = 0.5
