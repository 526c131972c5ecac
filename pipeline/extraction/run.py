"""The work of an extraction: each generation of a plan is opened, filled and published.

What is committed is never written again: a run that was killed, or a store that grows, continues
with the shards that are missing.
"""

from __future__ import annotations

import platform
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np

from milan.core.paths import AnyPath, folders_in
from milan.core.progress import Progress
from milan.core.units import format_bytes
from milan.core.waiting import Wait
from milan.core.watchdog import HEARD, LIMIT
from milan.errors import CacheError, DataError, MachineError
from milan.images.manifest import Manifest
from milan.images.source import ImageSource
from milan.store.cache import TargetCache
from milan.store.codecs import Codec, codec_of
from milan.store.format import FIDELITY, MANIFEST, ORIGIN, CacheSpec, Entry, canonical, read_json
from milan.store.generation import Generation, read_array
from pipeline.config import allowed_bad
from pipeline.extraction.fidelity import check_canaries, check_min_cosine, prepare
from pipeline.extraction.growth import Part, codec_fits_none, readable
from pipeline.extraction.hardware import Workers
from pipeline.extraction.plan import Plan, teacher_spec
from pipeline.extraction.rewriting import written_again
from pipeline.extraction.worker import BLOCKS_AT_ONCE, Extractor
from pipeline.teachers.load import Teacher
from pipeline.writing.backend import check_space
from pipeline.writing.store import Store, Writer, group_attributes

LESS = "fewer --views, --codec int8, --limit, or --out on a larger disk"
"""What to do where a store does not fit."""
_ATTEMPTS = 3  # of one block, before the run gives it up


def fill_store(
    work: Plan, store: Store, workers: Workers, summary: dict, progress: Progress
) -> None:
    """Write the missing shards, generation by generation, and publish all when they are complete.

    Adds to `summary`: fidelity, bad (counts by reason), bad_csv, digest, seconds,
    images_per_second. Raises MilanError.
    """
    rejected: dict[int, str] = {}
    writers: list[Writer] = []
    seconds, images = 0.0, 0
    codec: Codec | None = None
    store.drop(work.dropped)
    for part in work.parts:
        writer, codec = _open_generation(work, store, part, codec)
        if part is work.parts[0]:
            check_canaries(writer.root, work.teacher)
        summary["fidelity"] = read_json(writer.root / FIDELITY)
        todo = writer.missing()
        entry = next((entry for entry in store.entries() if entry.path == part.name), None)
        if entry is None:
            _try_rejected(work, part, writer, progress)
            writer.forget_partial_blocks()
        elif todo.any():
            part = _as_it_was(work, store, entry, part, writer)
        todo = writer.missing()
        shards = int(todo.sum())
        needed = part.spec.total_bytes() * shards // part.spec.shards
        check_space(work.location, needed, fix=LESS)
        if 0 < shards < part.spec.shards:
            finished = part.spec.shards - shards
            progress.note(f"resuming: {finished} of {part.spec.shards} shards are there")
        if shards:
            started = time.perf_counter()
            write_shards(work, writer, part, codec, todo, workers, progress)
            seconds += time.perf_counter() - started
            images += rows_of(part.spec, todo)
        rejected |= {part.spec.first_row + row: reason for row, reason in writer.bad().items()}
        _check_rejected(work, store, rejected, summary)
        writers.append(writer)
    store.publish(*[writer.finish(work.layer) for writer in writers])
    summary["seconds"] = round(seconds, 3)
    summary["images_per_second"] = round(images / seconds, 2) if images else None
    cache = TargetCache(store.path, layer=work.layer)
    summary["digest"] = cache.digest
    store.log("finish", digest=cache.digest, images_per_second=summary["images_per_second"])


