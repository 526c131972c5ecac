"""Segmentation: a head on a frozen encoder, or encoder and decoder, trained on images with masks.

The run is that of milan.training.supervised_run; beside it there are

    runs/pretrain/segment/linear/  segmenter.safetensors   milan.load_segmenter opens it
      classes.csv confusion.csv    per class; pixels of one class that were taken for another
      sheet.png                    image, truth and prediction
      random/                      the baseline's run
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from milan.core.config_resolver import from_call
from milan.core.device import autocast, network_input, seeded_weights
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.core.size import Size, height_width
from milan.data.sampler import Address, Kind, split_over_ranks
from milan.errors import none_readable
from milan.evaluation.config import SegmentConfig
from milan.evaluation.iou import Agreement, Areas, agreement, areas, confusion, require_torchmetrics
from milan.evaluation.masked import MaskedData, open_masked
from milan.images.channels import picture_of
from milan.images.masks import IGNORED
from milan.models.foreign import Weights
from milan.models.segmenter import (
    SEGMENTER,
    Segmenter,
    build_head,
    classes_at,
    create_encoder,
    prepared,
    set_window,
    slide,
)
from milan.reporting.mask_sheet import MaskRow, class_colours, mask_sheet
from milan.reporting.run_files import SHEET
from milan.training.loop import Context
from milan.training.segmentation_data import MaskedBatch, MaskedBatches, WindowAugmentation
from milan.training.supervised import (
    Plan,
    Supervised,
    SupervisedData,
    SupervisedTask,
    initial_weights,
    load_weights,
)
from milan.training.supervised_run import train_supervised

_SIZE = 512  # of crops and windows (DINOv3, MAE)
_PICTURES = 6
LoadTeacher = Callable[[SegmentConfig], tuple[Any, Weights]]
"""The teacher as an encoder, and what it is."""


def segment(
    checkpoint: str | SegmentConfig = "runs/pretrain",
    *,
    load: LoadTeacher | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a segmenter on images with masks and measure it; beside it a baseline.

    `checkpoint` and `settings` are the command's arguments (SegmentConfig's fields); `load` loads
    the teacher (pipeline.teachers.dense.dense_teacher). Returns the
    metrics of the last validation: miou with its 95 % interval over images, pixel and class
    accuracy in percent, counts, the run's folder, and the baseline's; resumes, stops and raises as
    milan.training.supervised_run.train_supervised.
    """
    config = from_call(SegmentConfig, "checkpoint", checkpoint, settings, "segment").published()
    require_torchmetrics()
    protocol = partial(Segment, load=load)
    return train_supervised(protocol, config, stop=stop, progress=progress)


@dataclass(frozen=True)
class _Data(SupervisedData):
    """Images with masks."""

    masked: MaskedData
    classes: list[str]
    left_out: int

    @property
    def train_count(self) -> int:
        """Images to train on."""
        return len(self.masked.train)

    @property
    def val_count(self) -> int:
        """Images to measure on."""
        return len(self.masked.val)

    @property
    def identity(self) -> str:
        """Changes with images, masks, their order, and what masks mean."""
        return self.masked.identity

    def key(self, position: int) -> str:
        """Name of an image of a batch: training images are counted first."""
        return self.masked.key(position)


