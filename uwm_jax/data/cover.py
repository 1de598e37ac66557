"""Frames of another size than the model's or the dataset's."""

from __future__ import annotations

import numpy as np
from PIL import Image


def cover(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame (h, w, 3) uint8 resized to cover `size` (height, width) with its shape kept, cropped in the centre.

    The official rule for web video: scale by the larger of the two ratios, both sides rounded up. The resampling is
    bilinear and antialiased.
    """
    height, width = frame.shape[:2]
    if (height, width) == size:
        return frame
    # In whole numbers: a ratio in floating point may round a side that fits exactly up by one.
    if size[0] * width >= size[1] * height:
        new = size[0], -(-width * size[0] // height)
    else:
        new = -(-height * size[1] // width), size[1]
    resized = np.asarray(Image.fromarray(frame).resize(new[::-1], Image.Resampling.BILINEAR))
    top, left = (new[0] - size[0]) // 2, (new[1] - size[1]) // 2
    return resized[top : top + size[0], left : left + size[1]]
