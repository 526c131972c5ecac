"""Pretraining: cached targets in, a student out. The teacher never runs here."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.config import PretrainConfig
from milan.core.atomic import write_json
from milan.core.config_fields import as_typed, check_choice
from milan.core.config_resolver import deviations, from_call, load_recipe
from milan.core.device import MEAN, STD, pick_device, ranks_here, tf32, try_device
from milan.core.distributed import Ranks, parallelise
from milan.core.launch import as_rank, launch
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.units import parse_bytes
from milan.core.versions import version
from milan.core.waiting import Stopped
from milan.data.dataset import CachedDataset
from milan.data.feeding import Feeding, Loading
from milan.data.loader import batch_wait
from milan.data.order import GrownOrder, Order, Stream, shuffle_quality
from milan.data.sampler import StepSampler
from milan.errors import ConfigError
from milan.models.export import CHANNELS, ENCODER, save_encoder
from milan.models.kernels import choose_kernels
from milan.models.student import Student
from milan.objectives.base import JointObjective
from milan.reporting.log import RunLog, last_metrics, read_log, write_curves
from milan.reporting.run_files import METRICS, read_metrics, read_run
from milan.reporting.trackers import check_trackers, open_trackers
from milan.store.cache import TargetCache
from milan.store.format import Index
from milan.store.joined import JoinedCache, layers_of, short_names
from milan.training import checkpoint
from milan.training.build import (
    PretrainTask,
    Settings,
    check_room,
    loader_of,
    micro_batch_of,
    resolve_defaults,
    run_order,
    schedule_of,
    student_of,
    uncaptioned_rows,
    workers_of,
)
from milan.training.channels import colours_of, prepare, resumed
from milan.training.channels import describe as describe_channels
from milan.training.compilation import StepLoss, compile_step
from milan.training.initial import initialise_from
from milan.training.joint import JointStep
from milan.training.loop import Context, fit
from milan.training.machine_errors import as_train_error
from milan.training.memory import trial_batch
from milan.training.optim import Schedule, adamw
from milan.training.run import (
    Start,
    check_place,
    continue_run,
    decide,
    locked,
    restart_arguments,
    start_run,
)
from milan.training.run_store import (
    decoder_of,
    differing,
    identity_with,
    keep_statistics,
    known_parts,
    moved_on,
    open_cache_of,
    part_of,
    settle_statistics,
    store_of_run,
    without_changed,
)
from milan.training.validation import Validation, ValidationPlan, check_labels

_CLUSTER = "pipeline.cluster.pretrain"  # loaded only for a run on several machines
_PLACES = ("cache", "out", "data_root", "local", "cache_limit", "recipe")  # not of a recipe


@dataclass(frozen=True)
class Call:
    """How a call of `pretrain` meets a run that is there, and where it ends."""

    resume: str = "auto"
    """auto: resume the newest checkpoint of the same settings; never: start anew."""
    overwrite: bool = False
    """Replace a run of other settings instead of refusing."""
    stop_after: int | None = None
    """End after so many steps of this call."""

    def check(self) -> None:
        """Raises ConfigError for a value out of its range."""
        check_choice("resume", self.resume, ("auto", "never"))
        if self.stop_after is not None and self.stop_after < 1:
            raise ConfigError(f"max_steps {self.stop_after}", expected="at least 1")


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
    resumes the newest checkpoint of the same settings, `"never"` starts anew; `overwrite` replaces
    a run of other settings instead of refusing. Asked to `stop`, or by SIGINT, SIGTERM or SIGUSR1,
    it finishes its step and writes a checkpoint; a second SIGINT interrupts. With several GPUs it
    starts a process for each, with `num_nodes` or `address` ranks on a Ray cluster. Returns the
    figures of metrics.json, `run` and `rank`, and `stopped_by` if it was asked to stop before its
    end (`step` is 0 if it waited for other ranks or for data then). Raises MilanError, and
    RankError if other ranks are out of reach.
    """
    config = from_call(PretrainConfig, "cache", cache, settings, "pretrain")
    config.check()
    call = Call(resume, overwrite, stop_after)
    call.check()
    try:
        return _pretrain(config, call, stop or Stop(), progress or NoProgress())
    except Stopped as stopped:  # before there was anything to save, or by what stood still
        figures = {"step": 0, "steps": 0, "finished": False, "stopped_by": stopped.by}
        given = Ranks.from_environment()
        return figures | {"run": config.out, "rank": given.rank if given else 0}


