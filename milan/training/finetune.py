"""Fine-tuning: an encoder and a new head, all weights trained on labelled images.

The published recipe (MILAN, MAE: main_finetune.py) by timm's parts: layer-wise learning rates, drop
path, RandAugment, random erasing, mixup and cutmix, label smoothing. Run, log, checkpoints, resume
and ranks are the pretraining's.

    runs/pretrain/finetune/       run.json, log.jsonl, curves.csv, checkpoints/ as of a pretraining
      classifier.safetensors      encoder and head, as timm names them (load_classifier)
      classes.csv confusion.csv   per class; how often which class was taken for which
    runs/pretrain/finetune.json   the metrics
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from milan.core import rng
from milan.core.atomic import write_json
from milan.core.config_resolver import deviations, from_call, load_recipe
from milan.core.device import autocast, normalise, pick_device, ranks_here
from milan.core.distributed import Ranks, parallelise
from milan.core.launch import as_rank, launch
from milan.core.machine import cpu_count
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.waiting import Stopped
from milan.data.loader import batch_loader, batch_wait
from milan.data.sampler import Address, Kind, StepSampler, split_over_ranks
from milan.errors import ConfigError, DataError
from milan.evaluation.meaning import accuracy_interval, chance
from milan.evaluation.protocols import FinetuneConfig
from milan.evaluation.splits import Split, open_splits
from milan.models.classifier import CLASSIFIER, describe_input, new_weights, seeded_classifier
from milan.models.export import read_about, save_encoder
from milan.models.weights import Weights, find_weights, misfit, resampled
from milan.reporting.log import RunLog, read_log, write_curves
from milan.reporting.run_files import METRICS, read_metrics, read_run
from milan.reporting.trackers import check_trackers, open_trackers
from milan.training import checkpoint
from milan.training.build import precision_of
from milan.training.finetune_data import (
    Augmentation,
    LabelledBatch,
    LabelledImages,
    seeded,
    shuffled,
)
from milan.training.loop import Context, fit
from milan.training.machine_errors import as_train_error
from milan.training.optim import Schedule
from milan.training.run import (
    Differing,
    compared,
    continue_run,
    decide,
    identity_of,
    locked,
    restart_arguments,
    start_run,
)

_BASE_LR = 1e-4  # for 256 images a step (MILAN, FINETUNE.md)
_MICRO_BATCH = 128  # images a GPU takes at once, as published for ViT-B
_CPU_MICRO_BATCH = 32
_PLACES = (
    "checkpoint", "data", "val_data", "data_root", "split", "val_split", "out", "recipe", "like",
    "model", "model_args", "overwrite", "device", "devices", "num_workers",
)  # fmt: skip
"""Settings that no recipe has."""


def finetune(
    checkpoint: str | FinetuneConfig = "runs/pretrain",
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train an encoder and a new head on labelled images, and measure the classifier.

    `checkpoint` and `settings` are the command's arguments (FinetuneConfig's fields). Called again
    it goes on from the newest checkpoint. With several GPUs it starts a rank for each. Returns the
    metrics of the last epoch's validation: top1 with its 95 % interval, top5 (None with 5 classes
    and less) and chance in percent, counts, and the run's folder; ranks after the first return {}.
    Asked to stop, or by SIGINT, SIGTERM or SIGUSR1, it finishes its step, writes a checkpoint and
    returns {"stopped_by": signal}. Raises MilanError, and RankError if other ranks are out of
    reach.
    """
    config = from_call(FinetuneConfig, "checkpoint", checkpoint, settings, "finetune")
    config.check()
    device = pick_device(config.device)
    given = Ranks.from_environment()
    count = 1 if given else ranks_here(config.device, device, config.devices)
    stop = stop or Stop()
    progress = progress if progress and not (given and given.rank) else NoProgress()
    try:
        if count > 1:
            begun, goes_on = restart_arguments(config.run), replace(config, overwrite=False)
            return launch(
                finetune,
                {"checkpoint": config},
                ranks=count,
                restarts=config.max_restarts,
                restart_arguments=lambda: {"checkpoint": goes_on} if begun() else {},
                progress=progress,
            )
        with (
            as_rank(given, device, stop=stop, progress=progress) as (ranks, own),
            ExitStack() as until_end,
        ):
            context = Context(config.run, own, ranks, progress, stop)
            with as_train_error(context.run, None):
                figures = _finetune(config, context, until_end)
                return figures if ranks.is_rank0 else {}
    except Stopped as stopped:
        return {"stopped_by": stopped.by}


