"""Pretraining: cached targets in, a student out. The teacher never runs here."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from milan import changed, checkpoint
from milan.cache import TargetCache
from milan.config import deviations
from milan.data import Batch, CachedDataset, training_loader
from milan.device import MEAN, STD, normalise, pick_device
from milan.errors import CacheError, ConfigError, TrainError
from milan.format import Index
from milan.grids import resampled_attention, resampled_features
from milan.kernels import choose_kernels
from milan.masking import Mask, importance_mask, random_mask, visible_count
from milan.model import Student, build_student
from milan.objectives import feature_regression, pixel_regression
from milan.order import Order, StepSampler, order_of, shuffle_quality
from milan.settings import PretrainConfig, bytes_of, choice
from milan.train import Course, decay_groups, fit
from milan.watch import Silent, Watch

_BASE_LR = 1.5e-4  # for 256 images a step (MILAN, PRETRAIN.sh)
_MICRO = 256  # images a device takes at once, as published for ViT-B

# What may change between a run and its resumption, because it changes no step.
_FREE = (
    "cache", "layer", "out", "data_root", "num_workers", "device", "log_every", "save_every",
    "keep", "local", "cache_limit",
    "on_changed",  # what it took out is saved with the run
    "checkpoint_activations",
)  # fmt: skip


def resolved(config: PretrainConfig, device: torch.device) -> PretrainConfig:
    """The same with every default that depends on other fields filled in."""
    milan = config.objective == "milan"
    precision = config.precision
    if precision == "auto":
        half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
        precision = half if device.type == "cuda" else "fp32"
    micro = config.micro_batch
    if micro is None:
        micro = next(m for m in range(min(_MICRO, config.batch_size), 0, -1)
                     if config.batch_size % m == 0)  # fmt: skip
    if config.batch_size % micro:
        raise ConfigError(
            f"batch size {config.batch_size} with micro-batches of {micro}",
            expected="a whole number of micro-batches",
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    filled = {
        "decoder_kind": config.decoder_kind or ("prompt" if milan else "mae"),
        "masking": config.masking or ("semantic" if milan else "random"),
        "warmup_epochs": config.epochs / 10
        if config.warmup_epochs is None
        else config.warmup_epochs,
        "lr": config.lr or _BASE_LR * config.batch_size / 256,
        "micro_batch": micro,
        "precision": precision,
        "num_workers": max(1, min(8, (cores or 1) - 1))
        if config.num_workers is None
        else config.num_workers,
    }
    return PretrainConfig(**{**asdict(config), **filled})


def pretrain(
    cache: str | PretrainConfig = "targets.zarr",
    *,
    resume: str = "auto",
    overwrite: bool = False,
    stop_after: int | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a student on a finished store; the run's folder then holds `encoder.safetensors`.

    `cache` and `settings` are the command's arguments (PretrainConfig's fields). `resume="auto"`
    goes on from the newest checkpoint of the same settings, `"never"` starts anew; `overwrite`
    replaces a run of other settings instead of refusing. Returns the figures of metrics.json.
    Raises MilanError.
    """
    config = cache if isinstance(cache, PretrainConfig) else PretrainConfig(cache=cache, **settings)
    watch = watch or Silent()
    config.check()
    choice("resume", resume, ("auto", "never"))
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"max_steps {stop_after}", expected="at least 1")
    device = pick_device(config.device)
    published = deviations(config, leave=("cache", "out", "data_root", "local", "cache_limit"))
    config = resolved(config, device)
    run = Path(config.out)
    pinned = _pinned(run, config) if resume == "auto" and not overwrite else None
    targets = TargetCache(config.cache, layer=config.layer, pinned=pinned)
    targets.check_files()
    dataset = CachedDataset(targets, data_root=config.data_root)
    _tell(config, targets, published, watch)

    order = order_of(
        targets,
        seed=config.seed,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        window_rows=config.window_rows,
    )
    if config.local and config.cache_limit:
        limit = bytes_of(config.cache_limit)
        check_room(order, targets, limit)
        targets.use_local(Path(config.local), limit)
        watch.note(f"local copies: {limit:,} bytes of shards at most, below {config.local}")
    student = student_of(config, targets).to(device)
    choose_kernels(student, device, config.precision)
    optimiser = optimiser_of(student, config, device)
    objective = loss_function(student, config, targets, device)
    step = _take_run(run, config, targets, resume, overwrite, published, watch)
    order = changed.take_out(run, dataset, order, policy=config.on_changed, step=step, watch=watch)
    course = Course(
        epochs=config.epochs,
        steps_per_epoch=order.steps,
        batch_size=config.batch_size,
        accumulate=config.batch_size // config.micro_batch,  # type: ignore[operator]
        lr=config.lr,  # type: ignore[arg-type]
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        min_lr=config.min_lr,
        precision=config.precision,
        save_every=config.save_every or max(50, order.steps),
        keep=config.keep,
        log_every=config.log_every,
    )
    watch.note(
        f"steps: {course.steps:,} of {config.batch_size} images "
        f"({course.accumulate} x {config.micro_batch}), {order.steps} an epoch, "
        f"{config.precision} on {device}, {config.num_workers} loader workers"
    )
    watch.note(f"shuffle: {shuffle_told(order)}")

    def batches_from(step: int) -> Any:
        sampler = StepSampler(order, start=step, stop=course.steps, micro=config.micro_batch)  # type: ignore[arg-type]
        return training_loader(
            dataset,
            sampler,
            features=config.objective == "milan",
            num_workers=config.num_workers,  # type: ignore[arg-type]
            pin_memory=device.type == "cuda",
            patches=student.patches,
        )

    figures = fit(
        student,
        optimiser,
        course=course,
        run=run,
        device=device,
        batches_from=batches_from,
        loss_of_batch=objective,
        rows_of_batch=lambda batch: batch.rows.tolist(),
        watch=watch,
        stop_after=stop_after,
    )
    about = {
        "model": config.model,
        "model_args": config.model_args,
        "mean": MEAN,
        "std": STD,
        "input_size": targets.view_spec.size,
        "objective": config.objective,
        "epochs": figures["step"] / order.steps,
        "cache": targets.digest,
        "teacher": targets.attributes["about"],
        "milan": version("milan-pretrain"),
    }
    checkpoint.save_encoder(run / checkpoint.ENCODER, student.encoder, about)
    metrics_path = run / "metrics.json"
    if not figures["seconds"]:
        watch.note(f"nothing is left to do: {run} is at step {course.steps} of {course.steps}")
        if metrics_path.exists():  # the figures of the call that trained
            figures = json.loads(metrics_path.read_text())
    checkpoint.write_json(metrics_path, figures)
    return figures | {"run": str(run)}