def _pretrain(config: PretrainConfig, call: Call, stop: Stop, progress: Progress) -> dict[str, Any]:
    """`pretrain`, as one rank or as what starts all of them. Raises Stopped."""
    if config.num_nodes > 1 or config.address:
        on_cluster = import_module(_CLUSTER).pretrain_on_cluster
        return on_cluster(config, **vars(call), progress=progress)
    device = pick_device(config.device)
    given = Ranks.from_environment()
    count = 1 if given else ranks_here(config.device, device, config.devices)
    if count > 1:
        # What does not fit is refused before anything starts.
        run_order(resolve_defaults(config, device, Ranks(size=count)).config, open_cache_of(config))
        return launch(
            pretrain,
            {"cache": config, **vars(call)},
            ranks=count,
            restarts=config.max_restarts,
            restart_arguments=restart_arguments(Path(config.out)),
            progress=progress,
        )
    progress = NoProgress() if given and given.rank else progress
    with (
        as_rank(given, device, stop=stop, progress=progress) as (ranks, own),
        ExitStack() as until_end,
    ):
        try_device(own)
        context = Context(Path(config.out), own, ranks, progress, stop)
        with as_train_error(context.run, None):
            return _train(resolve_defaults(config, own, ranks), call, context, until_end)


def _train(
    settings: Settings, call: Call, context: Context, until_end: ExitStack
) -> dict[str, Any]:
    """One rank's part of a run; its lock is released when `until_end` closes."""
    config, run, ranks, progress = settings.config, context.run, context.ranks, context.progress
    differs = deviations(
        config, recipe=load_recipe(PretrainConfig, config.recipe, "pretrain"), leave=_PLACES
    )
    stores = [store for store, _ in layers_of(config.cache, config.layer)]
    ranks.on_rank0(lambda: check_place(run, stores))
    # What this call does is decided under the lock: a call before it may have trained until now.
    ranks.on_rank0(lambda: until_end.enter_context(locked(run, progress=progress)))
    start = ranks.on_rank0(lambda: start_of(settings, call, run, progress))
    step = start.step or 0
    order, cache, parts = _order_and_store(config, start, context)
    dataset = _open_dataset(settings, order, cache, context)
    digests = settle_statistics(settings.objective(cache), context, start.step)
    _note_settings(settings, cache, differs, progress)
    decoder = None if start.step is None else ranks.on_rank0(lambda: decoder_of(run))
    student = student_of(settings, cache, decoder=decoder)
    progress.note(describe_student(config.model, student))
    if start.step is None:
        newest = order.for_epoch(0)
        rows = np.union1d(newest.train_rows, newest.validation_rows)
        prepared = prepare(config, dataset, rows[~np.isin(rows, cache.dropped)], context)
    else:
        prepared = resumed(config, dataset, context)
    dataset.channels = prepared.channels
    if prepared.channels:
        progress.note(describe_channels(prepared))
    initial = {}
    if start.step is None:
        initial = initialise_from(config, student, progress, prepared.law)
    student = student.to(context.device)
    micro_batch = micro_batch_of(config, student, context.device, ranks, progress)
    if start.step is None:
        if start.why:
            progress.note(f"begins anew: {run} ({start.why})")
        values = settings.values(micro_batch=micro_batch)
        kept = {**store_of_run(cache), "decoder": student.decoder.arguments, **initial,
                **prepared.kept}  # fmt: skip
        identity = identity_with(values, cache)
        identity |= {"target_statistics": digests} if digests else {}
        images = cache.image_places(config.data_root) if dataset.roots else []
        ranks.on_rank0(lambda: check_place(run, images))
        ranks.on_rank0(lambda: start_run(run, identity, values, differs, **kept))
        ranks.on_rank0(lambda: keep_statistics(settings.objective(cache), run))
        ranks.on_rank0(lambda: prepared.keep_table(run))
    else:
        progress.note(f"resuming: {run} at step {step}")
        ranks.on_rank0(lambda: checkpoint.check_fits(run, step, student))
        ranks.on_rank0(lambda: continue_run(run, start, settings.values(), stretches=parts))
    order = without_changed(
        dataset, order, context, policy=config.on_changed, step=step, prepared=prepared
    )
    if prepared.channels:
        prepared.channels.of_run(run)
    schedule = schedule_of(settings, order, micro_batch, ranks.size)
    _note_schedule(settings, schedule, order, micro_batch, context)
    if start.schedule:
        progress.note(_describe_new_schedule(start, schedule))
    context = replace(
        context, open_log=lambda at: RunLog(run, at, open_trackers(config.report_to, run, at))
    )
    with as_train_error(run, micro_batch), tf32(context.device, settings.tf32, progress):
        figures = _fit(
            settings, schedule, context, student, dataset, resume_from=start.step,
            stop_after=call.stop_after,
        )  # fmt: skip
        weights = checkpoint.whole_weights(student.encoder, ranks)
        if figures["step"]:
            ranks.on_rank0(lambda: _finish(settings, schedule, run, figures, dataset, weights))
            ranks.on_rank0(lambda: settings.objective(cache).leave(run, student))
    if step == schedule.steps:
        progress.note(f"nothing is left to do: {run} is at step {step} of {schedule.steps}")
    if figures["step"]:
        figures |= ranks.on_rank0(lambda: read_metrics(run))
    return figures | {"run": str(run), "rank": ranks.rank}


