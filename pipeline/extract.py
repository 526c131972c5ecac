"""Extraction: which shards are missing, and how one is made.

A task is a block of rows. Each image of it is read and decoded once, its K views are rendered and
shown to the teacher, and the block's K shards are staged; the driver commits them.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from milan.cache import GENERATION, CacheSpec, record_name
from milan.codecs import codec_of
from milan.errors import CacheError, ConfigError, DataError, ImageFault, TeacherError
from milan.images import content_digest, decode
from milan.manifest import Manifest, build_manifest, data_root, resolve_data
from milan.places import Place
from milan.sources import ImageSource
from milan.views import ViewSpec, checksum, render, view_of
from milan.watch import Silent, Watch
from pipeline.settings import ExtractConfig, allowed_bad
from pipeline.store import Store, group_attributes, stage_shard, told_if_full
from pipeline.teacher import Teacher, TeacherSpec, load_teacher

_ATTEMPTS = 3  # of one block, before the run gives it up
_RECORDED = ("torch", "open_clip_torch", "zarr", "numcodecs", "numpy", "pillow", "ray")


# --- the worker -----------------------------------------------------------------------------------


@dataclass
class _Rendered:
    """An image after decoding: its K views, or why there are none."""

    row: int
    pixels: np.ndarray | None = None  # [K, S, S, 3] uint8
    crops: np.ndarray | None = None  # [K, 5]
    digest: str | None = None
    size: tuple[int, int] = (0, 0)  # height, width
    reason: str | None = None


class Extractor:
    """A copy of the teacher and the threads that feed it; stages whole shards, one block a call."""

    def __init__(
        self,
        *,
        spec: CacheSpec,
        manifest: Manifest,
        root: str,
        teacher: TeacherSpec | Teacher,
        device: str,
        batch_size: int,
        threads: int,
        torch_threads: int | None = None,
    ) -> None:
        if torch_threads:
            import torch

            torch.set_num_threads(torch_threads)
        self.spec, self.batch_size, self.threads = spec, batch_size, threads
        self.view_spec = ViewSpec.from_law(spec.view_law)
        self.codec = codec_of(spec.codec)
        self.source = ImageSource(manifest, root)
        self.teacher = (
            teacher if isinstance(teacher, Teacher) else load_teacher(teacher, device=device)
        )
        if self.teacher.identity != spec.teacher:
            raise TeacherError(
                "a worker loaded another teacher than the driver",
                expected="the same weight file and settings on every node",
            )
        self.images = 0
        """Images dealt with since the start; read by the driver while a block is in work."""

    def run(self, block: int, views: list[int], folder: str) -> list[dict]:
        """Stage the shards (block, view) for `views` in `folder`; returns their records.

        All K views are computed whichever are asked for, so that the teacher meets the same
        batches, and gives the same bits, as in an undisturbed run.
        """
        start, stop = self.spec.block_rows(block)
        count, k = stop - start, self.spec.views
        arrays = {
            name: np.full((k, count, *array.shape[2:]), array.fill, array.dtype)
            for name, array in self.spec.arrays().items()
        }
        record: dict[str, Any] = {
            "digests": [None] * count,
            "heights": [0] * count,
            "widths": [0] * count,
        }
        pixel_sums = np.zeros((k, count), np.int64)
        bad: dict[str, str] = {}

        def rendered() -> Iterator[tuple[int, int, np.ndarray]]:
            for image in self._images(range(start, stop)):
                at = image.row - start
                record["digests"][at] = image.digest
                record["heights"][at], record["widths"][at] = image.size
                if image.pixels is None or image.crops is None:
                    bad[str(image.row)] = image.reason or "unreadable"
                    self.images += 1
                    continue
                arrays["crop"][:, at] = image.crops
                for view, pixels in enumerate(image.pixels):
                    pixel_sums[view, at] = checksum(pixels)
                    yield at, view, pixels
                self.images += 1

        for batch in _batches(rendered(), self.batch_size):
            at = np.array([item[0] for item in batch])
            view = np.array([item[1] for item in batch])
            features, attention = self.teacher.targets(np.stack([item[2] for item in batch]))
            self._check(features, attention, at + start)
            codes, scale = self.codec.encode(features)
            if not np.isfinite(codes).all():
                raise TeacherError("features beyond the range of float16", fix="--codec int8")
            arrays["features"][view, at] = codes
            arrays["attention"][view, at] = attention.cpu().numpy()
            if scale is not None:
                arrays["scale"][view, at] = scale

        staged = []
        for v in views:
            with told_if_full(f"staging shard {record_name(block, v)[:-5]}"):
                files = stage_shard(
                    Path(folder), self.spec, block, v, {n: a[v] for n, a in arrays.items()}
                )
            staged.append(
                {"block": block, "view": v, "rows": [start, stop], "files": files, "bad": bad}
                | record
                | {"pixels": pixel_sums[v].tolist()}
            )
        return staged

    def _images(self, rows: range) -> Iterator[_Rendered]:
        """The images of `rows` in order, decoded by threads a few batches ahead of the teacher."""
        ahead = 2 * max(1, self.batch_size // self.spec.views) + self.threads
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            waiting: deque[Future[_Rendered]] = deque()
            for row in rows:
                waiting.append(pool.submit(self._render, row))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _render(self, row: int) -> _Rendered:
        digest = None
        try:
            data = self.source.read(row)
            digest = content_digest(data)
            image = decode(data)
        except ImageFault as fault:
            return _Rendered(row, digest=digest, reason=str(fault))
        width, height = image.size
        views = [
            view_of(self.view_spec, row, view=v, height=height, width=width)
            for v in range(self.spec.views)
        ]
        size = self.view_spec.size
        return _Rendered(
            row,
            np.stack([render(image, view, size=size) for view in views]),
            np.array([view.numbers() for view in views], np.int32),
            digest,
            (height, width),
        )

    def _check(self, features: Any, attention: Any, rows: np.ndarray) -> None:
        good = features.isfinite().flatten(1).all(1) & (attention > 0).all(1)
        good &= attention.isfinite().all(1)
        if not bool(good.all()):
            first = int(rows[int((~good).int().argmax())])
            raise TeacherError(
                f"the teacher's output for row {first} is not finite or its attention not > 0",
                expected="finite features",
                fix="--precision fp32",
            )


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# --- the driver -----------------------------------------------------------------------------------


@dataclass
class Plan:
    """Everything decided before the first image is read."""

    config: ExtractConfig
    source: Place
    manifest: Manifest
    teacher: Teacher
    spec: CacheSpec

    def attributes(self) -> dict:
        """What the store says of itself beside its spec."""
        root = data_root(self.source).resolve()
        about = self.teacher.about | {
            "data": self.config.data,
            "data_root": str(root),
            # A URL is where it is, wherever the store goes.
            "data_root_from_store": os.path.relpath(root, Path(self.config.out).resolve())
            if isinstance(root, Path)
            else None,
        }
        versions = {name: version(name) for name in _RECORDED}
        versions |= {"milan": version("milan-pretrain"), "python": platform.python_version()}
        return group_attributes(self.spec, about, versions)


def _teacher_spec(config: ExtractConfig) -> TeacherSpec:
    return TeacherSpec(
        name=config.teacher,
        pretrained=config.pretrained,
        norm=config.teacher_norm,
        img_size=config.img_size,
        precision=config.precision,
        offline=config.offline,
    )


def plan(config: ExtractConfig, watch: Watch) -> Plan:
    """Resolve data and teacher and fix the store's spec; reads no image. Raises MilanError."""
    config.check()
    codec_of(config.codec)
    source = resolve_data(config.data, config.data_root)
    watch.note(f"data: {source.resolve()}")
    manifest = build_manifest(source, seed=config.seed, limit=config.limit)
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    watch.note(f"manifest: {len(manifest):,} images{classes}")
    if manifest.ignored:
        kinds = ", ".join(f"{n:,} {ext}" for ext, n in sorted(manifest.ignored.items()))
        watch.note(f"no images, left out: {kinds}")
    teacher = load_teacher(_teacher_spec(config), device=config.device)
    law = ViewSpec(teacher.size, config.scale, config.ratio, config.hflip, config.seed).law()
    spec = CacheSpec(
        manifest=manifest.digest(),
        rows=len(manifest),
        views=config.views,
        tokens=teacher.tokens,
        channels=teacher.channels,
        codec=config.codec,
        shard_size=config.shard_size,
        view_law=law,
        teacher=teacher.identity,
    )
    about, identity = teacher.about, teacher.identity
    random = ", RANDOM WEIGHTS (for tests of shape and speed only)"
    watch.note(
        f"teacher: {about['name']} ({about['pretrained']}), {teacher.size} px, "
        f"{teacher.tokens} x {teacher.channels}, {identity['precision']} on {teacher.device}, "
        f"normalisation {about['normalisation']}, licence of the weights: {about['licence']}"
        + (random if about["random_weights"] else "")
    )
    for note in about["notes"]:
        watch.note(f"teacher: {note}")
    return Plan(config, source, manifest, teacher, spec)


