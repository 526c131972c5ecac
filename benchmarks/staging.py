"""What an extraction does beside decoding and the teacher: arrays, checksums, shards.

    python -m benchmarks.staging [--rows 512]

A shard of int8 features [197, 512], staged by us and by zarr-python in the same bytes. Then blocks
of views whose pixels are ready and whose features cost nothing: views a second, and what the thread
that feeds the teacher does beside it. Then a teacher that takes 3,000 views a second: how long it
waits. Shards are written to $TMPDIR and synced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr

from benchmarks.measure import interleaved, parser, ratio, report
from benchmarks.reading import numbered
from milan.images.views import ViewSpec
from milan.store.codecs import Int8
from milan.store.format import CacheSpec
from pipeline.extraction import worker
from pipeline.extraction.growth import Part
from pipeline.extraction.hardware import Workers
from pipeline.teachers.load import Teacher
from pipeline.writing.shards import create_arrays, stage_shard

_BATCH, _TOKENS, _CHANNELS = 64, 197, 512
_BLOCKS = 8
_GOAL = 3000  # views a second that a teacher may take


def by_zarr(folder: Path, spec: CacheSpec, arrays: dict[str, np.ndarray]) -> None:
    """One shard, as zarr-python writes it; synced, and its files' digests."""
    create_arrays(folder, spec, {}, {})
    for name, values in arrays.items():
        array = zarr.open_array(folder / name, config={"write_empty_chunks": False})
        array[0 : len(values), 0] = values
    for relative in spec.files(0, 0).values():
        with open(folder / relative, "rb") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())


class FreeTeacher(Teacher):
    """Its features are there before it is asked, or as soon as a batch takes `seconds`.

    A GPU has them and checks them: here they are a number a view.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.identity, self.texts, self.channels = {}, None, _CHANNELS
        self.device, self.seconds, self.busy = torch.device("cpu"), seconds, 0.0
        self.features = torch.zeros(_BATCH, 1, 1)
        self.attention = torch.rand(_BATCH, _TOKENS - 1) + 0.1

    def targets(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same each time."""
        time.sleep(self.seconds)
        self.busy += self.seconds
        return self.features[: len(pixels)], self.attention[: len(pixels)]


