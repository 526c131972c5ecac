"""Fine-tuning: an encoder and a new head, all weights trained on labelled images.

The published recipe (MILAN, MAE: main_finetune.py) by timm's parts: layer-wise learning rates, drop
path, RandAugment, random erasing, mixup and cutmix, label smoothing. The run is that of
milan.training.supervised_run; beside it there are

    runs/pretrain/finetune/classes.csv confusion.csv   per class; which was taken for which
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

from milan.core import rng
from milan.core.config_resolver import from_call
from milan.core.device import autocast, normalise
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.core.size import Size
from milan.errors import ConfigError, DataError
from milan.evaluation.config import FinetuneConfig
from milan.evaluation.meaning import chance
from milan.evaluation.outcome import TOP, Answers, Outcome
from milan.evaluation.splits import Split, open_splits
from milan.images.channels import Channels
from milan.models.classifier import CLASSIFIER, describe_input, new_weights, seeded_classifier
from milan.models.foreign import Weights
from milan.training.finetune_data import Augmentation, LabelledBatch, LabelledImages, seeded
from milan.training.loop import Context
from milan.training.supervised import (
    Plan,
    Supervised,
    SupervisedData,
    SupervisedTask,
    load_weights,
)
from milan.training.supervised_run import train_supervised


def finetune(
    checkpoint: str | FinetuneConfig = "runs/pretrain",
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train an encoder and a new head on labelled images, and measure the classifier.

    `checkpoint` and `settings` are the command's arguments (FinetuneConfig's fields). Returns the
    metrics of the last epoch's validation: top1 with its 95 % interval, top5 (None with 5 classes
    and less) and chance in percent, counts, and the run's folder; resumes, stops and raises as
    milan.training.supervised_run.train_supervised.
    """
    config = from_call(FinetuneConfig, "checkpoint", checkpoint, settings, "finetune")
    return train_supervised(Finetune, config, stop=stop, progress=progress)


@dataclass(frozen=True)
class _Data(SupervisedData):
    """Labelled images, whose classes are numbered from 0 as training has them."""

    train: Split
    val: Split
    classes: list[str]
    channels: Channels | None
    """What the encoder sees in place of RGB."""

    @property
    def train_count(self) -> int:
        """Images to train on."""
        return len(self.train.rows)

    @property
    def val_count(self) -> int:
        """Images to measure on."""
        return len(self.val.rows)

    def key(self, position: int) -> str:
        """Name of an image of a batch: training images are counted first."""
        train = len(self.train.rows)
        return self.train.key(position) if position < train else self.val.key(position - train)

    @property
    def identity(self) -> str:
        """Changes with the images, with files beside them that the encoder sees, their order and
        their labels. Raises ConfigError if nobody says where these files are."""
        sha = hashlib.sha256()
        for split in (self.train, self.val):
            sha.update(split.of.identity_for(self.channels).encode())
            sha.update(split.rows.tobytes() + split.labels.tobytes())
        return sha.hexdigest()


