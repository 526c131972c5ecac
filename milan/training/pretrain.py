"""Pretraining: cached targets in, a student out. The teacher never runs here."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.config import PretrainConfig, choice
from milan.core.atomic import write_json
from milan.core.config_resolver import deviations, from_call, load_recipe
from milan.core.device import MEAN, STD, pick_device
from milan.core.distributed import SINGLE, Ranks, parallelise, process_group
from milan.core.launch import launch
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop, on_stop_signals
from milan.core.units import parse_bytes
from milan.data import changed_images
from milan.data.dataset import CachedDataset, training_loader
from milan.data.order import Order, StepSampler, Stream, Stretches, order_of, shuffle_quality
from milan.errors import ConfigError
from milan.models.export import ENCODER, save_encoder
from milan.models.kernels import choose_kernels
from milan.models.student import Student
from milan.reporting import trackers
from milan.reporting.log import RunLog, kept_lines, last_of, write_curves
from milan.store.cache import TargetCache
from milan.store.format import Index
from milan.training import checkpoint
from milan.training import run as runs
from milan.training.build import Task, optimiser_of, student_of
from milan.training.faults import as_train_error
from milan.training.loop import fit
from milan.training.optim import Schedule
from milan.training.validation import check_labels

_BASE_LR = 1.5e-4  # for 256 images a step (MILAN, PRETRAIN.sh)
_MICRO = 256  # images a device takes at once, as published for ViT-B
_CACHED = 32 * 2**20  # bytes: about the last-level cache of a CPU


def resolve_defaults(
    config: PretrainConfig, device: torch.device, ranks: Ranks = SINGLE
) -> PretrainConfig:
    """The same with every default that depends on other fields filled in, but for micro_batch."""
    milan = config.objective == "milan"
    precision = config.precision
    if precision == "auto":
        half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
        precision = half if device.type == "cuda" else "fp32"
    share = config.batch_size // ranks.size
    if config.batch_size % ranks.size:
        raise ConfigError(
            f"batch size {config.batch_size} over {ranks.size} ranks",
            expected="as many images for every rank",
            fix=f"--batch-size {(share + 1) * ranks.size}"
            + ("" if share else f", or at most {config.batch_size} ranks (--devices)"),
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return replace(
        config,
        decoder_kind=config.decoder_kind or ("prompt" if milan else "mae"),
        masking=config.masking or ("semantic" if milan else "random"),
        warmup_epochs=config.epochs / 10 if config.warmup_epochs is None else config.warmup_epochs,
        lr=config.lr or _BASE_LR * config.batch_size / 256,
        precision=precision,
        num_workers=max(1, min(8, (cores or 1) // ranks.on_node - 1))
        if config.num_workers is None
        else config.num_workers,
    )


def in_micro_batches(
    config: PretrainConfig,
    student: Student,
    device: torch.device,
    ranks: Ranks = SINGLE,
    progress: Progress | None = None,
) -> PretrainConfig:
    """The same, resolved, with the largest `micro_batch` that divides a rank's share of a step.

    At most as many images as were asked for. By default 256; on a CPU no more than keep the widest
    thing that a block makes of them in its cache (docs/performance.md).
    """
    share = config.batch_size // ranks.size
    most = config.micro_batch or _MICRO
    if device.type == "cpu" and not config.micro_batch:
        most = max(1, min(most, _CACHED // _widest(student, config.mask_ratio)))
    most = min(most, share)
    fits = next(m for m in range(most, 0, -1) if share % m == 0)
    if progress and 2 * fits <= most:
        better = max(1, round(share / most)) * most * ranks.size
        progress.note(
            f"micro-batches of {fits} images, for the {share} of a rank divide by none nearer to "
            f"{most}: --batch-size {better} is faster"
        )
    return replace(config, micro_batch=fits)


def _widest(student: Student, mask_ratio: float) -> int:
    """Bytes of the widest thing that a layer makes of an image: a hidden one of an MLP, mostly."""
    seen = (student.encoder, 1 - mask_ratio), (student.decoder, 1.0)
    return max(
        round(4 * share * student.patches * layer.out_features)
        for part, share in seen
        for layer in part.modules()
        if isinstance(layer, torch.nn.Linear)
    )


def pretrain(
    cache: str | PretrainConfig = "targets.zarr",
    *,
    resume: str = "auto",
    overwrite: bool = False,
    stop_after: int | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a student on a finished store; the run's folder then holds `encoder.safetensors`.

    `cache` and `settings` are the command's arguments (PretrainConfig's fields). `resume="auto"`
    goes on from the newest checkpoint of the same settings, `"never"` starts anew; `overwrite`
    replaces a run of other settings instead of refusing. Asked to `stop`, or by SIGINT, SIGTERM or
    SIGUSR1, it finishes its step and writes a checkpoint; a second SIGINT interrupts. With several
    GPUs it starts a process for each (in a script, call it below `if __name__ == "__main__"`).
    Returns the figures of metrics.json, `run` and `rank`, and `stopped_by` if it was asked to stop
    before its end. Raises MilanError.
    """
    config = from_call(PretrainConfig, "cache", cache, settings, "pretrain")
    config.check()
    choice("resume", resume, ("auto", "never"))
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"max_steps {stop_after}", expected="at least 1")
    device = pick_device(config.device)
    known = Ranks.from_environment()
    count = 1 if known else devices_of(config, device)
    if count > 1:
        # What does not fit is said before anything starts.
        open_stream(resolve_defaults(config, device, Ranks(size=count)))
        arguments = {"cache": config, "resume": resume, "overwrite": overwrite}
        return launch(
            pretrain,
            arguments | {"stop_after": stop_after},
            ranks=count,
            restarts=config.max_restarts,
            restart_arguments=runs.again(Path(config.out)),
            progress=progress or NoProgress(),
        )
    stop = stop or Stop()
    with (
        on_stop_signals(stop.request),
        process_group(known, device) as (ranks, own),
        ExitStack() as held,
    ):
        progress = progress if progress and ranks.is_rank0 else NoProgress()
        return _train(config, ranks, own, held, resume, overwrite, stop_after, stop, progress)