def start_of(settings: Settings, call: Call, run: Path, progress: Progress) -> Start:
    """Whether the call resumes the run in the folder, or begins anew; as `decide` does."""
    return decide(
        run,
        lambda: differing(run, settings.config, settings.values()),
        resume=call.resume,
        overwrite=call.overwrite,
        progress=progress,
    )


def _fit(
    settings: Settings,
    schedule: Schedule,
    context: Context,
    student: Student,
    dataset: CachedDataset,
    *,
    resume_from: int | None,
    stop_after: int | None,
) -> dict[str, Any]:
    """Put the task together and train."""
    config, ranks, device = settings.config, context.ranks, context.device
    order = schedule.data
    assert isinstance(order, Order | GrownOrder)
    micro_batch = config.batch_size // ranks.size // schedule.accumulate
    choose_kernels(student, device, settings.precision)
    objective = settings.objective(dataset.cache, ranks)
    objective.to(device)
    network = parallelise(student, ranks, config.parallel, settings.precision)
    workers = workers_of(config, dataset, micro_batch, ranks)
    context.progress.note(f"data loading: {workers.words()}")
    step = StepLoss(objective, network, objective.loss)
    trial = partial(trial_batch, micro_batch, student, dataset.cache, device, objective=objective)
    step = compile_step(step, trial, settings, context)
    optimiser = adamw(student, device, weight_decay=config.weight_decay, beta2=config.beta2)
    optimiser.register_step_post_hook(lambda *_: objective.after_step(student))
    joint = None
    compared = None
    if isinstance(objective, JointObjective):
        compared = objective.compared
        predict = partial(objective.predict, step.network)
        joint = JointStep(
            lambda batch: predict(batch).joint, objective.joint_loss, network=network,
            device=device, precision=settings.precision,
        )  # fmt: skip
    loading = Loading()

    def on_speed(device_rate: float, wait_share: float) -> dict[str, Any]:
        if not loading.images:  # a call of very few steps
            return {}
        feeding = Feeding(loading, workers, ranks.on_node, dataset.stored, device_rate, wait_share)
        context.progress.note(f"data loading: {feeding.words()}")
        return feeding.figures()

    plan = ValidationPlan(config, order, ranks, micro_batch, compared)
    # Validation compares what it has gathered, and decodes all.
    alone = settings.whole().objective(dataset.cache)
    validation = Validation(plan, student, alone, dataset, device, settings.precision)

    def batches_from(step: int) -> Any:
        sampler = StepSampler(
            order,
            start=step,
            stop=schedule.steps,
            micro=micro_batch,
            rank=ranks.rank,
            ranks=ranks.size,
            after_epoch=plan.addresses,
        )
        loader = loader_of(
            dataset, sampler, objective, student, num_workers=workers.count,
            pin_memory=device.type == "cuda", wait=batch_wait(context.progress, context.stop),
        )  # fmt: skip
        loader.loading = loading
        return loader

    return fit(
        PretrainTask(student, network, step, validation, device),
        optimiser,
        schedule,
        replace(context, on_speed=on_speed),
        batches_from=batches_from,
        resume_from=resume_from,
        stop_after=stop_after,
        joint=joint,
    )


