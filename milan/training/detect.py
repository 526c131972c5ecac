"""Detection: Mask R-CNN on the encoder, all weights trained on COCO's boxes and masks.

ViTDet's recipe (Li et al. 2022, arXiv 2203.16527; detectron2, projects/ViTDet) on torchvision's
parts (milan.models.detector). The run is that of milan.training.supervised_run; beside it there are

    runs/pretrain/detect/classes.csv confusion.csv   AP of each class; which was taken for which
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core import rng
from milan.core.config_resolver import from_call
from milan.core.device import autocast, manual_seed, seeded_weights
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.errors import ImageFault, none_readable
from milan.evaluation.average_precision import AveragePrecision
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.coco import BoxSet
from milan.evaluation.config import DetectConfig
from milan.images.channels import picture_of
from milan.models.detector import DETECTOR, Detector, DetectorSpec, detector_encoder, interpolated
from milan.models.foreign import Weights
from milan.reporting.boxes import SHOWN, sheet_of_boxes
from milan.reporting.run_files import SHEET
from milan.training.detect_data import BoxBatch, BoxImages, read_image
from milan.training.loop import Context
from milan.training.supervised import (
    Plan,
    Supervised,
    SupervisedData,
    SupervisedTask,
    initial_weights,
    load_weights,
)
from milan.training.supervised_run import train_supervised

_PICTURES = 4  # images of a sheet
_DROPS = (163_889 / 184_375, 177_546 / 184_375)  # of the run (mask_rcnn_vitdet_b_100ep.py)
_HEAD = ("masks", "window", "width", "anchor_scale", "proposals")  # of a DetectorSpec


def detect(
    checkpoint: str | DetectConfig = "runs/pretrain",
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train an encoder with Mask R-CNN's heads on COCO's annotations, and measure the detector.

    `checkpoint` and `settings` are the command's arguments (DetectConfig's fields). Returns the
    metrics of the last epoch's validation in percent: box_ap with its 95 % interval, box_ap50,
    box_ap75, the same of masks (None without), counts, and the run's folder; resumes, stops and
    raises as milan.training.supervised_run.train_supervised.
    """
    config = from_call(DetectConfig, "checkpoint", checkpoint, settings, "detect")
    return train_supervised(Detect, config, stop=stop, progress=progress)


@dataclass(frozen=True)
class _Data(SupervisedData):
    """Images with boxes, whose classes are numbered alike."""

    train: BoxSet
    val: BoxSet
    classes: list[str]

    @property
    def train_count(self) -> int:
        """Images to train on."""
        return len(self.train)

    @property
    def val_count(self) -> int:
        """Images to measure on."""
        return len(self.val)

    def key(self, position: int) -> str:
        """Name of an image of a batch: training images are counted first."""
        train = len(self.train)
        return self.train.names[position] if position < train else self.val.names[position - train]

    @property
    def identity(self) -> str:
        """Changes with the images, their order and their boxes."""
        return hashlib.sha256((self.train.identity + self.val.identity).encode()).hexdigest()


