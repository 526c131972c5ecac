"""The run of a protocol that trains an encoder with a new head (milan.training.supervised).

Folder, log, checkpoints, exact resume, ranks and restarts are those of pretraining.

    runs/pretrain/finetune/       run.json, log.jsonl, curves.csv, checkpoints/ as of a pretraining
      classifier.safetensors      encoder and head (Supervised.file)
    runs/pretrain/finetune.json   the metrics
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from milan.core.atomic import write_json
from milan.core.config_fields import as_typed
from milan.core.config_resolver import deviations
from milan.core.device import pick_device, ranks_here, tf32
from milan.core.distributed import Ranks
from milan.core.launch import as_rank, launch
from milan.core.paths import AnyPath
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.size import height_width, size_in_words
from milan.core.units import format_duration
from milan.core.versions import version
from milan.core.waiting import Stopped
from milan.data.feeding import loader_cores
from milan.data.loader import batch_loader, batch_wait
from milan.data.order import Order
from milan.data.sampler import StepSampler
from milan.errors import ConfigError, DataError
from milan.evaluation.config import SupervisedConfig
from milan.images.channels import Channels
from milan.images.manifest import resolve_data
from milan.models.export import CHANNELS, is_whole, save_encoder
from milan.models.foreign import Weights
from milan.reporting.log import RunLog, read_log, write_curves
from milan.reporting.run_files import METRICS, read_metrics
from milan.reporting.trackers import check_trackers, open_trackers
from milan.training import checkpoint
from milan.training.build import divisor, precision_of
from milan.training.compilation import compile_network, compiled
from milan.training.loop import Context, fit
from milan.training.machine_errors import as_train_error
from milan.training.optim import Schedule
from milan.training.run import (
    Differing,
    check_place,
    compared,
    continue_run,
    decide,
    identity_of,
    locked,
    restart_arguments,
    start_run,
    stored_identity,
)
from milan.training.supervised import Plan, Supervised, SupervisedTask, parameter_groups

_PLACES = (
    "checkpoint", "data", "val_data", "data_root", "split", "val_split", "out", "recipe", "like",
    "model", "model_args", "overwrite", "device", "devices", "num_workers", "save_lists",
    "corruptions", "student_data", "val_student_data", "baseline",
)  # fmt: skip
"""Settings that no recipe has."""
_SPEED = ("images_per_second", "seconds", "device")
"""Of the metrics, what a call that trains nothing does not know."""


def train_supervised(
    protocol: Callable[[Any], Supervised],
    config: SupervisedConfig,
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and measure, and then a baseline; called again it goes on from the newest checkpoint.

    With several GPUs it starts a rank for each. Returns the metrics of the last validation, which
    lie in the run's folder too, and as `baseline` those of the same network as timm initialises
    it, trained alike; ranks after the first return {}. Asked to stop, or by SIGINT,
    SIGTERM or SIGUSR1, it finishes its step, writes a checkpoint and returns {"stopped_by":
    signal}. Raises MilanError, and RankError if other ranks are out of reach.
    """
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
                train_supervised,
                {"protocol": protocol, "config": config},
                ranks=count,
                restarts=config.max_restarts,
                restart_arguments=lambda: {"config": goes_on} if begun() else {},
                progress=progress,
            )
        with as_rank(given, device, stop=stop, progress=progress) as (ranks, own):
            context = Context(config.run, own, ranks, progress, stop)
            metrics = _with_baseline(protocol, config, context)
            return metrics if ranks.is_rank0 else {}
    except Stopped as stopped:
        return {"stopped_by": stopped.by}


def _with_baseline(
    protocol: Callable[[Any], Supervised], config: SupervisedConfig, context: Context
) -> dict[str, Any]:
    """The metrics of `_train`, and as `baseline` those of the same network as timm initialises it,
    trained alike in the folder `random` of the run, if the settings ask for it."""
    progress = context.progress
    with ExitStack() as until_end, as_train_error(context.run, None):
        metrics = _train(protocol(config), context, until_end)
    if "stopped_by" in metrics or config.baseline == "none":
        return metrics
    if config.checkpoint in ("random", "teacher"):
        return metrics
    rate = metrics.get("images_per_second")
    takes = (
        f", about {format_duration(metrics['train_images'] * config.epochs / rate)}" if rate else ""
    )
    progress.note(
        f"measured: {config.run / METRICS}; now the baseline, the same network as timm initialises "
        f"it{takes} (--baseline none leaves it out)"
    )
    like = None if config.checkpoint.startswith("published") else config.checkpoint
    run = config.run / "random"
    other = replace(config, checkpoint="random", like=like, out=f"{run}.json", baseline="none")
    with ExitStack() as until_end, as_train_error(run, None):
        beside = _train(protocol(other), replace(context, run=run), until_end)
    return beside if "stopped_by" in beside else metrics | {"baseline": beside}