# --- the store of a run ---------------------------------------------------------------------------


def _order_and_store(
    config: PretrainConfig, start: Start, context: Context
) -> tuple[Stream, TargetCache, list[dict[str, Any]]]:
    """The order of a run that begins or is resumed, the store as it knows it, and its parts."""
    run, ranks = context.run, context.ranks
    if start.step is None:
        # A store may grow at this moment: all ranks see what the first one saw.
        first = ranks.on_rank0(lambda: part_of(0, open_cache_of(config)))
        cache = open_cache_of(config, first)
        return run_order(config, cache), cache, [first]

    def known(parts: list[dict[str, Any]]) -> tuple[GrownOrder, TargetCache]:
        caches = known_parts(parts, config)
        orders = ((epoch, run_order(config, cache)) for epoch, cache in caches)
        return GrownOrder(tuple(orders)), caches[-1][1]

    parts = ranks.on_rank0(lambda: read_run(run)["stretches"])
    order, cache = known(parts)
    if config.on_growth == "move":
        epoch, within = order.position(start.step)
        parts = ranks.on_rank0(lambda: moved_on(parts, config, epoch + (within > 0)))
        order, cache = known(parts)
    return order, cache, parts


def _open_dataset(
    settings: Settings, order: Stream, cache: TargetCache, context: Context
) -> CachedDataset:
    """The images and targets of a run, checked before its folder is touched."""
    config, newest = settings.config, order.for_epoch(settings.config.epochs)
    cache.check_files()
    dataset = CachedDataset(cache, data_root=config.data_root)
    context.ranks.on_rank0(lambda: check_trackers(config.report_to))
    if config.probe_every:
        for doubt in check_labels(dataset, newest, config):
            context.progress.note(doubt)
    if config.local and config.cache_limit:
        limit = parse_bytes(config.cache_limit)
        check_room(newest, cache, limit)
        cache.use_local(Path(config.local), limit)
        context.progress.note(
            f"local cache: at most {limit:,} bytes of shards below {config.local}"
        )
    return dataset


# --- what a run leaves ----------------------------------------------------------------------------


def _finish(
    settings: Settings,
    schedule: Schedule,
    run: Path,
    figures: dict[str, Any],
    dataset: CachedDataset,
    weights: dict[str, torch.Tensor],
) -> None:
    """Write the encoder, and the figures of the call that trained last."""
    config, cache = settings.config, dataset.cache
    law = dataset.channels.law if dataset.channels else None
    several = len(cache.parts) > 1
    about = {
        "model": config.model,
        "model_args": config.model_args,
        "mean": law.mean if law else MEAN,
        "std": law.std if law else STD,
        "input_size": cache.view_spec.size,
        "objective": config.objective,
        "pooling": settings.objective(cache).pooling,
        "epochs": round(schedule.epoch(figures["step"]), 4),
        "cache": cache.digest,
        "teacher": cache.attributes["about"],
        **({"teachers": [part.attributes["about"] for part in cache.parts]} if several else {}),
        "milan": version("milan-pretrain"),
    }
    if law := law or colours_of(cache.view_spec):
        about[CHANNELS] = law.about()
    save_encoder(run / ENCODER, weights, about)
    lines = read_log(run, figures["step"])
    write_curves(run, lines)
    if "images_per_second" not in figures:  # nothing was left to do
        before = read_metrics(run)
        figures = before if before.get("step") == figures["step"] else figures
    kept = {name: value for name, value in figures.items() if name != "stopped_by"}
    write_json(run / METRICS, kept | last_metrics(lines))


# --- what a run tells -----------------------------------------------------------------------------


