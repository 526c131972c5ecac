"""Extraction: what a store lacks of what was asked for, and the run that makes it.

A new store is one generation. A store that is there grows by whole generations: more views of each
stretch of rows, and then the new rows; what is committed stays as it is, byte for byte.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np

from milan.core.config_resolver import from_call
from milan.core.paths import AnyPath, Url, folders_in
from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes
from milan.errors import CacheError, ConfigError, DataError
from milan.images.manifest import Manifest, data_root
from milan.images.source import ImageSource
from milan.store.cache import TargetCache
from milan.store.codecs import Codec, codec_of
from milan.store.format import FIDELITY, MANIFEST, ORIGIN, CacheSpec, canonical, read_json
from milan.store.generation import open_array
from pipeline.config import ExtractConfig, allowed_bad
from pipeline.estimate.cost import Tables, measure_cost
from pipeline.extraction.fidelity import check_canaries, demand, prepare
from pipeline.extraction.growth import Part
from pipeline.extraction.plan import Plan, Workers, plan, share, teacher_spec
from pipeline.extraction.worker import Extractor
from pipeline.teachers.load import Teacher
from pipeline.writing.disk import as_full_disk_error
from pipeline.writing.store import Store, Writer, group_attributes, writable

ASK_ABOVE = 100e9
"""Bytes to be written above which extraction asks first."""
_ATTEMPTS = 3  # of one block, before the run gives it up


@as_full_disk_error("writing the store")
def extract_targets(
    data: str | ExtractConfig,
    *,
    progress: Progress | None = None,
    dry_run: bool = False,
    agree: Callable[[Tables], bool] | None = None,
    **settings: Any,
) -> dict:
    """Run the teacher over K views of every image and leave a finished store.

    `data` and `settings` are the command's arguments (ExtractConfig's fields). Going on where a
    killed run stopped is the same call again; so is growing a store, with more views or images.
    Returns a summary: path, images, views, bad (a count by reason), bytes_per_view, fidelity,
    seconds, images_per_second; of a `dry_run`, which leaves nothing, `costs`.
    Above ASK_ABOVE bytes `agree` is shown the costs and decides, unless the settings say `yes`.
    Raises MilanError.
    """
    config = from_call(ExtractConfig, "data", data, settings)
    progress = progress or NoProgress()
    work = plan(config, progress)
    out = writable(config.out)
    specs = [part.spec for part in work.parts]
    fresh = [p.spec for p in work.parts if not (out / p.name / "zarr.json").exists()]
    summary: dict[str, Any] = {
        "path": str(out),
        "layer": work.layer,
        "images": max(s.first_row + s.rows for s in specs),
        "views": max(s.first_view + s.views for s in specs),
        "shards": sum(s.shards for s in specs),
        "bytes_per_view": specs[0].view_bytes(),
        "bytes": sum(s.total_bytes() for s in specs),
    }
    workers = share(config, work)
    held = config.shard_size * max(s.views for s in specs) * specs[0].view_bytes()
    progress.note(
        f"executor: {config.executor}, {workers[0]} x teacher, {workers[1]} decoding threads each, "
        f"batches of {config.batch_size} views, {held / 1e6:,.0f} MB of targets held by each"
    )
    _check_space(out, sum(s.total_bytes() for s in fresh))
    if dry_run:
        summary["costs"] = measure_cost(work, workers, progress)
        return summary
    big = sum(s.total_bytes() for s in fresh)  # what has begun was agreed to
    agreed = config.yes or big <= ASK_ABOVE
    if not agreed and agree is not None:
        agreed = agree(measure_cost(work, workers, progress))
    if not agreed:
        raise ConfigError(
            f"{out} would take {format_bytes(big)}", expected="your consent", fix="--yes"
        )
    store = Store(out)
    try:
        _fill(work, store, workers, summary, progress)
    finally:
        store.close()
    return summary


def _fill(work: Plan, store: Store, workers: Workers, summary: dict, progress: Progress) -> None:
    """Make what is missing, generation by generation, and publish each when it is whole."""
    bad: dict[int, str] = {}
    seconds, images = 0.0, 0
    codec: Codec | None = None
    for part in work.parts:
        writer, codec = _open(work, store, part, codec, progress)
        if part is work.parts[0]:
            check_canaries(writer.root, work.teacher)
        report = writer.root / FIDELITY
        summary["fidelity"] = read_json(report) if report.exists() else {}
        todo = writer.missing()
        shards, rows = int(todo.sum()), rows_of(part.spec, todo)
        _check_space(store.path, part.spec.total_bytes() * shards // part.spec.shards)
        if 0 < shards < part.spec.shards:
            there = part.spec.shards - shards
            progress.note(f"resuming: {there} of {part.spec.shards} shards are there")
        if shards:
            started = time.perf_counter()
            run_part(work, writer, part, codec, todo, workers, progress)
            seconds, images = seconds + time.perf_counter() - started, images + rows
        bad |= {part.spec.first_row + row: why for row, why in writer.bad().items()}
        _publish(work, writer, bad, summary)
    summary["seconds"] = round(seconds, 3)
    summary["images_per_second"] = round(images / seconds, 2) if images else None
    cache = TargetCache(store.path, layer=work.layer)
    summary["digest"] = cache.digest
    store.log("finish", digest=cache.digest, images_per_second=summary["images_per_second"])


def _open(
    work: Plan, store: Store, part: Part, codec: Codec | None, progress: Progress
) -> tuple[Writer, Codec]:
    """The generation of `part`, new or as it is, and the codec of its layer."""
    images = ImageSource(part.manifest, data_root(work.source))

    def make() -> tuple[dict, dict[str, np.ndarray], dict[str, bytes]]:
        batch = work.config.batch_size
        prepared = prepare(part.spec, images, work.teacher, batch=batch, codec=codec)
        demand(prepared.fidelity, work.config.min_cosine)
        if codec is not None:  # the first generation has the tables and canaries of its layer
            prepared = replace(prepared, codec=replace(codec, tables={}), canaries={})
        files = {
            MANIFEST: part.manifest.to_parquet(),
            FIDELITY: canonical(prepared.fidelity),
            ORIGIN: canonical(work.origin()),
        }
        tables = prepared.tables() | prototypes_of(part, work.teacher)
        return group_attributes(part.spec, work.teacher.about), tables, files

    writer = store.generation(part.name, part.spec, make)
    return writer, codec or codec_at(writer.root, part.spec)


def prototypes_of(part: Part, teacher: Teacher) -> dict[str, np.ndarray]:
    """The tables of the classes of a generation where rows begin, if texts are asked for."""
    classes = part.manifest.classes
    if teacher.texts is None or not classes or part.spec.first_view:
        return {}
    return teacher.texts.prototypes(classes)


def codec_at(root: AnyPath, spec: CacheSpec) -> Codec:
    """The codec with the tables that the generation at `root` keeps."""
    folder = root / "codec"
    names = sorted(folders_in(folder)) if folder.is_dir() else []
    tables = {n: np.asarray(open_array(folder / n).read().result()) for n in names}
    return codec_of(spec.codec).restored(tables)


def _check_space(out: AnyPath, needed: int) -> None:
    if isinstance(out, Url):
        return  # a bucket has no end
    place = out.absolute()
    while not os.path.exists(place):
        place = place.parent
    usage = shutil.disk_usage(place)
    if needed * 1.02 > usage.free and usage.total:  # without size: no disk, and not writable either
        raise CacheError(
            f"the store needs {needed / 1e9:,.2f} GB, "
            f"and {place} has {usage.free / 1e9:,.2f} GB free",
            fix="fewer --views, --codec int8, --limit, or --out on a larger disk",
        )


def rows_of(spec: CacheSpec, todo: np.ndarray) -> int:
    """How many images the blocks with anything to make ([blocks, K] bool) have."""
    starts = np.flatnonzero(todo.any(axis=1)) * spec.shard_size
    return int((np.minimum(starts + spec.shard_size, spec.rows) - starts).sum())


def run_part(
    work: Plan,
    writer: Writer,
    part: Part,
    codec: Codec,
    todo: np.ndarray,
    workers: Workers,
    progress: Progress,
) -> None:
    """Make the shards `todo` ([blocks, K] bool) of a generation; `workers` is `share`'s."""
    config, spec, store = work.config, part.spec, writer.store
    replicas, threads, torch_threads = workers
    init: dict[str, Any] = {
        "spec": spec,
        "codec": codec,
        "manifest": part.manifest,
        "root": str(data_root(work.source).resolve()),
        "device": config.device,
        "batch_size": config.batch_size,
        "threads": threads,
        "torch_threads": torch_threads,
    }
    store.log("start", executor=config.executor, host=platform.node(), shards=int(todo.sum()))
    progress.begin("extract", rows_of(spec, todo), "images")
    shards = int(todo.sum())
    done, written, started = 0, 0, time.perf_counter()

    def commit(block: int, folder: AnyPath, records: list[dict]) -> None:
        nonlocal done, written
        for record in records:
            writer.commit(folder, record)
            done += 1
            written += sum(file["bytes"] for file in record["files"])
        store.files.leave(folder)
        store.log("commit", block=block, seconds=round(time.perf_counter() - started, 3))

    def report_images(images: int) -> None:
        progress.advance(images, f"{done}/{shards} shards, {written / 1e9:.2f} GB")

    def folder_of(block: int, attempt: int) -> AnyPath:
        return writer.stage(f"{block:05d}.{attempt}")

    writer.clear(todo)

    if config.executor == "local":
        import torch

        before = torch.get_num_threads()
        try:
            _run_here(
                Extractor(teacher=work.teacher, **init), todo, folder_of, commit, report_images
            )
        finally:
            torch.set_num_threads(before)  # the caller's own
    else:
        from pipeline.cluster.connect import RemoteClass
        from pipeline.cluster.pool import BlockCallbacks, Replicas, map_blocks

        arguments = init | {"teacher": teacher_spec(config)}
        lost = map_blocks(
            RemoteClass("pipeline.extraction.worker", "Extractor", arguments),
            todo,
            BlockCallbacks(
                folder_of=folder_of,
                on_done=commit,
                on_progress=report_images,
                on_failure=lambda block, attempt, why: store.log(
                    "failure", block=block, attempt=attempt, why=why
                ),
            ),
            Replicas(
                count=replicas,
                gpus=1 if work.teacher.device.type == "cuda" else 0,
                address=config.address,
            ),
            attempts=_ATTEMPTS,
        )
        if lost:
            block, why = next(iter(lost.items()))
            raise CacheError(
                f"{len(lost)} blocks failed {_ATTEMPTS} times, the first is {block}: {why}",
                fix="run the same line again: finished shards are kept",
            )
    progress.end()


