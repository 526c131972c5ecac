"""Images of detection: scaled, cropped, mirrored by address to train on; whole to measure on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from milan.core import rng
from milan.core.bilinear import bilinear
from milan.core.device import copy_to
from milan.core.paths import probe, read_below
from milan.core.retry import described
from milan.data.loader import each
from milan.data.sampler import Address, Kind
from milan.errors import DataError, ImageFault
from milan.evaluation.coco import BoxSet
from milan.images.channels import whole_image
from milan.models.detector import fitted, unit
from milan.training.stand_ins import read_batch

_LEAST = 1.0  # pixel that a box to train on is wide and high


class BoxBatch(NamedTuple):
    """B images on their canvas, with the n boxes of all."""

    pixels: torch.Tensor
    """[B, S, S, 3] uint8; channels of files [B, S, S, C] float32, normalised; the image is at the
    top left"""
    sizes: torch.Tensor
    """[B, 2] int64: height and width of the image on its canvas"""
    boxes: torch.Tensor
    """[n, 4] float32: left, top, right, bottom in pixels of the canvas; those of an image follow
    one another"""
    labels: torch.Tensor
    """[n] int64, from 1 on"""
    counts: torch.Tensor
    """[B] int64: boxes of each image"""
    masks: torch.Tensor | None
    """[n, S, S / 8] uint8, a bit for each pixel of the canvas; None: boxes alone"""
    positions: torch.Tensor
    """[B] int64, places in the training images, or in the validation images behind them"""
    readable: torch.Tensor
    """[B] bool; another image stands in for one that cannot be read"""

    def to(self, device: torch.device) -> BoxBatch:
        """The same on `device`; from pinned memory to CUDA the copy does not wait."""
        return each(self, lambda t: copy_to(t, device))

    def pin_memory(self) -> BoxBatch:
        """In pages that a GPU copies from by itself."""
        return each(self, torch.Tensor.pin_memory)

    def images(self) -> list[torch.Tensor]:
        """Each image [3, h, w] in 0..1, or its channels, without the rest of its canvas."""
        return [
            unit(pixels[:height, :width])
            for pixels, (height, width) in zip(self.pixels, self.sizes.tolist(), strict=True)
        ]

    def targets(self) -> list[dict[str, torch.Tensor]]:
        """What torchvision's detectors learn from, for each image."""
        counts = self.counts.tolist()
        targets = [
            {"boxes": boxes, "labels": labels}
            for boxes, labels in zip(
                self.boxes.split(counts), self.labels.split(counts), strict=True
            )
        ]
        if self.masks is not None:
            parts = self.masks.split(counts)
            for target, bits, (height, width) in zip(
                targets, parts, self.sizes.tolist(), strict=True
            ):
                shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
                pixels = (bits[..., None] >> shifts & 1).flatten(2)
                target["masks"] = pixels[:, :height, :width]
        return targets


class Placement(NamedTuple):
    """How an image lies on its canvas: scaled, then cropped, then mirrored."""

    scaled: tuple[int, int]
    """Height and width after scaling."""
    top: int
    left: int
    height: int
    width: int
    flip: bool