def _note_settings(
    settings: Settings,
    cache: TargetCache,
    differs: dict[str, tuple[Any, Any]],
    progress: Progress,
) -> None:
    config = settings.config
    for part in cache.parts:
        about = part.attributes["about"]
        random = ", RANDOM WEIGHTS" if about["random_weights"] else ""
        progress.note(
            f"cache: {part.path}, {part.images:,} images x {part.views} views, "
            f"{part.spec.codec}, teacher {about['name']} ({about['pretrained']}{random}), "
            f"{part.digest[:12]}"
        )
        newest = Index.read(part.path).count
        if part.pinned < newest:
            progress.note(
                f"pinned: the first {part.pinned} of {newest} generations, as the run knows them; "
                "what was added since is not read"
            )
    if isinstance(cache, JoinedCache):
        progress.note(
            f"teachers: {', '.join(short_names(cache))}, a head each; {cache.views} views of each "
            f"image; masks by the attention of {cache.masking.layer}"
        )
        for layer, count in cache.lacking():
            progress.note(f"left out: {count:,} images that {layer} has no targets of")
    if without := len(cache.bad) - len(cache.superseded):
        progress.note(f"left out: {without} images without targets")
    for note in settings.objective(cache).notes():
        progress.note(note)
    if without := len(uncaptioned_rows(config, cache)):
        progress.note(f"left out: {without:,} images without a caption or a class")
    changes = ", ".join(f"{name} {as_typed(value)}" for name, (value, _) in differs.items())
    progress.note(f"differs from the published recipe {config.recipe}: {changes or 'nothing'}")
    progress.note(
        f"objective: {config.objective}, {settings.masking} masks of {config.mask_ratio:.0%}, "
        f"{settings.decoder_kind} decoder, {config.epochs} epochs, peak learning rate "
        f"{settings.lr:.3g}, warm-up {settings.warmup_epochs:g} epochs"
    )


def _note_schedule(
    settings: Settings, schedule: Schedule, order: Stream, micro_batch: int, context: Context
) -> None:
    config, newest = settings.config, order.for_epoch(settings.config.epochs)
    ranks = [context.ranks.size] if context.ranks.size > 1 else []
    factors = [*ranks, schedule.accumulate, micro_batch]
    context.progress.note(
        f"steps: {schedule.steps:,} of {config.batch_size} images "
        f"({' x '.join(map(str, factors))}), {newest.steps} an epoch, {settings.precision} on "
        f"{context.device.type}"
    )
    context.progress.note(f"shuffle: {describe_shuffle(newest)}")
    context.progress.note(describe_validation(newest, config.held_out))


def describe_student(name: str, student: Student) -> str:
    """The sizes of encoder and decoder, in words."""
    parts = student.encoder, student.decoder
    encoder, decoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in parts)
    shape = student.decoder.arguments
    text = sum(p.numel() for p in student.text.parameters()) if student.text else 0
    deep = sum(p.numel() for p in student.deep_decoders.parameters()) / 1e6
    return (
        f"student: {name}, {encoder:,.3g} M weights; its decoder has {decoder:,.3g} M, "
        f"{shape['depth']} blocks of width {shape['embed_dim']}"
        + (f"; deep supervision adds {deep:,.3g} M" if deep else "")
        + (f"; its text tower has {text / 1e6:,.3g} M" if text else "")
    )


def _describe_new_schedule(start: Start, schedule: Schedule) -> str:
    """What a finished run gets that goes on with more epochs, in words."""
    at = start.step or 0
    return (
        f"new schedule from step {at:,} of {schedule.steps:,} on: {', '.join(start.schedule)}; the "
        f"learning rate is {schedule.learning_rate(at):.3g} there. What was trained so far had the "
        "schedule of fewer epochs: --overwrite trains all epochs by the new one"
    )


def describe_shuffle(order: Order) -> str:
    """How the images are shuffled, and how near that is to a full permutation, in words."""
    count = len(np.unique(order.shards))
    windowed = f"windows of {order.window_shards:,} of {count:,} shards"
    what = "global" if order.window_shards >= count else windowed
    return f"{what}, {shuffle_quality(order.epoch(0)[0]):.2f} of a full permutation's quality"


def describe_validation(order: Order, share: float) -> str:
    """How many images are kept for validation, in words."""
    validation, rows = len(order.validation_rows), len(order.validation_rows)
    rows += len(order.train_rows)
    if validation or not share:
        return f"validation images: {validation:,} of {rows:,}"
    return (
        f"validation images: none ({share:.1%} of {rows:,} images is fewer than 8); "
        "a larger --held-out keeps some"
    )
