"""What an extraction takes and what it saves: arithmetic on a plan and a few rates.

Hours are as good as the rates. Powers of 1,000 throughout.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from milan.core.paths import AnyPath, Url, names_in
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError
from milan.store.codecs import codec_of
from pipeline.config import ExtractConfig
from pipeline.estimate.decoding import STORED, TRAINING, Decoding, cores, measure_decoding
from pipeline.estimate.size import Sizes, size_of_store
from pipeline.estimate.throughput import Rates, calibrate
from pipeline.extraction.plan import Plan, Workers, plan, share
from pipeline.writing.store import writable

Tables = dict[str, list[tuple[str, str]]]
"""Tables by title, rows of (what, figure): what people are shown."""

EPOCHS = 400  # of the published recipe
_ENOUGH, _MOST = 4, 16  # views: of the recipe, and as many as were ever found to help


def estimate_cost(
    config: ExtractConfig,
    *,
    budget: str | None = None,
    images_per_second: float | None = None,
    write_mb_per_second: float | None = None,
    train_images_per_second: float | None = None,
    progress: Progress | None = None,
) -> Tables:
    """What `milan extract-targets` with these settings would take; writes nothing that stays.

    `images_per_second` (of one replica, all views of each image) and `write_mb_per_second` replace
    the measurement. With a `budget` such as 2TB views, codec and whether to store views are
    proposed, and priced. Raises MilanError.
    """
    work = plan(config, progress or NoProgress())
    tables: Tables = {}
    decoding = measure_decoding(work) if images_per_second is None else None
    if budget is not None:
        starves = decoding is not None and decoding.starves(train_images_per_second)
        work, tables = within(work, budget, store_views=starves)
    rates = None
    if images_per_second is not None:
        if images_per_second <= 0 or (write_mb_per_second or 1) <= 0:
            raise ConfigError("a rate of nothing", expected="--images-per-second above 0")
        write = write_mb_per_second * 1e6 if write_mb_per_second else math.inf
        # All of an image's time counted as the teacher's: the least that an online run would take.
        image = 1 / images_per_second
        rates = Rates(image, image / config.views, write, "given")
    workers = share(work.config, work)
    if rates is None:
        rates = calibrate(work, workers, progress or NoProgress())
        if write_mb_per_second:
            rates = replace(
                rates, write=write_mb_per_second * 1e6, told=rates.told + ", disk given"
            )
    return tables | cost_of(work, workers, rates, decoding, train=train_images_per_second)


def measure_cost(work: Plan, workers: Workers, progress: Progress) -> Tables:
    """The tables of a plan at the rates of this machine."""
    return cost_of(work, workers, calibrate(work, workers, progress), measure_decoding(work))


def cost_of(
    work: Plan,
    workers: Workers,
    rates: Rates,
    decoding: Decoding | None = None,
    *,
    train: float | None = None,
) -> Tables:
    """The tables of a plan at these rates; `train` is images a second of training."""
    out, specs = writable(work.config.out), [part.spec for part in work.parts]
    spec, sizes = specs[0], size_of_store(work)
    images = max(s.first_row + s.rows for s in specs)
    views = max(s.first_view + s.views for s in specs)
    shards = sum(s.shards for s in specs)
    left = [s.shards - _recorded(out / p.name) for p, s in zip(work.parts, specs, strict=True)]
    share_left = sum(left) / shards
    to_write = sizes.total * share_left
    planned = [
        ("store", str(out)),
        ("images x views", f"{images:,} x {views}"),
        ("codec", f"{spec.codec}, {spec.view_bytes():,} bytes a view"),
        ("shards", f"{shards:,} of {spec.shard_size:,} rows"),
        ("bytes", f"{amount(sizes.total)}: shards {amount(sizes.shards)}, records "
                  f"{amount(sizes.records)}, manifest {amount(sizes.manifest)}, other "
                  f"{amount(sizes.other)}"),
        ("objects", f"{sizes.files:,}") if isinstance(out, Url) else
        ("files", f"{sizes.files:,} in {sizes.folders:,} folders"),
    ]  # fmt: skip
    if share_left < 1:
        planned.append(("still to make", f"{sum(left):,} shards, {amount(to_write)}"))
    if isinstance(out, Path):
        free = _free(out)
        fits = "enough" if to_write * 1.02 < free else "NOT ENOUGH"
        planned.append(("free on that disk", f"{amount(free)}: {fits}"))
    return {
        "Planned": planned,
        "Extraction": _extraction(work, workers, rates, left, to_write),
        "Training from it": _training(work, rates, images, views, sizes, train)
        + _decoding(work, decoding, images * views, train),
    }


def seconds_of(work: Plan, workers: Workers, rates: Rates, left: list[int]) -> float:
    """How long the replicas, or the disk, need for the shards `left` of each generation."""
    parts = [(p.spec, n / p.spec.shards) for p, n in zip(work.parts, left, strict=True)]
    views = work.config.views
    teacher = sum(s.rows * s.views / views * part for s, part in parts) * rates.image / workers[0]
    disk = sum(s.total_bytes() * part for s, part in parts) / rates.write
    return max(teacher, disk)


def _extraction(
    work: Plan, workers: Workers, rates: Rates, left: list[int], to_write: float
) -> list[tuple[str, str]]:
    seconds = seconds_of(work, workers, rates, left)
    needed = to_write / seconds if seconds else 0.0
    return [
        ("rates", rates.told),
        ("replicas of the teacher", f"{workers[0]}, each {1 / rates.image:,.4g} images/s"),
        ("time", duration(seconds)),
        ("writes", f"{amount(needed)}/s"),
        ("the disk takes", f"{amount(rates.write)}/s" if rates.write < math.inf else "not given"),
    ]


def _training(
    work: Plan, rates: Rates, images: int, views: int, sizes: Sizes, train: float | None
) -> list[tuple[str, str]]:
    speed = train or TRAINING
    a_view = work.parts[0].spec.view_bytes()
    column = pc.sum(work.parts[0].manifest.table["bytes"]).as_py() or 0
    a_photo = column / max(1, len(work.parts[0].manifest))
    epoch, memory = images * (a_view + a_photo), _memory()
    all_views = sizes.shards + images * a_photo
    cached = (
        "all of it stays there" if all_views < 0.8 * memory
        else "every epoch reads the disk: views take turns"
    )  # fmt: skip
    again = "" if train else " (assumed: ViT-B/16 on eight A100)"
    beside = f" and {amount(speed * a_photo)}/s of images" if a_photo else ""
    rows = [
        ("training, images/s", f"{speed:,.0f}{again}"),
        ("reads", f"{amount(speed * a_view)}/s of targets{beside}"),
        ("page cache", f"an epoch reads {amount(epoch)}, all views are {amount(all_views)}, memory "
                       f"is {amount(memory)}: {cached}"),
        ("paid back after", f"{rates.image / rates.forward:,.1f} epochs: an image costs "
                            f"{duration(rates.image)} once, the teacher online "
                            f"{duration(rates.forward)} in every epoch; the student's step is the "
                            f"same"),
        (f"{EPOCHS} epochs online",
         f"{duration(EPOCHS * images * rates.forward)} of the teacher; all {views} views here: "
         f"{duration(images * rates.image)}"),
    ]  # fmt: skip
    if train:
        slower = 1 + rates.forward * train
        rows.append(("a step online", f"{slower:,.2f} times as long, on one such device"))
    return rows


def _decoding(
    work: Plan, decoding: Decoding | None, count: int, train: float | None
) -> list[tuple[str, str]]:
    """Who decodes for training, and whether storing views spares it; of `count` views in all."""
    if decoding is None:
        return []
    speed, there = train or TRAINING, cores(train)
    kept = work.parts[0].spec.stored_views
    here = f"{there} on this machine" if train else f"{there} assumed"

    def needs(seconds: float, what: str) -> str:
        needed = seconds * speed
        enough = "enough" if needed <= there else "NOT ENOUGH"
        return f"{needed:,.3g} cores at {duration(seconds)} a view {what}, {here}: {enough}"

    if kept != "none":
        return [("decoding", needs(decoding.stored, "as stored"))]
    advice = ", RECOMMENDED for a new store" if decoding.starves(train) else ""
    return [
        ("decoding", needs(decoding.original, "of the originals")),
        (
            f"with --store-views {STORED}",
            f"{decoding.stored * speed:,.3g} cores at {duration(decoding.stored)} a view; about "
            f"{amount(decoding.bytes)} more each, {amount(decoding.bytes * count)} in all{advice}",
        ),
    ]


def within(work: Plan, budget: str, *, store_views: bool = False) -> tuple[Plan, Tables]:
    """The plan with the views and codec that fit a budget, and the choice as a table.

    More views before more bits: a view more is a crop that the student has not seen, while int8
    already keeps 0.9999 of a feature's direction. So int8 with all views that fit, at most 16;
    product quantisation only where fewer than 4 would fit. float16 is never proposed. With
    `store_views` each view is kept as a picture too, unless then not one would fit.
    """
    if len(work.parts) > 1 or (writable(work.config.out) / work.parts[0].name).exists():
        raise ConfigError(
            f"--budget for the store {work.config.out}, which has begun", fix="--out another.zarr"
        )
    allowed, part = parse_size(budget), work.parts[0]
    stored = part.spec.stored_views
    if store_views and stored == "none":
        stored = STORED
    found: list[tuple[str, int, int]] = []  # codec, views that fit, bytes of one more
    for name in ("int8", "pq:64", "pq:32", "pq:16"):
        try:
            codec_of(name).width(part.spec.channels)
        except ConfigError:
            continue  # its pieces do not divide the channels
        one, two = (size_of_store(_with(work, name, views, stored)).total for views in (1, 2))
        found.append((name, int((allowed - (2 * one - two)) // (two - one)), two - one))
    fitting = [(name, min(_MOST, views)) for name, views, _ in found if views >= _ENOUGH]
    fitting = fitting or [(name, views) for name, views, _ in reversed(found) if views > 0]
    if not fitting and stored != part.spec.stored_views:
        return within(work, budget)
    if not fitting:
        name, _, each = found[-1]
        raise ConfigError(
            f"--budget {budget} holds not one view of {part.spec.rows:,} images",
            expected=f"at least {amount(each)} ({name})",
            fix="--limit, or a larger budget",
        )
    codec_name, views = fitting[0]
    rows = [(n, f"{max(0, k):,} views fit, {amount(each)} each") for n, k, each in found]
    keeping = f" --store-views {stored}" if stored != "none" else ""
    rows.append(("proposed", f"--views {views} --codec {codec_name}{keeping}"))
    return _with(work, codec_name, views, stored), {f"Within {amount(allowed)}": rows}


def _with(work: Plan, codec: str, views: int, stored: str) -> Plan:
    part = work.parts[0]
    spec = replace(part.spec, codec=codec, views=views, stored_views=stored)
    config = replace(work.config, codec=codec, views=views, store_views=stored)
    return replace(work, config=config, parts=[replace(part, spec=spec)])


def parse_size(text: str) -> float:
    """Bytes of a size such as 2TB, 500GB or 1.5TiB. Raises ConfigError."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGTP]?)(i?)B?", text.strip(), re.IGNORECASE)
    try:
        number, unit, binary = match.groups() if match else ("", "", "")
        size = float(number) * (1024 if binary else 1000) ** " KMGTP".index(unit.upper() or " ")
    except ValueError:
        size = 0.0
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size", expected="such as 2TB, 500GB or 1.5TiB")
    return size


def amount(count: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:,.3g} {unit}"


def duration(seconds: float) -> str:
    """A time for people: 1.2 ms, 3.4 s, 2:05:00."""
    if seconds < 1:
        return f"{seconds * 1000:,.3g} ms"
    if seconds < 100:
        return f"{seconds:,.1f} s"
    whole = round(seconds)
    return f"{whole // 3600:,}:{whole % 3600 // 60:02d}:{whole % 60:02d} h"


def _recorded(generation: AnyPath) -> int:
    return sum(1 for _ in names_in(generation / "records"))


def _free(out: Path) -> int:
    place = out.absolute()
    while not os.path.exists(place):
        place = place.parent
    return shutil.disk_usage(place).free


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
