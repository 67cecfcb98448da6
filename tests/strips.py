"""Strips of pictures that `ocd infer` draws, and what a picture has of values."""

import numpy as np
from PIL import Image

from stages.evaluation.pictures import CAPTION, GAP


def panes(folder, row, side, answer="test"):
    """The panes of a strip as they were before they were enlarged, (n, side, side, 3) uint8."""
    with Image.open(folder.run / "infer" / answer / "pictures" / f"{row:06d}.png") as image:
        pixels = np.asarray(image)
    times = (len(pixels) - CAPTION) // side
    count = (pixels.shape[1] + GAP) // (times * side + GAP)
    assert pixels.shape == (CAPTION + times * side, count * times * side + (count - 1) * GAP, 3)
    found = [pixels[CAPTION:, left : left + times * side] for left in range(0, pixels.shape[1], times * side + GAP)]
    for one in found:
        np.testing.assert_array_equal(one, one[::times, ::times].repeat(times, 0).repeat(times, 1))
    return np.stack([one[::times, ::times] for one in found])


def drawn(values):
    """As a picture has them."""
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
