"""View sampling and rendering: the crops and flips that teacher and student share.

A view is five integers in source pixels. It is drawn at the address (seed, row, view), stored in
the cache, and rendered by `render` for both. Views are sampled as by RandomResizedCrop
(Szegedy et al. 2015; torchvision), with the paper's numbers: area 0.2-1, ratio 3/4-4/3, bicubic,
flip 0.5.
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass

import google_crc32c
import numpy as np
from PIL import Image

from milan.core import rng
from milan.core.size import Size, as_size, height_width
from milan.errors import ConfigError
from milan.images.decode import decode_pixels
from milan.images.formats import open_picture
from milan.images.jpeg import decode_jpeg
from milan.images.resize import resize
from milan.images.samples import Bands

USUAL_RATIO = (3 / 4, 4 / 3)
"""Least and greatest width / height of a crop that becomes a square (torchvision's)."""
_TRIES = 10  # torchvision's; then the largest central crop inside the ratio limits


@dataclass(frozen=True)
class ViewSpec:
    """How views are sampled. Every field is part of a store's fingerprint."""

    size: Size = 224
    """Of a rendered view in pixels: the edge of a square, or (height, width)."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the image's area in a crop (MILAN, PRETRAIN.sh)."""
    ratio: tuple[float, float] = USUAL_RATIO
    """Least and greatest width / height of a crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    seed: int = 0
    bands: tuple[int, int, int] | None = None
    """Which channels of a file are red, green and blue, from 1; None: those of a picture."""
    band_range: tuple[float, float] | None = None
    """Which samples of the bands become 0 and 255."""

    def __post_init__(self) -> None:
        # As plain numbers, so that a spec read back from JSON equals the one written.
        object.__setattr__(self, "size", as_size(self.size))
        if self.bands is not None:
            object.__setattr__(self, "bands", tuple(int(n) for n in self.bands))
            given = tuple(float(x) for x in self.band_range or ())
            object.__setattr__(self, "band_range", given or None)
        object.__setattr__(self, "scale", tuple(float(s) for s in self.scale))
        object.__setattr__(self, "ratio", tuple(float(r) for r in self.ratio))
        object.__setattr__(self, "hflip", float(self.hflip))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"--scale {self.scale}", expected="0 < least <= greatest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"--ratio {self.ratio}", expected="0 < least <= greatest")
        if not 0 <= self.hflip <= 1:
            raise ConfigError(f"--hflip {self.hflip}", expected="a probability, 0 to 1")
        low, high = self.band_range or (0.0, 0.0)
        if self.bands and not low < high:
            raise ConfigError(
                f"--bands {' '.join(map(str, self.bands))} with --band-range "
                f"{' '.join(f'{x:g}' for x in self.band_range or ()) or 'not given'}",
                expected="two samples, of which the lower becomes 0 and the greater 255",
                fix="--band-range 0 3000; without one milan extract-targets measures a proposal",
            )
        if min(self.shape) < 1:
            raise ConfigError(f"view size {self.size}", expected="at least 1 pixel")

    def law(self) -> dict:
        """The spec as JSON: `view_law` of a store's spec, the rendering rules included."""
        fields = asdict(self)
        if self.bands is None:  # stores of pictures say nothing of bands
            del fields["bands"], fields["band_range"]
        return {**fields, "interpolation": "bicubic", "renderer": "pillow-crop-resize-1"}

    @classmethod
    def from_law(cls, law: dict) -> ViewSpec:
        """The spec of a stored `view_law`."""
        return cls(**{key: law[key] for key in ("size", "scale", "ratio", "hflip", "seed")},
                   bands=law.get("bands"), band_range=law.get("band_range"))  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of a rendered view in pixels."""
        return height_width(self.size)

    @property
    def colours(self) -> Bands | None:
        """How red, green and blue are made of a file's channels; None: as decode_pixels does."""
        return Bands(self.bands, *self.band_range) if self.bands and self.band_range else None

    def decode(self, data: bytes) -> np.ndarray:
        """The RGB pixels of an image, uint8 [H, W, 3], as the teacher sees them.

        Raises ImageFault as decode_pixels and Bands.pixels do.
        """
        return self.colours.pixels(data) if self.colours else decode_pixels(data)


def ratio_for(size: Size) -> tuple[float, float]:
    """The usual least and greatest width / height of a crop that becomes a view of `size`: it is
    squeezed or stretched by a third at most, as it is for a square."""
    height, width = height_width(size)
    low, high = USUAL_RATIO
    return low * width / height, high * width / height


@dataclass(frozen=True)
class View:
    """A crop in source pixels after EXIF orientation, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def numbers(self) -> tuple[int, int, int, int, int]:
        """The five integers a store keeps."""
        return (self.top, self.left, self.height, self.width, int(self.flip))

    @classmethod
    def of(cls, numbers: np.ndarray) -> View:
        """The view of five stored integers."""
        top, left, height, width, flip = (int(n) for n in numbers)
        return cls(top, left, height, width, bool(flip))


def view_of(spec: ViewSpec, row: int, *, view: int, height: int, width: int) -> View:
    """View `view` of the image in `row`, which is `height` x `width` pixels after orientation.

    A pure function: of (spec, row, view, size) and of nothing else. Follows torchvision's
    RandomResizedCrop.get_params draw for draw, except that the numbers come by address.
    """
    u = rng.uniforms(spec.seed, rng.VIEW, (row, view), 1 + 4 * _TRIES)
    flip = bool(u[0] < spec.hflip)
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for area_u, ratio_u, top_u, left_u in u[1:].reshape(_TRIES, 4).tolist():
        area = height * width * (spec.scale[0] + area_u * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(low + ratio_u * (high - low))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_u * (height - crop_height + 1))
            left = int(left_u * (width - crop_width + 1))
            return View(top, left, crop_height, crop_width, flip)
    crop_height, crop_width = height, width
    if width / height < spec.ratio[0]:
        crop_height = max(1, round(width / spec.ratio[0]))
    elif width / height > spec.ratio[1]:
        crop_width = max(1, round(height * spec.ratio[1]))
    return View(
        (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip
    )


def render(image: Image.Image | np.ndarray, view: View, *, size: Size) -> np.ndarray:
    """The pixels of a view: cropped, resized (bicubic, antialiased), mirrored; uint8 [H, W, 3].

    `image` as milan.images.decode gives it: an RGB image, or its pixels [H, W, 3] uint8.

    Crop first, then resize, as RandomResizedCrop does: Pillow's `box` argument would let the
    filter look past the crop's edge, at pixels that the view does not contain.
    """
    whole = np.asarray(image)
    crop = whole[view.top : view.top + view.height, view.left : view.left + view.width]
    resized = resize(crop, size, flip=view.flip)
    if resized is not None:
        return resized
    height, width = height_width(size)
    image = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if view.flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def pack(pixels: np.ndarray, how: str) -> bytes:
    """Rendered pixels [H, W, 3] uint8 as a picture: `jpeg:95` (lossy), or `webp` (lossless).

    The teacher is then given the unpacked picture, so that a replay is exact.
    """
    kind, _, quality = how.partition(":")
    sink = io.BytesIO()
    if kind == "jpeg":
        Image.fromarray(pixels).save(sink, "JPEG", quality=int(quality))
    else:
        Image.fromarray(pixels).save(sink, "WEBP", lossless=True, method=1)
    return sink.getvalue()


def unpack(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """The pixels [H, W, 3] uint8 of a stored view; in `out` if it has this shape and is contiguous.

    Raises ValueError if it is no picture.
    """
    pixels = decode_jpeg(data, out)
    if pixels is not None:
        return pixels
    try:
        return np.asarray(open_picture(data).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"a stored view cannot be decoded: {error}") from None


def checksum(pixels: np.ndarray) -> int:
    """crc32c of rendered pixels: equal if a view renders to the pixels that the teacher saw."""
    return google_crc32c.value(np.ascontiguousarray(pixels))


def centre_view(height: int, width: int, *, crop_share: float = 0.875, size: Size = 1) -> View:
    """The evaluation view: `crop_share` (224 of 256) of the largest central rectangle that has the
    shape of `size`; of a square the shorter edge of the image.
    """
    tall, wide = height_width(size)
    scale = min(height / tall, width / wide) * crop_share
    crop = [max(1, round(edge * scale)) for edge in (tall, wide)]
    return View((height - crop[0]) // 2, (width - crop[1]) // 2, crop[0], crop[1], False)
