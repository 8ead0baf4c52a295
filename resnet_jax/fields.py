"""Every field of a config: its default, unit and meaning, in one place."""

import dataclasses
from typing import Any

from resnet_jax.limits import (
    FOUR_POSITIVES,
    ITERATIONS,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    POSITIVES,
    SCALES,
    SEED,
    SHARE,
    STEPS,
    STRIDES,
    TWO,
    Limit,
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field; its type is its default's.

    ``allowed`` is what a value must be beyond its type: a tuple of choices, or a test and what is said when it fails.
    ``recipe`` is whether the field has a part in what is learnt: a run resumes only with the same recipe.
    ``tasks`` are those that read the field; none: all do.
    """

    name: str
    default: Any
    unit: str
    text: str
    allowed: tuple[str, ...] | Limit | None = None
    recipe: bool = True
    tasks: tuple[str, ...] = ()


_FIELDS = (
    Field("task", "classification", "", "What is learnt: classification; detection (Faster R-CNN); localization (the"
          " per-class RPN of appendix C).", ("classification", "detection", "localization")),
    Field("model.name", "cifar_resnet20", "", "The network: a name of `python -m resnet_jax.summary`."),
    Field("model.num_classes", 0, "classes", "Length of the logits; 0 takes the data's number of classes.",
          NOT_NEGATIVE),
    Field("model.batch_norm", "global", "", "Examples that share BN statistics: global, per_device or group:N; frozen"
          " keeps the statistics that the weights came with; group_norm (of 32 groups of channels) or group_norm:N is"
          " GroupNorm."),
    Field("model.batch_norm_momentum", 0.9, "", "Share of the running statistics that a step keeps (1 - torch's).",
          SHARE),
    Field("model.dtype", "auto", "", "Compute dtype: auto (bfloat16 on TPU and GPU, else float32), bfloat16,"
          " float32 or float64."),
    Field("model.init_fan", "fan_out", "", "He initialisation by fan_out (fb.resnet.torch) or fan_in (Caffe).",
          ("fan_out", "fan_in")),
    Field("model.freeze_at", 0, "", "What training leaves as it is: so many leading parts (the stem, stage 1, ...; VGG:"
          " its stages); 0 nothing.", NOT_NEGATIVE),
    Field("model.width", 1.0, "", "Channels of a residual net's layers, times the paper's.", POSITIVE),
    Field("model.scan", "auto", "", "Run long stretches of identical blocks as a loop, which compiles in the same time"
          " at any depth: true, false, or auto (on accelerators, blocks of two layers; slow elsewhere).",
          ("auto", "true", "false"), recipe=False),
    Field("model.remat", False, "", "Keep only the blocks' inputs for the backward pass and compute the rest again:"
          " memory for time (residual nets). Loops recompute all but convolutions, products and sums anyway.",
          recipe=False),
    Field("model.space_to_depth", False, "", "Compute the 7x7 stem on 2x2 blocks of pixels: the same weights and"
          " output, faster on some devices.", recipe=False),
    Field("model.zero_init_last", False, "", "Start the last BN scale of each block at zero (residual nets)."),
    Field("data.source", "digits", "", "Where images come from: digits, cifar, image_folder, tfds, array_record (what"
          " `python -m resnet_jax.prepare` writes) or ilsvrc (ImageNet's tar files); for detection voc, coco, folder"
          " (either form) or shapes (drawn pictures)."),
    Field("data.name", "", "", "Data set within the source: cifar10 or cifar100 for cifar; TFDS's name for tfds."),
    Field("data.dir", "", "path", "Folder or archive of the data; empty where the source can do without.",
          recipe=False),
    Field("data.train_split", "train", "", "tfds, voc, coco: the training split: train, train[:90%]; 07+12, trainval;"
          " train2017."),
    Field("data.test_split", "", "", "The same of the test set; empty: test, or validation where there is none."),
    Field("data.labels", "", "path", "image_folder, voc, coco: text file with one class a line, in the order of their"
          " numbers; empty takes all of them, sorted (coco's in the order of their ids)."),
    Field("data.difficult", False, "", "voc: train on objects that are flagged difficult too."),
    Field("data.without_boxes", False, "", "Train on images without boxes too, as background."),
    Field("data.shapes", (2000, 300), "images", "shapes: how many are drawn to train and to test.", TWO),
    Field("data.holdout", 0, "images", "Training images held out at random (the same for every seed) for validation.",
          NOT_NEGATIVE),
    Field("data.placement", "auto", "", "device: all images lie on the devices; stream: they are read as training goes;"
          " auto: on the devices for data.crop=whole.", ("auto", "device", "stream"), recipe=False),
    Field("data.image_size", 0, "pixels", "Side of the squares that the network sees; 0 takes images as they are.",
          NOT_NEGATIVE),
    Field("data.crop", "whole", "", "What training sees of an image: whole; scale, a crop at a random scale (the"
          " paper's, section 3.4); inception, a crop of random area and shape.", ("whole", "scale", "inception")),
    Field("data.scales", (256, 480), "pixels", "scale: limits of the shorter side, both included.", ITERATIONS),
    Field("data.smallest_area", 0.08, "", "inception: least share of an image's area.", PART),
    Field("data.interpolation", "bilinear", "", "How training images are resized: bilinear, bicubic or area; not"
          " antialiased (but for whole).", ("bilinear", "bicubic", "area")),
    Field("data.reduced_dct", True, "", "Decode training JPEGs at a half, a quarter or an eighth of their size where"
          " the crop needs no more."),
    Field("data.mean", "channel", "", "What is subtracted: pixel (a mean image) or channel, of the training images"
          " alone; imagenet (0.485, 0.456, 0.406) or none.", ("pixel", "channel", "imagenet", "none")),
    Field("data.mean_image", "", "path", "A .npy file [H, W, 3] or [3] from 0 to 1 to subtract instead."),
    Field("data.std", "channel", "", "What images are divided by: channel (of the training images), imagenet (0.229,"
          " 0.224, 0.225) or none.", ("channel", "imagenet", "none")),
    Field("data.pad", 0, "pixels", "Zeros on each side (after the mean) before a random crop of the original size.",
          NOT_NEGATIVE),
    Field("data.flip", False, "", "Mirror half of the training images, at random."),
    Field("data.color_noise", 0.0, "", "Strength of random colour along ImageNet's principal components; AlexNet's and"
          " the paper's is 0.1.", NOT_NEGATIVE),
    Field("data.workers", -1, "", "Readers of image files; -1: one per core; 0: none, batches are read when they are"
          " needed.", Limit(lambda value: value >= -1, "must be at least -1"), recipe=False),
    Field("data.worker_type", "thread", "", "What readers are: thread, or process where a host has so many cores that"
          " Python's lock holds threads up.", ("thread", "process"), recipe=False),
    Field("data.prefetch", 2, "batches", "Batches that wait on the devices.", POSITIVE, recipe=False),
    Field("data.cache", "none", "", "memory: keep images in the host's memory, decoded if all of them fit.",
          ("none", "memory"), recipe=False),
    Field("data.cache_gb", 8.0, "GB", "Most that data.cache=memory takes.", NOT_NEGATIVE, recipe=False),
    Field("data.on_error", "raise", "", "An image that can't be read: raise stops there and names it; skip leaves it"
          " out, counts it, and lets training see the next image in its place. Detection skips boxes that can't be"
          " used; an image that can't be read ends the run.", ("raise", "skip"), recipe=False),
    Field("data.cache_dir", "", "path", "Where decoded and downloaded data is kept; empty: ~/.cache/resnet_jax.",
          recipe=False),
    Field("batch_size", 128, "images", "Images a step over all devices together.", POSITIVE),
    Field("epochs", 0.0, "epochs", "Length of the training; this or steps.", NOT_NEGATIVE, recipe=False),
    Field("steps", 0, "iterations", "Length of the training; this or epochs.", NOT_NEGATIVE, recipe=False),
    Field("seed", 0, "", "Seed of the initial weights, the order of the images and their augmentation.", SEED),
    Field("loss.label_smoothing", 0.0, "", "Share of the target spread over all classes (in training alone).", SHARE),
    Field("optimizer.name", "sgd", "", "sgd, or lars: SGD whose gradients are scaled, kernel by kernel, to the size of"
          " the weights (for batches above some 8,192).", ("sgd", "lars")),
    Field("optimizer.trust", 0.001, "", "lars: a kernel's gradient is scaled to this share of the kernel's norm.",
          POSITIVE),
    Field("optimizer.momentum", 0.9, "", "Share of the velocity that a step keeps.", SHARE),
    Field("optimizer.nesterov", False, "", "Nesterov's momentum."),
    Field("optimizer.momentum_style", "torch", "", "torch: rate times velocity; caffe: the rate inside the velocity"
          " (they differ only where the rate changes).", ("torch", "caffe")),
    Field("optimizer.weight_decay", 1e-4, "", "L2 penalty added to the gradient.", NOT_NEGATIVE),
    Field("optimizer.decay", "all", "", "What decays: all parameters (Caffe, the paper) or kernels only.",
          ("all", "kernels")),
    Field("optimizer.clip_norm", 0.0, "", "Largest norm of the whole gradient; 0 does not clip.", NOT_NEGATIVE),
    Field("optimizer.accumulate", 1, "", "Parts a batch is worked through in, to save"
          " memory; gradients are averaged. BN groups stay whole; global BN is of one part.", POSITIVE),
    Field("optimizer.ema", 0.0, "", "Decay of an average of the weights and BN statistics that is evaluated in"
          " their place, from the first step on; 0: none.",
          SHARE),
    Field("optimizer.head_rate", 1.0, "", "The classifier's learning rate, times the others'.", POSITIVE),
    Field("schedule.name", "steps", "", "constant, steps, linear, cosine, polynomial or plateau.",
          ("constant", "steps", "linear", "cosine", "polynomial", "plateau")),
    Field("schedule.learning_rate", 0.1, "", "Learning rate after warm-up.", POSITIVE),
    Field("schedule.boundaries", (), "iterations", "steps: where the rate is multiplied by schedule.factor.",
          ITERATIONS),
    Field("schedule.factor", 0.1, "", "steps and plateau: the multiplier.", POSITIVE),
    Field("schedule.power", 2.0, "", "polynomial: the exponent of what is left of the way from the end of the warm-up"
          " to schedule.end_step.", POSITIVE),
    Field("schedule.end_rate", 0.0, "", "linear, cosine and polynomial: the final rate, constant after"
          " schedule.end_step.", NOT_NEGATIVE),
    Field("schedule.end_step", 0, "iterations", "linear, cosine and polynomial: where the final rate is reached; 0: at"
          " the end.", NOT_NEGATIVE),
    Field("schedule.patience", 3, "evaluations", "plateau: so many evaluations without a better error drop the rate.",
          POSITIVE),
    Field("schedule.threshold", 0.0, "% points", "plateau: what counts as better.", NOT_NEGATIVE),
    Field("schedule.warmup_steps", 0, "iterations", "Linear warm-up from zero to the rate.", NOT_NEGATIVE),
    Field("schedule.warmup_rate", 0.01, "", "The rate until schedule.warmup_error is reached (section 4.2).",
          NOT_NEGATIVE),
    Field("schedule.warmup_error", 0.0, "%", "Hold schedule.warmup_rate until the training error (averaged over about"
          " the last 20 steps) is below this; 0: off.", NOT_NEGATIVE),
    Field("detection.neck", "c4", "", "What stands between backbone and regions: c4, the paper's (all stages but the"
          " last are shared, which looks at each region; for vgg16 fc6 and fc7 do), or fpn.", ("c4", "fpn")),
    Field("detection.roi", "align", "", "How a region is brought to a fixed size: align (RoIAlign) or pool (RoI"
          " pooling, quantised, the paper's).", ("align", "pool")),
    Field("detection.pooled", 0, "cells", "Side of that size; 0: 7, before a c4's last stage times its stride.",
          NOT_NEGATIVE),
    Field("detection.last_stride", 2, "", "Stride of a c4's last stage on regions: 2, from 14 to 7 cells (detectron2),"
          " or 1, the paper's other reading. Necks without such a stage take 1.", STRIDES),
    Field("detection.anchor_sizes", (128, 256, 512), "pixels", "Roots of the anchors' areas; the paper adds 64 for"
          " COCO. With fpn one for each level, from P2 on.", ITERATIONS),
    Field("detection.anchor_ratios", (0.5, 1.0, 2.0), "", "Their heights over widths.", POSITIVES),
    Field("detection.rpn_width", 512, "channels", "Of the RPN's 3x3 convolution.", POSITIVE),
    Field("detection.context", False, "", "The whole image's features stand beside each region's (appendix B)."),
    Field("detection.shorter", (600,), "pixels", "The shorter side as the network sees it; of several one is drawn for"
          " each training image, and the last one is tested.", ITERATIONS),
    Field("detection.longer", 1000, "pixels", "At most so long is the longer side.", POSITIVE),
    Field("detection.anchor_border", 0.0, "pixels", "By so much trained anchors may reach beyond the image; below 0:"
          " all are trained (detectron2)."),
    Field("detection.anchor_high", 0.7, "", "IoU from which an anchor is foreground; each box's best ones are in any"
          " case.", PART),
    Field("detection.anchor_low", 0.3, "", "IoU below which it is background.", SHARE),
    Field("detection.anchors_sampled", 256, "", "Anchors trained in an image.", POSITIVE),
    Field("detection.anchors_foreground", 0.5, "", "At most this share of them is foreground.", PART),
    Field("detection.anchor_beta", 1 / 9, "", "Where the RPN's smooth L1 turns linear.", POSITIVE),
    Field("detection.proposal_nms", 0.7, "", "IoU above which proposals suppress each other.", PART),
    Field("detection.train_before_nms", 12000, "", "Proposals of highest objectness that NMS sees in training (with fpn"
          " of each level).", POSITIVE),
    Field("detection.train_after_nms", 2000, "", "Proposals that are left, from which RoIs are drawn.", POSITIVE),
    Field("detection.test_before_nms", 6000, "", "The same in test: those that NMS sees.", POSITIVE,
          recipe=False),
    Field("detection.test_after_nms", 300, "", "The same in test: those that are left.", POSITIVE,
          recipe=False),
    Field("detection.proposal_side", 0.0, "pixels", "Proposals with a shorter side are dropped; 0 as in detectron2;"
          " py-faster-rcnn took 16 pixels of the image.", NOT_NEGATIVE),
    Field("detection.roi_high", 0.5, "", "IoU from which an RoI is foreground, below which it is background.", PART),
    Field("detection.roi_low", 0.1, "", "IoU below which it is neither: .1 on VOC, 0 on COCO.", SHARE),
    Field("detection.rois_sampled", 128, "", "RoIs trained in an image.", POSITIVE),
    Field("detection.rois_foreground", 0.25, "", "At most this share of them is foreground.", PART),
    Field("detection.roi_beta", 1.0, "", "Where the head's smooth L1 turns linear.", POSITIVE),
    Field("detection.box_stds", (0.1, 0.1, 0.2, 0.2), "", "What the head's box targets are divided by.",
          FOUR_POSITIVES),
    Field("detection.crowd_share", 0.7, "", "What lies in a crowd region by this part of its area is no background;"
          " above 1: crowds are ignored.", POSITIVE),
    Field("detection.score_threshold", 0.05, "", "Detections of a lower score are dropped.", SHARE, recipe=False),
    Field("detection.detection_nms", 0.3, "", "IoU above which detections of a class suppress each other.", PART,
          recipe=False),
    Field("detection.detections", 100, "", "At most so many an image.", POSITIVE, recipe=False),
    Field("detection.refine", False, "", "Test: boxes are pooled once more where they came to lie, and both predictions"
          " count (appendix B).", recipe=False),
    Field("detection.voting_iou", 0.5, "", "With refine, detections of a class vote on where a box is from this IoU"
          " on; above 1: no voting.", POSITIVE, recipe=False),
    Field("detection.test_scales", (200, 400, 600, 800, 1000), "pixels", "eval.protocol=multi_scale: shorter sides, of"
          " which each region is looked at in the two that bring its side closest to detection.test_side.", SCALES,
          recipe=False),
    Field("detection.test_side", 224, "pixels", "eval.protocol=multi_scale: the root of a region's area at which it is"
          " best looked at; what the backbone was trained on.", POSITIVE, recipe=False),
    Field("detection.labelled", True, "", "Whether the test set's boxes are known; if not (12_test, COCO's test-dev),"
          " its detections are written alone.", recipe=False),
    Field("detection.average_precision", "voc", "", "What `map` is: voc07 (11 points), voc (area under the curve), both"
          " at an IoU of .5, or coco (the mean over .5 to .95).", ("voc07", "voc", "coco"), recipe=False),
    Field("localization.anchor_sizes", (56, 112, 224), "pixels", "Roots of the anchors' areas, at the network's input;"
          " the paper says none.", ITERATIONS),
    Field("localization.anchor_ratios", (0.5, 1.0, 2.0), "", "Their heights over widths.", POSITIVES),
    Field("localization.rpn_width", 512, "channels", "Of the 3x3 convolution before the sibling outputs.", POSITIVE),
    Field("localization.anchor_high", 0.7, "", "IoU from which an anchor is positive; each box's best ones are in any"
          " case.", PART),
    Field("localization.anchor_low", 0.3, "", "IoU below which it is negative; between the two it is not trained.",
          SHARE),
    Field("localization.anchors_sampled", 8, "", "Anchors trained in an image (appendix C).", POSITIVE),
    Field("localization.anchors_foreground", 0.5, "", "At most this share of them is positive; missing ones are made up"
          " for by negatives, as in Faster R-CNN.", PART),
    Field("localization.anchor_beta", 1 / 9, "", "Where the smooth L1 turns linear.", POSITIVE),
    Field("localization.other_classes", False, "", "Train the other classes' scores too, to say no at every sampled"
          " anchor."),
    Field("localization.least_visible", 0.2, "", "The least share of a box, by its area, with which what a crop holds"
          " of it is trained as an object.", PART),
    Field("localization.candidates", 20, "", "Boxes of highest score that a class keeps of each view, for voting and to"
          " combine views.", POSITIVE, recipe=False),
    Field("localization.voting_iou", 2.0, "", "Boxes of at least this IoU with the best one are averaged with it,"
          " weighted by score; above 1: the best one alone, the paper's.", POSITIVE, recipe=False),
    Field("localization.predictions", "", "path", "A classification's predictions.npz of the test set, whose five"
          " likeliest classes are located; empty: the true class.", recipe=False),
    Field("eval.every", 0, "iterations", "Evaluate so often; 0: only at the end.", NOT_NEGATIVE, recipe=False),
    Field("eval.patience", 0, "evaluations", "Stop after so many without a better error; 0: train to the end.",
          NOT_NEGATIVE, recipe=False),
    Field("eval.batch_size", 1000, "images", "Images a step in evaluation.", POSITIVE, recipe=False),
    Field("eval.resize", 256, "pixels", "Shorter side, where training sees crops; the middle is evaluated.",
          POSITIVE, recipe=False),
    Field("eval.interpolation", "bilinear", "", "How evaluation resizes, antialiased: bilinear, bicubic or area.",
          ("bilinear", "bicubic", "area"), recipe=False),
    Field("eval.protocol", "center", "", "How the test set is looked at in the end: center (one view, as in between);"
          " ten_crop (the middle, the corners and their mirror images); multi_scale (fully convolutional).",
          ("center", "ten_crop", "multi_scale"), recipe=False),
    Field("eval.scales", (224, 256, 384, 480, 640), "pixels", "multi_scale: shorter sides.", ITERATIONS, recipe=False),
    Field("checkpoint.every", 0, "iterations", "Save so often; 0: by time alone.", NOT_NEGATIVE, recipe=False),
    Field("checkpoint.minutes", 10.0, "minutes", "Save when so much time has passed; 0: by iterations alone (the"
          " end is saved anyway).",
          NOT_NEGATIVE, recipe=False),
    Field("checkpoint.keep", 2, "", "How many of the latest checkpoints stay (the best one always does); with one alone"
          " there is none to take where it is damaged.",
          POSITIVE, recipe=False),
    Field("log.every", 100, "iterations", "Write metrics so often. An accelerator runs the"
          " steps between two log lines at once.", POSITIVE, recipe=False),
    Field("log.tensorboard", True, "", "Write TensorBoard events too.", recipe=False),
    Field("profile.steps", "", "iterations", "Write a trace of the steps from one to another, as 10:15, into the work"
          " directory's profile/, for TensorBoard and Perfetto; empty: none.", STEPS, recipe=False),
    Field("deterministic", False, "", "Bit-exact reruns on GPUs, slower (CPUs and TPUs are exact anyway).",
          recipe=False),
    Field("init.weights", "", "path", "Start from these weights: a file (.safetensors; torch's, Caffe's, Keras's), the"
          " work directory of a run, hf:OWNER/NAME or https://...#sha256=DIGITS. They bring their preprocessing."),
    Field("init.head", "keep", "", "The classifier of init.weights: keep it, or replace it by a new one for the data's"
          " classes.", ("keep", "replace")),
)  # fmt: skip

# What some tasks alone read; what is not listed all do.
_OF_TASKS = {
    ("classification",): (
        "data.name", "data.holdout", "data.placement", "data.crop", "data.smallest_area", "data.mean_image", "data.pad",
        "data.cache", "data.cache_gb", "data.cache_dir", "loss.label_smoothing", "optimizer.accumulate",
        "optimizer.head_rate", "schedule.warmup_error", "model.scan", "model.remat",
    ),
    ("classification", "localization"): (
        "data.image_size", "data.scales", "data.interpolation", "data.reduced_dct", "data.color_noise", "eval.resize",
        "eval.interpolation", "eval.scales",
    ),
    ("detection", "localization"): ("data.difficult", "data.without_boxes", "data.shapes"),
    ("detection",): tuple(field.name for field in _FIELDS if field.name.startswith("detection.")),
    ("localization",): tuple(field.name for field in _FIELDS if field.name.startswith("localization.")),
}  # fmt: skip
_TASKS = {name: tasks for tasks, names in _OF_TASKS.items() for name in names}
FIELDS = tuple(dataclasses.replace(field, tasks=_TASKS.get(field.name, ())) for field in _FIELDS)
# What decides an evaluation's figures without being learnt.
OF_EVALUATION = tuple(
    field.name for field in FIELDS if not field.recipe
    and field.name.startswith(("eval.resize", "eval.interpolation", "eval.scales", "detection.", "localization."))
)  # fmt: skip
