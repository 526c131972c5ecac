"""The samples of a file as they are: any number of channels, of 8 bits, 16 bits or floats.

For students that see other channels than red, green and blue, and for teachers whose colours are
bands of a file. `milan.images.decode` makes 8-bit RGB of pictures; here nothing is scaled,
converted or dropped. TIFF is read by tifffile, an array file (.npy) by numpy, others by Pillow.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from milan.core.paths import answered
from milan.core.size import Size, height_width
from milan.errors import DataError, ImageFault
from milan.images.decode import (
    MAX_PIXELS,
    UPRIGHT,
    fault_of,
    is_deep_png,
    only_high_bytes,
    orientation_of,
    png_samples,
)
from milan.images.formats import open_picture
from milan.images.metadata import TiffPage

EXTENSIONS = (".npy", ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm")
"""Endings, in lower case, of files whose samples are read."""
INSTALL_TIFF = "pip install 'milan-pretrain[tiff]'"
_NUMPY = b"\x93NUMPY"
_MAX_BYTES = 2**32  # of a file's samples: MAX_PIXELS of a dozen 16-bit bands
_SAMPLES = 100_000  # of a file that percentiles are taken of
_CHANNEL_AXES = "SCQI"  # of tifffile: samples, channels, pages without a name, pages of a sequence


def read_samples(data: bytes) -> np.ndarray:
    """The samples of a picture or array file, upright: [H, W, C] in their own type.

    Integers of any size, or floats; all finite. A TIFF may have its channels in pixels, in planes
    or in pages (not those of a stack in depth or time). Raises ImageFault with one of the reasons:
    empty, not-an-image, unsupported, truncated, too-large, multi-page, not-finite, unreadable;
    MachineError if memory runs out.
    """
    if not data:
        raise ImageFault("empty", "0 bytes")
    return answered(f"an image of {len(data):,} bytes", lambda: _read(data))


def _read(data: bytes) -> np.ndarray:
    try:
        if data.startswith(_NUMPY):
            samples = _of_array(data)
        elif TiffPage.first(data):
            samples = _of_tiff(data)
        else:
            samples = _of_picture(data)
    except ImageFault:
        raise
    except Exception as error:
        fault = fault_of(data, error)
        if fault.reason == "unsupported":  # of a format that is read here
            fault = ImageFault("unreadable", f"{type(error).__name__}: {error}")
        raise fault from None
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise ImageFault("not-finite", f"{bad:,} of {samples.size:,} samples are NaN or infinite")
    return samples


def _of_array(data: bytes) -> np.ndarray:
    version = np.lib.format.read_magic(file := io.BytesIO(data))
    head = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
        np.lib.format.read_array_header_2_0
    )  # fmt: skip
    shape, _, dtype = head(file)
    _check(shape, dtype)
    if len(data) < file.tell() + int(np.prod(shape)) * dtype.itemsize:
        raise ImageFault("truncated", f"an array {list(shape)} of {dtype} needs more bytes")
    samples = np.load(io.BytesIO(data), allow_pickle=False)
    return samples[..., None] if samples.ndim == 2 else samples


def _of_tiff(data: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise ImageFault("unsupported", f"a TIFF's samples need tifffile: {INSTALL_TIFF}") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says is raised here
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        # Axes of length 1 say nothing.
        axes = zip(series.axes, series.shape, strict=True)
        kept = [(axis, length) for axis, length in axes if length > 1 or axis in "YX"]
        channels = [i for i, (axis, _) in enumerate(kept) if axis not in "YX"]
        known = all(kept[i][0] in _CHANNEL_AXES for i in channels[:1])
        if len(file.series) > 1 or len(channels) > 1 or not known:
            raise ImageFault(
                "multi-page", f"a TIFF of axes {series.axes}, {list(series.shape)}, in "
                f"{len(file.series)} series; expected one of channels"
            )  # fmt: skip
        count = kept[channels[0]][1] if channels else 1
        _check((*(length for axis, length in kept if axis in "YX"), count), series.dtype)
        end = max((o + n for page in series.pages for o, n in _segments(page)), default=0)
        if end > len(data) or (file.imagej_metadata or {}).get("images", 1) > max(1, count):
            raise ImageFault("truncated", f"{len(data):,} bytes, of which pixels need more")
        turned = getattr(series.pages[0], "tags", {}).get("Orientation")
        try:
            samples = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise ImageFault("unsupported", f"a compression; {INSTALL_TIFF}") from None
    samples = samples.reshape([length for _, length in kept])
    samples = np.moveaxis(samples, channels[0], -1) if channels else samples[..., None]
    upright = UPRIGHT.get(turned.value if turned else 1)
    return upright(samples) if upright else samples


def _segments(page: object) -> Iterable[tuple[int, int]]:
    """(first byte, bytes) of each strip or tile of a page."""
    return zip(page.dataoffsets, page.databytecounts, strict=False)  # type: ignore[attr-defined]


def _of_picture(data: bytes) -> np.ndarray:
    image = open_picture(data)
    if image.width * image.height > MAX_PIXELS:
        raise ImageFault("too-large", f"{image.width} x {image.height}, limit {MAX_PIXELS:,}")
    if (pages := getattr(image, "n_frames", 1)) > 1 and image.format not in ("MPO", "HEIF"):
        raise ImageFault("multi-page", f"{pages} pages in a {image.format} file")
    if only_high_bytes(image):
        raise ImageFault(
            "unreadable", f"16-bit colour in a {image.format}, of which Pillow keeps 8"
        )
    upright = UPRIGHT.get(orientation_of(image))
    image.load()
    if is_deep_png(data):
        samples = png_samples(data)
    elif image.mode in ("1", "P", "PA", "La"):
        samples = np.asarray(image.convert({"1": "L", "La": "LA"}.get(image.mode, "RGB")))
    else:
        samples = np.asarray(image)
    samples = samples[..., None] if samples.ndim == 2 else samples
    return upright(samples) if upright else samples


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ImageFault for what is no array of samples, or a very large one."""
    if dtype.kind not in "uifb" or len(shape) not in (2, 3) or 0 in shape:
        raise ImageFault("unsupported", f"an array {list(shape)} of {dtype}; expected [height, "
                         "width] or [height, width, channels] of numbers")  # fmt: skip
    if (size := int(np.prod(shape)) * dtype.itemsize) > _MAX_BYTES:
        raise ImageFault("too-large", f"{size:,} bytes of samples, limit {_MAX_BYTES:,}")


