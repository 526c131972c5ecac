"""What an extraction takes and what it saves: arithmetic on a plan and a few rates.

Bytes and files are exact but for images that turn out to be bad and the digits of some numbers.
Hours are as good as the rates. Powers of 1,000 throughout.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from milan.codecs import codec_of
from milan.errors import ConfigError
from milan.format import FIDELITY, MANIFEST, SHARDS, CacheSpec, Entry, Index, canonical
from milan.manifest import Manifest
from milan.places import Place, Url, names_in
from milan.watch import Silent, Watch
from pipeline.calibrate import Rates, calibrate, stand_in
from pipeline.plan import Plan, Workers, plan, share
from pipeline.prepare import CANARIES
from pipeline.settings import ExtractConfig
from pipeline.store import create_arrays, group_attributes, writable
from pipeline.tally import Tally

Tables = dict[str, list[tuple[str, str]]]
"""Tables by title, rows of (what, figure): what people are shown."""

TRAINING = 6_000.0
"""Images a second that training is assumed to reach: ViT-B/16, 75 % masked, on eight A100."""
EPOCHS = 400  # of the published recipe
_ENOUGH, _MOST = 4, 16  # views: of the recipe, and as many as were ever found to help
_SAMPLE = 100_000  # rows of a manifest, shards of a table: from there on it is proportion
_REPORT, _LOG_LINE, _LOCK = 300, 145, 20  # bytes of fidelity.json, of a line of the log, of .lock


@dataclass(frozen=True)
class Sizes:
    """Bytes and files of a store, or of a part of it."""

    shards: int
    """Bytes of the arrays' files."""
    records: int
    manifest: int
    other: int
    """Tables of codec and shards, canaries, descriptions, index, log."""
    files: int
    folders: int

    @property
    def total(self) -> int:
        """Bytes of everything in the store's folder."""
        return self.shards + self.records + self.manifest + self.other

    def __add__(self, more: Sizes) -> Sizes:
        pairs = zip(asdict(self).values(), asdict(more).values(), strict=True)
        return Sizes(*(a + b for a, b in pairs))


def sizes_of(spec: CacheSpec, manifest: Manifest, attributes: dict, *, first: bool) -> Sizes:
    """What a generation of `spec` takes, its share of the index and the log included.

    `first` of its layer: it has the codec's tables and the canaries.
    """
    last = spec.blocks - 1
    per_shard = [len(canonical(made_up_record(spec, b, 0))) for b in (0, last)]
    records = spec.views * (per_shard[0] * last + per_shard[1])
    some = manifest.head(_SAMPLE)
    listed = round(len(some.to_parquet()) * len(manifest) / max(1, len(some)))
    other, files, folders = _fixed(spec, attributes, first)
    # A view of a shard has a folder of its own in each array, that of the features one more.
    arrays = spec.arrays()
    deep = sum(len(array.shape) - 2 for array in arrays.values())
    return Sizes(
        shards=spec.total_bytes(),
        records=records,
        manifest=listed,
        other=other + _table_bytes(spec) + _LOG_LINE * (spec.blocks + 2),
        files=files + spec.shards * (len(arrays) + 1),
        folders=folders + spec.shards * deep + (spec.blocks + 1) * len(arrays),
    )


def made_up_record(spec: CacheSpec, block: int, view: int) -> dict[str, Any]:
    """A record like that of a shard of good photographs, of the same size but for some digits."""
    start, stop = spec.block_rows(block)
    count, noise = stop - start, np.random.default_rng((block, view))
    sums = [noise.integers(0, 1 << 32, count).tolist() for _ in range(5)]
    arrays = spec.arrays()
    files = [
        {"path": f"{name}/{arrays[name].file(block, view)}", "bytes": 100_000_000,
         "sha256": noise.bytes(32).hex()}
        for name in sorted(arrays)
    ]  # fmt: skip
    return {
        "block": block, "view": view, "rows": [start, stop], "files": files, "bad": {},
        "digests": [noise.bytes(16).hex() for _ in range(count)],
        "heights": [375] * count, "widths": [500] * count, "pixels": sums[4],
        "crc32c": dict(zip(arrays, sums, strict=False)),
    }  # fmt: skip


def _table_bytes(spec: CacheSpec) -> int:
    shards = max(1, min(spec.shards, _SAMPLE))
    tally = Tally(replace(spec, rows=shards, shard_size=1, views=1))
    tally.records[:] = np.random.default_rng(0).integers(0, 256, tally.records.shape, np.uint8)
    return round(len(tally.parquet()) * max(1, spec.shards / shards))