class Finetune(Supervised):
    """The protocol `finetune`."""

    kind, file = FinetuneConfig, CLASSIFIER
    of_rgb: ClassVar[dict[str, Any]] = {"auto_augment": "none", "corruptions": False}
    pairs = "pairs of images, which mixup and cutmix mix", ", or --mixup 0 --cutmix 0"

    @property
    def multiple(self) -> int:
        """Mixing takes pairs of images."""
        return 2 if self.config.mixup or self.config.cutmix else 1

    def open_data(self, progress: Progress) -> _Data:
        """Images to train on and to measure on. Raises DataError, and ConfigError for files beside
        them that are not named, or not seen."""
        train, val = open_splits(self.config, progress)
        for split in (train, val):
            split.of.beside.check(self.channels)
        numbers, labels = np.unique(train.labels, return_inverse=True)
        if len(numbers) < 2:
            raise DataError(
                f"all {len(labels)} images to train on are of one class",
                expected="at least two classes",
                fix="--data with images of several: class folders, or a column `label`",
            )
        positions = np.searchsorted(numbers, val.labels).clip(max=len(numbers) - 1)
        val_labels = np.where(numbers[positions] == val.labels, positions, -1)
        names = train.of.names or [str(number) for number in range(int(numbers.max()) + 1)]
        return _Data(
            _relabelled(train, labels),
            _relabelled(val, val_labels),
            [names[n] for n in numbers.tolist()],
            self.channels,
        )

    def build(self, weights: Weights, plan: Plan, data: _Data) -> Any:
        """A timm ViT with a new head. Raises ConfigError."""
        _augmentation(plan).build()  # refuses what it does not know before the run begins
        patch = weights.args.get("patch_size")
        for name in ("size", "width"):
            edge = getattr(self.config, name)
            if edge and patch and edge % patch:
                raise ConfigError(
                    f"{name} {edge} with patches of {patch} pixels",
                    expected="a multiple of the patch",
                    fix=f"--{name} {max(1, round(edge / patch)) * patch}",
                )
        return classifier_of(weights, self.config, size=plan.size, classes=len(data.classes))

    def source(self, plan: Plan, data: _Data) -> LabelledImages:
        """Augmented images to train on, centre crops to measure on."""
        return LabelledImages(
            data.train, data.val, _augmentation(plan), crop_share=self.config.crop_share,
            seed=self.config.seed, channels=self.channels,
        )  # fmt: skip

    def task(self, network: Any, plan: Plan, data: _Data, context: Context) -> FinetuneTask:
        """How it is trained and measured."""
        return FinetuneTask(network, "classifier", plan, data, context)

    def results(self, task: FinetuneTask, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its head and crop; metrics; writes classes.csv and confusion.csv."""
        outcome, data, config = task.outcome, task.data, self.config
        assert outcome is not None
        outcome.write_tables(run)
        return {"pooling": config.pooling, "crop_share": config.crop_share}, {
            **outcome.figures(),
            "chance": round(chance(data.train.labels, data.val.labels), 2),
            "val_images": int(outcome.read.sum()),
        }


def classifier_of(weights: Weights, config: FinetuneConfig, *, size: Size, classes: int) -> Any:
    """A timm ViT with these weights, positions resampled for `size`, and a new head.

    Raises ConfigError for weights that do not fit.
    """
    vit = seeded_classifier(
        config.seed, weights.model, weights.args, size=size, classes=classes,
        pooling=config.pooling, drop_path=config.drop_path, any_channels=bool(weights.channels),
    )  # fmt: skip
    load_weights(vit, weights, name=config.checkpoint, leave=new_weights(config.pooling))
    describe_input(vit, weights.mean, weights.std, size=size, crop_share=config.crop_share)
    return vit


def _augmentation(plan: Plan) -> Augmentation:
    config = plan.config
    return Augmentation(plan.size, config.scale, config.hflip, config.auto_augment, plan.mean)


def _relabelled(split: Split, labels: np.ndarray) -> Split:
    """The split with `labels` [n] for its rows."""
    whole = np.full(len(split.of.labels), -1, np.int64)
    whole[split.rows] = labels
    return replace(split, of=replace(split.of, labels=whole))


# --- the task -------------------------------------------------------------------------------------


class FinetuneTask(SupervisedTask):
    """Fine-tuning as the loop sees it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, self.classes = self.config, len(self.data.classes)
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, switch_prob=0.5, label_smoothing=config.smoothing,
                num_classes=self.classes,
            )  # fmt: skip
        device = str(self.context.device)
        self.erase = RandomErasing(config.erasing, mode="pixel", device=device)
        self.soft_loss = SoftTargetCrossEntropy()
        self.outcome: Outcome | None = None
        """Of the last validation."""

    def loss(self, batch: LabelledBatch) -> torch.Tensor:
        """Cross-entropy of a micro-batch, its images erased and mixed, labels smoothed."""
        images, labels = self._images(batch), batch.labels
        # The loop seeds torch at an address; so are the draws of timm's parts.
        with seeded(torch.initial_seed(), rng.MIXED, ()):
            images = self.erase(images)
            if self.mixup:
                images, targets = self.mixup(images, labels)
                return self.soft_loss(self.forward(images), targets)
        return F.cross_entropy(self.forward(images), labels, label_smoothing=self.config.smoothing)

    def measure(self, batches: Iterator[LabelledBatch]) -> tuple[dict[str, float], dict[str, Any]]:
        """val_loss, val_top1, and val_top5 where there are more than 5 classes; in percent."""
        total, answers = 0.0, Answers(self.data.val.labels, self.data.classes)
        with autocast(self.context.device, self.plan.precision):
            for batch in batches:
                logits = self.evaluated(self._images(batch)).float()
                known = batch.labels.clamp(min=0)  # -1: a class that training lacks
                losses = F.cross_entropy(logits, known, reduction="none")
                best = logits.topk(min(TOP, self.classes), dim=1).indices
                total += float((losses * (batch.readable & (batch.labels >= 0))).sum())
                positions = (batch.positions - self.data.train_count)[batch.readable]
                answers.see(positions.cpu().numpy(), best[batch.readable])
        return self._metrics(answers, total), {}

    def _images(self, batch: LabelledBatch) -> torch.Tensor:
        """What the network sees, [B, C, H, W]; channels of files come as it sees them."""
        if batch.pixels.is_floating_point():
            return batch.pixels
        return normalise(batch.pixels, self.plan.mean, self.plan.std)

    def _metrics(self, answers: Answers, total: float) -> dict[str, float]:
        """Metrics of what all ranks have seen."""
        self.outcome = outcome = answers.of_all(self.context.ranks)
        (total,) = self.context.ranks.all_reduce_sum([total])
        read = outcome.read
        metrics = {
            "val_loss": total / max(1, int((read & (outcome.labels >= 0)).sum())),
            "val_top1": 100 * float((outcome.predicted == outcome.labels)[read].mean()),
        }
        if self.classes > TOP:
            metrics["val_top5"] = 100 * float(outcome.in_top5[read].mean())
        return metrics
