"""How fast this machine extracts targets: some seconds of the real work, deleted afterwards."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from milan.core.progress import Progress
from milan.errors import CacheError
from milan.store.codecs import Codec, codec_of
from milan.store.format import CacheSpec
from pipeline.extraction.hardware import Workers
from pipeline.extraction.plan import Plan
from pipeline.extraction.worker import Extractor
from pipeline.writing.backend import Location
from pipeline.writing.shards import create_arrays, stage_shard

_SECONDS = 4.0  # a measurement that takes longer is the last one
_VIEWS = 8  # of the first measurement, and of a forward pass on a CPU


@dataclass(frozen=True)
class Throughput:
    """How fast one replica of the teacher and the store's disk are."""

    image_seconds: float
    """For an image with all its K views: read, decode, render, teacher, encode, stage."""
    teacher_seconds: float
    """For a view, of the teacher alone."""
    write_rate: float
    """Bytes a second of the store's disk: written, synced and read back. inf: not known."""
    source: str
    """Where these figures come from, for people."""


def measure_throughput(work: Plan, workers: Workers, progress: Progress) -> Throughput:
    """Run a replica on the first images and write one shard, beside where the store will be.

    Each run has twice the images of the one before, until one takes some seconds or is a whole
    block. Only the last run counts: the first is slow. Raises CacheError if the folder cannot be
    written, TeacherError for targets that are not finite.
    """
    part = work.parts[-1]
    spec = part.spec
    progress.note("measuring: a few images, the teacher, the disk")
    began = time.perf_counter()
    codec = stand_in(spec.codec, spec.channels)
    with scratch(work.location) as scratch_folder, _threads(workers.torch_threads):
        extractor = Extractor(
            part=part,
            codec=codec,
            root=str(work.root.resolve()),
            teacher=work.teacher,
            device=work.config.device,
            batch_size=work.batch_size,
            workers=workers,
        )
        block = min(spec.rows, spec.shard_size)
        runs, rows = 0, min(block, -(-_VIEWS // spec.views))
        while True:
            extractor.spec = replace(spec, rows=rows)
            folder = scratch_folder / str(runs)
            create_arrays(folder, extractor.spec, {}, {})
            started = time.perf_counter()
            extractor.run(0, list(range(spec.views)), str(folder))
            seconds = time.perf_counter() - started
            if seconds > _SECONDS or (runs and rows == block):
                break
            runs, rows = runs + 1, min(block, 2 * rows)
        teacher_seconds = _teacher_seconds(work)
        # A bucket is not measured: that would write to it.
        write_rate = math.inf
        if work.location.scratch_is_on_store:
            write_rate = _write_rate(replace(spec, rows=block), scratch_folder / "write")
    return Throughput(
        image_seconds=seconds / rows,
        teacher_seconds=teacher_seconds,
        write_rate=write_rate,
        source=f"measured with {rows} images in {time.perf_counter() - began:.0f} s",
    )


@lru_cache
def stand_in(codec: str, channels: int) -> Codec:
    """The codec fitted to noise [*, channels]: as fast and as large as one fitted to features."""
    noise = torch.randn(max(256, channels), channels, generator=torch.Generator())
    return codec_of(codec).fitted(noise)


@contextmanager
def scratch(location: Location) -> Iterator[Path]:
    """A folder on the file system of the planned store, deleted afterwards. Raises CacheError.

    For a bucket it is in $TMPDIR, where workers stage.
    """
    parent = location.scratch_parent()
    try:
        with tempfile.TemporaryDirectory(prefix=".milan-plan-", dir=parent) as name:
            yield Path(name)
    except OSError as error:
        raise CacheError(
            f"{location.path} cannot be written: {error.strerror}", fix="--out a folder of your own"
        ) from None


def _teacher_seconds(work: Plan) -> float:
    """Seconds of the teacher for a view, the faster of two batches of noise."""
    views = _VIEWS if work.teacher.device.type == "cpu" else work.batch_size
    size = work.teacher.size
    pixels = np.random.default_rng(0).integers(0, 256, (views, size, size, 3), np.uint8)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        features, _attention = work.teacher.targets(pixels)
        features[0, 0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds) / views


def _write_rate(spec: CacheSpec, folder: Path) -> float:
    """Bytes a second of staging one shard of `spec.rows` rows of noise."""
    create_arrays(folder, spec, {}, {})
    noise = np.random.default_rng(0)
    arrays = {}
    for name, array in spec.view_arrays().items():
        shape = (spec.rows, *array.shape[2:])
        count = int(np.prod(shape)) * np.dtype(array.dtype).itemsize
        arrays[name] = np.frombuffer(noise.bytes(count), array.dtype).reshape(shape)
    started = time.perf_counter()
    files = stage_shard(folder, spec, 0, 0, arrays)
    return sum(file["bytes"] for file in files) / (time.perf_counter() - started)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Inside, torch has `count` threads (None: as many as before); afterwards as many as before."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
