"""Faster R-CNN for your own boxes, from pretrained weights: a folder in VOC's layout or COCO's.

    python -m resnet_jax.main --config=detection/folder --workdir=runs/mine --config.data.dir=FOLDER \
      --config.model.name=resnet50_v1_5 --config.init.weights=resnet50.safetensors

VOC's: Annotations/*.xml, JPEGImages/*, ImageSets/Main/{train,test}.txt. COCO's: annotations/instances_{train,test}.json
and train/*, test/*; or {train,test}/_annotations.coco.json beside the images, as labelling tools export it. The test
set may be called val or valid; --config.data.train_split and --config.data.test_split name others. Without weights:
--config.model.batch_norm=global --config.model.freeze_at=0.
"""

from resnet_jax.config import load_config


def get_config():
    config = load_config("detection/voc")
    config.model.name = "resnet50_v1_5"
    config.data.source = "folder"
    config.data.train_split = "train"
    config.data.test_split = ""
    config.batch_size = 4
    config.steps = 0
    config.epochs = 20.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.004
    config.schedule.boundaries = ()
    config.schedule.warmup_steps = 100
    config.optimizer.clip_norm = 10.0
    config.detection.anchor_sizes = (32, 64, 128, 256, 512)
    config.detection.roi_low = 0.0
    config.detection.average_precision = "voc"
    config.eval.every = 500
    config.log.every = 20
    return config