@dataclass(frozen=True)
class _Plan:
    """A FinetuneConfig with every default filled in that depends on another field or the device."""

    config: FinetuneConfig
    lr: float
    warmup_epochs: float
    precision: str
    num_workers: int
    size: int
    """Edge of the images in pixels."""
    mean: tuple[float, ...]
    """Of the encoder's normalisation."""

    @property
    def augmentation(self) -> Augmentation:
        """What training images become."""
        config = self.config
        return Augmentation(self.size, config.scale, config.hflip, config.auto_augment, self.mean)

    def values(self, **more: Any) -> dict[str, Any]:
        """All settings by name, as run.json keeps them."""
        filled = {name: value for name, value in vars(self).items() if name != "config"}
        return asdict(self.config) | filled | more


@dataclass(frozen=True)
class _Data:
    """Labelled images, whose classes are numbered from 0 as training has them."""

    train: Split
    val: Split
    names: list[str]
    """Of the classes."""

    def key(self, position: int) -> str:
        """Name of an image of a batch: training images are counted first."""
        train = len(self.train.rows)
        return self.train.key(position) if position < train else self.val.key(position - train)

    @property
    def identity(self) -> str:
        """Changes with the images, their order and their labels."""
        sha = hashlib.sha256()
        for split in (self.train, self.val):
            sha.update(split.of.identity.encode())
            sha.update(split.rows.tobytes() + split.labels.tobytes())
        return sha.hexdigest()


def _finetune(config: FinetuneConfig, context: Context, until_end: ExitStack) -> dict[str, Any]:
    """One rank's part of a run; its lock is released when `until_end` closes."""
    run, ranks, progress = context.run, context.ranks, context.progress
    differs = deviations(
        config, recipe=load_recipe(FinetuneConfig, config.recipe, "finetune"), leave=_PLACES
    )
    ranks.on_rank0(lambda: until_end.enter_context(locked(run, progress=progress)))
    data = ranks.on_rank0(lambda: _open_data(config, progress))
    weights = _weights_of(config)
    plan = _plan_of(config, weights, context)
    vit = classifier_of(weights, config, size=plan.size, classes=len(data.names))
    micro_batch = _micro_batch(plan, context)
    values = plan.values(micro_batch=micro_batch, classes=len(data.names))
    identity = {"data": data.identity, "weights": _digest(weights)}
    identity |= identity_of(FinetuneConfig, values)
    start = ranks.on_rank0(
        lambda: decide(
            run,
            lambda: _differing(run, identity),
            resume="auto",
            overwrite=config.overwrite,
            progress=progress,
        )
    )
    _note(plan, data, weights, differs, context)
    if start.step is None:
        if start.why:
            progress.note(f"begins anew: {run} ({start.why})")
        ranks.on_rank0(lambda: check_trackers(config.report_to))
        ranks.on_rank0(lambda: start_run(run, identity, values, differs))
    else:
        schedule = f"; a new schedule from there: {', '.join(start.schedule)}"
        progress.note(f"resuming: {run} at step {start.step}{schedule if start.schedule else ''}")
        ranks.on_rank0(lambda: continue_run(run, start, values))
    context = replace(
        context, open_log=lambda at: RunLog(run, at, open_trackers(config.report_to, run, at))
    )
    trainer = _Trainer(plan, data, vit.to(context.device), weights, micro_batch, context)
    with as_train_error(run, micro_batch):
        figures = trainer.fit(start.step)
        if not figures["finished"]:
            return {"stopped_by": figures.get("stopped_by", "the end of this call")}
        if trainer.task.outcome is None and read_metrics(run).get("step") != figures["step"]:
            trainer.measure()  # it was killed between its last step and its metrics
        if trainer.task.outcome is not None:
            state = checkpoint.whole_weights(trainer.task.judged, ranks)
            ranks.on_rank0(lambda: _finish(trainer, run, figures, state))
    if figures["seconds"] == 0:
        progress.note(f"nothing is left to do: {run} is at its last step")
    metrics = ranks.on_rank0(lambda: read_metrics(run))
    return {name: value for name, value in metrics.items() if name not in ("step", "steps")}


# --- what is trained ------------------------------------------------------------------------------


