"""Decode bytes to upright RGB pixels, or raise ImageFault with a reason.

The rules, the same for teacher and student:
- Formats are a list of those that are pictures (milan.images.formats), whatever a name says.
- EXIF orientation is applied; sizes and crops are in oriented pixels. Metadata that are damaged
  say nothing about the pixels: the picture is then taken without them.
- Palette, grey, CMYK and 8-bit modes are converted to RGB by Pillow. An alpha channel is dropped,
  as torchvision's ImageFolder does.
- 16-bit samples are scaled by the least of 8, 10, 12, 14 or 16 bits that fits the image's largest
  sample, so that a 12-bit picture in a 16-bit PNG is neither a white nor a black square. Samples
  that are fractions up to 1 are scaled by 1. Where white is zero, the high eight bits are inverted:
  the pixels are those of the same picture in 8 bits.
- Pillow reads only the high bytes of 16-bit colour in TIFF and PPM: one that uses no more than 14
  bits is refused, for it would come out dark.
- Files of several pages (animations, multi-page TIFF) are refused. MPO, the JPEG of many phones,
  has one photograph and previews of it: the first picture is used; of HEIC the primary one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan.core.paths import answered
from milan.errors import ImageFault
from milan.images.formats import kind_of, open_picture
from milan.images.jpeg import decode_jpeg
from milan.images.metadata import PHOTOMETRIC, TiffPage, pixels_only

MAX_PIXELS = 178_956_970
"""An image with more pixels is refused as a decompression bomb (Pillow's limit, 1/2 GiB of RGB)."""

_DEPTHS = (8, 10, 12, 14, 16)
_SUBFILE_TYPE, _SUB_PAGES, _SAMPLE_FORMAT, _DNG_VERSION = 254, 330, 339, 50706  # tags of TIFF
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""EXIF orientation -> what turns the picture upright (EXIF 2.3, tag 0x0112)."""

# Pillow warns between half its limit and its limit; only the limit counts here. Its other warnings
# are of damaged metadata.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def decode(data: bytes) -> Image.Image:
    """The picture in `data` as an image of Pillow, mode RGB. Raises as decode_pixels does."""
    return Image.fromarray(decode_pixels(data))


def decode_pixels(data: bytes) -> np.ndarray:
    """The pixels of the picture in `data`, oriented; RGB, uint8 [H, W, 3].

    Raises ImageFault with one of the reasons: empty, not-an-image, unsupported (of a format that is
    not read), truncated, too-large, multi-page, unreadable; MachineError if memory runs out, which
    is not the image's fault.
    """
    if not data:
        raise ImageFault("empty", "0 bytes")
    return answered(f"an image of {len(data):,} bytes", lambda: _decode_any(data))


def _decode_any(data: bytes) -> np.ndarray:
    try:
        return _decode(data)
    except ImageFault:
        raise
    except Exception as error:
        fault = fault_of(data, error)
    if fault.reason not in ("truncated", "too-large"):
        for variant, white_is_zero in _variants(data):
            try:
                return _decode(variant, white_is_zero=white_is_zero)
            except Exception as error:
                fault_of(variant, error)
    raise fault


def fault_of(data: bytes, error: Exception) -> ImageFault:
    """What is wrong with an image that cannot be decoded. Raises errors of the machine."""
    # Decoders meet hostile bytes with any exception at all (SyntaxError, struct.error, zlib.error
    # ...), and a bad image must never end a run. But what the system says is about the system.
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
        raise error
    if isinstance(error, ImageFault):
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageFault("too-large", str(error))
    if kind := kind_of(data):
        return ImageFault("unsupported", kind)
    page = TiffPage.first(data)
    if isinstance(error, UnidentifiedImageError):
        if page and page.pages():
            return ImageFault("unsupported", f"TIFF of {page.samples()}, which Pillow cannot read; "
                "extract-targets --bands R G B takes three of its channels")  # fmt: skip
        return ImageFault("not-an-image", f"begins with {data[:8]!r}")
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return ImageFault(reason, f"{type(error).__name__}: {error}")


def _variants(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Files with the same pixels for Pillow to try, and whether their white is zero."""
    if (bare := pixels_only(data)) is not None:
        yield bare, False
    # Pillow reads white as zero in fewer byte orders and depths than black.
    page = TiffPage.first(data)
    if page and page.value(PHOTOMETRIC, 0) == 0:
        yield page.alone(photometric=1), True


def _decode(data: bytes, *, white_is_zero: bool = False) -> np.ndarray:
    page = TiffPage.first(data)
    if page:
        _check_pages(page)
    image = open_picture(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageFault("too-large", f"{width} x {height} pixels, limit {MAX_PIXELS:,}")
    pages = 1 if page else getattr(image, "n_frames", 1)
    if pages > 1 and image.format not in ("MPO", "HEIF"):
        raise ImageFault("multi-page", f"{pages} pages in a {image.format} file")
    pixels = decode_jpeg(data) if image.format in ("JPEG", "MPO") and image.mode == "RGB" else None
    if pixels is None or pixels.shape[:2] != (height, width):
        pixels = _pixels_of(image, data, page, white_is_zero)
    upright = UPRIGHT.get(orientation_of(image))
    return upright(pixels) if upright else pixels


def _pixels_of(
    image: Image.Image, data: bytes, page: TiffPage | None, white_is_zero: bool
) -> np.ndarray:
    """Pillow's pixels of an image, [H, W, 3] uint8; TIFFs are turned upright by Pillow."""
    high_bytes = only_high_bytes(image)
    image.load()
    if is_deep_png(data):
        samples = png_samples(data)
        return _eight_bits(samples[..., :3] if samples.shape[-1] >= 3 else samples[..., 0])
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        samples = np.asarray(image)
        if page and image.mode == "I" and page.value(_SAMPLE_FORMAT, 1) == 1:
            samples = samples.view(np.uint32)  # Pillow has no mode for them
        # Pillow inverts what has 8 bits or less.
        white_is_zero |= page is not None and page.value(PHOTOMETRIC, 0) == 0
        return _eight_bits(samples, white_is_zero=white_is_zero)
    if high_bytes and np.asarray(image)[..., :high_bytes].max() < 64:
        raise ImageFault("unreadable", f"16-bit colour in a {image.format} that uses at most 14")
    if image.mode == "P" and "transparency" in image.info:
        return np.asarray(image.convert("RGBA").convert("RGB"))
    image = image.convert("LA") if image.mode == "La" else image
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return 255 - pixels if white_is_zero else pixels


def _check_pages(page: TiffPage) -> None:
    """Raises ImageFault unless a TIFF is one picture."""
    # A raw's first page is a small preview, in which Pillow sees a picture.
    preview = page.value(_SUBFILE_TYPE, 0) & 1 and _SUB_PAGES in page.tags()
    if preview or _DNG_VERSION in page.tags() or page.data[8:10] == b"CR":
        raise ImageFault("unsupported", "camera raw in a TIFF")
    if (pages := page.pages()) > 1:
        raise ImageFault("multi-page", f"{pages} pages in a TIFF file")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on height and width change places."""
    try:
        return image.getexif().get(0x0112, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF: any
        return 1


def is_deep_png(data: bytes) -> bool:
    """Whether data are a PNG of 16 bits: of one in colour Pillow keeps only the high bytes."""
    # Byte 24 of the file is the bit depth.
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 25 and data[24] == 16


def only_high_bytes(image: Image.Image) -> int:
    """Of how many channels Pillow keeps the high byte of 16 bits; 0: of none."""
    if not image.mode.startswith(("RGB", "CMYK")):
        return 0
    channels = 4 if image.mode == "CMYK" else 3
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # BitsPerSample: a number, or one a channel
    if image.format == "PPM" and (tile := getattr(image, "tile", None)):
        args = tile[0][3]
        bits = 16 if isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255 else 8
    return channels if 16 in np.atleast_1d(bits) else 0


def png_samples(data: bytes) -> np.ndarray:
    """The samples of a PNG as they are, alpha too: [H, W, C], of 16 bits where it has them."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_png(buffer, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()


def _eight_bits(samples: np.ndarray, *, white_is_zero: bool = False) -> np.ndarray:
    """Samples of more than 8 bits ([H, W] or [H, W, 3]) as [H, W, 3] uint8, by the stated rule."""
    peak = samples.max(initial=0)
    if not np.isfinite(samples).all():
        raise ImageFault("unreadable", "samples that are not finite")
    depth = next((d for d in _DEPTHS if peak <= 2**d - 1), None)
    top = float(peak) if depth is None else float(2**depth - 1)
    if samples.dtype.kind == "f" and peak <= 1:
        top = 1.0
    flat, scaled = samples.reshape(-1), np.empty(samples.shape, np.uint8)
    # In pieces: float64 copies of the largest picture allowed would take 5 GB.
    for at in range(0, flat.size, 1 << 22):
        piece = np.clip(flat[at : at + (1 << 22)].astype(np.float64), 0, None)
        if white_is_zero:  # the high bits, inverted: what the same picture has in 8 bits
            eight = 255 - np.minimum(np.floor(piece * (256.0 / (top + (top > 1)))), 255)
        else:
            eight = np.rint(piece * (255.0 / top))
        scaled.reshape(-1)[at : at + (1 << 22)] = eight
    return scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)


def content_digest(data: bytes) -> str:
    """The checksum that names an image's bytes in a record: BLAKE2b, 128 bits, hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
