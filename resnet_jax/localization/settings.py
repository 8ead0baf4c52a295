"""The numbers of localization: the config's section ``localization``, the paper's as defaults where it says any.

The paper (appendix C) says 8 anchors an image, half of them positive, and that boxes are relative to anchors as in
Faster R-CNN. It is silent on the anchors' sizes, which here are a quarter, a half and all of a crop's side. The least
share of a box that is trained is a fifth: a 224 x 224 crop of 480 pixels holds 22% of an object that fills a square
image. ``fields.py`` says what each number is.
"""

import functools

import ml_collections

from resnet_jax.config import make_section

Settings = ml_collections.FrozenConfigDict
make_settings = functools.partial(make_section, "localization")