def _fixed(spec: CacheSpec, attributes: dict, first: bool) -> tuple[int, int, int]:
    """(bytes, files, folders) that a generation has whatever its rows, its index entry included."""
    tables: dict[str, np.ndarray] = {}
    if first:
        size, few = spec.view_law["size"], min(CANARIES, spec.rows)
        tables = {
            f"codec/{name}": table
            for name, table in stand_in(spec.codec, spec.channels).tables.items()
        }
        tables["canary/pixels"] = np.zeros((few, size, size, 3), np.uint8)
        tables["canary/features"] = np.zeros((few, spec.tokens, spec.channels), np.float32)
        tables["canary/attention"] = np.zeros((few, spec.tokens - 1), np.float32)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        create_arrays(root, spec, attributes, tables)
        found = [path for path in root.rglob("*") if path.is_file()]
        folders = 2 + sum(path.is_dir() for path in root.rglob("*"))  # itself and its records
        total = sum(path.stat().st_size for path in found)
        names = [path.relative_to(root).as_posix() for path in found]
    names += [FIDELITY, MANIFEST, SHARDS]
    entry = Entry(
        "generations/000", f"{attributes['about']['name']}/{spec.codec}", "0" * 64, "0" * 64,
        (0, spec.rows), (0, spec.views), spec.shards, spec.total_bytes(), 0,
        dict.fromkeys(names, "0" * 64),
    )  # fmt: skip
    return total + len(Index((entry,)).to_bytes()) + _REPORT, len(names) + 1, folders


def size_of_store(work: Plan) -> Sizes:
    """What the layer of a plan takes when it is whole, the store's own few files included."""
    groups = canonical({"attributes": {}, "node_type": "group", "zarr_format": 3})
    total = Sizes(0, 0, 0, 2 * (len(groups) + 12) + _LOCK, 5, 1)
    for part in work.parts:
        attributes = group_attributes(part.spec, work.teacher.about)
        first = part is work.parts[0]
        total += sizes_of(part.spec, part.manifest, attributes, first=first)
        total += Sizes(0, 0, 0, len(canonical(work.origin())), 0, 0)
    return total


def price(
    config: ExtractConfig,
    *,
    budget: str | None = None,
    images_per_second: float | None = None,
    write_mb_per_second: float | None = None,
    train_images_per_second: float | None = None,
    watch: Watch | None = None,
) -> Tables:
    """What `milan extract-targets` with these settings would take; writes nothing that stays.

    `images_per_second` (of one replica, all views of each image) and `write_mb_per_second` replace
    the measurement. With a `budget` such as 2TB views and codec are proposed, and priced. Raises
    MilanError.
    """
    work = plan(config, watch or Silent())
    tables: Tables = {}
    if budget is not None:
        work, tables = within(work, budget)
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
        rates = calibrate(work, workers, watch or Silent())
        if write_mb_per_second:
            rates = replace(
                rates, write=write_mb_per_second * 1e6, told=rates.told + ", disk given"
            )
    return tables | cost_of(work, workers, rates, train=train_images_per_second)


def cost_of(work: Plan, workers: Workers, rates: Rates, *, train: float | None = None) -> Tables:
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
        "Training from it": _training(work, rates, images, views, sizes, train),
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


def within(work: Plan, budget: str) -> tuple[Plan, Tables]:
    """The plan with the views and codec that fit a budget, and the choice as a table.

    More views before more bits: a view more is a crop that the student has not seen, while int8
    already keeps 0.9999 of a feature's direction. So int8 with all views that fit, at most 16;
    product quantisation only where fewer than 4 would fit. float16 is never proposed.
    """
    if len(work.parts) > 1 or (writable(work.config.out) / work.parts[0].name).exists():
        raise ConfigError(
            f"--budget for the store {work.config.out}, which has begun", fix="--out another.zarr"
        )
    allowed, part = parse_size(budget), work.parts[0]
    found: list[tuple[str, int, int]] = []  # codec, views that fit, bytes of one more
    for name in ("int8", "pq:64", "pq:32", "pq:16"):
        try:
            codec_of(name).width(part.spec.channels)
        except ConfigError:
            continue  # its pieces do not divide the channels
        one, two = (size_of_store(_with(work, name, views)).total for views in (1, 2))
        found.append((name, int((allowed - (2 * one - two)) // (two - one)), two - one))
    fitting = [(name, min(_MOST, views)) for name, views, _ in found if views >= _ENOUGH]
    fitting = fitting or [(name, views) for name, views, _ in reversed(found) if views > 0]
    if not fitting:
        name, _, each = found[-1]
        raise ConfigError(
            f"--budget {budget} holds not one view of {part.spec.rows:,} images",
            expected=f"at least {amount(each)} ({name})",
            fix="--limit, or a larger budget",
        )
    codec_name, views = fitting[0]
    rows = [(n, f"{max(0, k):,} views fit, {amount(each)} each") for n, k, each in found]
    rows.append(("proposed", f"--views {views} --codec {codec_name}"))
    return _with(work, codec_name, views), {f"Within {amount(allowed)}": rows}


def _with(work: Plan, codec: str, views: int) -> Plan:
    part = work.parts[0]
    spec = replace(part.spec, codec=codec, views=views)
    config = replace(work.config, codec=codec, views=views)
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


def _recorded(generation: Place) -> int:
    return sum(1 for _ in names_in(generation / "records"))


def _free(out: Path) -> int:
    place = out.absolute()
    while not os.path.exists(place):
        place = place.parent
    return shutil.disk_usage(place).free


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
