"""Images of fine-tuning: augmented by address for training, their centre crop for validation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose, RandomHorizontalFlip

from milan.core import rng
from milan.core.device import copy_to
from milan.core.size import Size, height_width
from milan.data.loader import each
from milan.data.sampler import Address, Kind
from milan.errors import ConfigError
from milan.evaluation.splits import Split
from milan.images.channels import Channels, centre_crop
from milan.images.decode import decode
from milan.images.views import View, ViewSpec, ratio_for, view_of
from milan.training.stand_ins import read_batch

_PART = re.compile(r"(m|n|w|d|t|p|a|b|inc|mmax)[0-9.]+|mstd([0-9.]+|inf)|3a|weights")
"""Of a policy of timm: what its functions take apart."""


class LabelledBatch(NamedTuple):
    """B labelled images."""

    pixels: torch.Tensor
    """[B, H, W, 3] uint8; channels of files [B, C, H, W] float32, normalised"""
    labels: torch.Tensor
    """[B] int64"""
    positions: torch.Tensor
    """[B] int64, places in the training split, or in the validation split behind it"""
    readable: torch.Tensor
    """[B] bool; another image stands in for one that cannot be read"""

    def to(self, device: torch.device) -> LabelledBatch:
        """The same on `device`; from pinned memory to CUDA the copy does not wait."""
        return each(self, lambda t: copy_to(t, device))

    def pin_memory(self) -> LabelledBatch:
        """In pages that a GPU copies from by itself."""
        return each(self, torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Augmentation:
    """What an image becomes before training sees it: timm's parts, with their names."""

    size: Size
    """Of the pictures, in pixels."""
    scale: tuple[float, float]
    """Area of the random crop, as a share of the image."""
    hflip: float
    """Probability that it is mirrored."""
    auto_augment: str
    """A policy of timm, such as rand-m9-mstd0.5-inc1; none for no other change."""
    mean: tuple[float, ...]
    """Colour that fills what a rotation leaves empty."""

    def build(self) -> Any:
        """The transform: a PIL image to a PIL image [H, W]. The device erases and mixes.

        As timm.data.create_transform composes it. Raises ConfigError for a policy unknown to timm.
        """
        parts: list[Any] = [
            RandomResizedCropAndInterpolation(
                height_width(self.size), self.scale, ratio_for(self.size), interpolation="bicubic"
            ),
            RandomHorizontalFlip(self.hflip),
        ]
        if self.auto_augment != "none":
            parts.append(self._policy())
        return Compose(parts)

    def _policy(self) -> Any:
        hparams = {
            "translate_const": int(0.45 * min(height_width(self.size))),
            "img_mean": tuple(min(255, round(255 * value)) for value in self.mean),
            "interpolation": Image.Resampling.BICUBIC,
            # At 10 posterize keeps no bit, which Pillow refuses.
            "magnitude_max": 9.999,
        }
        make = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}
        kind, *parts = self.auto_augment.split("-")
        try:
            for part in parts if kind in ("rand", "augmix") else ():
                if not _PART.fullmatch(part):  # timm passes over what it does not know
                    raise ValueError(f"no part {part!r}")
            return make.get(self.auto_augment[:4], auto_augment_transform)(
                self.auto_augment, hparams
            )
        except (AssertionError, LookupError, ValueError) as error:
            raise ConfigError(
                f"auto_augment {self.auto_augment}: {error}",
                expected="a policy of timm, or none",
                fix="--auto-augment rand-m9-mstd0.5-inc1",
            ) from None


class LabelledImages:
    """Batches of two splits; a loader's source (milan.data.loader.BatchSource)."""

    def __init__(
        self, train: Split, val: Split, augmentation: Augmentation, *, crop_share: float, seed: int,
        channels: Channels | None = None,
    ) -> None:  # fmt: skip
        """`channels`: what is seen in place of RGB, cropped and mirrored alone."""
        self.train, self.val, self.augmentation = train, val, augmentation
        self.crop_share, self.seed, self.channels = crop_share, seed, channels
        self._transform: Any = None
        self._crops = ViewSpec(
            augmentation.size,
            augmentation.scale,
            ratio_for(augmentation.size),
            augmentation.hflip,
            seed,
        )

    def load(self, address: Address) -> LabelledBatch:
        """The images at `address`. Raises DataError if neither they nor the next can be read."""
        training = address.kind is Kind.TRAIN
        split = self.train if training else self.val
        epoch = address.epoch if training else None
        pixels, rows, readable = read_batch(
            address.rows.tolist(), lambda position: self._seen(split, position, epoch),
            count=len(split.rows), name=split.key,
        )  # fmt: skip
        positions = address.rows + (0 if training else len(self.train.rows))
        return LabelledBatch(
            torch.from_numpy(np.stack(pixels)),
            torch.from_numpy(split.labels[rows]),
            torch.from_numpy(positions),
            torch.from_numpy(readable),
        )

    def _seen(self, split: Split, position: int, epoch: int | None) -> np.ndarray:
        """An image as it is trained on in an epoch, or its centre crop. Raises ImageFault."""
        row, law = int(split.rows[position]), self.channels
        data, beside = split.of.images.read(row), split.of.beside.read(row, law)
        if epoch is None:
            return centre_crop(
                law, data, beside, share=self.crop_share, size=self.augmentation.size
            )
        if law is None:
            return self._augmented(decode(data), epoch, position)

        def place(height: int, width: int) -> View:
            return view_of(self._crops, position, view=epoch, height=height, width=width)

        return law.part(data, beside, place, size=self.augmentation.size)

    def _augmented(self, image: Image.Image, epoch: int, position: int) -> np.ndarray:
        """uint8 [H, W, 3], as drawn for this image in this epoch."""
        self._transform = self._transform or self.augmentation.build()
        with seeded(self.seed, rng.AUGMENTED, (epoch, position)):
            return np.asarray(self._transform(image))


@contextmanager
def seeded(seed: int, purpose: int, address: tuple[int, ...]) -> Iterator[None]:
    """Inside, the global generators of Python, numpy and torch's CPU start at an address.

    timm's augmentation draws from all three. Afterwards they are as before.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    draw = int(rng.bits(seed, purpose, address, 1)[0])
    random.seed(draw)
    np.random.seed(draw % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(draw >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