@dataclass(frozen=True)
class Bands:
    """Which channels of a file are red, green and blue, and which samples become 0 and 255."""

    numbers: tuple[int, int, int]
    """From 1, as satellites' bands are counted."""
    low: float
    high: float

    def pixels(self, data: bytes) -> np.ndarray:
        """RGB of a file, uint8 [H, W, 3]: round(255 (x - low) / (high - low)), within 0..255.

        The same for every image: nothing is measured on one. Raises ImageFault as read_samples, and
        for a file with fewer channels.
        """
        samples = pick(read_samples(data), self.numbers).astype(np.float32)
        scaled = (samples - np.float32(self.low)) * np.float32(255 / (self.high - self.low))
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def pick(samples: np.ndarray, numbers: tuple[int, ...]) -> np.ndarray:
    """Channels of [H, W, C] by number from 1: [H, W, n]. Raises ImageFault for one it lacks."""
    count = samples.shape[2]
    if max(numbers) > count:
        raise ImageFault("channels", f"{count} channels, no number {max(numbers)}")
    return samples[..., [number - 1 for number in numbers]]


def percentiles(files: Iterable[bytes], numbers: tuple[int, ...]) -> tuple[float, float, int]:
    """(percentile 2, percentile 98) of the samples of these channels, and of how many files.

    Files without them are left out. Raises DataError if none is left, with the first's reason.
    """
    sampled, why = list[np.ndarray](), ""
    for data in files:
        try:
            samples = pick(read_samples(data), numbers).reshape(-1)
            sampled.append(samples[:: max(1, samples.size // _SAMPLES)].astype(np.float64))
        except ImageFault as fault:
            why = why or str(fault)
    if not sampled:
        raise DataError(
            f"no file has channels {', '.join(map(str, numbers))}: {why or 'none can be read'}",
            expected="TIFFs (or arrays) of several channels, counted from 1",
        )
    low, high = np.percentile(np.concatenate(sampled), (2, 98))
    return float(low), float(max(high, low + 1)), len(sampled)


def resize_samples(samples: np.ndarray, size: Size, *, flip: bool) -> np.ndarray:
    """Samples [h, w, C] of any type as float32 [C, H, W], mirrored with `flip`.

    By the filter that resizes a teacher's view (Pillow's bicubic, antialiased), each channel by
    itself; computed in float64, neither rounded nor cut to a range.
    """
    height, width = height_width(size)
    out = np.empty((samples.shape[2], height, width), np.float32)
    for channel, into in enumerate(out):
        plane = Image.fromarray(np.ascontiguousarray(samples[..., channel], np.float32))
        resized = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
        into[:] = resized[:, ::-1] if flip else resized
    return out