class Segment(Supervised):
    """The protocol `segment`."""

    kind, file = SegmentConfig, SEGMENTER
    most = (16, 4)
    of_rgb: ClassVar[dict[str, Any]] = {"distortion": 0.0}
    compiles = False  # BatchNorm
    pairs = "two images at least, of which UPerNet's BatchNorm takes statistics", ""
    places = (
        "masks", "mask_column", "classes", "palette", "ignore", "reduce_zero_label",
    )  # fmt: skip

    def __init__(self, config: SegmentConfig, load: LoadTeacher | None = None) -> None:
        super().__init__(config)
        self.load, self.teacher = load, None
        self.native_size: Size = 0
        """Of the images that the encoder was made for; known with its weights."""

    @property
    def linear(self) -> bool:
        """Whether the encoder is frozen."""
        return self.config.protocol == "linear"

    @property
    def multiple(self) -> int:
        """UPerNet's BatchNorm sees a single pixel of each image: of two images at least."""
        return 1 if self.linear else 2

    def recipe(self) -> dict[str, Any]:
        """The published numbers of the protocol."""
        return self.config.recipe_values() | {"protocol": self.config.protocol}

    def weights(self) -> Weights:
        """Those of any ViT of timm, whose blocks can be looked at, or of the teacher."""
        if self.config.checkpoint == "teacher" and self.load and self.linear:
            self.teacher, weights = self.load(self.config)
            height, width = height_width(weights.size)
            self.config = replace(
                self.config, size=height, width=None if width == height else width
            )
            return weights
        weights = initial_weights(replace(self.config, size=None))
        with torch.device("meta"):
            vit = create_encoder(
                weights.model, weights.args, size=weights.size, any_channels=bool(weights.channels)
            )
        self.native_size, patch = weights.size, vit.patch_embed.patch_size[0]
        self.config = replace(self.config, size=self.config.size or -(-_SIZE // patch) * patch)
        return weights

    @property
    def window(self) -> tuple[int, int]:
        """(H, W) of crops and windows, in pixels."""
        return self.config.size, self.config.width or self.config.size

    def open_data(self, progress: Progress) -> _Data:
        """Images with masks. Raises DataError."""
        masked = open_masked(self.config, progress, self.channels, window=self.window)
        return _Data(masked, masked.names, masked.rejected)

    def build(self, weights: Weights, plan: Plan, data: _Data) -> Segmenter:
        """Encoder and head. Raises ConfigError."""
        config, args = self.config, dict(weights.args)
        if config.drop_path:
            args["drop_path_rate"] = config.drop_path
        with seeded_weights(config.seed):
            vit = self.teacher or create_encoder(
                weights.model, args, size=weights.size, any_channels=bool(weights.channels)
            )
            if not self.teacher:
                set_window(vit, self.window)
                load_weights(vit, weights, name=config.checkpoint, leave=())
            head = build_head(config.protocol, vit, len(data.classes), width=config.channels)
        if self.linear:
            vit.requires_grad_(False)
        segmenter = Segmenter(prepared(vit, head), head, window=self.window, frozen=self.linear)
        segmenter.class_names, segmenter.mean, segmenter.std = data.classes, plan.mean, plan.std
        segmenter.colours = data.masked.colours or class_colours(len(data.classes))
        return segmenter

    def source(self, plan: Plan, data: _Data) -> MaskedBatches:
        """Crops to train on, whole images to measure on."""
        config = self.config
        # Of channels of files, which are normalised before, the mean is 0.
        fill = [0 if self.channels else min(255, max(0, round(255 * part))) for part in plan.mean]
        augmentation = WindowAugmentation(
            self.window, config.scale, config.hflip, config.distortion, tuple(fill)
        )
        return MaskedBatches(data.masked.train, data.masked.val, augmentation, seed=config.seed)

    def task(self, network: Segmenter, plan: Plan, data: _Data, context: Context) -> SegmentTask:
        """How it is trained and measured."""
        if context.ranks.size > 1 and context.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return SegmentTask(network, plan, data, context)

    def results(self, task: SegmentTask, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Head and window; metrics; writes classes.csv and confusion.csv."""
        assert task.outcome is not None
        agreement, network = task.outcome.agreement, task.evaluated
        _write_tables(run, task.outcome, task.data)
        described = {
            "protocol": self.config.protocol, "window": list(self.window),
            "native_size": self.native_size, "decoder_width": self.config.channels,
            "colours": network.colours,
        }  # fmt: skip
        return described, {
            "protocol": self.config.protocol,
            "miou": round(agreement.miou, 2),
            "miou_interval": agreement.interval,
            "pixel_accuracy": round(agreement.pixel_accuracy, 2),
            "class_accuracy": round(agreement.class_accuracy, 2),
            "measured_classes": sum(value is not None for value in agreement.iou),
            "val_images": task.outcome.images,
        }


# --- the task -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a segmenter said of all validation images."""

    confusion: np.ndarray
    """[C, C] int64, pixels"""
    agreement: Agreement
    images: int
    """How many could be read."""


class SegmentTask(SupervisedTask):
    """Segmentation as the loop sees it."""

    def __init__(self, network: Segmenter, plan: Plan, data: _Data, context: Context) -> None:
        super().__init__(network, "segmenter", plan, data, context)
        if network.frozen and self.config.ema is None:
            self.model = nn.ModuleDict({"head": network.head})  # checkpoints need no more
        self.outcome: Outcome | None = None
        """Of the last validation."""

    @property
    def kept(self) -> nn.Module:
        """The segmenter; of the teacher's the head, for its encoder is none of timm's."""
        return self.evaluated.head if self.config.checkpoint == "teacher" else self.evaluated

    def loss(self, batch: MaskedBatch) -> torch.Tensor:
        """Cross-entropy of the pixels that count, the auxiliary classifier's added."""
        images = network_input(batch.pixels, self.plan.mean, self.plan.std)
        masks = batch.masks.long()
        outputs = self.forward(images)
        weights = (1.0, self.config.auxiliary)[: len(outputs)]
        parts = (w * _entropy(logits, masks) for w, logits in zip(weights, outputs, strict=True))
        return torch.stack(list(parts)).sum()

    def addresses(self, epoch: int) -> list[Address]:
        """This rank's validation images, one by one, for they have sizes of their own."""
        rows = np.arange(self.data.val_count)
        whole = Address(Kind.VALIDATION, epoch, rows, np.zeros_like(rows))
        ranks = self.context.ranks
        return split_over_ranks(whole, rank=ranks.rank, ranks=ranks.size, micro=1)

    def measure(self, batches: Iterator[MaskedBatch]) -> tuple[dict[str, float], dict[str, Any]]:
        """val_loss, val_miou and val_accuracy (percent), and a sheet of the first images."""
        classes, network = len(self.data.classes), self.evaluated
        counts, total = torch.zeros(classes, classes, dtype=torch.int64), 0.0
        seen, rows = list[tuple[int, Areas]](), list[MaskRow]()
        for batch in batches:
            if not batch.readable.all():
                continue
            pixels, mask = batch.pixels[0], batch.masks[0].long()
            with autocast(self.context.device, self.plan.precision):
                logits = slide(self._logits, pixels, network.window, at_once=self.plan.micro_batch)
            total += float(_entropy(logits[None], _at(mask, logits.shape[1:])[None]))
            named = classes_at(logits, mask.shape)
            own = confusion(named, mask, classes).cpu()
            counts += own
            place = int(batch.positions[0]) - self.data.train_count
            seen.append((place, areas(own.numpy())))
            if len(rows) < _PICTURES and self.context.ranks.is_rank0:
                name = self.data.key(int(batch.positions[0]))
                image, *masks = (part.cpu().numpy() for part in (pixels, mask, named))
                law = self.data.masked.val.channels
                rows.append(MaskRow(name, picture_of(law, image), *masks))
        self.outcome = self._outcome(counts.numpy(), seen)
        (total,) = self.context.ranks.all_reduce_sum([total])
        agreement = self.outcome.agreement
        metrics = {
            "val_loss": total / self.outcome.images,
            "val_miou": agreement.miou,
            "val_accuracy": agreement.pixel_accuracy,
        }
        if not rows:
            return metrics, {}
        title = (
            f"{self.config.checkpoint}, {self.config.protocol}: mIoU {agreement.miou:.1f} % of "
            f"{self.outcome.images} images; beside each class its IoU in percent"
        )
        sheet = mask_sheet(title, rows, self.data.classes, network.colours, agreement.iou)
        return metrics, {SHEET: sheet}

    def _logits(self, windows: torch.Tensor) -> torch.Tensor:
        return self.evaluated(network_input(windows, self.plan.mean, self.plan.std))

    def _outcome(self, own: np.ndarray, seen: list[tuple[int, Areas]]) -> Outcome:
        """Of what all ranks have seen, in the order of the images."""
        parts = self.context.ranks.gather_objects((own, seen))
        everything = sorted((pair for _, (_, pairs) in parts for pair in pairs), key=lambda p: p[0])
        if not everything:
            raise none_readable(self.data.masked.val.name)
        whole = sum(counts for _, (counts, _) in parts)
        images = Areas(
            *(np.stack(column) for column in zip(*(a for _, a in everything), strict=True))
        )
        measured = agreement(np.asarray(whole), images, seed=self.config.seed)
        return Outcome(np.asarray(whole), measured, len(everything))


def _entropy(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [B, C, H, W] over the pixels that count; 0 without any."""
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def _at(mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """A mask [H, W] of the nearest pixels, at (h, w)."""
    return F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest-exact")[
        0, 0
    ].long()


# --- what a run leaves ----------------------------------------------------------------------------


def _write_tables(run: Path, outcome: Outcome, data: _Data) -> None:
    """classes.csv and confusion.csv."""
    agreement, counts, names = outcome.agreement, outcome.confusion, data.classes
    with open(run / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "iou", "accuracy", "pixels", "train_pixels"])
        for name, iou, accuracy, pixels, trained in zip(
            names, agreement.iou, agreement.accuracy, counts.sum(axis=1).tolist(),
            data.masked.train_pixels.tolist(), strict=True,
        ):  # fmt: skip
            figures = ("" if value is None else f"{value:.2f}" for value in (iou, accuracy))
            writer.writerow([name, *figures, pixels, trained])
    with open(run / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["is", "taken for", "pixels"])
        for a, b in np.argwhere(counts).tolist():
            if a != b:
                writer.writerow([names[a], names[b], int(counts[a, b])])
