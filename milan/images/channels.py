"""What a student sees that is not, or not only, the teacher's red, green and blue.

The teacher's view and the student's are the same crop, resized by the same filter and mirrored
alike; the student's is of other channels, of the image's own file or of one beside it. Values are
never squeezed to 8 bits: they are (x - mean) / std of the file's samples, float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from milan.core.device import MEAN, STD
from milan.core.size import Size
from milan.errors import ConfigError, ImageFault
from milan.images.decode import decode_pixels
from milan.images.samples import Bands, pick, read_samples, resize_samples
from milan.images.views import View, ViewSpec, centre_view, render

RGB = "rgb"
"""The word for the view's own three colours, as the teacher sees them."""
_MOST = 1024
_PART = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Channels:
    """The channels of a student, in order, and how they become its input."""

    spelled: str
    """As --student-channels has them: rgb,1,4-6."""
    paired: bool = False
    """Whether numbers are those of a file beside the image, or of the image's own."""
    mean: tuple[float, ...] = ()
    """Of each channel, in the unit of the file's samples; empty: not measured yet."""
    std: tuple[float, ...] = ()
    """Of each channel, > 0."""
    bands: Bands | None = None
    """How the colours are made of a file of more channels; None: as pictures have them."""

    @classmethod
    def parse(cls, text: str, *, paired: bool, law: ViewSpec | None = None) -> Channels:
        """Channels as a person writes them. Raises ConfigError."""
        channels = cls(text.replace(" ", "").lower(), paired, bands=law.colours if law else None)
        numbers = channels.numbers
        if not numbers or len(set(numbers)) < len(numbers) or len(numbers) > _MOST:
            raise ConfigError(
                f"student_channels {text!r}",
                expected=f"each channel once, and others than {RGB} alone, which all students see "
                "without this setting",
                fix=f"--student-channels {RGB},1",
            )
        return channels

    @property
    def colours(self) -> bool:
        """Whether the first three are the view's colours."""
        return self.spelled.split(",")[0] == RGB

    @property
    def numbers(self) -> tuple[int, ...]:
        """The others, by number from 1. Raises ConfigError for what are none."""
        numbers = list[int]()
        parts = self.spelled.split(",")[self.colours :]
        for part in parts:
            match = _PART.fullmatch(part)
            first, last = (int(n or match[1]) for n in match.groups()) if match else (0, 0)
            if not 1 <= first <= last <= first + _MOST:
                raise ConfigError(
                    f"student_channels {self.spelled!r}: {part!r}",
                    expected=f"numbers from 1, and ranges, with commas between; {RGB} before them "
                    "for the image's own colours",
                    fix=f"--student-channels 1-13, or {RGB},1",
                )
            numbers += range(first, last + 1)
        return tuple(numbers)

    @property
    def count(self) -> int:
        """C."""
        return 3 * self.colours + len(self.numbers)

    def measured(self, mean: np.ndarray, std: np.ndarray) -> Channels:
        """With mean and deviation of the numbered channels, each [n] float64.

        Colours have ImageNet's, as for every student of RGB. Raises ConfigError for one that is
        constant.
        """
        for number, m, s in zip(self.numbers, mean, std, strict=True):
            if not s > 1e-6 * max(1e-3, abs(m)):
                raise ConfigError(
                    f"channel {number} is {m:g} everywhere, in all images that were looked at",
                    expected="channels that vary: this one says nothing",
                    fix=f"--student-channels without {number}",
                )
        colours = [[255 * x for x in values] if self.colours else [] for values in (MEAN, STD)]
        means, stds = ((*c, *v.tolist()) for c, v in zip(colours, (mean, std), strict=True))
        return replace(self, mean=means, std=stds)

    def about(self) -> dict[str, Any]:
        """As JSON, for run.json and encoder.safetensors."""
        return asdict(self)

    @classmethod
    def from_about(cls, about: dict[str, Any]) -> Channels:
        """What `about` gave."""
        bands = about["bands"]
        if bands is not None:
            bands = Bands(tuple(bands["numbers"]), bands["low"], bands["high"])
        return cls(about["spelled"], about["paired"], tuple(about["mean"]), tuple(about["std"]),
                   bands)  # fmt: skip

    @classmethod
    def if_any(cls, about: dict[str, Any] | None) -> Channels | None:
        """The same; None for nothing: pictures' RGB."""
        return cls.from_about(about) if about else None

    # --- one image --------------------------------------------------------------------------------

    def samples(self, data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
        """The numbered channels of a file, [H, W, n] in their own type.

        Raises ImageFault as read_samples, for a file that has fewer, and for one of another `size`
        (height, width) than its image.
        """
        samples = pick(read_samples(data), self.numbers)
        if size and samples.shape[:2] != size:
            height, width = samples.shape[:2]
            raise ImageFault(
                "other-size", f"{height} x {width} (height x width), its image is "
                f"{size[0]} x {size[1]}"
            )  # fmt: skip
        return samples

    def view(
        self, samples: np.ndarray | None, view: View, size: Size, pixels: np.ndarray | None
    ) -> np.ndarray:
        """What the student sees of an image: float32 [C, H, W], (x - mean) / std.

        `samples` are the numbered channels of the whole image, if there are any; `pixels` the
        teacher's view of it, uint8 [H, W, 3], where colours are seen too.
        """
        planes = list[np.ndarray]()
        if self.colours and pixels is not None:
            planes.append(pixels.transpose(2, 0, 1).astype(np.float32))
        if samples is not None:
            crop = samples[view.top : view.top + view.height, view.left : view.left + view.width]
            planes.append(resize_samples(crop, size, flip=view.flip))
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return (np.concatenate(planes) - mean) / std

    def centre_crop(self, data: bytes, beside: bytes, *, share: float, size: Size) -> np.ndarray:
        """The same of an image's centre crop, for evaluations. Raises ImageFault."""
        return self.part(data, beside, partial(centre_view, crop_share=share, size=size), size=size)

    def part(
        self, data: bytes, beside: bytes, place: Callable[[int, int], View], *, size: Size
    ) -> np.ndarray:
        """The same of the part of an image that `place` says, of its height and width.

        `beside` is the file that belongs to the image, if channels are of such. Raises ImageFault.
        """
        image, samples = self._read(data, beside)
        height, width = (samples if image is None else image).shape[:2]  # type: ignore[union-attr]
        view = place(height, width)
        pixels = render(image, view, size=size) if self.colours and image is not None else None
        return self.view(samples, view, size, pixels)

    def whole(self, data: bytes, beside: bytes) -> np.ndarray:
        """The same of a whole image as it is: float32 [H, W, C]. Raises ImageFault."""
        image, samples = self._read(data, beside)
        seen = [part for part in (image if self.colours else None, samples) if part is not None]
        planes = np.concatenate([part.astype(np.float32) for part in seen], axis=2)
        return (planes - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def _read(self, data: bytes, beside: bytes) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(pixels [H, W, 3] where they or their size count, the numbered channels [H, W, n])."""
        image = samples = None
        if self.colours or self.paired:
            image = self.bands.pixels(data) if self.bands else decode_pixels(data)
        if self.numbers:
            known = None if image is None else (image.shape[0], image.shape[1])
            samples = self.samples(beside if self.paired else data, known)
        return image, samples

    def shown(self, seen: np.ndarray) -> np.ndarray:
        """What is seen, [..., H, W, C] as `whole` has it, as a picture, uint8 [..., H, W, 3]: its
        colours where they are among it, else as `as_colours`."""
        if not self.colours:
            return as_colours(seen)
        mean, std = (np.array(v[:3], np.float32) for v in (self.mean, self.std))
        return np.rint(seen[..., :3] * std + mean).clip(0, 255).astype(np.uint8)


def as_colours(seen: np.ndarray, chosen: tuple[int, int, int] | None = None) -> np.ndarray:
    """Three of the channels [..., C] that a student sees as colours, uint8 [..., 3].

    `chosen`: numbers from 1; default: the first three, or the first in grey where there are fewer.
    The mean is grey, two deviations below it are black, two above white.
    """
    numbers = chosen or ((1, 2, 3) if seen.shape[-1] >= 3 else (1, 1, 1))
    three = seen[..., [number - 1 for number in numbers]].astype(np.float32)
    return np.rint(128 + 64 * three).clip(0, 255).astype(np.uint8)


# --- images, of RGB or not ------------------------------------------------------------------------


def whole_image(channels: Channels | None, data: bytes, beside: bytes = b"") -> np.ndarray:
    """What a network of these `channels` sees of a whole image: float32 [H, W, C], normalised;
    without any pixels, uint8 [H, W, 3]. Raises ImageFault."""
    return channels.whole(data, beside) if channels else decode_pixels(data)


def centre_crop(
    channels: Channels | None, data: bytes, beside: bytes = b"", *, share: float, size: Size,
    bands: Bands | None = None,
) -> np.ndarray:  # fmt: skip
    """The same of its centre crop: float32 [C, H, W]; without channels uint8 [H, W, 3], whose
    colours are `bands` of the file where such are given. Raises ImageFault."""
    if channels:
        return channels.centre_crop(data, beside, share=share, size=size)
    image = bands.pixels(data) if bands else decode_pixels(data)
    return render(image, centre_view(*image.shape[:2], crop_share=share, size=size), size=size)


def picture_of(channels: Channels | None, seen: np.ndarray) -> np.ndarray:
    """What `whole_image` gave, as a picture: uint8 [H, W, 3]."""
    return channels.shown(seen) if channels else seen