class Detect(Supervised):
    """The protocol `detect`."""

    kind, file = DetectConfig, DETECTOR
    base_lr = 4 * 1e-4  # 1e-4 for 64 images (ViTDet)
    most = (8, 2)
    compiles = False  # regions are of another number in each image
    default_size = 1024
    places = ("annotations", "val_annotations")

    @property
    def drops(self) -> tuple[float, ...]:
        """Shares of the run after which the learning rate is a tenth."""
        return _DROPS if self.config.schedule == "steps" else ()

    @property
    def canvas(self) -> int:
        """Edge of the square that images are padded to, in pixels."""
        return self.config.size or self.default_size

    def weights(self) -> Weights:
        """As they were trained: positions are resampled for the canvas. Raises ConfigError."""
        return initial_weights(replace(self.config, size=None))

    def open_data(self, progress: Progress) -> _Data:
        """Images to train on and to measure on. Raises DataError."""
        train, val = open_boxes(self.config, progress, self.channels)
        return _Data(train, val, list(train.classes))

    def build(self, weights: Weights, plan: Plan, data: _Data) -> Detector:
        """The encoder with its weights, and new heads. Raises ConfigError."""
        config = self.config
        spec = DetectorSpec(
            weights.model, tuple(data.classes), data.train.masks is not None, self.canvas,
            weights.args, config.window, config.width, config.anchor_scale, config.proposals,
            plan.mean, plan.std, weights.channels,
        )  # fmt: skip
        with seeded_weights(config.seed):
            vit = detector_encoder(spec, drop_path=config.drop_path)
            known = interpolated(weights, vit)
            leave = ("head.", "fc_norm.", "norm.")
            load_weights(vit, known, name=config.checkpoint, leave=leave)
            return Detector(vit, spec, samples=config.samples)

    def source(self, plan: Plan, data: _Data) -> BoxImages:
        """Scaled, cropped and mirrored images to train on, whole ones to measure on."""
        config = self.config
        return BoxImages(
            data.train, data.val, size=self.canvas, scale=config.scale, hflip=config.hflip,
            seed=config.seed,
        )  # fmt: skip

    def task(self, network: Any, plan: Plan, data: _Data, context: Context) -> DetectTask:
        """How it is trained and measured."""
        return DetectTask(network, "detector", plan, data, context)

    def results(self, task: DetectTask, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its heads; metrics; writes classes.csv and confusion.csv."""
        measured, val = task.found, task.data.val
        assert measured is not None
        figures = measured.figures()
        _write_tables(run, measured, figures)
        figures |= measured.intervals(seed=self.config.seed)
        metrics = {
            f"{kind}_{name}": figures.get(f"{kind}_{name}")
            for kind in ("box", "mask")
            for name in ("ap", "ap_interval", "ap50", "ap75")
        }
        return {name: getattr(task.trained.spec, name) for name in _HEAD}, metrics | {
            "val_images": len(measured.positions),
            "val_boxes": int((~val.crowd).sum()),
        }


class DetectTask(SupervisedTask):
    """Detection as the loop sees it."""

    found: AveragePrecision | None = None
    """Of the last validation; on rank 0."""

    def loss(self, batch: BoxBatch) -> torch.Tensor:
        """The sum of torchvision's losses: proposals, classes, boxes, masks.

        What they sample is drawn by torch's generator, which the loop seeds at an address.
        """
        return torch.stack(list(self.network(batch.images(), batch.targets()).values())).sum()

    def measure(self, batches: Iterator[BoxBatch]) -> tuple[dict[str, float], dict[str, Any]]:
        """val_loss and its parts, val_box_ap, val_box_ap50 and val_mask_ap in percent; a sheet."""
        val, seen, sums = (
            self.data.val,
            AveragePrecision(self.data.val),
            defaultdict[str, float](float),
        )
        for batch in batches:
            positions = (batch.positions - self.data.train_count).tolist()
            shapes = [(int(h), int(w)) for h, w in val.shapes[positions]]
            draw = rng.bits(self.config.seed, rng.MIXED, (positions[0],), 1)[0]
            manual_seed(int(draw >> 1), self.context.device)
            with autocast(self.context.device, self.plan.precision):
                detections, losses = self.evaluated.detect(batch.images(), shapes, batch.targets())
            for name, loss in losses.items():
                sums[name] += float(loss) * len(positions)
            for position, one, whole in zip(
                positions, detections, batch.readable.tolist(), strict=True
            ):
                if whole:
                    seen.add(position, one)
        ranks = self.context.ranks
        states = [state for _, state in ranks.gather_objects(seen.state())]
        totals = ranks.all_reduce_sum([sums[name] for name in self._losses()])
        parts = {
            f"val_{name}": total / len(val)
            for name, total in zip(self._losses(), totals, strict=True)
        }
        figures = ranks.on_rank0(lambda: self._figures(states))
        sheet = {SHEET: self._sheet()} if ranks.is_rank0 else {}
        return {"val_loss": sum(parts.values())} | parts | figures, sheet

    def _losses(self) -> list[str]:
        """Names of torchvision's losses."""
        names = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
        return names + (["loss_mask"] if self.data.val.masks is not None else [])

    def _figures(self, states: list[Any]) -> dict[str, float]:
        self.found = AveragePrecision.joined(self.data.val, states)
        if not self.found.positions:
            raise none_readable(str(self.data.val.annotations))
        figures = self.found.figures()
        shown = ("box_ap", "box_ap50", "mask_ap")
        return {f"val_{name}": figures[name] for name in shown if figures.get(name) is not None}

    def _sheet(self) -> np.ndarray:
        """The first images that were measured, annotated and as found."""
        assert self.found is not None
        val, shown = self.data.val, []
        for number, position in enumerate(self.found.positions[:_PICTURES]):
            try:
                image = picture_of(val.channels, read_image(val, position))
            except ImageFault:
                continue
            there, detections = val.of_image(position), self.found.found_on(number)
            sure = detections["scores"] >= SHOWN
            annotated: dict[str, Any] = {"boxes": val.boxes[there], "labels": val.labels[there]}
            detected = {name: detections[name][sure] for name in ("boxes", "labels", "scores")}
            if val.masks is not None:
                shape = image.shape[:2]
                annotated["masks"] = [
                    val.mask(box, shape) for box in range(there.start, there.stop)
                ]
                detected["masks"] = [
                    detections["mask_of"](n) for n in np.flatnonzero(sure).tolist()
                ]
            shown.append(
                {
                    "key": val.names[position],
                    "image": image,
                    "annotated": annotated,
                    "found": detected,
                }
            )
        title = f"{self.context.run}: {len(val):,} images to measure on"
        return sheet_of_boxes(title, shown, self.data.classes)


def _write_tables(run: Path, measured: AveragePrecision, figures: dict[str, Any]) -> None:
    """classes.csv and confusion.csv."""
    val, kinds = measured.truth, measured.kinds
    single = val.labels[~val.crowd]
    with open(run / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "boxes", *(f"{kind}_ap" for kind in kinds)])
        for label, name in enumerate(val.classes):
            aps = [figures[f"{kind}_classes"][label] for kind in kinds]
            writer.writerow(
                [name, int((single == label).sum()), *("" if a is None else a for a in aps)]
            )
    names, counts = [*val.classes, "nothing"], measured.confusion()
    with open(run / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["is", "taken for", "boxes"])
        writer.writerows(
            [names[a], names[b], int(counts[a, b])] for a, b in np.argwhere(counts).tolist()
        )
