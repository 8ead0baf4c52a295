"""Bilinear resizing from its definition, in 64 bits."""

import numpy as np


def sampling(length: int, resized: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of pixels start, start + 1, ...: the source pixels before and after their centres, and the latter's weight."""
    centres = ((np.arange(start, start + count) + 0.5) * length / resized - 0.5).clip(0, length - 1)
    before = np.floor(centres).astype(int)
    return before, np.minimum(before + 1, length - 1), centres - before


def bilinear(pixels: np.ndarray, height: int, width: int, top: int, left: int, size: int) -> np.ndarray:
    """A square of the image resized to height x width, by the definition in 64 bits."""
    above, below, down = sampling(pixels.shape[0], height, top, size)
    before, after, across = sampling(pixels.shape[1], width, left, size)
    rows = [pixels[y].astype(np.float64) for y in (above, below)]
    upper, lower = (row[:, before] * (1 - across)[:, None] + row[:, after] * across[:, None] for row in rows)
    return upper * (1 - down)[:, None, None] + lower * down[:, None, None]
