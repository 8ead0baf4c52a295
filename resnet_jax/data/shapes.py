"""The shapes of images that are still in their files, for whoever sorts them by shape before reading them."""

from concurrent.futures import ThreadPoolExecutor
import sys

import numpy as np
import tqdm

from resnet_jax.data.decode import BrokenImage, image_shape
from resnet_jax.data.sources import Examples
from resnet_jax.errors import UsageError


def image_shapes(examples: Examples, workers: int, broken: dict[str, str] | None) -> np.ndarray:
    """(height, width) of every example, int32 [N, 2], from their headers; zeros where one can't be read.

    Args:
      examples: encoded images.
      workers: threads.
      broken: takes what can't be read: where -> why; None makes that an error.

    Raises:
      UsageError: one can't be read, and ``broken`` is None.
    """

    def shape(i: int) -> tuple[int, int]:
        try:
            return image_shape(examples[i][0])
        except (OSError, BrokenImage) as error:
            reason = f"not a readable image ({error})"
            if broken is None:
                raise UsageError(f"{examples.where(i)}: {reason}; data.on_error=skip leaves such images out") from error
            if examples.where(i) not in broken:
                print(f"left out {examples.where(i)}: {reason}", file=sys.stderr, flush=True)
                broken[examples.where(i)] = reason
            return 0, 0

    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(shape, range(len(examples)))
        try:
            shown = tqdm.tqdm(found, "shapes", len(examples), disable=not sys.stderr.isatty(), leave=False)
            return np.array(list(shown), np.int32).reshape(-1, 2)
        except BaseException:  # Ctrl-C too: many may be waiting.
            pool.shutdown(cancel_futures=True)
            raise
