"""`extract_targets`: run the teacher once over all images, and leave a finished store.

A new store is one generation. An existing store grows by whole generations: more views of each
stretch of rows, and then the new rows; committed files are never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from milan.core.config_resolver import from_call
from milan.core.paths import AnyPath, read_file
from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes
from milan.errors import ConfigError
from milan.store.format import INDEX
from pipeline.config import ExtractConfig
from pipeline.estimate.cost import Tables, measure_cost
from pipeline.extraction.hardware import plan_workers
from pipeline.extraction.plan import plan
from pipeline.extraction.run import LESS, fill_store
from pipeline.extraction.worker import BLOCKS_AT_ONCE
from pipeline.writing.backend import check_space, location_of
from pipeline.writing.disk import as_store_error
from pipeline.writing.store import Store

ASK_ABOVE = 100e9
"""Bytes to be written above which extraction asks first."""


def extract_targets(
    data: str | ExtractConfig,
    *,
    progress: Progress | None = None,
    dry_run: bool = False,
    agree: Callable[[Tables], bool] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run the teacher over K views of every image and leave a finished store.

    `data` and `settings` are the command's arguments (ExtractConfig's fields). To continue a run
    that was killed, make the same call again; to grow a store, call with more views or images.
    Above ASK_ABOVE bytes `agree` gets the cost tables and decides, unless the settings say `yes`.

    Returns a summary: path, layer, images, views, shards, bytes_per_view, bytes, dropped (images of
    the store that are not in the data any more), fidelity, bad
    (rejected files: a count by reason), bad_csv, digest, seconds, images_per_second; a `dry_run`,
    which writes nothing that stays, returns `costs` in place of the results. Raises MilanError.
    """
    config = from_call(ExtractConfig, "data", data, settings, "extract")
    progress = progress or NoProgress()
    config.check()
    if not dry_run:
        location_of(config.out).check()  # before a teacher is fetched and loaded
    planned_for = _index_of(location_of(config.out).path)
    work = plan(config, progress)
    out = work.location.path
    specs = [part.spec for part in work.parts]
    summary: dict[str, Any] = {
        "path": str(out),
        "layer": work.layer,
        "images": max(s.first_row + s.rows for s in specs) - len(work.superseded),
        "views": max(s.first_view + s.views for s in specs),
        "shards": sum(s.shards for s in specs),
        "bytes_per_view": specs[0].view_bytes(),
        "bytes": sum(s.total_bytes() for s in specs),
        "dropped": len(work.dropped.get(work.layer, [])),
    }
    workers = plan_workers(config, work.hardware)
    block = config.shard_size * max(s.views for s in specs) * specs[0].view_bytes()
    in_memory = block * min(BLOCKS_AT_ONCE, max(s.blocks for s in specs))
    progress.note(
        f"executor: {work.hardware.executor}, {workers.replicas} x teacher, "
        f"{workers.decode_threads} decoding threads each, batches of {work.batch_size} views, "
        f"{format_bytes(in_memory)} of targets in memory each"
    )
    new = [p.spec for p in work.parts if not (out / p.name / "zarr.json").exists()]
    needed = sum(s.total_bytes() for s in new)  # generations that have begun were agreed to
    check_space(work.location, needed, fix=LESS)
    if dry_run:
        summary["costs"] = measure_cost(work, workers, progress)
        return summary
    agreed = config.yes or needed <= ASK_ABOVE
    if not agreed and agree is not None:
        agreed = agree(measure_cost(work, workers, progress))
    if not agreed:
        raise ConfigError(
            f"{out} would take {format_bytes(needed)}", expected="your consent", fix="--yes"
        )
    with as_store_error(out):
        store = Store(out)
        try:
            # Another call may have finished or grown the store before this one had the lock.
            current = _index_of(out) == planned_for
            if current:
                fill_store(work, store, workers, summary, progress)
        except KeyboardInterrupt:
            finished = sum(work.finished_shards())
            raise KeyboardInterrupt(
                f"{finished:,} of {summary['shards']:,} shards are in {out} and stay; "
                "the same line goes on with the others"
            ) from None
        finally:
            store.close()
    if current and not work.begun:
        return summary
    if not current:
        progress.note(f"planned anew: {out} has changed since the plan was made")
    return extract_targets(config, progress=progress, agree=agree)


def _index_of(out: AnyPath) -> bytes | None:
    """The index of a finished store, None if there is none."""
    return read_file(out / INDEX) if (out / INDEX).exists() else None