def _try_rejected(work: Plan, part: Part, writer: Writer, progress: Progress) -> None:
    """Try the rejected images of an earlier run again; forget the shards of those that are well.

    A file that was missing, cut short or not fetched may have been restored since.
    """
    images = ImageSource(part.manifest, work.root)
    bad = [row for row in writer.bad() if row not in part.rejected]
    if not bad:
        return
    digests = readable(images, bad, progress)
    rows = [row for row, digest in digests.items() if part.is_same(row, digest)]
    if not rows:
        return
    if part.spec.has_targets and not read_json(writer.root / FIDELITY):
        raise codec_fits_none(work.location.path)
    blocks = sorted({row // part.spec.shard_size for row in rows})
    for block in blocks:
        for view in range(part.spec.views):
            writer.forget(block, view)
    progress.note(
        f"{len(rows)} of {len(bad)} rejected images can be read now: "
        f"{len(blocks) * part.spec.views} shards are written again"
    )


def _as_it_was(work: Plan, store: Store, entry: Entry, part: Part, writer: Writer) -> Part:
    """A finished part some of whose shards are gone, as it is written again."""
    images = ImageSource(part.manifest, work.root)
    missing = {(block, view) for block, view in np.argwhere(writer.missing()).tolist()}
    dropped = work.dropped.get(work.layer, [])
    part, shards = written_again(part, Generation(store.path, entry), images, missing, dropped)
    for block, view in shards - missing:
        writer.forget(block, view)
    return part


def _open_generation(
    work: Plan, store: Store, part: Part, codec: Codec | None
) -> tuple[Writer, Codec]:
    """The generation of `part`, new or that of an earlier run, and the codec of its layer."""
    images = ImageSource(part.manifest, work.root)

    def initial() -> tuple[dict, dict[str, np.ndarray], dict[str, bytes]]:
        batch = work.batch_size
        prepared = prepare(part.spec, images, work.teacher, batch=batch, codec=codec)
        check_min_cosine(prepared.fidelity, work.config.min_cosine)
        if codec is not None:  # the layer's first generation has its tables and canaries
            prepared = replace(prepared, codec=replace(codec, tables={}), canaries={})
        files = {
            MANIFEST: part.manifest.to_parquet(),
            FIDELITY: canonical(prepared.fidelity),
            ORIGIN: canonical(work.origin()),
        }
        tables = prepared.tables() | _prototypes(part, work.teacher)
        return group_attributes(part.spec, work.teacher.about), tables, files

    writer = store.generation(part.name, part.spec, initial)
    return writer, codec or read_codec(writer.root, part.spec)


def _prototypes(part: Part, teacher: Teacher) -> dict[str, np.ndarray]:
    """The text tower's class prototypes, if texts are stored; once for each stretch of rows."""
    classes = part.manifest.classes
    if teacher.texts is None or not classes or part.spec.first_view:
        return {}
    return teacher.texts.prototypes(classes)


def read_codec(root: AnyPath, spec: CacheSpec) -> Codec:
    """The codec of `spec` with its tables, which the generation at `root` holds."""
    folder = root / "codec"
    names = sorted(folders_in(folder)) if folder.is_dir() else []
    tables = {n: read_array(folder / n) for n in names}
    return codec_of(spec.codec).restored(tables)


def rows_of(spec: CacheSpec, todo: np.ndarray) -> int:
    """How many images there are in the blocks with any shard in `todo` ([blocks, K] bool)."""
    starts = np.flatnonzero(todo.any(axis=1)) * spec.shard_size
    return int((np.minimum(starts + spec.shard_size, spec.rows) - starts).sum())


class _Commits:
    """Commits blocks as workers finish them, and reports how far the run is."""

    def __init__(self, writer: Writer, todo: np.ndarray, progress: Progress) -> None:
        self.writer, self.progress = writer, progress
        self.shards, self.committed, self.bytes = int(todo.sum()), 0, 0
        self.started = time.perf_counter()

    def folder_of(self, block: int, attempt: int) -> AnyPath:
        """The staging folder of an attempt at a block."""
        return self.writer.stage(f"{block:05d}.{attempt}")

    def commit(self, block: int, folder: AnyPath, records: list[dict]) -> None:
        """Commit the shards of a block."""
        store = self.writer.store
        for record in records:
            self.writer.commit(folder, record)
            self.committed += 1
            self.bytes += sum(file["bytes"] for file in record["files"])
        store.backend.drop_staging(folder)
        store.log("commit", block=block, seconds=round(time.perf_counter() - self.started, 3))

    def report(self, images: int) -> None:
        """Show how many images the workers have processed."""
        self.progress.advance(
            images, f"{self.committed}/{self.shards} shards, {format_bytes(self.bytes)}"
        )

    def log_failure(self, block: int, attempt: int, reason: str) -> None:
        """Log a failed attempt."""
        self.writer.store.log("failure", block=block, attempt=attempt, why=reason)


def write_shards(
    work: Plan,
    writer: Writer,
    part: Part,
    codec: Codec,
    todo: np.ndarray,
    workers: Workers,
    progress: Progress,
) -> None:
    """Write and commit the shards `todo` ([blocks, K] bool) of a generation. Raises MilanError."""
    config, store = work.config, writer.store
    init: dict[str, Any] = {
        "part": part,
        "codec": codec,
        "root": str(work.root.resolve()),
        "device": work.hardware.worker_device(config.device),
        "batch_size": work.batch_size,
        "workers": workers,
    }
    store.log(
        "start", executor=work.hardware.executor, host=platform.node(), shards=int(todo.sum())
    )
    progress.begin("extract", rows_of(part.spec, todo), "images")
    commits = _Commits(writer, todo, progress)
    writer.clear(todo)
    if work.hardware.executor == "local":
        import torch

        threads = torch.get_num_threads()
        try:
            _run_in_process(Extractor(teacher=work.teacher, **init), todo, commits)
        finally:
            torch.set_num_threads(threads)  # the caller's own
    else:
        from pipeline.cluster.connect import RemoteClass
        from pipeline.cluster.pool import BlockCallbacks, Replicas, map_blocks

        arguments = init | {"teacher": teacher_spec(config, work.hardware)}
        gpus = 1 if work.hardware.on_gpu else 0
        failed = map_blocks(
            RemoteClass("pipeline.extraction.worker", "Extractor", arguments),
            todo,
            BlockCallbacks(
                folder_of=commits.folder_of,
                on_done=commits.commit,
                on_progress=commits.report,
                on_failure=commits.log_failure,
            ),
            Replicas(workers.replicas, gpus, BLOCKS_AT_ONCE, config.address),
            attempts=_ATTEMPTS,
            progress=progress,
        )
        if failed:
            block, reason = next(iter(failed.items()))
            raise CacheError(
                f"{len(failed)} blocks failed {_ATTEMPTS} times, the first is {block}: {reason}",
                fix="run the same line again: finished shards are kept",
            )
    progress.end()


def _run_in_process(extractor: Extractor, todo: np.ndarray, commits: _Commits) -> None:
    """The same work in threads of this process."""

    patience = Wait(
        "the next image or batch of the teacher",
        limit=LIMIT,
        fix="look at the disk or server of the images; the same line goes on",
        progress=commits.progress,
        error=MachineError,
    )

    def commit_first() -> None:
        block, folder, task = tasks.popleft()
        images = -1
        while wait([task], timeout=0.2).not_done:
            if images != extractor.images:
                images = extractor.images
                patience.restart()
            patience.check()
            commits.report(extractor.images)
        commits.commit(block, folder, task.result())
        commits.report(extractor.images)

    tasks: deque[tuple[int, AnyPath, Future[list[dict]]]] = deque()
    pool = ThreadPoolExecutor(BLOCKS_AT_ONCE, thread_name_prefix="extract")
    running: deque[Future[list[dict]]] = deque(maxlen=BLOCKS_AT_ONCE)
    try:
        for block in np.flatnonzero(todo.any(axis=1)).tolist():
            views = np.flatnonzero(todo[block]).tolist()
            folder = commits.folder_of(block, 0)
            running.append(pool.submit(extractor.run, block, views, str(folder)))
            tasks.append((block, folder, running[-1]))
            if len(tasks) == BLOCKS_AT_ONCE:
                commit_first()
        while tasks:
            commit_first()
    finally:
        extractor.stopped.set()  # after an error or Ctrl-C nobody waits for the next block,
        wait(running, timeout=HEARD)  # nor for ever for the one in hand
        pool.shutdown(wait=False)


def _check_rejected(work: Plan, store: Store, rejected: dict[int, str], summary: dict) -> None:
    """List the files rejected so far (reason by row). Raises DataError if they are too many.

    Rows that were dropped from the store do not count: they are left out of training already. Nor
    do those whose images have a later row.
    """
    left_out = work.superseded.union(work.dropped.get(work.layer, []))
    rejected = {row: reason for row, reason in rejected.items() if row not in left_out}
    reasons = Counter(reason.split(":")[0] for reason in rejected.values())
    summary["bad"] = dict(reasons.most_common())
    manifest = Manifest.join([p.manifest for p in work.parts if p.spec.first_view == 0])
    path = store.report_bad(rejected, manifest)
    summary["bad_csv"] = str(path) if path else None
    allowed = allowed_bad(work.config.max_bad, summary["images"])
    if len(rejected) > allowed:
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        store.log("withheld", bad=len(rejected))
        raise DataError(
            f"{len(rejected)} of {summary['images']} images are rejected ({counts}); all others "
            f"are done, the list is {path}",
            expected=f"at most {allowed} (--max-bad {work.config.max_bad})",
            fix=f"the same line with --max-bad {len(rejected)}: it then only writes the index",
        )