@told_if_full("writing the store")
def extract_targets(
    data: str | ExtractConfig, *, watch: Watch | None = None, dry_run: bool = False, **settings: Any
) -> dict:
    """Run the teacher over K views of every image and leave a finished store.

    `data` and `settings` are the command's arguments (ExtractConfig's fields). Going on where a
    killed run stopped is the same call again. Returns a summary: path, images, views, bad (a
    count by reason), bytes_per_view, seconds, images_per_second. Raises MilanError.
    """
    config = data if isinstance(data, ExtractConfig) else ExtractConfig(data=data, **settings)
    watch = watch or Silent()
    work = plan(config, watch)
    out = Path(config.out)
    summary: dict[str, Any] = {
        "path": str(out),
        "images": work.spec.rows,
        "views": work.spec.views,
        "shards": work.spec.blocks * work.spec.views,
        "bytes_per_view": work.spec.view_bytes(),
        "bytes": work.spec.total_bytes(),
    }
    replicas, threads, torch_threads = _share(config, work)
    held = config.shard_size * config.views * work.spec.view_bytes()
    watch.note(
        f"executor: {config.executor}, {replicas} x teacher, {threads} decoding threads each, "
        f"batches of {config.batch_size} views, {held / 1e6:,.0f} MB of targets held by each"
    )
    if dry_run or not (out / GENERATION / "zarr.json").exists():
        _check_space(out, summary["bytes"])
    if dry_run:
        return summary
    store = Store(out, work.spec, work.attributes(), work.manifest)
    try:
        todo = store.missing()
        shards = sum(len(views) for _, views in todo)
        committed = summary["shards"] - shards
        rows_todo = sum(stop - start for start, stop in (work.spec.block_rows(b) for b, _ in todo))
        _check_space(out, int(summary["bytes"] * shards / summary["shards"]))
        if committed:
            watch.note(f"resuming: {committed} of {summary['shards']} shards are there")
        started = time.perf_counter()
        if todo:
            _run(work, store, todo, replicas, threads, torch_threads, watch)
        seconds = time.perf_counter() - started
        summary["seconds"] = round(seconds, 3)
        summary["images_per_second"] = round(rows_todo / seconds, 2) if todo else None
        _finish(work, store, summary)
    finally:
        store.close()
    return summary


