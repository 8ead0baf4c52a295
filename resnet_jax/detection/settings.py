"""The numbers of Faster R-CNN: the config's section ``detection``, the paper's as defaults.

Paper, section 4.3 and appendix A; Faster R-CNN, sections 3.1 and 3.3; Fast R-CNN, section 2.3. ``fields.py`` says what
each of them is.
"""

from typing import Any

import ml_collections

from resnet_jax.config import default_config

Settings = ml_collections.FrozenConfigDict


def make_settings(section: ml_collections.ConfigDict | Settings | None = None, **changes: Any) -> Settings:
    """A config's section ``detection``, or the paper's numbers, with changes."""
    values = default_config().detection if section is None else ml_collections.ConfigDict(section)
    values.update(changes)
    return Settings(values)
