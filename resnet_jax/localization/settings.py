"""The numbers of localization: the config's section ``localization``, the paper's as defaults where it says any."""

import dataclasses

import ml_collections

from resnet_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a config says of localization.

    The paper says 8 anchors an image, half of them positive, and that boxes are relative to anchors "as in" Faster
    R-CNN (appendix C); it is silent on the anchors' sizes, which here are a quarter, a half and all of a crop's side.

    Attributes:
      anchor_sizes: roots of the anchors' areas, pixels of the network's input.
      anchor_ratios: their heights over widths.
      rpn_width: channels of the 3x3 convolution before the sibling outputs.
      anchor_high: IoU from which an anchor is positive; each box's best ones are in any case.
      anchor_low: IoU below which it is negative; between the two it is not trained.
      anchors_sampled: anchors trained in an image.
      anchors_foreground: at most this share of them is positive; missing ones are made up for by negatives, as in
        Faster R-CNN, which the paper cites for the ratio.
      anchor_beta: where the smooth L1 turns linear.
      other_classes: train the other classes' scores too, to say no at every sampled anchor (``steps.losses``).
      least_visible: the least share of a box, by its area, with which what a crop holds of it is trained as an object.
        A fifth: a 224 x 224 crop of 480 pixels holds 22% of an object that fills a square image.
      candidates: how many boxes of highest score a class keeps of each view, for voting and to combine views.
      voting_iou: boxes of at least this IoU with the best one are averaged with it, weighted by score; above 1: the
        best one alone, which is all that the paper mentions.
      predictions: a ``predictions.npz`` of a classification of the test set, whose five likeliest classes are located;
        empty: the true class.
    """

    anchor_sizes: tuple[float, ...] = (56.0, 112.0, 224.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_width: int = 512
    anchor_high: float = 0.7
    anchor_low: float = 0.3
    anchors_sampled: int = 8
    anchors_foreground: float = 0.5
    anchor_beta: float = 1 / 9
    other_classes: bool = False
    least_visible: float = 0.2
    candidates: int = 20
    voting_iou: float = 2.0
    predictions: str = ""

    def __post_init__(self) -> None:
        if not self.anchor_low <= self.anchor_high:
            raise UsageError(
                f"localization.anchor_low={self.anchor_low} is above localization.anchor_high={self.anchor_high}"
            )


def settings_of(config: ml_collections.ConfigDict) -> Settings:
    """The settings of a whole config; the defaults where it has no section ``localization``."""
    return Settings(**config.get("localization", {}))
