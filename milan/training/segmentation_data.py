"""Images with masks for segmentation: crops drawn by address for training, whole ones to measure.

Training (mmsegmentation's pipeline, which MAE, BEiT and DINOv3 use): the image is scaled until a
window just fits in, times 0.5 to 2; a window is cut out, in which no class fills more than three
quarters if ten tries find one; it is mirrored, and its brightness, contrast, saturation and hue
change, each half of the time. What is missing of a window is of the mean colour, and ignored.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as colours

from milan.core import rng
from milan.core.bilinear import bilinear
from milan.core.device import copy_to
from milan.data.loader import each
from milan.data.sampler import Address, Kind
from milan.errors import DataError
from milan.evaluation.masked import MaskedSplit
from milan.images.masks import IGNORED
from milan.models.segmenter import fitted
from milan.training.finetune_data import seeded
from milan.training.stand_ins import read_batch

_TRIES, _MOST = 10, 0.75  # windows tried; the share of one class that is little enough
_DISTORTIONS = (
    (colours.adjust_brightness, 1 - 32 / 255, 1 + 32 / 255),
    (colours.adjust_contrast, 0.5, 1.5),
    (colours.adjust_saturation, 0.5, 1.5),
    (colours.adjust_hue, -18 / 180, 18 / 180),
)
"""What changes colours, and from where to where (SSD's photometric distortion)."""


class MaskedBatch(NamedTuple):
    """B images with masks: windows to train on, or one whole image to measure on."""

    pixels: torch.Tensor
    """[B, h, w, 3] uint8; channels of files [B, h, w, C] float32, normalised; to measure on it is
    scaled (milan.models.segmenter.fitted)"""
    masks: torch.Tensor
    """[B, H, W] int16; to train on h x w, else of the image as it is; -1: does not count"""
    positions: torch.Tensor
    """[B] int64, places in the training split, or in the validation split behind it"""
    readable: torch.Tensor
    """[B] bool; another image stands in for one that cannot be read"""

    def to(self, device: torch.device) -> MaskedBatch:
        """The same on `device`; from pinned memory to CUDA the copy does not wait."""
        return each(self, lambda t: copy_to(t, device))

    def pin_memory(self) -> MaskedBatch:
        """In pages that a GPU copies from by itself."""
        return each(self, torch.Tensor.pin_memory)


@dataclass(frozen=True)
class WindowAugmentation:
    """What an image with its mask becomes before training sees it."""

    window: tuple[int, int]
    """(H, W) in pixels."""
    scale: tuple[float, float]
    """Of the image, times the smallest that a window fits in."""
    hflip: float
    """Probability that it is mirrored."""
    distortion: float
    """Probability of each of the four changes of colour."""
    fill: tuple[int, ...]
    """What is missing has this colour, of each channel."""

    def __call__(self, pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [H, W, 3] (or float32 [H, W, C], as the image is) and int16 [H, W] of a window,
        drawn by Python's global generator. Only pictures of RGB can be distorted."""
        (high, wide), (height, width) = self.window, mask.shape
        scale = random.uniform(*self.scale) * max(high / height, wide / width)
        scaled = max(1, round(height * scale)), max(1, round(width * scale))
        for _ in range(_TRIES):
            top = random.randint(0, max(0, scaled[0] - high))
            left = random.randint(0, max(0, scaled[1] - wide))
            rows = _sources(top, min(high, scaled[0]), scaled[0], height)
            columns = _sources(left, min(wide, scaled[1]), scaled[1], width)
            cut = mask[rows[:, None], columns]
            counts = np.bincount(cut[cut != IGNORED].ravel())
            if np.count_nonzero(counts) > 1 and counts.max() < _MOST * counts.sum():
                break
        ratio = height / scaled[0], width / scaled[1]
        box = (
            left * ratio[1], top * ratio[0],
            min(width, (left + len(columns)) * ratio[1]), min(height, (top + len(rows)) * ratio[0]),
        )  # fmt: skip
        image = bilinear(pixels, (len(rows), len(columns)), box)
        for change, low, most in _DISTORTIONS:
            if random.random() < self.distortion:
                image = np.asarray(change(Image.fromarray(image), random.uniform(low, most)))
        window = np.empty((high, wide, pixels.shape[2]), pixels.dtype)
        window[:] = self.fill
        window[: len(rows), : len(columns)] = image
        whole = np.full((high, wide), IGNORED, np.int16)
        whole[: len(rows), : len(columns)] = cut
        if random.random() < self.hflip:
            window, whole = window[:, ::-1], whole[:, ::-1]
        return window, whole


def _sources(first: int, count: int, scaled: int, length: int) -> np.ndarray:
    """[count] int64: which of `length` pixels lie under those from `first` on, of `scaled`."""
    return (
        ((first + np.arange(count) + 0.5) * length / scaled).astype(np.int64).clip(max=length - 1)
    )


class MaskedBatches:
    """Batches of two splits; a loader's source (milan.data.loader.BatchSource)."""

    def __init__(
        self, train: MaskedSplit, val: MaskedSplit, augmentation: WindowAugmentation, *, seed: int
    ) -> None:
        self.train, self.val, self.augmentation, self.seed = train, val, augmentation, seed

    def load(self, address: Address) -> MaskedBatch:
        """The images at `address`: several to train on, or one to measure on.

        Raises DataError if neither they nor the next can be read, or a mask has another size than
        its image.
        """
        training = address.kind is Kind.TRAIN
        split = self.train if training else self.val

        def read(position: int) -> tuple[np.ndarray, np.ndarray]:
            pixels, mask = split.pixels(position), split.mask(position)
            if pixels.shape[:2] != mask.shape:
                raise DataError(
                    f"the mask of {split.keys[position]} has {mask.shape[1]} x {mask.shape[0]} "
                    f"pixels, its image {pixels.shape[1]} x {pixels.shape[0]}",
                    expected="the mask that was there when the run began",
                    fix="put it back; the same line goes on",
                )
            if not training:
                return fitted(pixels, self.augmentation.window), mask
            with seeded(self.seed, rng.AUGMENTED, (address.epoch, position)):
                return self.augmentation(pixels, mask)

        pairs, _, readable = read_batch(
            address.rows.tolist(), read, count=len(split), name=split.keys.__getitem__
        )
        positions = address.rows + (0 if training else len(self.train))
        return MaskedBatch(
            torch.from_numpy(np.stack([pair[0] for pair in pairs])),
            torch.from_numpy(np.stack([pair[1] for pair in pairs])),
            torch.from_numpy(positions),
            torch.from_numpy(readable),
        )