def _weights_of(config: FinetuneConfig) -> Weights:
    """Weights, model and normalisation that a run starts from. Raises ConfigError."""
    name = config.checkpoint
    if name == "teacher":
        raise ConfigError(
            "checkpoint teacher: its network is not fine-tuned here",
            expected="a run, timm:NAME, published[:FILE] or random",
            fix="--checkpoint timm:vit_base_patch16_clip_224.openai, the published teacher",
        )
    if name != "random":
        return find_weights(name, flag="--checkpoint", model=config.model, size=config.size)
    if not config.like:
        args = dict(config.model_args)
        size = config.size or int(args.pop("img_size", 224))
        return Weights({}, config.model, size, args)
    if config.like.startswith("timm:"):
        found = find_weights(config.like, flag="--like", model=config.model, size=config.size)
        return replace(found, encoder={})
    about = read_about(config.like)
    return Weights({}, about["model"], about["input_size"], about["model_args"])


def classifier_of(weights: Weights, config: FinetuneConfig, *, size: int, classes: int) -> Any:
    """A timm ViT with these weights, positions resampled for `size`, and a new head.

    Raises ConfigError for weights that do not fit.
    """
    vit = seeded_classifier(
        config.seed, weights.model, weights.args, size=size, classes=classes,
        pooling=config.pooling, drop_path=config.drop_path,
    )  # fmt: skip
    if weights.encoder:
        state, new = resampled(weights.encoder, vit), new_weights(config.pooling)
        if odd := misfit(state, vit, leave=new):
            raise ConfigError(
                f"the weights of {config.checkpoint} do not fit {weights.model}: {odd}",
                expected="the encoder of a plain ViT",
            )
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(new)}
        vit.load_state_dict(kept, strict=False)
    describe_input(vit, weights.mean, weights.std, size=size, crop_share=config.crop_share)
    return vit