def _share(config: ExtractConfig, work: Plan) -> tuple[int, int, int | None]:
    """(replicas, decoding threads each, torch threads each) on the machine or cluster at hand."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    on_gpu = work.teacher.device.type == "cuda"
    if config.executor == "local":
        if config.replicas not in (None, 1):
            raise ConfigError(
                f"--replicas {config.replicas} with --executor local", fix="--executor ray"
            )
        replicas = 1
    elif config.replicas:
        replicas = config.replicas
    elif config.address or os.environ.get("RAY_ADDRESS"):
        from pipeline.cluster import cluster_gpus

        replicas = max(1, cluster_gpus(config.address))
    else:
        replicas = torch.cuda.device_count() if on_gpu else 1
    threads = config.num_workers or max(1, min(16, cores // replicas))
    # In this process the user's setting holds; Ray would give a worker one thread.
    here = on_gpu or config.executor == "local"
    return replicas, threads, None if here else max(1, torch.get_num_threads() // replicas)


def _check_space(out: Path, needed: int) -> None:
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


def _run(
    work: Plan,
    store: Store,
    todo: list[tuple[int, list[int]]],
    replicas: int,
    threads: int,
    torch_threads: int | None,
    watch: Watch,
) -> None:
    config, spec = work.config, work.spec
    init: dict[str, Any] = {
        "spec": spec,
        "manifest": work.manifest,
        "root": str(data_root(work.source).resolve()),
        "device": config.device,
        "batch_size": config.batch_size,
        "threads": threads,
        "torch_threads": torch_threads,
    }
    store.log("start", executor=config.executor, host=platform.node(), shards=len(todo))
    watch.begin("extract", sum(np.diff(spec.block_rows(b))[0] for b, _ in todo), "images")
    shards = sum(len(views) for _, views in todo)
    done, written, started = 0, 0, time.perf_counter()

    def commit(block: int, folder: Path, records: list[dict]) -> None:
        nonlocal done, written
        for record in records:
            store.commit(folder, record)
            done += 1
            written += sum(file["bytes"] for file in record["files"])
        shutil.rmtree(folder, ignore_errors=True)
        store.log("commit", block=block, seconds=round(time.perf_counter() - started, 3))

    def progress(images: int) -> None:
        watch.advance(images, f"{done}/{shards} shards, {written / 1e9:.2f} GB")

    def folder_of(block: int, attempt: int) -> Path:
        folder = store.staging / f"{block:05d}.{attempt}"
        for name in spec.arrays():
            (folder / name).mkdir(parents=True)
            shutil.copyfile(store.root / name / "zarr.json", folder / name / "zarr.json")
        return folder

    if config.executor == "local":
        import torch

        before = torch.get_num_threads()
        try:
            _run_here(Extractor(teacher=work.teacher, **init), todo, folder_of, commit, progress)
        finally:
            torch.set_num_threads(before)  # the caller's own
    else:
        from pipeline.cluster import map_blocks

        lost = map_blocks(
            ("pipeline.extract", "Extractor"),
            init | {"teacher": _teacher_spec(config)},
            todo,
            folder_of=folder_of,
            on_done=commit,
            on_progress=progress,
            on_failure=lambda block, attempt, why: store.log(
                "failure", block=block, attempt=attempt, why=why
            ),
            replicas=replicas,
            gpus=1 if work.teacher.device.type == "cuda" else 0,
            address=config.address,
            attempts=_ATTEMPTS,
        )
        if lost:
            block, why = next(iter(lost.items()))
            raise CacheError(
                f"{len(lost)} blocks failed {_ATTEMPTS} times, the first is {block}: {why}",
                fix="run the same line again: finished shards are kept",
            )
    watch.end()


def _run_here(
    extractor: Extractor,
    todo: list[tuple[int, list[int]]],
    folder_of: Callable[[int, int], Path],
    commit: Callable[[int, Path, list[dict]], None],
    progress: Callable[[int], None],
) -> None:
    """The same work in this process, in a thread, so that progress moves within a block."""
    with ThreadPoolExecutor(1, thread_name_prefix="extract") as pool:
        for block, views in todo:
            folder = folder_of(block, 0)
            task = pool.submit(extractor.run, block, views, str(folder))
            while wait([task], timeout=0.2).not_done:
                progress(extractor.images)
            commit(block, folder, task.result())
            progress(extractor.images)


def _finish(work: Plan, store: Store, summary: dict) -> None:
    """Count the bad, write their list and, if they are few enough, the index."""
    bad = store.bad()
    reasons = Counter(why.split(":")[0] for why in bad.values())
    summary["bad"] = dict(reasons.most_common())
    listed = store.report_bad(bad, work.manifest)
    summary["bad_csv"] = str(listed) if listed else None
    allowed = allowed_bad(work.config.max_bad, work.spec.rows)
    if len(bad) > allowed:
        counts = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
        store.log("withheld", bad=len(bad))
        raise DataError(
            f"{len(bad)} of {work.spec.rows} images are bad ({counts}); all others are done, "
            f"the list is {listed}",
            expected=f"at most {allowed} (--max-bad {work.config.max_bad})",
            fix=f"the same line with --max-bad {len(bad)}: it then only writes the index",
        )
    generation = store.finish()
    summary["digest"] = generation["digest"]
    store.log("finish", digest=generation["digest"], images_per_second=summary["images_per_second"])
