"""How fast this machine extracts targets: some seconds of the real work, deleted afterwards."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from milan.core.progress import Progress
from milan.core.size import height_width
from milan.errors import CacheError
from milan.store.codecs import Codec, codec_of
from milan.store.format import CacheSpec
from pipeline.estimate.accelerators import accelerator_of, teacher_seconds_on
from pipeline.extraction.hardware import Workers
from pipeline.extraction.plan import Plan
from pipeline.extraction.worker import BLOCKS_AT_ONCE, Extractor
from pipeline.teachers.load import Teacher
from pipeline.writing.backend import Location
from pipeline.writing.shards import stage_shard

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
    """Bytes a second of the store's disk: written and synced. inf: not known."""
    source: str
    """Where these figures come from, for people."""
    assumed: tuple[str, ...] = ()
    """What of them was neither measured nor given, with its source."""


def measure_throughput(
    work: Plan, workers: Workers, progress: Progress, *, accelerator: str | None = None
) -> Throughput:
    """Run a replica on the first images and write one shard, beside where the store will be.

    With the name of an `accelerator` its rate is assumed for the teacher, and everything else is
    measured: targets are then there at once.

    Each run has twice the images of the one before, until one takes some seconds or is a whole
    block. Only the last run counts: the first is slow. Raises CacheError if the folder cannot be
    written, TeacherError for targets that are not finite, ConfigError for an unknown accelerator.
    """
    assumed = accelerator_of(accelerator) if accelerator else None
    part = work.parts[-1]
    spec = part.spec
    progress.note("measuring: a few images, the teacher, the disk")
    began = time.perf_counter()
    codec, teacher = stand_in(spec.codec, spec.channels), work.teacher
    if assumed:
        codec = _ReadyCodec(codec.name, codec.dtype, codec.fill, codec.scaled)
        teacher = _ReadyTeacher(teacher, codec_of(spec.codec).width(spec.channels))
    with scratch(work.location) as scratch_folder, _threads(workers.torch_threads):
        extractor = Extractor(
            part=part,
            codec=codec,
            root=str(work.root.resolve()),
            teacher=teacher,
            device=work.config.device,
            batch_size=work.batch_size,
            workers=workers,
        )
        block = min(spec.rows, spec.shard_size)
        runs, rows = 0, min(block, -(-_VIEWS // spec.views))
        while True:
            # As many blocks as a worker has: it stages one while it computes the next.
            extractor.spec = replace(spec, rows=rows, shard_size=-(-rows // BLOCKS_AT_ONCE))
            folder = scratch_folder / str(runs)
            started = time.perf_counter()
            views, blocks = list(range(spec.views)), range(extractor.spec.blocks)
            with ThreadPoolExecutor(BLOCKS_AT_ONCE) as pool:
                list(pool.map(extractor.run, blocks, repeat(views), repeat(str(folder))))
            seconds = time.perf_counter() - started
            if seconds > _SECONDS or (runs and rows == block):
                break
            runs, rows = runs + 1, min(block, 2 * rows)
        if assumed:
            teacher_seconds = teacher_seconds_on(assumed, work.teacher)
        else:
            teacher_seconds = _teacher_seconds(work)
        # A bucket is not measured: that would write to it.
        write_rate = math.inf
        if work.location.scratch_is_on_store:
            write_rate = _write_rate(replace(spec, rows=block), scratch_folder / "write")
    measured = f"measured with {rows} images in {time.perf_counter() - began:.0f} s"
    if assumed is None:
        return Throughput(seconds / rows, teacher_seconds, write_rate, measured)
    return Throughput(
        # Reading, decoding and writing go on while the teacher computes.
        image_seconds=max(seconds / rows, spec.views * teacher_seconds),
        teacher_seconds=teacher_seconds,
        write_rate=write_rate,
        source=f"{measured}, but the teacher",
        assumed=(
            f"the teacher at {1 / teacher_seconds:,.0f} views/s on {accelerator}: ViT-B/16 takes "
            f"{assumed.views_per_second:,.0f}, {assumed.source}",
        ),
    )


class _ReadyTeacher(Teacher):
    """A teacher that takes no time: what it said is there."""

    def __init__(self, teacher: Teacher, width: int) -> None:
        self.identity, self.texts, self.device = (
            teacher.identity,
            teacher.texts,
            torch.device("cpu"),
        )
        self.tokens, self.width = teacher.tokens, width

    def targets(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A number for each code, and attention."""
        count = len(pixels)
        features = torch.ones(1).expand(count, self.tokens, self.width)
        return features, torch.ones(count, self.tokens - 1)


class _ReadyCodec(Codec):
    """A codec that takes no time; its codes are not the fill value, so they are written."""

    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ones."""
        codes = torch.ones(features.shape, dtype=torch.from_numpy(np.empty(0, self.dtype)).dtype)
        return codes, torch.ones(features.shape[:-1]) if self.scaled else None

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The codes: nobody looks at them."""
        return codes.float()


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
    shape = (views, *height_width(work.teacher.size), 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        features, _attention = work.teacher.targets(pixels)
        features.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds) / views


def _write_rate(spec: CacheSpec, folder: Path) -> float:
    """Bytes a second of staging one shard of `spec.rows` rows of noise."""
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