def parameter_groups(vit: Any, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: `lr_scale` is layer_decay^(depth + 1 - layer); no decay for biases, norms,
    positions and tokens (MAE, util/lr_decay.py)."""
    return param_groups_layer_decay(
        vit, config.weight_decay, no_weight_decay_list=vit.no_weight_decay(),
        layer_decay=config.layer_decay,
    )  # fmt: skip


def _digest(weights: Weights) -> str:
    """Of what a run starts from: drawn weights are named by their seed."""
    sha = hashlib.sha256(f"{weights.model} {sorted(weights.args.items())}".encode())
    for name, tensor in sorted(weights.encoder.items()):
        sha.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


# --- the task -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a classifier said of all validation images."""

    labels: np.ndarray
    """[m] int64"""
    predicted: np.ndarray
    """[m] int64; -1: the image cannot be read"""
    in_top5: np.ndarray
    """[m] bool"""


class FinetuneTask:
    """Fine-tuning as the loop sees it (milan.training.loop.Task)."""

    def __init__(
        self, vit: Any, plan: _Plan, data: _Data, weights: Weights, micro_batch: int,
        context: Context,
    ) -> None:  # fmt: skip
        config = plan.config
        self.config, self.data, self.context = config, data, context
        self.precision, self.micro_batch = plan.precision, micro_batch
        self.classes = len(data.names)
        self.mean, self.std = weights.mean, weights.std
        parts = {"classifier": vit}
        if config.ema is not None:
            average = get_ema_multi_avg_fn(config.ema)
            parts["average"] = AveragedModel(vit, multi_avg_fn=average).requires_grad_(False)
        self.model: nn.Module = nn.ModuleDict(parts)
        self.network = parallelise(vit, context.ranks, "ddp")
        self.judged = parts["average"].module if config.ema is not None else vit
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, switch_prob=0.5, label_smoothing=config.smoothing,
                num_classes=self.classes,
            )  # fmt: skip
        self.erase = RandomErasing(config.erasing, mode="pixel", device=str(context.device))
        self.soft_loss = SoftTargetCrossEntropy()
        self.rejected: set[int] = set()
        """Positions of images that cannot be read, as far as this rank saw."""
        self.outcome: Outcome | None = None
        """Of the last validation."""

    def update_average(self) -> None:
        """Let the average follow the weights; called after each step of the optimiser."""
        self.model["average"].update_parameters(self.model["classifier"])  # type: ignore[index]

    def to_device(self, batch: LabelledBatch) -> LabelledBatch:
        """The micro-batch on the device; from pinned memory to CUDA the copy does not wait."""
        if not batch.readable.all():
            new = set(batch.positions[~batch.readable].tolist()) - self.rejected
            if new and not self.rejected:
                first = self.data.key(min(new))
                self.context.progress.note(
                    f"rejected files: others of their batch stand in for them, the first is {first}"
                )
            self.rejected |= new
        return batch.to(self.context.device)

    def loss(self, batch: LabelledBatch) -> torch.Tensor:
        """Cross-entropy of a micro-batch, its images erased and mixed, labels smoothed."""
        images, labels = normalise(batch.pixels, self.mean, self.std), batch.labels
        # The loop seeds torch at an address; so are the draws of timm's parts.
        with seeded(torch.initial_seed(), rng.MIXED, ()):
            images = self.erase(images)
            if self.mixup:
                images, targets = self.mixup(images, labels)
                return self.soft_loss(self.network(images), targets)
        return F.cross_entropy(self.network(images), labels, label_smoothing=self.config.smoothing)

    def describe(self, batch: LabelledBatch) -> list[str]:
        """The key of each image of a micro-batch."""
        return [self.data.key(position) for position in batch.positions.tolist()]

    def addresses(self, epoch: int) -> list[Address]:
        """This rank's micro-batches of validation images; every rank has as many."""
        rows = np.arange(len(self.data.val.rows))
        whole = Address(Kind.VALIDATION, epoch, rows, np.zeros_like(rows))
        ranks = self.context.ranks
        return split_over_ranks(whole, rank=ranks.rank, ranks=ranks.size, micro=self.micro_batch)

    def validate(
        self, epoch: int, batches: Iterator[LabelledBatch]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """val_loss, val_top1, and val_top5 where there are more than 5 classes; in percent."""
        self.judged.eval()
        total, seen = 0.0, list[tuple[np.ndarray, ...]]()
        with torch.no_grad(), autocast(self.context.device, self.precision):
            for address in self.addresses(epoch):
                batch = next(batches)
                logits = self.judged(normalise(batch.pixels, self.mean, self.std)).float()
                if address.padding:
                    continue
                known = batch.labels.clamp(min=0)  # -1: a class that training lacks
                losses = F.cross_entropy(logits, known, reduction="none")
                best = logits.topk(min(5, self.classes), dim=1).indices
                top = torch.where(batch.readable, best[:, 0], -1)
                hit = (best == batch.labels[:, None]).any(dim=1) & batch.readable
                total += float((losses * (batch.readable & (batch.labels >= 0))).sum())
                places = batch.positions - len(self.data.train.rows)
                seen.append(tuple(t.cpu().numpy() for t in (places, top, hit)))
        self.judged.train()
        return self._outcome(seen, total), {}

    def _outcome(self, seen: list[tuple[np.ndarray, ...]], total: float) -> dict[str, float]:
        """Metrics of what all ranks have seen."""
        count = len(self.data.val.rows)
        predicted, in_top5 = np.full(count, -1), np.zeros(count, bool)
        for _, parts in self.context.ranks.gather_objects(seen):
            for positions, top, hit in parts:
                predicted[positions], in_top5[positions] = top, hit
        labels = self.data.val.labels
        self.outcome = Outcome(labels, predicted, in_top5)
        read = predicted >= 0
        if not read.any():
            raise DataError(f"no image of {self.data.val.of.source} can be read")
        (total,) = self.context.ranks.all_reduce_sum([total])
        metrics = {
            "val_loss": total / max(1, int((read & (labels >= 0)).sum())),
            "val_top1": 100 * float((predicted == labels)[read].mean()),
        }
        if self.classes > 5:
            metrics["val_top5"] = 100 * float(in_top5[read].mean())
        return metrics


class _Trainer:
    """The task, its optimiser and its loader."""

    def __init__(
        self, plan: _Plan, data: _Data, vit: Any, weights: Weights, micro_batch: int,
        context: Context,
    ) -> None:  # fmt: skip
        config = plan.config
        self.plan, self.data, self.context, self.micro_batch = plan, data, context, micro_batch
        self.weights = weights
        self.task = FinetuneTask(vit, plan, data, weights, micro_batch, context)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(vit, config), lr=0.0, betas=(0.9, 0.999),
            fused=context.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        if config.ema is not None:
            self.optimiser.register_step_post_hook(lambda *_: self.task.update_average())
        self.order = shuffled(data.train, batch_size=config.batch_size, seed=config.seed)
        self.source = LabelledImages(
            data.train, data.val, plan.augmentation, crop_share=config.crop_share, seed=config.seed
        )

    def fit(self, resume_from: int | None) -> dict[str, Any]:
        """Train to the end, or until asked to stop; figures as milan.training.loop.fit has them."""
        config, ranks = self.plan.config, self.context.ranks
        schedule = Schedule(
            data=self.order, epochs=config.epochs,
            accumulate=config.batch_size // ranks.size // self.micro_batch, lr=self.plan.lr,
            warmup_epochs=self.plan.warmup_epochs, min_lr=config.min_lr,
            precision=self.plan.precision, save_every=None, save_minutes=None, keep=2,
            log_every=config.log_every, clip_grad=config.clip_grad,
        )  # fmt: skip

        def batches_from(step: int) -> Any:
            sampler = StepSampler(
                self.order, start=step, stop=schedule.steps, micro=self.micro_batch,
                rank=ranks.rank, ranks=ranks.size, after_epoch=self.task.addresses,
            )  # fmt: skip
            return self._loader(sampler)

        return fit(
            self.task, self.optimiser, schedule, self.context, batches_from=batches_from,
            resume_from=resume_from,
        )  # fmt: skip

    def measure(self) -> None:
        """Validate once more, with no training."""
        addresses = self.task.addresses(self.plan.config.epochs - 1)
        batches = (self.task.to_device(batch) for batch in self._loader(addresses))
        self.task.validate(self.plan.config.epochs - 1, batches)

    def _loader(self, addresses: Any) -> Any:
        return batch_loader(
            self.source, addresses, num_workers=self.plan.num_workers,
            pin_memory=self.context.device.type == "cuda",
            wait=batch_wait(self.context.progress, self.context.stop),
        )  # fmt: skip


# --- settings and data ----------------------------------------------------------------------------


def _plan_of(config: FinetuneConfig, weights: Weights, context: Context) -> _Plan:
    """Fill in the defaults of a run. Raises ConfigError."""
    ranks = context.ranks
    if config.batch_size % ranks.size:
        raise ConfigError(
            f"batch size {config.batch_size} over {ranks.size} ranks",
            expected="as many images for every rank",
            fix=f"--batch-size {(config.batch_size // ranks.size + 1) * ranks.size}",
        )
    workers = config.num_workers
    if workers is None:
        workers = max(1, cpu_count() // ranks.on_node - 1)
    plan = _Plan(
        config,
        lr=config.lr or _BASE_LR * config.batch_size / 256,
        warmup_epochs=config.epochs / 20 if config.warmup_epochs is None else config.warmup_epochs,
        precision=precision_of(config.precision, context.device),
        num_workers=workers,
        size=config.size or weights.size,
        mean=tuple(weights.mean),
    )
    plan.augmentation.build()  # refuses what it does not know before the run begins
    return plan


def _micro_batch(plan: _Plan, context: Context) -> int:
    """Images at once on a device: the largest number that divides a rank's share of a step.

    Mixing takes pairs: then it is even. Raises ConfigError if none is.
    """
    config = plan.config
    share = config.batch_size // context.ranks.size
    most = config.micro_batch or (
        _MICRO_BATCH if context.device.type == "cuda" else _CPU_MICRO_BATCH
    )
    pairs = 2 if config.mixup or config.cutmix else 1
    sizes = [m for m in range(1, min(most, share) + 1) if share % m == 0 and m % pairs == 0]
    if not sizes:
        raise ConfigError(
            f"batch size {config.batch_size}: {share} images a rank in micro-batches of "
            f"{most} at most",
            expected="pairs of images, which mixup and cutmix mix",
            fix=f"--batch-size {2 * context.ranks.size * max(1, share // 2)}, "
            "or --mixup 0 --cutmix 0",
        )
    return sizes[-1]


def _open_data(config: FinetuneConfig, progress: Progress) -> _Data:
    """Images to train on and to measure on. Raises DataError."""
    train, val = open_splits(config, progress)
    numbers, labels = np.unique(train.labels, return_inverse=True)
    if len(numbers) < 2:
        raise DataError(
            f"all {len(labels)} images to train on are of one class",
            expected="at least two classes",
        )
    if config.batch_size > len(labels):
        raise ConfigError(
            f"batch size {config.batch_size} with {len(labels)} images to train on",
            expected="no more than there are images",
            fix=f"--batch-size {len(labels) // 2 * 2}",
        )
    found = np.searchsorted(numbers, val.labels).clip(max=len(numbers) - 1)
    val_labels = np.where(numbers[found] == val.labels, found, -1)
    names = train.of.names or [str(number) for number in range(int(numbers.max()) + 1)]
    return _Data(
        _relabelled(train, labels),
        _relabelled(val, val_labels),
        [names[n] for n in numbers.tolist()],
    )


def _relabelled(split: Split, labels: np.ndarray) -> Split:
    """The split with `labels` [n] for its rows."""
    whole = np.full(len(split.of.labels), -1, np.int64)
    whole[split.rows] = labels
    return replace(split, of=replace(split.of, labels=whole))


def _differing(run: Path, identity: dict[str, Any]) -> Differing:
    """What differs between the fine-tuning in a folder and the one of `identity`."""
    return compared(read_run(run)["identity"], identity)


# --- what a run leaves ----------------------------------------------------------------------------


def _finish(
    trainer: _Trainer, run: Path, figures: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    """Write the classifier, its tables and its metrics."""
    plan, data, outcome = trainer.plan, trainer.data, trainer.task.outcome
    assert outcome is not None
    config, cfg = plan.config, trainer.task.judged.pretrained_cfg
    about = {
        "model": trainer.weights.model, "model_args": trainer.weights.args,
        "mean": cfg["mean"], "std": cfg["std"], "input_size": plan.size,
        "classes": data.names, "pooling": config.pooling, "crop_share": config.crop_share,
        "epochs": config.epochs, "from": config.checkpoint, "milan": version("milan-pretrain"),
    }  # fmt: skip
    save_encoder(run / CLASSIFIER, state, about)
    write_curves(run, read_log(run, figures["step"]))
    _write_tables(run, outcome, data.names)
    read = outcome.predicted >= 0
    correct = (outcome.predicted == outcome.labels)[read]
    top5 = round(100 * float(outcome.in_top5[read].mean()), 2) if len(data.names) > 5 else None
    write_json(run / METRICS, {
        "checkpoint": config.checkpoint,
        "top1": round(100 * float(correct.mean()), 2),
        "top1_interval": accuracy_interval(correct),
        "top5": top5,
        "chance": round(chance(data.train.labels, data.val.labels), 2),
        "classes": len(data.names),
        "train_images": len(data.train.rows),
        "val_images": int(read.sum()),
        "rejected_images": len(trainer.task.rejected),
        "epochs": config.epochs,
        "run": str(run),
        **{k: figures[k] for k in ("step", "steps", "finished", "images_per_second", "seconds")
           if k in figures},
    })  # fmt: skip


def _write_tables(run: Path, outcome: Outcome, names: list[str]) -> None:
    """classes.csv and confusion.csv."""
    read = (outcome.predicted >= 0) & (outcome.labels >= 0)
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (outcome.labels[read], outcome.predicted[read]), 1)
    with open(run / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "correct", "top1"])
        for name, row, right in zip(names, counts, counts.diagonal().tolist(), strict=True):
            images = int(row.sum())
            writer.writerow([name, images, right, f"{100 * right / images:.2f}" if images else ""])
    with open(run / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["is", "taken for", "images"])
        for a, b in np.argwhere(counts).tolist():
            if a != b:
                writer.writerow([names[a], names[b], int(counts[a, b])])


def _note(plan: _Plan, data: _Data, weights: Weights, differs: Differing, context: Context) -> None:
    config, progress = plan.config, context.progress
    count = len(data.train.rows)
    progress.note(
        f"fine-tuning: {config.checkpoint} ({weights.model}) at {plan.size} pixels on {count:,} "
        f"images of {len(data.names):,} classes, validated on {len(data.val.rows):,}"
    )
    changes = ", ".join(f"{name} {value}" for name, (value, _) in differs.items())
    progress.note(f"differs from the published recipe {config.recipe}: {changes or 'nothing'}")
    progress.note(
        f"steps: {config.epochs} epochs of {count // config.batch_size:,} x {config.batch_size} "
        f"images, peak learning rate {plan.lr:.3g}, layer decay {config.layer_decay:g}, "
        f"{plan.precision} on {context.device.type}, {plan.num_workers} loader workers"
    )
