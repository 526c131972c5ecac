"""What an extraction takes and what it saves: arithmetic on a plan and a measured throughput.

Times are as good as the throughput. Powers of 1,000 throughout.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pyarrow.compute as pc

from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes, format_duration, parse_bytes
from milan.data.feeding import cores_needed
from milan.errors import ConfigError
from milan.store.codecs import codec_of
from pipeline.config import ExtractConfig
from pipeline.estimate.accelerators import accelerator_of, teacher_seconds_on
from pipeline.estimate.decoding import (
    STORED_VIEWS,
    TRAINING_SOURCE,
    TRAINING_SPEED,
    Decoding,
    measure_decoding,
    training_cores,
)
from pipeline.estimate.size import Sizes, size_of_store
from pipeline.estimate.throughput import Throughput, measure_throughput
from pipeline.extraction.hardware import Workers, plan_workers
from pipeline.extraction.plan import Plan, plan

Tables = dict[str, list[tuple[str, str]]]
"""Tables for people by title: rows of (what, figure)."""

EPOCHS = 400  # of the published recipe
_ENOUGH_VIEWS, _MAX_VIEWS = 4, 16  # of the recipe, and as many as were ever found to help


def estimate_cost(
    config: ExtractConfig,
    *,
    budget: str | None = None,
    images_per_second: float | None = None,
    write_mb_per_second: float | None = None,
    train_images_per_second: float | None = None,
    accelerator: str | None = None,
    progress: Progress | None = None,
) -> Tables:
    """What `milan extract-targets` with these settings would take, as tables; leaves no file.

    `images_per_second` (of one replica, all views of each image) and `write_mb_per_second` replace
    the measurement; `accelerator` names one whose rate is assumed for the teacher;
    `train_images_per_second` replaces the assumed speed of training. With a
    `budget` such as 2TB, the tables propose views, codec and whether to store views, and are those
    of the proposal. Raises MilanError.
    """
    progress = progress or NoProgress()
    for flag, rate in (
        ("images", images_per_second),
        ("write-mb", write_mb_per_second),
        ("train-images", train_images_per_second),
    ):
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"--{flag}-per-second {rate:g}", expected="a rate above 0")
    work = plan(config, progress)
    tables: Tables = {}
    decoding = measure_decoding(work)
    if budget is not None:
        slow = decoding is not None and decoding.is_bottleneck(train_images_per_second)
        work, tables = fit_budget(work, budget, store_views=slow)
    workers = plan_workers(work.config, work.hardware)
    if images_per_second is None:
        throughput = _measured(work, workers, progress, accelerator)
    else:
        throughput = _given(work, images_per_second, accelerator)
    if throughput and write_mb_per_second:
        source = throughput.source
        throughput = replace(
            throughput,
            write_rate=write_mb_per_second * 1e6,
            source=source if source == "given" else f"{source}, disk given",
        )
    return tables | cost_of(work, workers, throughput, decoding, train=train_images_per_second)


def _measured(
    work: Plan, workers: Workers, progress: Progress, accelerator: str | None = None
) -> Throughput | None:
    """Of this machine; None where the teacher would run on GPUs that are not here to be measured.

    With `accelerator` all but the teacher is measured.
    """
    elsewhere = work.hardware.on_gpu and work.teacher.device.type != "cuda"
    if elsewhere and accelerator is None:
        return None
    return measure_throughput(work, workers, progress, accelerator=accelerator)


def _given(work: Plan, images_per_second: float, accelerator: str | None) -> Throughput:
    seconds = 1 / images_per_second
    if accelerator is None:
        assumed = "all of an image's time is the teacher's, as if decoding took none"
        each = seconds / work.config.views
    else:
        each = teacher_seconds_on(accelerator_of(accelerator), work.teacher)
        assumed = f"the teacher at {1 / each:,.0f} views/s: {accelerator_of(accelerator).source}"
    return Throughput(seconds, each, math.inf, "given", (assumed,))


def measure_cost(work: Plan, workers: Workers, progress: Progress) -> Tables:
    """The tables of a plan, at the throughput of this machine. Raises MilanError."""
    throughput = _measured(work, workers, progress)
    return cost_of(work, workers, throughput, measure_decoding(work))


def cost_of(
    work: Plan,
    workers: Workers,
    throughput: Throughput | None,
    decoding: Decoding | None = None,
    *,
    train: float | None = None,
) -> Tables:
    """The tables of a plan at this throughput; `train` is the speed of training, images/s.

    The last table tells what was measured, given or assumed. Without a throughput there are no
    times.
    """
    out, specs = work.location.path, [part.spec for part in work.parts]
    spec, sizes = specs[0], size_of_store(work)
    images = max(s.first_row + s.rows for s in specs)
    views = max(s.first_view + s.views for s in specs)
    shards = sum(s.shards for s in specs)
    finished = work.finished_shards()
    missing = [s.shards - n for s, n in zip(specs, finished, strict=True)]
    to_write = sizes.total * sum(missing) / shards
    planned = [
        ("store", str(out)),
        ("images x views", f"{images:,} x {views}"),
        ("codec", f"{spec.codec}, {spec.view_bytes():,} bytes a view"),
        ("shards", f"{shards:,} of {spec.shard_size:,} rows"),
        ("bytes", f"{format_bytes(sizes.total)}: shards {format_bytes(sizes.shards)}, records "
                  f"{format_bytes(sizes.records)}, manifest {format_bytes(sizes.manifest)}, other "
                  f"{format_bytes(sizes.other)}"),
        ("files", f"{sizes.files:,} in {sizes.folders:,} folders") if work.location.has_folders
        else ("objects", f"{sizes.files:,}"),
    ]  # fmt: skip
    if sum(missing) < shards:
        planned.append(("still to write", f"{sum(missing):,} shards, {format_bytes(to_write)}"))
    if (free := work.location.free_bytes()) is not None:
        fits = "enough" if to_write * 1.02 < free else "NOT ENOUGH"
        planned.append(("free on its disk", f"{format_bytes(free)}: {fits}"))
    return {
        "Planned": planned,
        "Extraction": _extraction(work, workers, throughput, missing, to_write),
        "Training from it": _training(work, throughput, sizes, images, views, train)
        + _decoding(work, decoding, images * views, train),
        "Where the figures come from": _sources(workers, throughput, decoding, train),
    }


def _sources(
    workers: Workers, throughput: Throughput | None, decoding: Decoding | None, train: float | None
) -> list[tuple[str, str]]:
    rows = [("teacher, images, disk", throughput.source if throughput else _UNKNOWN)]
    rows += [("assumed", line) for line in (throughput.assumed if throughput else ())]
    if throughput and workers.replicas > 1:
        rows.append(("assumed", f"{workers.replicas} replicas, each as fast as this one"))
    if throughput and throughput.write_rate == math.inf:
        rows.append(("assumed", "the store takes what is written; else --write-mb-per-second"))
    if decoding:
        rows.append(("decoding", "measured here, in processor time"))
    assumed = f"assumed, {TRAINING_SPEED:,.0f} images/s: {TRAINING_SOURCE}"
    rows.append(("training", "given, with the cores of this machine" if train else assumed))
    rows.append(("page cache", "the memory of this machine"))
    return rows


def seconds_of(work: Plan, workers: Workers, throughput: Throughput, missing: list[int]) -> float:
    """Seconds to extract the `missing` shards of each generation.

    Those that the replicas need, or the disk if it is slower.
    """
    parts = [(p.spec, n / p.spec.shards) for p, n in zip(work.parts, missing, strict=True)]
    images = sum(s.rows * s.views / work.config.views * part for s, part in parts)
    teacher = images * throughput.image_seconds / workers.replicas
    disk = sum(s.total_bytes() * part for s, part in parts) / throughput.write_rate
    return max(teacher, disk)


_UNKNOWN = (
    "unknown: its GPUs are not here to be measured. --images-per-second of one replica, or "
    "--accelerator NAME of `milan plan`, assumes a rate"
)


def _extraction(
    work: Plan,
    workers: Workers,
    throughput: Throughput | None,
    missing: list[int],
    to_write: float,
) -> list[tuple[str, str]]:
    if throughput is None:
        return [("throughput", _UNKNOWN), ("replicas of the teacher", f"{workers.replicas}")]
    seconds = seconds_of(work, workers, throughput, missing)
    needed = to_write / seconds if seconds else 0.0
    replicas = f"{workers.replicas}, each {1 / throughput.image_seconds:,.4g} images/s"
    write_rate = throughput.write_rate
    disk = f"{format_bytes(write_rate)}/s" if write_rate < math.inf else "unknown"
    return [
        ("throughput", throughput.source),
        ("replicas of the teacher", replicas),
        ("time", format_duration(seconds)),
        ("bandwidth needed", f"{format_bytes(needed)}/s"),
        ("the disk writes", disk),
    ]


def _training(
    work: Plan,
    throughput: Throughput | None,
    sizes: Sizes,
    images: int,
    views: int,
    train: float | None,
) -> list[tuple[str, str]]:
    speed = train or TRAINING_SPEED
    view_bytes = work.parts[0].spec.view_bytes()
    all_photos = pc.sum(work.parts[0].manifest.table["bytes"]).as_py() or 0
    photo_bytes = all_photos / max(1, len(work.parts[0].manifest))
    epoch, memory = images * (view_bytes + photo_bytes), _memory()
    all_views = sizes.shards + images * photo_bytes
    cached = (
        "all of it stays there" if all_views < 0.8 * memory
        else "every epoch reads from disk, as each reads another view"
    )  # fmt: skip
    assumed = "" if train else " (assumed)"
    photos = f" and {format_bytes(speed * photo_bytes)}/s of images" if photo_bytes else ""
    rows = [
        ("training, images/s", f"{speed:,.0f}{assumed}"),
        ("reads", f"{format_bytes(speed * view_bytes)}/s of targets{photos}"),
        ("page cache", f"an epoch reads {format_bytes(epoch)}, all views are "
                       f"{format_bytes(all_views)}, memory is {format_bytes(memory)}: {cached}"),
    ]  # fmt: skip
    if throughput is None or not work.parts[0].spec.has_targets:
        return rows
    once, every_epoch = throughput.image_seconds, throughput.teacher_seconds
    rows += [
        ("break-even", f"{once / every_epoch:,.1f} epochs: an image costs {format_duration(once)} "
                       f"once, the teacher online {format_duration(every_epoch)} in every epoch; "
                       f"the student's step is the same"),
        (f"{EPOCHS} epochs online",
         f"{format_duration(EPOCHS * images * every_epoch)} of the teacher; all {views} views from "
         f"the store: {format_duration(images * once)}"),
    ]  # fmt: skip
    if train:
        factor = 1 + every_epoch * train
        rows.append(("a step online", f"{factor:,.2f} times as long, on one such device"))
    return rows


def _decoding(
    work: Plan, decoding: Decoding | None, count: int, train: float | None
) -> list[tuple[str, str]]:
    """Cores that decode for training, and whether to store views; of `count` views in all."""
    if decoding is None:
        return []
    speed, cores = train or TRAINING_SPEED, training_cores(train)
    where = "on this machine" if train else "assumed"

    def needed(seconds: float, what: str) -> str:
        busy = cores_needed(speed, seconds)
        enough = "enough" if busy <= cores else "NOT ENOUGH"
        return (
            f"{busy:,.3g} cores at {format_duration(seconds)} a view {what}, "
            f"{cores} {where}: {enough}"
        )

    if work.parts[0].spec.stored_views != "none":
        return [("decoding", needed(decoding.stored, "as stored"))]
    advice = ", RECOMMENDED for a new store" if decoding.is_bottleneck(train) else ""
    each, total = format_bytes(decoding.bytes), format_bytes(decoding.bytes * count)
    return [
        ("decoding", needed(decoding.original, "of the originals")),
        (
            f"with --store-views {STORED_VIEWS}",
            f"{cores_needed(speed, decoding.stored):,.3g} cores at "
            f"{format_duration(decoding.stored)} a view; "
            f"about {each} more each, {total} in all{advice}",
        ),
    ]


def fit_budget(work: Plan, budget: str, *, store_views: bool = False) -> tuple[Plan, Tables]:
    """The plan with the views and codec that fit a budget, and the choice as a table.

    More views before more bits: another view is a crop that the student has not seen, while int8
    already keeps 0.9999 of a feature's direction. So int8 with all views that fit, at most 16;
    product quantisation only where fewer than 4 would fit. float16 is never proposed. With
    `store_views` the views' pixels are stored too, unless then not one view would fit. Raises
    ConfigError: for a store that has begun, and if not one view fits.
    """
    if len(work.parts) > 1 or (work.location.path / work.parts[0].name).exists():
        raise ConfigError(
            f"--budget for the store {work.config.out}, which has begun", fix="--out another.zarr"
        )
    allowed, part = parse_bytes(budget), work.parts[0]
    stored = part.spec.stored_views
    if store_views and stored == "none":
        stored = STORED_VIEWS
    options: list[tuple[str, int, int]] = []  # codec, views that fit, bytes of one more
    for name in ("int8", "pq:64", "pq:32", "pq:16"):
        try:
            codec_of(name).width(part.spec.channels)
        except ConfigError:
            continue  # its pieces do not divide the channels
        one, two = (size_of_store(_with(work, name, views, stored)).total for views in (1, 2))
        options.append((name, int((allowed - (2 * one - two)) // (two - one)), two - one))
    fitting = [
        (name, min(_MAX_VIEWS, views)) for name, views, _ in options if views >= _ENOUGH_VIEWS
    ]
    fitting = fitting or [(name, views) for name, views, _ in reversed(options) if views > 0]
    if not fitting and stored != part.spec.stored_views:
        return fit_budget(work, budget)
    if not fitting:
        name, _, each = options[-1]
        raise ConfigError(
            f"not one view of {part.spec.rows:,} images fits --budget {budget}",
            expected=f"at least {format_bytes(each)} ({name})",
            fix="--limit, or a larger budget",
        )
    codec_name, views = fitting[0]
    rows = [(n, f"{max(0, k):,} views fit, {format_bytes(each)} each") for n, k, each in options]
    store_flag = f" --store-views {stored}" if stored != "none" else ""
    rows.append(("proposed", f"--views {views} --codec {codec_name}{store_flag}"))
    return _with(work, codec_name, views, stored), {f"Within {format_bytes(allowed)}": rows}


def _with(work: Plan, codec: str, views: int, stored: str) -> Plan:
    part = work.parts[0]
    spec = replace(part.spec, codec=codec, views=views, stored_views=stored)
    config = replace(work.config, codec=codec, views=views, store_views=stored)
    return replace(work, config=config, parts=[replace(part, spec=spec)])


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