def check_room(order: Order, targets: TargetCache, limit: int) -> None:
    """Raises ConfigError if the shards of a window are more than `limit` bytes."""
    shards = min(order.window_shards, len(np.unique(order.shards)))
    one = max(int(g.sizes().clip(0).sum(axis=1).max()) for g in targets.generations)
    if shards * one > limit:
        raise ConfigError(
            f"a window of {shards:,} shards takes {shards * one:,} bytes, cache_limit is {limit:,}",
            expected="room for one window, better for two",
            fix="a larger --cache-limit, or a smaller window: --set window_rows=N",
        )


def shuffle_told(order: Order) -> str:
    """How the images are mixed, and how near that is to a full permutation, in words."""
    count = len(np.unique(order.shards))
    whole = order.window_shards >= count
    what = "global" if whole else f"windows of {order.window_shards:,} of {count:,} shards"
    return f"{what}, {shuffle_quality(order.epoch(0)[0]):.2f} of a full permutation's quality"


def student_of(config: PretrainConfig, targets: TargetCache) -> Student:
    """The student for views and targets of the store. Raises ConfigError."""
    milan = config.objective == "milan"
    patch = config.model_args.get("patch_size") or _patch_of(config.model)
    if not isinstance(patch, int):
        raise ConfigError(f"patch_size {patch!r} of the model", expected="a number of pixels")
    student = build_student(
        config.model,
        img_size=targets.view_spec.size,
        target_width=targets.spec.channels if milan else 3 * patch * patch,
        decoder_kind=config.decoder_kind or "prompt",
        model_args=config.model_args,
        decoder=config.decoder,
        seed=config.seed,
        recompute=config.checkpoint_activations,
    )
    visible_count(student.patches, config.mask_ratio)  # refuses a ratio before the run begins
    return student