class BoxImages:
    """Batches of two sets; a loader's source (milan.data.loader.BatchSource)."""

    def __init__(
        self, train: BoxSet, val: BoxSet, *, size: int, scale: tuple[float, float], hflip: float,
        seed: int,
    ) -> None:  # fmt: skip
        self.train, self.val, self.size, self.scale = train, val, size, scale
        self.hflip, self.seed = hflip, seed

    def load(self, address: Address) -> BoxBatch:
        """The images at `address`. Raises DataError if neither they nor the next can be read, or
        one is of another size than its annotations say: its boxes would be elsewhere."""
        training = address.kind is Kind.TRAIN
        boxes = self.train if training else self.val
        place = self._drawn if training else self._whole

        def read(position: int) -> tuple[np.ndarray, ...]:
            image = read_image(boxes, position)
            height, width = image.shape[:2]
            placement = place(height, width, (address.epoch, position))
            return self._placed(image, boxes, position, placement)

        placed, _, readable = read_batch(
            address.rows.tolist(), read, count=len(boxes), name=boxes.names.__getitem__
        )
        pixels, sizes, kept, labels, masks = zip(*placed, strict=True)
        return BoxBatch(
            torch.from_numpy(np.stack(pixels)),
            torch.from_numpy(np.stack(sizes)),
            torch.from_numpy(np.concatenate(kept)),
            torch.from_numpy(np.concatenate(labels)),
            torch.tensor([len(part) for part in kept]),
            None if boxes.masks is None else torch.from_numpy(np.concatenate(masks)),
            torch.from_numpy(address.rows + (0 if training else len(self.train))),
            torch.from_numpy(readable),
        )

    def _whole(self, height: int, width: int, _: tuple[int, int]) -> Placement:
        scaled = fitted(height, width, self.size)
        return Placement(scaled, 0, 0, *scaled, False)

    def _drawn(self, height: int, width: int, address: tuple[int, int]) -> Placement:
        """Large scale jitter (Ghiasi et al. 2021; detectron2's ResizeScale and FixedSizeCrop)."""
        factor, top, left, flip = rng.uniforms(self.seed, rng.AUGMENTED, address, 4)
        low, high = self.scale
        tall, wide = fitted(height, width, self.size * (low + (high - low) * factor))
        seen = min(tall, self.size), min(wide, self.size)
        at = int(top * (tall - seen[0] + 1)), int(left * (wide - seen[1] + 1))
        return Placement((tall, wide), *at, *seen, bool(flip < self.hflip))

    def _placed(
        self, image: np.ndarray, boxes: BoxSet, position: int, placement: Placement
    ) -> tuple[np.ndarray, ...]:
        """(canvas, size, boxes, labels, bits of masks) of one image."""
        there, (height, width) = boxes.of_image(position), placement[3:5]
        canvas = np.zeros((self.size, self.size, image.shape[2]), image.dtype)
        canvas[:height, :width] = _pixels(image, placement)
        moved = _moved(boxes.boxes[there], image, placement)
        whole = ((moved[:, 2:] - moved[:, :2]) >= _LEAST).all(axis=1) & ~boxes.crowd[there]
        kept, bits = np.flatnonzero(whole), np.empty((0, self.size, self.size // 8), np.uint8)
        if boxes.masks is not None and len(kept):
            shape = image.shape[:2]
            masks = [_mask(boxes.mask(there.start + n, shape), placement) for n in kept.tolist()]
            seen = [mask.any() for mask in masks]
            kept = kept[np.array(seen)]
            on_canvas = np.zeros((len(kept), self.size, self.size), bool)
            if len(kept):
                on_canvas[:, :height, :width] = [m for m, s in zip(masks, seen, strict=True) if s]
            bits = np.packbits(on_canvas, axis=-1)
        labels = boxes.labels[there][kept] + 1
        return canvas, np.array([height, width]), moved[kept], labels, bits


def read_image(boxes: BoxSet, position: int) -> np.ndarray:
    """An image of a set, uint8 [H, W, 3]; of channels float32 [H, W, C]. Raises ImageFault if it
    cannot be read, DataError if it is of another size than its annotations say."""
    name = boxes.names[position]
    try:
        data = read_below(boxes.root, name, size=None)
    except FileNotFoundError:
        probe(boxes.root)
        raise ImageFault("missing", name) from None
    except OSError as error:
        raise ImageFault("unreadable", f"{name}: {described(error)}") from None
    beside = boxes.beside.read(position, boxes.channels) if boxes.beside else b""
    image = whole_image(boxes.channels, data, beside)
    height, width = boxes.shapes[position].tolist()
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{boxes.root / name} is {image.shape[1]} x {image.shape[0]} pixels, and {width} x "
            f"{height} in {boxes.annotations}",
            expected="the size that its boxes were drawn on",
            fix="the image as it was annotated, or its width and height there if they are wrong",
        )
    return image


def _pixels(image: np.ndarray, placement: Placement) -> np.ndarray:
    """[h, w, C]: what of the image is seen, scaled by Pillow's bilinear filter."""
    (tall, wide), top, left, height, width, flip = placement
    whole = image.shape[:2]
    down, across = whole[0] / tall, whole[1] / wide
    seen = (left * across, top * down, (left + width) * across, (top + height) * down)
    seen = (seen[0], seen[1], min(seen[2], whole[1]), min(seen[3], whole[0]))
    pixels = bilinear(image, (height, width), seen)
    return pixels[:, ::-1] if flip else pixels


def _moved(boxes: np.ndarray, image: np.ndarray, placement: Placement) -> np.ndarray:
    """Boxes [n, 4] of an image as they lie on its canvas, cut at the edge of what is seen."""
    (tall, wide), top, left, height, width, flip = placement
    factors = np.array([wide / image.shape[1], tall / image.shape[0]] * 2, np.float32)
    moved = boxes * factors - np.array([left, top] * 2, np.float32)
    moved = moved.clip(0, np.array([width, height] * 2, np.float32))
    if flip:
        moved = np.stack([width - moved[:, 2], moved[:, 1], width - moved[:, 0], moved[:, 3]], 1)
    return moved.astype(np.float32)


def _mask(mask: np.ndarray, placement: Placement) -> np.ndarray:
    """A mask [H, W] as it lies on its canvas, [h, w] bool: of each pixel what is at its centre."""
    (tall, wide), top, left, height, width, flip = placement
    rows = ((np.arange(top, top + height) + 0.5) * mask.shape[0] / tall).astype(np.int64)
    columns = ((np.arange(left, left + width) + 0.5) * mask.shape[1] / wide).astype(np.int64)
    seen = mask[rows[:, None], columns].astype(bool)
    return seen[:, ::-1] if flip else seen