class FreeCodec(Int8):
    """Its codes are there as well: a GPU computes them."""

    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Random codes."""
        return _CODES[: len(features)], torch.ones(len(features), _TOKENS)


_CODES = torch.randint(-127, 128, (_BATCH, _TOKENS, _CHANNELS), dtype=torch.int8)


def feed(spec: CacheSpec, folder: Path, seconds: float = 0.0) -> Fed:
    """Extract blocks of ready pixels by a FreeTeacher of `seconds` a batch."""
    shutil.rmtree(folder, ignore_errors=True)
    create_arrays(folder, spec, {}, {})
    teacher = FreeTeacher(seconds)
    extractor = worker.Extractor(
        part=Part("000", spec, numbered(spec.rows)), root=str(folder), teacher=teacher,
        codec=FreeCodec("int8", "int8", fill=-128, scaled=True), device="cpu", batch_size=_BATCH,
        workers=Workers(1, 2, None),
    )  # fmt: skip
    pixels = np.zeros((224, 224, 3), np.uint8)
    ready: dict[str, Any] = {"pixels": [pixels], "sums": [0], "digest": "d"}
    ready["crops"] = np.zeros((1, 5), np.int32)
    extractor._render = lambda row: worker._Rendered(row, **ready)  # type: ignore[method-assign]
    feeding, staging = _Clock(), _Clock()
    extractor._compute = feeding.timing(extractor._compute)  # type: ignore[method-assign]
    stage, worker.stage_shard = worker.stage_shard, staging.timing(worker.stage_shard)
    began, cpu = time.perf_counter(), time.process_time()
    try:
        with ThreadPoolExecutor(worker.BLOCKS_AT_ONCE) as pool:
            list(pool.map(lambda b: extractor.run(b, [0], str(folder)), range(spec.blocks)))
    finally:
        worker.stage_shard = stage
    wall = time.perf_counter() - began
    in_feeding = sum(staging.by_thread.get(thread, 0.0) for thread in feeding.by_thread)
    return Fed(
        views_per_second=spec.rows / wall,
        cpu_ms=1000 * (time.process_time() - cpu) / spec.rows,
        feeding_ms=1000 * sum(feeding.by_thread.values()) / spec.rows,
        staging_share=in_feeding / sum(feeding.by_thread.values()),
        waiting=1 - teacher.busy / (feeding.last - began),
    )


class Fed(NamedTuple):
    """What `feed` saw."""

    views_per_second: float
    cpu_ms: float
    """Of all cores, a view."""
    feeding_ms: float
    """Of a core, a view, in the thread that feeds the teacher while it does."""
    staging_share: float
    """Processor time of shards in the threads that feed, beside what feeding takes."""
    waiting: float
    """Share of the time, until the last block is computed, in which the teacher does nothing."""


class _Clock:
    """Processor time inside a function, by thread."""

    def __init__(self) -> None:
        self.by_thread: dict[int, float] = {}
        self.last = 0.0  # when it ended last, on the clock of the wall

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*arguments: Any) -> Any:
            began, thread = time.thread_time(), threading.get_ident()
            try:
                return function(*arguments)
            finally:
                spent = time.thread_time() - began
                self.by_thread[thread] = self.by_thread.get(thread, 0.0) + spent
                self.last = time.perf_counter()

        return timed


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, default=512)
    args = flags.parse_args()
    spec = CacheSpec(
        manifest="", rows=_BLOCKS * args.rows, views=1, tokens=_TOKENS, channels=_CHANNELS,
        codec="int8", shard_size=args.rows, view_law=ViewSpec().law(), teacher={},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.integers(-127, 128, (args.rows, _TOKENS, _CHANNELS), np.int8),
        "scale": rng.random((args.rows, _TOKENS), np.float32),
        "attention": rng.random((args.rows, _TOKENS - 1), np.float32) + 0.1,
        "crop": np.ones((args.rows, 5), np.int32),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "shard")

        def fresh() -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

        cpu = interleaved(
            {
                "zarr": lambda: by_zarr(fresh(), spec, arrays),
                "ours": lambda: stage_shard(fresh(), spec, 0, 0, arrays),
            },
            args.rounds,
            clock="cpu",
        )
        paced = _BATCH / _GOAL
        free, kept_busy = [], []
        for _ in range(args.rounds):
            free.append(feed(spec, Path(name, "fed")))
            kept_busy.append(feed(spec, Path(name, "fed"), paced))
    free_views, cpu_ms, feeding_ms, share, _ = np.median(np.array(free), axis=0)
    each = {who: 1000 * float(np.median(s)) / args.rows for who, s in cpu.items()}
    lines = [
        f"A view of a shard: {each['zarr']:.2f} ms of a core by zarr-python, {each['ours']:.2f} by "
        f"us, {ratio(cpu['zarr'], cpu['ours'])} times less.",
        "",
        f"{_BLOCKS} blocks of {args.rows} views of ready pixels, two decoding threads:",
        "",
        "| teacher | views/s | of a core, ms a view | feeding, ms a view | shards in the feeding "
        "threads / feeding | the teacher waits |",
        "|---|---|---|---|---|---|",
        f"| free | {free_views:,.0f} | {cpu_ms:.2f} | {feeding_ms:.2f} | {share:.1%} | |",
    ]
    views, cpu_ms, feeding_ms, share, waiting = np.median(np.array(kept_busy), axis=0)
    lines.append(
        f"| {_GOAL:,} views/s | {views:,.0f} | {cpu_ms:.2f} | {feeding_ms:.2f} | {share:.1%} | "
        f"{waiting:.1%} |"
    )
    report("staging", "python -m benchmarks.staging", lines, keep=args.keep)


if __name__ == "__main__":
    main()
