"""The detection task: Faster R-CNN on residual networks, from anchors to the average precisions of VOC and COCO."""
