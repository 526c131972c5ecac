"""Pillow's bilinear filter for pixels and for channels of floats alike: what segmenters and
detectors see, in training as in use. Views are resized by the law of views, which is bicubic
(milan.images.views).
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def bilinear(
    pixels: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """The part `box` (left, top, right, bottom; default: all) at `size`, (height, width).

    uint8 [H, W, 3], or float32 [H, W, C], of which each channel is resized by itself; antialiased.
    The result is of the same kind.
    """
    height, width = size
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)
    out = np.empty((height, width, pixels.shape[2]), np.float32)
    for channel in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., channel], np.float32))
        resized = plane.resize((width, height), Image.Resampling.BILINEAR, box=box)
        out[..., channel] = np.asarray(resized)
    return out
