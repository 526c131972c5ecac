"""JPEGs decoded by libjpeg-turbo alone, without Pillow around it: the same pixels in less time.

Pillow's pixels are the law. Both are libjpeg-turbo, but a build of Pillow may have another library.
So a process decodes a few pictures of its own both ways before the first one, and where these
differ, Pillow decodes everything. It also decodes what is rare (other colours than YCbCr, unusual
subsampling) and what is damaged, for it defines what is made of that.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image

from milan.images.formats import open_picture

_SUBSAMPLINGS = ("444", "422", "420")  # those that Pillow writes, so that they can be compared
_PROBE = (45, 67)  # height, width: no multiples of a block


def decode_jpeg(data: bytes, out: np.ndarray | None = None) -> np.ndarray | None:
    """The pixels [H, W, 3] uint8 of a JPEG, as Pillow's; None where Pillow has to decode it.

    They are written to `out`, C-contiguous uint8, if it has their shape. EXIF is not looked at.
    """
    return _decode(data, out) if _is_pillows() else None


def _decode(data: bytes, out: np.ndarray | None = None) -> np.ndarray | None:
    try:
        height, width, colours, subsampling = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or subsampling not in _SUBSAMPLINGS:
            return None
        if out is not None and out.shape != (height, width, 3):
            out = None
        return simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError:  # no JPEG, or a damaged one: warnings count too
        return None


@cache
def _is_pillows() -> bool:
    """Whether both decode pictures of each kind to the same pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (*_PROBE, 3), np.uint8)
    smooth = np.add.outer(np.arange(_PROBE[0]) * 3, np.arange(_PROBE[1] * 3)).astype(np.uint8)
    for pixels in (noise, smooth.reshape(noise.shape)):
        for subsampling in _SUBSAMPLINGS:
            for options in ({"quality": 95}, {"quality": 40, "progressive": True}):
                sink = io.BytesIO()
                how = ":".join(subsampling)
                Image.fromarray(pixels).save(sink, "JPEG", subsampling=how, **options)
                ours = _decode(sink.getvalue())
                if ours is None or not np.array_equal(
                    ours, np.asarray(open_picture(sink.getvalue()))
                ):
                    return False
    return True
