"""The numbers of Faster R-CNN: the config's section ``detection``, the paper's as defaults.

Paper, section 4.3 and appendix A; Faster R-CNN, sections 3.1 and 3.3; Fast R-CNN, section 2.3. ``fields.py`` says what
each of them is.
"""

import functools

import ml_collections

from resnet_jax.config import make_section

Settings = ml_collections.FrozenConfigDict
make_settings = functools.partial(make_section, "detection")
