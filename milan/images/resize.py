"""Pillow's bicubic resize of RGB pixels, compiled for vectors: the same values in a third of the
time.

Pillow's pixels are the law. An output is a sum of inputs, the cubic's weights (Keys 1981, a = -0.5)
scaled to a sum of 1 and rounded to 22 bits, and the sum rounded to 8 bits; so for columns, and then
for rows. So results are integers, and equal or not. A process compares some with Pillow's before
the first, and the weights of every size before they are used. Where one differs, or the C beside
this file was not compiled when milan was installed, Pillow resizes.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from milan.core.size import Size, height_width

_BITS = 22
_RULES = (
    lambda rows, columns: rows[0] > rows[1] and rows[0] - rows[1] > 2 * (columns[0] - columns[1]),
    lambda rows, columns: False,
)
"""Whether rows come first, of (rows, columns) before and after each: since Pillow 13 where that
takes less time, before never."""
_SHAPES: tuple[tuple[int, int, Size], ...] = (
    (9, 31, 8), (31, 9, 8), (40, 22, 8), (40, 26, 8), (5, 3, 16), (17, 30, 16), (30, 17, 16),
    (40, 22, (12, 8)), (40, 22, (24, 8)), (22, 40, (8, 30)),
)  # fmt: skip
"""Height, width and wanted size of the pictures that are compared."""


def resize(pixels: np.ndarray, size: Size, *, flip: bool = False) -> np.ndarray | None:
    """Pixels [h, w, 3] uint8 resized to [H, W, 3], and mirrored with `flip`.

    As Pillow's; None where Pillow has to do it. Raises MemoryError.
    """
    rule = _rule()
    if rule is None or pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        return None
    (height, width), (tall, wide) = pixels.shape[:2], height_width(size)
    x, y = _tried(width, wide, flip), _tried(height, tall, False)
    if x is None or y is None:
        return None
    return _run(pixels, x, y, _RULES[rule]((height, tall), (width, wide)))


class _Pass(ctypes.Structure):
    """`pass` of resize.c."""

    _fields_ = (
        ("inputs", ctypes.c_int32), ("outputs", ctypes.c_int32), ("taps", ctypes.c_int32),
        ("first", ctypes.c_void_p), ("weights", ctypes.c_void_p),
    )  # fmt: skip


class _Weights(NamedTuple):
    """Those of one direction."""

    described: _Pass
    arrays: tuple[np.ndarray, np.ndarray]
    """Which `described` points to."""


@cache
def _library() -> Any:
    try:
        spec = find_spec("milan.images._resize")
        library = ctypes.CDLL(spec.origin or "") if spec else None
    except OSError:
        return None
    if library:
        pointer = ctypes.c_void_p
        library.milan_resize.argtypes = [
            pointer, ctypes.c_ssize_t, pointer, pointer, ctypes.c_int, pointer
        ]  # fmt: skip
    return library


def _run(pixels: np.ndarray, x: _Weights, y: _Weights, rows_first: bool) -> np.ndarray:
    if pixels.strides[1:] != (3, 1):
        pixels = np.ascontiguousarray(pixels)
    out = np.empty((y.described.outputs, x.described.outputs, 3), np.uint8)
    if _library().milan_resize(
        pixels.ctypes.data, pixels.strides[0], ctypes.byref(x.described), ctypes.byref(y.described),
        rows_first, out.ctypes.data,
    ):  # fmt: skip
        raise MemoryError(f"no memory to resize {pixels.shape[0]:,} x {pixels.shape[1]:,} pixels")
    return out


def _weights(inputs: int, outputs: int, flip: bool = False) -> _Weights:
    scale = inputs / outputs
    wide = max(scale, 1.0)  # the filter of a smaller picture is wider: antialiasing
    centres = (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centres - 2 * wide + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + 2 * wide + 0.5).astype(np.int64), inputs)
    taps = int((last - first).max())
    first = np.minimum(first, inputs - taps)  # as many for each output, some of weight 0
    indices = first[:, None] + np.arange(taps)
    x = np.abs((indices - centres[:, None] + 0.5) * (1 / wide))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    total = np.zeros(outputs)
    for tap in range(taps):  # in this order: the last bits count
        total += weights[:, tap]
    weights = weights / total[:, None] * (1 << _BITS)
    whole = np.trunc(weights + np.where(weights < 0, -0.5, 0.5))
    turn = slice(None, None, -1 if flip else 1)
    arrays = tuple(np.ascontiguousarray(a[turn], np.int32) for a in (first, whole))
    pointers = (array.ctypes.data for array in arrays)
    return _Weights(_Pass(inputs, outputs, taps, *pointers), (arrays[0], arrays[1]))


@lru_cache(maxsize=512)
def _tried(inputs: int, outputs: int, flip: bool) -> _Weights | None:
    """Weights that were compared with Pillow's on a few rows of noise; None if they differ."""
    noise = np.random.default_rng(inputs).integers(0, 256, (4, inputs, 3), np.uint8)
    weights = _weights(inputs, outputs, flip)
    ours = _run(noise, weights, _weights(4, 4), False)
    pillows = np.asarray(Image.fromarray(noise).resize((outputs, 4), Image.Resampling.BICUBIC))
    return weights if np.array_equal(ours, pillows[:, ::-1] if flip else pillows) else None


@cache
def _rule() -> int | None:
    """Which of _RULES this Pillow follows; None: none of them, or there is no C."""
    rng = np.random.default_rng(0)
    for number, rule in enumerate(_RULES if _library() else ()):
        for height, width, size in _SHAPES:
            noise = rng.integers(0, 256, (height, width, 3), np.uint8)
            tall, wide = height_width(size)
            x, y = _weights(width, wide), _weights(height, tall)
            ours = _run(noise, x, y, rule((height, tall), (width, wide)))
            pillows = Image.fromarray(noise).resize((wide, tall), Image.Resampling.BICUBIC)
            if not np.array_equal(ours, np.asarray(pillows)):
                break
        else:
            return number
    return None
