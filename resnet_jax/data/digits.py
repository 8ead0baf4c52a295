"""scikit-learn's scanned digits: 1,797 images of 8x8 pixels, installed with the library, so nothing is downloaded."""

import numpy as np

from resnet_jax.data.order import holdout_split
from resnet_jax.data.sources import Dataset, Images
from resnet_jax.errors import UsageError


def load() -> Dataset:
    """1,438 training and 359 test images (a fixed fifth), uint8 [N, 8, 8, 1], white 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("data.source=digits needs scikit-learn: pip install 'resnet_jax[digits]'") from error
    scanned = load_digits()
    pixels = np.rint(scanned.images * (255 / 16)).astype(np.uint8)[..., None]  # The scans have 17 grey levels.
    everything = Images(pixels, scanned.target.astype(np.int32))
    train, test = holdout_split(len(everything), held_out=len(everything) // 5)
    return Dataset(everything.subset(train), everything.subset(test), tuple(str(name) for name in scanned.target_names))