def optimiser_of(
    student: Student, config: PretrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW as published; its rate is set at every step."""
    return torch.optim.AdamW(
        decay_groups(student, config.weight_decay),
        lr=0.0,
        betas=(0.9, config.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def _patch_of(model: str) -> int:
    from milan.model import build_encoder

    return build_encoder(model, img_size=224, args={"depth": 1}).patch_embed.patch_size[0]


def loss_function(
    student: Student, config: PretrainConfig, targets: TargetCache, device: torch.device
) -> Callable[[Batch], torch.Tensor]:
    """The objective as a function of a batch.

    Targets of another grid than the student's are resampled: unit vectors, for only directions
    count, and a long one must not drown its neighbours.
    """

    def loss(batch: Batch) -> torch.Tensor:
        batch = batch.to(device)
        images = normalise(batch.pixels, MEAN, STD)
        patches = batch.noise.shape[1]
        visible = visible_count(patches, config.mask_ratio)
        prediction, mask = predict(student, images, batch, config.masking, visible)
        if config.objective == "pixels":
            patch = images.shape[2] // round(patches**0.5)
            return pixel_regression(prediction, images, mask.boolean(), patch=patch)
        assert batch.codes is not None
        features = targets.codec.decode(batch.codes, batch.scale)
        if features.shape[1] != 1 + patches:
            features = resampled_features(F.normalize(features, dim=-1), patches)
        # A student without class token predicts patches only.
        return feature_regression(prediction, features[:, -prediction.shape[1] :])

    return loss


def predict(
    student: Student, images: torch.Tensor, batch: Batch, masking: str | None, visible: int
) -> tuple[torch.Tensor, Mask]:
    """Mask and predict: (predictions [B, T, C], the mask)."""
    if masking == "semantic":
        attention, patches = batch.attention, batch.noise.shape[1]
        if attention.shape[1] != patches:
            attention = resampled_attention(attention, patches)
        mask = importance_mask(attention, batch.noise, visible=visible)
    else:
        mask = random_mask(batch.noise, visible=visible)
    return student(images, mask), mask


def _tell(
    config: PretrainConfig, targets: TargetCache, published: dict[str, Any], watch: Watch
) -> None:
    about, spec = targets.attributes["about"], targets.spec
    random = ", RANDOM WEIGHTS" if about["random_weights"] else ""
    watch.note(
        f"cache: {config.cache}, {targets.rows:,} images x {targets.views} views, {spec.codec}, "
        f"teacher {about['name']} ({about['pretrained']}{random}), {targets.digest[:12]}"
    )
    newest = len(Index.read(targets.path).generations)
    if targets.pinned < newest:
        watch.note(
            f"pinned: the first {targets.pinned} of {newest} generations, as the run began; "
            "what was added since is not read"
        )
    if targets.bad:
        watch.note(f"left out by plan: {len(targets.bad)} images without targets")
    told = ", ".join(f"{key} {value}" for key, (value, _) in published.items())
    watch.note(f"differs from the published recipe: {told or 'nothing'}")
    watch.note(
        f"objective: {config.objective}, {config.masking} masks of {config.mask_ratio:.0%}, "
        f"{config.decoder_kind} decoder, {config.epochs} epochs, lr {config.lr:.3g}, "
        f"warm-up {config.warmup_epochs:g}"
    )


def _identity(config: PretrainConfig, targets: TargetCache) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    fixed = {k: v for k, v in asdict(config).items() if k not in _FREE}
    return json.loads(json.dumps({"cache": targets.digest, **fixed}))


def _pinned(run: Path, config: PretrainConfig) -> int | None:
    """How many generations of the store a run began with, if it is to go on and they are there.

    A store may have grown since: the run goes on with what it knew.
    """
    if not (checkpoint.steps(run) and (run / "run.json").exists()):
        return None
    there = json.loads((run / "run.json").read_text())
    try:
        before = TargetCache(config.cache, layer=config.layer, pinned=there.get("generations"))
    except CacheError:
        return None  # the newest will say what is wrong
    return before.pinned if before.digest == there["identity"]["cache"] else None


def _take_run(
    run: Path,
    config: PretrainConfig,
    targets: TargetCache,
    resume: str,
    overwrite: bool,
    published: dict[str, Any],
    watch: Watch,
) -> int:
    """Make the run's folder ready: fresh, or with the run that is to go on; returns its step."""
    identity = _identity(config, targets)
    try:
        checkpoint.make_writable(run)
    except OSError as error:
        raise TrainError(
            f"{run} cannot be written: {error.strerror}", fix="--out another folder"
        ) from None
    there = run / "run.json"
    saved = checkpoint.steps(run)
    # What a run leaves at its end, or what is not ours: lost, if this run began here at step 0.
    ends = [checkpoint.ENCODER, "metrics.json"]
    ends += [] if there.exists() else ["log.jsonl", "curves.csv", "tensorboard", checkpoint.FOLDER]
    kept = [name for name in ends if (run / name).exists()]
    if kept and not (saved and there.exists()) and not overwrite and resume == "auto":
        raise TrainError(
            f"{run} holds {', '.join(kept)}, and no run that can go on",
            expected="an empty folder, or a run with its run.json and checkpoints",
            fix="--out another folder, or --overwrite to replace them",
        )
    if saved and there.exists():
        before = json.loads(there.read_text())["identity"]
        differing = [k for k in identity if before.get(k) != identity[k]]
        if resume == "never" or (differing and overwrite):
            shutil.rmtree(run / checkpoint.FOLDER)
            saved = []
        elif differing:
            told = ", ".join(f"{k}: {before.get(k)} != {identity[k]}" for k in differing)
            raise TrainError(
                f"{run} holds a run of other settings ({told})",
                expected="the settings it was started with",
                fix="--out another folder, or --overwrite (or --resume never) to start it anew",
            )
    if saved:
        watch.note(f"resuming: {run} at step {saved[-1]}")
        return saved[-1]
    for name in ("log.jsonl", "curves.csv", "metrics.json", checkpoint.ENCODER, changed.CSV):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    checkpoint.write_json(
        there,
        {
            "identity": identity,
            "config": asdict(config),
            "differs": {k: list(v) for k, v in published.items()},
            "fingerprint": targets.spec.fingerprint(),
            "generations": targets.pinned,
            "versions": {n: version(n) for n in ("torch", "timm", "tensorstore", "numpy")},
            "command": sys.argv,
            "platform": platform.platform(),
        },
    )
    return 0