def _train(work: Supervised, context: Context, until_end: ExitStack) -> dict[str, Any]:
    """One rank's part of a run; its lock is released when `until_end` closes."""
    config, run, ranks, progress = work.config, context.run, context.ranks, context.progress
    differs = deviations(config, recipe=work.recipe(), leave=(*_PLACES, *work.places))
    ranks.on_rank0(lambda: check_place(run, _data_of(config)))
    ranks.on_rank0(lambda: until_end.enter_context(locked(run, progress=progress)))
    weights = work.weights()
    work.see(Channels.if_any(weights.channels))
    data = ranks.on_rank0(lambda: work.open_data(progress))
    if config.batch_size > data.train_count:
        raise ConfigError(
            f"batch size {config.batch_size} with {data.train_count} images to train on",
            expected="no more than there are images",
            fix=f"--batch-size {max(1, data.train_count // 2 * 2)}",
        )
    plan = _plan_of(work, weights, context)
    network = work.build(weights, plan, data)
    values = plan.values(classes=len(data.classes))
    identity = {"data": data.identity, "weights": _digest(weights)}
    identity |= identity_of(work.kind, values)
    start = ranks.on_rank0(
        lambda: decide(
            run,
            lambda: compared(stored_identity(run, work.kind), identity),
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
    fast = config.tf32 and plan.precision == "fp32"
    with as_train_error(run, plan.micro_batch), tf32(context.device, fast, progress):
        task = work.task(network.to(context.device), plan, data, context)
        if work.compiles:
            task.forward = _compiled(task)
        trainer = _Trainer(work, task)
        figures = trainer.fit(start.step)
        if not figures["finished"]:
            return {"stopped_by": figures.get("stopped_by", "the end of this call")}
        before = read_metrics(run)
        if not task.measured:
            # It was killed between its last step and its metrics, or somebody lost the file.
            whole = before.get("step") == figures["step"] and is_whole(run / work.file)
            if not ranks.on_rank0(lambda: whole):
                progress.note(f"written again: {run / work.file}")
                trainer.measure()
                figures = figures | {k: before[k] for k in _SPEED if k in before}
        if task.measured:
            state = checkpoint.whole_weights(task.kept, ranks)
            figures["rejected_images"] = data.left_out + len(task.rejected_of_all())
            ranks.on_rank0(lambda: _finish(work, task, weights, figures, state))
    if figures["seconds"] == 0:
        progress.note(f"nothing is left to do: {run} is at its last step")
    metrics = ranks.on_rank0(lambda: read_metrics(run))
    return {name: value for name, value in metrics.items() if name not in ("step", "steps")}


def _data_of(config: SupervisedConfig) -> list[AnyPath]:
    """Where the images are, as far as names say it."""
    paths = list[AnyPath]()
    for name in filter(None, (config.data, config.val_data)):
        with suppress(DataError):
            paths.append(resolve_data(name, config.data_root))
    return paths


def _compiled(task: SupervisedTask) -> Any:
    """The network that `loss` calls, as the setting `compile` asks for it."""
    plan, context, plain = task.plan, task.context, task.network
    shape = (plan.micro_batch, len(plan.mean), *height_width(plan.size))

    def trial(network: Any) -> torch.Tensor:
        return network(torch.zeros(shape, device=context.device)).float().mean()

    return compiled(
        plain, lambda: compile_network(plain, context), trial, network=plain,
        precision=plan.precision, choice=task.config.compile, context=context,
    )  # fmt: skip


class _Trainer:
    """The task, its optimiser and its loader."""

    def __init__(self, work: Supervised, task: SupervisedTask) -> None:
        config, plan, data = task.config, task.plan, task.data
        self.task, self.plan, self.context = task, plan, task.context
        self.optimiser = torch.optim.AdamW(
            parameter_groups(task.trained, config), lr=0.0, betas=(0.9, 0.999),
            fused=self.context.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        if config.ema is not None:
            self.optimiser.register_step_post_hook(lambda *_: task.update_average())
        self.order = _shuffled(data.train_count, batch_size=config.batch_size, seed=config.seed)
        self.source, self.drops = work.source(plan, data), work.drops

    def fit(self, resume_from: int | None) -> dict[str, Any]:
        """Train to the end, or until asked to stop; figures as milan.training.loop.fit has them."""
        config, ranks, micro = self.task.config, self.context.ranks, self.plan.micro_batch
        schedule = Schedule(
            data=self.order, epochs=config.epochs,
            accumulate=config.batch_size // ranks.size // micro, lr=self.plan.lr,
            warmup_epochs=self.plan.warmup_epochs, min_lr=config.min_lr,
            precision=self.plan.precision, save_every=None, save_minutes=None, keep=2,
            log_every=config.log_every, clip_grad=config.clip_grad, drops=self.drops,
        )  # fmt: skip

        def batches_from(step: int) -> Any:
            sampler = StepSampler(
                self.order, start=step, stop=schedule.steps, micro=micro,
                rank=ranks.rank, ranks=ranks.size, after_epoch=self.task.addresses,
            )  # fmt: skip
            return self._loader(sampler)

        return fit(
            self.task, self.optimiser, schedule, self.context, batches_from=batches_from,
            resume_from=resume_from,
        )  # fmt: skip

    def measure(self) -> None:
        """Validate once more, with no training."""
        last = self.task.config.epochs - 1
        loader = self._loader(self.task.addresses(last))
        self.task.validate(last, (self.task.to_device(batch) for batch in loader))

    def _loader(self, addresses: Any) -> Any:
        return batch_loader(
            self.source, addresses, num_workers=self.plan.num_workers,
            pin_memory=self.context.device.type == "cuda",
            wait=batch_wait(self.context.progress, self.context.stop),
        )  # fmt: skip


# --- settings -------------------------------------------------------------------------------------


def _digest(weights: Weights) -> str:
    """Of what a run starts from: drawn weights are named by their seed."""
    sha = hashlib.sha256(f"{weights.model} {sorted(weights.args.items())}".encode())
    if weights.channels:
        sha.update(json.dumps(weights.channels, sort_keys=True).encode())
    for name, tensor in sorted(weights.encoder.items()):
        sha.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def _plan_of(work: Supervised, weights: Weights, context: Context) -> Plan:
    """Fill in the defaults of a run. Raises ConfigError."""
    config, ranks = work.config, context.ranks
    if config.batch_size % ranks.size:
        raise ConfigError(
            f"batch size {config.batch_size} over {ranks.size} ranks",
            expected="as many images for every rank",
            fix=f"--batch-size {(config.batch_size // ranks.size + 1) * ranks.size}",
        )
    workers = config.num_workers
    if workers is None:
        workers = loader_cores(ranks.on_node)
    return Plan(
        config,
        lr=config.lr or work.base_lr * config.batch_size / 256,
        warmup_epochs=config.epochs / 20 if config.warmup_epochs is None else config.warmup_epochs,
        precision=precision_of(config.precision, context.device),
        num_workers=workers,
        size=config.image_size or work.default_size or weights.size,
        mean=tuple(weights.mean),
        std=tuple(weights.std),
        micro_batch=_micro_batch(work, context),
    )


def _micro_batch(work: Supervised, context: Context) -> int:
    """Images at once on a device: the largest number that divides a rank's share of a step."""
    config, size = work.config, context.ranks.size
    share = config.batch_size // size
    on_gpu, on_cpu = work.most
    most = config.micro_batch or (on_gpu if context.device.type == "cuda" else on_cpu)
    micro_batch = divisor(share, most, multiple=work.multiple)
    if micro_batch is None:
        raise ConfigError(
            f"batch size {config.batch_size}: {share} images a rank in micro-batches of "
            f"{most} at most",
            expected=work.pairs[0],
            fix=f"--batch-size {2 * size * max(1, share // 2)}" + work.pairs[1],
        )
    return micro_batch


def _shuffled(count: int, *, batch_size: int, seed: int) -> Order:
    """The order of an epoch's images: all of them, shuffled anew in each."""
    return Order(
        train_rows=np.arange(count), shards=np.zeros(count, np.int64), shard_size=count, views=1,
        seed=seed, batch_size=batch_size, window_rows=count,
    )  # fmt: skip


# --- what a run leaves ----------------------------------------------------------------------------


def _finish(
    work: Supervised,
    task: SupervisedTask,
    weights: Weights,
    figures: dict[str, Any],
    state: dict[str, torch.Tensor],
) -> None:
    """Write the network, its tables and its metrics."""
    plan, data, run, config = task.plan, task.data, task.context.run, work.config
    described, metrics = work.results(task, run)
    about = {
        "model": weights.model, "model_args": weights.args,
        "mean": plan.mean, "std": plan.std, "input_size": plan.size, "classes": data.classes,
        "epochs": config.epochs, "from": config.checkpoint, "milan": version("milan-pretrain"),
    }  # fmt: skip
    about |= {CHANNELS: weights.channels} if weights.channels else {}
    save_encoder(run / work.file, state, about | described)
    write_curves(run, read_log(run, figures["step"]))
    write_json(run / METRICS, {
        "checkpoint": config.checkpoint,
        **metrics,
        "classes": len(data.classes),
        "train_images": data.train_count,
        "rejected_images": figures["rejected_images"],
        "epochs": config.epochs,
        "run": str(run),
        **{k: figures[k] for k in ("step", "steps", "finished", *_SPEED) if k in figures},
    })  # fmt: skip


def _note(plan: Plan, data: Any, weights: Weights, differs: Differing, context: Context) -> None:
    config, progress = plan.config, context.progress
    count = data.train_count
    progress.note(
        f"training: {config.checkpoint} ({weights.model}) at {size_in_words(plan.size)} on "
        f"{count:,} images of {len(data.classes):,} classes, validated on {data.val_count:,}"
    )
    if weights.said:
        progress.note(f"{config.checkpoint} was read {weights.said}")
    changes = ", ".join(f"{name} {as_typed(value)}" for name, (value, _) in differs.items())
    progress.note(f"differs from the published recipe {config.recipe}: {changes or 'nothing'}")
    progress.note(
        f"steps: {config.epochs} epochs of {count // config.batch_size:,} x {config.batch_size} "
        f"images, peak learning rate {plan.lr:.3g}, layer decay {config.layer_decay:g}, "
        f"{plan.precision} on {context.device.type}, {plan.num_workers} loader workers"
    )
