"""Decode bytes to an upright RGB image, or raise ImageFault with a reason.

The rules, the same for teacher and student:
- EXIF orientation is applied; sizes and crops are in oriented pixels.
- Palette, grey, CMYK and 8-bit modes are converted to RGB by Pillow. An alpha channel is dropped,
  as torchvision's ImageFolder does.
- 16-bit samples are scaled by the least of 8, 10, 12, 14 or 16 bits that fits the image's largest
  sample, so that a 12-bit picture in a 16-bit PNG is neither a white nor a black square. Samples
  that are fractions up to 1 are scaled by 1. Pillow reads only the high bytes of 16-bit colour
  TIFFs: one that uses no more than 14 bits is refused, for it would come out dark.
- Files of several pages (animations, multi-page TIFF) are refused. MPO, the JPEG of many phones,
  has one photograph and previews of it: the first picture is used.
"""

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan.errors import ImageFault

MAX_PIXELS = 178_956_970
"""An image with more pixels is refused as a decompression bomb (Pillow's limit, 1/2 GiB of RGB)."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_DEPTHS = (8, 10, 12, 14, 16)
_UPRIGHT = {  # EXIF orientation -> what turns the picture upright (EXIF 2.3, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns between half its limit and its limit; only the limit counts here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes) -> Image.Image:
    """The picture in `data`, oriented, mode RGB, fully loaded.

    Raises ImageFault with one of the reasons: empty, not-an-image, truncated, too-large,
    multi-page, unreadable.
    """
    if not data:
        raise ImageFault("empty", "0 bytes")
    try:
        return _decode(data)
    except ImageFault:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFault("too-large", str(error)) from None
    except UnidentifiedImageError:
        raise ImageFault("not-an-image", f"begins with {data[:8]!r}") from None
    except MemoryError:
        raise
    except Exception as error:
        # The one broad catch: decoders meet hostile bytes with any exception at all (SyntaxError,
        # struct.error, zlib.error ...), and a bad image must never end a run.
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise ImageFault(reason, f"{type(error).__name__}: {error}") from None


def _decode(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageFault("too-large", f"{width} x {height} pixels, limit {MAX_PIXELS:,}")
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":
        raise ImageFault("multi-page", f"{pages} pages in a {image.format} file")
    # Loaded first: Pillow turns TIFFs upright by itself, and then takes the tag away.
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    if _deep_png(data):
        image = _eight_bits(_png_samples(data))
    elif image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        image = _eight_bits(np.asarray(image))
    elif _deep_tiff(image) and np.asarray(image)[..., :3].max() < 64:
        raise ImageFault("unreadable", "a colour TIFF of 16 bits that uses at most 14 of them")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA").convert("RGB")
    else:
        image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image


def _deep_png(data: bytes) -> bool:
    # Pillow keeps only the high byte of 16-bit colour PNGs; byte 24 of the file is the bit depth.
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 25 and data[24] == 16


def _deep_tiff(image: Image.Image) -> bool:
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # BitsPerSample: a number, or one a channel
    return image.mode.startswith("RGB") and 16 in np.atleast_1d(bits)


def _png_samples(data: bytes) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    samples = decode_png(buffer, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return samples[..., :3] if samples.shape[-1] >= 3 else samples[..., 0]


def _eight_bits(samples: np.ndarray) -> Image.Image:
    """Samples of more than 8 bits ([H, W] or [H, W, 3]) as an RGB image, by the stated rule."""
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
        scaled.reshape(-1)[at : at + (1 << 22)] = np.rint(piece * (255.0 / top))
    return Image.fromarray(scaled).convert("RGB")


def content_digest(data: bytes) -> str:
    """The checksum that names an image's bytes in a record: BLAKE2b, 128 bits, hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