def _run_here(
    extractor: Extractor,
    todo: np.ndarray,
    folder_of: Callable[[int, int], AnyPath],
    commit: Callable[[int, AnyPath, list[dict]], None],
    report_images: Callable[[int], None],
) -> None:
    """The same work in this process, in a thread, so that progress moves within a block."""
    with ThreadPoolExecutor(1, thread_name_prefix="extract") as pool:
        for block in np.flatnonzero(todo.any(axis=1)).tolist():
            views = np.flatnonzero(todo[block]).tolist()
            folder = folder_of(block, 0)
            task = pool.submit(extractor.run, block, views, str(folder))
            while wait([task], timeout=0.2).not_done:
                report_images(extractor.images)
            commit(block, folder, task.result())
            report_images(extractor.images)


def _publish(work: Plan, writer: Writer, bad: dict[int, str], summary: dict) -> None:
    """Count the bad so far, write their list and, if they are few enough, publish."""
    reasons = Counter(why.split(":")[0] for why in bad.values())
    summary["bad"] = dict(reasons.most_common())
    manifest = Manifest.join([p.manifest for p in work.parts if p.spec.first_view == 0])
    listed = writer.store.report_bad(bad, manifest)
    summary["bad_csv"] = str(listed) if listed else None
    allowed = allowed_bad(work.config.max_bad, summary["images"])
    if len(bad) > allowed:
        counts = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
        writer.store.log("withheld", bad=len(bad))
        raise DataError(
            f"{len(bad)} of {summary['images']} images are bad ({counts}); all others are done, "
            f"the list is {listed}",
            expected=f"at most {allowed} (--max-bad {work.config.max_bad})",
            fix=f"the same line with --max-bad {len(bad)}: it then only writes the index",
        )
    writer.finish(work.layer)