def devices_of(config: PretrainConfig, device: torch.device) -> int:
    """How many ranks this machine gets: one a GPU, or as many as asked for. Raises ConfigError."""
    seen = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if config.devices is None:
        return seen
    if device.type == "cuda" and config.devices > seen:
        raise ConfigError(f"devices {config.devices}", expected=f"at most the {seen} GPUs here")
    return config.devices


def _train(
    config: PretrainConfig,
    ranks: Ranks,
    device: torch.device,
    held: ExitStack,
    resume: str,
    overwrite: bool,
    stop_after: int | None,
    stop: Stop,
    progress: Progress,
) -> dict[str, Any]:
    """One rank's part of a run; what it has `held` is let go of at its end."""
    published = deviations(
        config,
        recipe=load_recipe(PretrainConfig, config.recipe, "pretrain"),
        leave=("cache", "out", "data_root", "local", "cache_limit", "recipe"),
    )
    config = resolve_defaults(config, device, ranks)
    run = Path(config.out)
    step = ranks.on_rank0(
        lambda: runs.step_to_resume(
            run, config, resume=resume, overwrite=overwrite, progress=progress
        )
    )

    def claim() -> None:
        ranks.on_rank0(lambda: held.enter_context(runs.locked(run, progress=progress)))

    stream: Stream
    if step is None:
        # A store may grow at this moment: all ranks see what the first one saw.
        pinned = ranks.on_rank0(lambda: TargetCache(config.cache, layer=config.layer).pinned)
        stream, targets = open_stream(config, pinned)
    else:
        claim()
        stream, targets = _resumed_stream(run, config, step, ranks)
    targets.check_files()
    dataset = CachedDataset(targets, data_root=config.data_root)
    ranks.on_rank0(lambda: trackers.check(config.report_to))
    if config.probe_every:
        check_labels(dataset, stream.of_epoch(config.epochs))
    _tell(config, targets, published, progress)
    if config.local and config.cache_limit:
        limit = parse_bytes(config.cache_limit)
        check_room(stream.of_epoch(config.epochs), targets, limit)
        targets.use_local(Path(config.local), limit)
        progress.note(f"local copies: {limit:,} bytes of shards at most, below {config.local}")
    student = student_of(config, targets).to(device)
    config = in_micro_batches(config, student, device, ranks, progress)
    if step is None:
        claim()
        ranks.on_rank0(lambda: runs.begin(run, config, targets, published))
    else:
        progress.note(f"resuming: {run} at step {step}")
    stream = changed_images.take_out(
        run, dataset, stream, policy=config.on_changed, step=step or 0, ranks=ranks, stop=stop,
        progress=progress,
    )  # fmt: skip
    choose_kernels(student, device, config.precision)
    network = parallelise(student, ranks, config.parallel)
    optimiser = optimiser_of(student, config, device)
    schedule = schedule_of(config, stream, ranks.size)
    steps_an_epoch = stream.of_epoch(config.epochs).steps
    progress.note(
        f"steps: {schedule.steps:,} of {config.batch_size} images "
        f"({_product(ranks.size, schedule.accumulate, config.micro_batch)}), {steps_an_epoch} an "
        f"epoch, {config.precision} on {device.type}, {config.num_workers} loader workers"
    )
    progress.note(f"shuffle: {describe_shuffle(stream.of_epoch(config.epochs))}")
    progress.note(describe_validation(stream.of_epoch(config.epochs), config.held_out))
    task = Task(config, student, network, dataset, stream, ranks, device)

    def batches_from(step: int) -> Any:
        task.sampler = StepSampler(
            stream,
            start=step,
            stop=schedule.steps,
            micro=config.micro_batch,  # type: ignore[arg-type]
            rank=ranks.rank,
            ranks=ranks.size,
            aside=task.judged.addresses,
        )
        return training_loader(
            dataset,
            task.sampler,
            features=config.objective == "milan",
            num_workers=config.num_workers,  # type: ignore[arg-type]
            pin_memory=device.type == "cuda",
            patches=student.patches,
        )

    log = None
    if ranks.is_rank0 and (step or 0) < schedule.steps:
        log = RunLog(run, step or 0, trackers.open_trackers(config.report_to, run, step or 0))
    with as_train_error(run, config.micro_batch):
        figures = fit(
            task,
            optimiser,
            schedule=schedule,
            run=run,
            resumed=step,
            ranks=ranks,
            device=device,
            batches_from=batches_from,
            log=log,
            progress=progress,
            stop=stop,
            stop_after=stop_after,
        )
        weights = checkpoint.whole_weights(student.encoder, ranks)
        if figures["step"]:
            ranks.on_rank0(lambda: _finish(run, config, figures, targets, weights, schedule))
        if log:
            log.close()
    if (step or 0) == schedule.steps:
        progress.note(
            f"nothing is left to do: {run} is at step {schedule.steps} of {schedule.steps}"
        )
    if figures["step"]:
        figures |= ranks.on_rank0(lambda: json.loads((run / runs.METRICS).read_text()))
    return figures | {"run": str(run), "rank": ranks.rank}


