"""JPEGs decoded without Pillow have Pillow's pixels; what is rare or damaged is left to it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan.errors import ImageFault
from milan.images import jpeg
from milan.images.decode import decode_pixels
from milan.images.jpeg import decode_jpeg


def picture(height: int, width: int) -> Image.Image:
    """Edges, ramps and noise."""
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
    pixels[: height // 2] += (np.arange(width) * 190 // width).astype(np.uint8)[:, None]
    pixels[height // 3, :, 0] = 255
    return Image.fromarray(pixels)


def saved(image: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", **options)
    return sink.getvalue()


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(picture(33, 50), exif=exif)


WHOLE = saved(picture(90, 121), quality=90)
MIDDLE = len(WHOLE) // 2
CASES: dict[str, tuple[bytes, bool]] = {
    **{
        f"{subsampling} {quality} {size}": (
            saved(picture(*size), subsampling=subsampling, quality=quality), True
        )
        for subsampling in ("4:4:4", "4:2:2", "4:2:0")
        for quality in (30, 95)
        for size in ((1, 1), (17, 3), (64, 48), (91, 133))
    },
    "progressive": (saved(picture(70, 51), progressive=True), True),
    "restarts": (saved(picture(70, 51), restart_marker_rows=1), True),
    "bytes after the end": (WHOLE + b"more", True),
    **{f"orientation {n}": (oriented(n), True) for n in range(1, 9)},
    "grey": (saved(picture(40, 41).convert("L")), False),
    "CMYK": (saved(picture(40, 41).convert("CMYK")), False),
    "RGB": (saved(picture(40, 41), keep_rgb=True), False),
    "damaged": (WHOLE[:MIDDLE] + bytes(40) + WHOLE[MIDDLE + 40 :], False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_pixels_are_pillows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind; and a common kind is not left to Pillow."""
    data, fast = CASES[case]
    assert (decode_jpeg(data) is not None) == fast
    ours = decode_pixels(data)
    monkeypatch.setattr(jpeg, "_is_pillows", lambda: False)
    assert np.array_equal(ours, decode_pixels(data))
    assert (ours.dtype, ours.ndim) == (np.uint8, 3)


@pytest.mark.parametrize("end", [MIDDLE, -2])
def test_a_cut_picture_is_refused(end: int) -> None:
    """As truncated, by Pillow."""
    with pytest.raises(ImageFault, match="truncated"):
        decode_pixels(WHOLE[:end])


def test_into_an_array() -> None:
    """Its own memory is used if it has the picture's shape, and no other memory is touched."""
    out = np.zeros((2, 90, 121, 3), np.uint8)
    pixels = decode_jpeg(WHOLE, out[0])
    assert pixels is not None
    assert np.may_share_memory(pixels, out)
    assert np.array_equal(out[0], decode_pixels(WHOLE))
    assert not out[1].any()
    small = np.zeros((90, 120, 3), np.uint8)
    assert not np.may_share_memory(decode_jpeg(WHOLE, small), small)
    assert not small.any()


def test_another_library_in_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the two differ in one value of one kind, Pillow decodes everything."""
    opened = jpeg.open_picture

    def differs(data: bytes) -> np.ndarray:
        pixels = np.array(opened(data))
        if b"\xff\xc2" in data:  # a progressive one
            pixels[3, 5, 1] ^= 1
        return pixels

    jpeg._is_pillows.cache_clear()
    monkeypatch.setattr(jpeg, "open_picture", differs)
    assert decode_jpeg(WHOLE) is None
    monkeypatch.undo()
    jpeg._is_pillows.cache_clear()
    assert decode_jpeg(WHOLE) is not None
