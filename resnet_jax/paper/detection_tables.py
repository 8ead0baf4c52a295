"""The paper's tables of detection (section 4.3, appendices A and B) and of localization (appendix C)."""

from resnet_jax.paper.tables import Row, Table

AP50_11_POINT, AP50_AREA = "ap50_11_point", "ap50"  # VOC2007's, and VOC's from 2010 on.
AP50, AP = "coco/AP50", "coco/AP"
TOP5_LOCALIZATION = "top5_localization_error"
# What a localizer is asked for, in place of the path in localization.predictions.
GIVEN, PREDICTED = "the true class", "a classification's"

_VGG = {"model.name": "vgg16"}
_JOINT = (
    "The paper trains in four steps, ours are trained jointly, as public codes are; regions are brought to a fixed size"
    " by RoIAlign or, as in the paper, by RoI pooling (detection.roi=pool), which the remark says."
)
_SERVER = "Measured by a test server, whose boxes nobody has; an evaluation writes the files that it takes."
TABLE_7_VOC07 = Table(
    "Tables 7 and 10: PASCAL VOC 2007 test, mAP",
    "voc07",
    "center",
    (AP50_11_POINT,),
    (
        Row("VGG-16", (73.2,), ("vgg16",), "detection/voc", settings=_VGG),
        Row("ResNet-101", (76.4,), ("resnet101",), "detection/voc"),
        Row("ResNet-101, COCO, baseline+++", (85.6,), ("a detector from COCO",),
            remark="fine-tuned from COCO, with box refinement, context and multi-scale testing"),
    ),
    f"Trained on VOC07 trainval and VOC12 trainval; AP of 11 points. {_JOINT}",
    "detection",
    rises=True,
    places=1,
)  # fmt: skip
TABLE_7_VOC12 = Table(
    "Tables 7 and 11: PASCAL VOC 2012 test, mAP",
    "voc12",
    "center",
    (AP50_AREA,),
    (
        Row("VGG-16", (70.4,), ("vgg16",), "detection/voc", settings=_VGG),
        Row("ResNet-101", (73.8,), ("resnet101",), "detection/voc"),
        Row("ResNet-101, COCO, baseline+++", (83.8,), ("a detector from COCO",),
            remark="fine-tuned from COCO, with box refinement, context and multi-scale testing"),
    ),
    f"Trained on VOC07 trainval and test and VOC12 trainval; AP as the area under the curve. {_SERVER}",
    "detection",
    {"data.train_split": "07++12", "data.test_split": "12_test"},
    rises=True,
    places=1,
)  # fmt: skip
_REFINED = {"detection.refine": True}
_CONTEXT = {"detection.refine": True, "detection.context": True}
_SCALES = _CONTEXT | {"detection.test_scales": [200, 400, 600, 800, 1000]}
TABLE_9_VAL = Table(
    "Tables 8 and 9: COCO val, trained on train",
    "coco",
    "center",
    (AP50, AP),
    (
        Row("VGG-16", (41.5, 21.2), ("vgg16",), "detection/coco", settings=_VGG),
        Row("ResNet-101", (48.4, 27.2), ("resnet101",), "detection/coco"),
        Row("+ box refinement", (49.9, 29.9), ("resnet101",), "detection/coco", settings=_REFINED),
        Row("+ context", (51.1, 30.0), ("resnet101",), "detection/coco", settings=_CONTEXT),
        Row("+ multi-scale testing", (53.8, 32.5), ("resnet101",), "detection/coco", settings=_SCALES,
            protocol="multi_scale"),
    ),
    "Each improvement is added to those above it. detectron2's ResNet-50 C4 (1x) and ResNet-101 C4 (3x) have an AP of"
    f" 35.7 and 41.1 (train2017, val2017, RoIAlign, 800 pixels). {_JOINT}",
    "detection",
    {"data.train_split": "train2014", "data.test_split": "val2014"},
    rises=True,
    places=1,
)  # fmt: skip
TABLE_9_TEST = Table(
    "Table 9: COCO test-dev, trained on trainval",
    "coco_test_dev",
    "center",
    (AP50, AP),
    (
        Row("ResNet-101 + box refinement + context", (53.3, 32.2), ("resnet101",), "detection/coco", settings=_CONTEXT),
        Row("+ multi-scale testing", (55.7, 34.9), ("resnet101",), "detection/coco", settings=_SCALES,
            protocol="multi_scale"),
        Row("ensemble", (59.0, 37.4), ("an ensemble",), remark="three networks"),
    ),
    f"{_SERVER}",
    "detection",
    {"data.train_split": "trainval2014", "data.test_split": "test-dev2015"},
    rises=True,
    places=1,
)  # fmt: skip
_LOCALIZER = (("resnet101",), "detection/localization")
_PREDICTED = {"localization.predictions": PREDICTED}
TABLE_13 = Table(
    "Tables 13 and 14: ImageNet localization, validation, top-5 error",
    "imagenet",
    "center",
    (TOP5_LOCALIZATION,),
    (
        Row("VGG, class given, one crop", (33.1,)),
        Row("ResNet-101, per-class RPN, class given, one crop", (13.3,), *_LOCALIZER),
        Row("ResNet-101, per-class RPN, class given, dense", (11.7,), *_LOCALIZER, protocol="multi_scale"),
        Row("ResNet-101, per-class RPN, predicted classes, dense", (14.4,), *_LOCALIZER, settings=_PREDICTED,
            protocol="multi_scale"),
        Row("ResNet-101, per-class RPN and R-CNN, predicted classes, dense", (10.6,), ("a localizer's R-CNN",)),
        Row("ensemble, predicted classes, dense", (8.9,), ("an ensemble",), remark="9.0 on the test set"),
    ),
    "Dense is eval.protocol=multi_scale; classes are predicted where localization.predictions names a"
    " classification's.",
    "localization",
    places=1,
)  # fmt: skip
TABLES = (TABLE_7_VOC07, TABLE_7_VOC12, TABLE_9_VAL, TABLE_9_TEST, TABLE_13)