def schedule_of(config: PretrainConfig, stream: Stream, ranks: int) -> Schedule:
    """How a run of resolved settings goes."""
    return Schedule(
        stream=stream,
        epochs=config.epochs,
        accumulate=config.batch_size // ranks // config.micro_batch,  # type: ignore[operator]
        lr=config.lr,  # type: ignore[arg-type]
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        min_lr=config.min_lr,
        precision=config.precision,
        save_every=config.save_every or max(50, stream.of_epoch(config.epochs).steps),
        save_minutes=config.save_minutes,
        keep=config.keep,
        log_every=config.log_every,
        on_nonfinite=config.on_nonfinite,
        clip_grad=config.clip_grad,
    )


def open_stream(config: PretrainConfig, pinned: int | None = None) -> tuple[Order, TargetCache]:
    """Which images come when in a run that begins now, and the store it reads.

    `pinned`: only the first so many of the store's generations.
    """
    cache = TargetCache(config.cache, layer=config.layer, pinned=pinned)
    return _order(cache, config), cache


def _order(cache: TargetCache, config: PretrainConfig) -> Order:
    return order_of(
        cache,
        seed=config.seed,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        window_rows=config.window_rows,
        held_out=config.held_out,
    )


def _resumed_stream(
    run: Path, config: PretrainConfig, step: int, ranks: Ranks
) -> tuple[Stream, TargetCache]:
    """The stream of a run that goes on, and the newest part of the store that it sees."""

    def parts() -> tuple[Stretches, TargetCache]:
        found = runs.stretches(ranks.on_rank0(lambda: runs.read_run(run)["stretches"]), config)
        return Stretches(tuple((at, _order(cache, config)) for at, cache in found)), found[-1][1]

    stream, cache = parts()
    if config.on_growth == "move":
        epoch, within = stream.at(step)
        ranks.on_rank0(lambda: runs.move_on(run, config, epoch + (within > 0)))
        stream, cache = parts()
    return stream, cache


def _finish(
    run: Path,
    config: PretrainConfig,
    figures: dict[str, Any],
    targets: TargetCache,
    weights: dict[str, torch.Tensor],
    schedule: Schedule,
) -> None:
    """Leave the encoder, and the figures of the call that trained last."""
    encoder = {
        "model": config.model,
        "model_args": config.model_args,
        "mean": MEAN,
        "std": STD,
        "input_size": targets.view_spec.size,
        "objective": config.objective,
        "epochs": round(schedule.epoch(figures["step"]), 4),
        "cache": targets.digest,
        "teacher": targets.attributes["about"],
        "milan": version("milan-pretrain"),
    }
    save_encoder(run / ENCODER, weights, encoder)
    lines = kept_lines(run, figures["step"])
    write_curves(run, lines)
    path = run / runs.METRICS
    if "images_per_second" not in figures and path.exists():  # nothing was left to do
        before = json.loads(path.read_text())
        figures = before if before["step"] == figures["step"] else figures
    kept = {name: value for name, value in figures.items() if name != "stopped_by"}
    write_json(path, kept | last_of(lines))


def _product(*factors: int | None) -> str:
    return " x ".join(str(f) for i, f in enumerate(factors) if i or f != 1)


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


def describe_shuffle(order: Order) -> str:
    """How the images are mixed, and how near that is to a full permutation, in words."""
    count = len(np.unique(order.shards))
    whole = order.window_shards >= count
    what = "global" if whole else f"windows of {order.window_shards:,} of {count:,} shards"
    return f"{what}, {shuffle_quality(order.epoch(0)[0]):.2f} of a full permutation's quality"


def describe_validation(order: Order, share: float) -> str:
    """By how many images a run is judged, in words."""
    held, rows = len(order.held), len(order.held) + len(order.good)
    if held or not share:
        return f"held out: {held:,} of {rows:,} images"
    return f"held out: none, for {share:.1%} of {rows:,} images is fewer than 8: --held-out"


def _tell(
    config: PretrainConfig, targets: TargetCache, published: dict[str, Any], progress: Progress
) -> None:
    about, spec = targets.attributes["about"], targets.spec
    random = ", RANDOM WEIGHTS" if about["random_weights"] else ""
    progress.note(
        f"cache: {config.cache}, {targets.rows:,} images x {targets.views} views, {spec.codec}, "
        f"teacher {about['name']} ({about['pretrained']}{random}), {targets.digest[:12]}"
    )
    newest = len(Index.read(targets.path).generations)
    if targets.pinned < newest:
        progress.note(
            f"pinned: the first {targets.pinned} of {newest} generations, as the run knows "
            "them; what was added since is not read"
        )
    if targets.bad:
        progress.note(f"left out by plan: {len(targets.bad)} images without targets")
    told = ", ".join(f"{key} {value}" for key, (value, _) in published.items())
    progress.note(f"differs from the published recipe {config.recipe}: {told or 'nothing'}")
    progress.note(
        f"objective: {config.objective}, {config.masking} masks of {config.mask_ratio:.0%}, "
        f"{config.decoder_kind} decoder, {config.epochs} epochs, lr {config.lr:.3g}, "
        f"warm-up {config.warmup_epochs:g}"
    )
