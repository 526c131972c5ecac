"""How fast this machine makes targets: a few seconds of the real work, thrown away afterwards."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from milan.core.paths import AnyPath, Url
from milan.core.progress import Progress
from milan.errors import CacheError
from milan.images.manifest import data_root
from milan.store.codecs import Codec, codec_of
from milan.store.format import CacheSpec
from pipeline.extraction.plan import Plan, Workers
from pipeline.extraction.worker import Extractor
from pipeline.writing.store import create_arrays, stage_shard, writable

_SECONDS = 4.0  # a measurement that takes as long is long enough
_VIEWS = 8  # of the first, and of a forward pass on a CPU


@dataclass(frozen=True)
class Rates:
    """How fast one replica of the teacher and the store's disk are."""

    image: float
    """Seconds for an image with all its K views: read, decode, render, teacher, encode, stage."""
    forward: float
    """Seconds of the teacher alone for a view."""
    write: float
    """Bytes a second that the store's disk takes: written, synced and read back. inf: not known."""
    told: str
    """How they are known."""


def calibrate(work: Plan, workers: Workers, progress: Progress) -> Rates:
    """Run a replica on the first images and write one shard, beside where the store will be.

    Runs of twice the images each, until one takes some seconds or is a whole block: the last one
    counts, so that the first, which is slow, does not. Raises CacheError if the place cannot be
    written, TeacherError for targets that are not finite.
    """
    part = work.parts[-1]
    whole = part.spec
    progress.note("measuring: a few images, the teacher, the disk")
    began = time.perf_counter()
    codec = stand_in(whole.codec, whole.channels)
    with scratch(writable(work.config.out)) as place, _threads(workers[2]):
        extractor = Extractor(
            spec=whole,
            codec=codec,
            manifest=part.manifest,
            root=str(data_root(work.source).resolve()),
            teacher=work.teacher,
            device=work.config.device,
            batch_size=work.config.batch_size,
            threads=workers[1],
            torch_threads=workers[2],
        )
        most = min(whole.rows, whole.shard_size)
        runs, rows = 0, min(most, -(-_VIEWS // whole.views))
        while True:
            extractor.spec = replace(whole, rows=rows)
            folder = place / str(runs)
            create_arrays(folder, extractor.spec, {}, {})
            started = time.perf_counter()
            extractor.run(0, list(range(whole.views)), str(folder))
            seconds = time.perf_counter() - started
            if seconds > _SECONDS or (runs and rows == most):
                break
            runs, rows = runs + 1, min(most, 2 * rows)
        forward = _forward(work)
        # What a bucket takes is not tried: it would be written to.
        remote = isinstance(writable(work.config.out), Url)
        write = math.inf if remote else _write(replace(whole, rows=most), place / "write")
    return Rates(
        image=seconds / rows,
        forward=forward,
        write=write,
        told=f"measured with {rows} images in {time.perf_counter() - began:.0f} s",
    )


@lru_cache
def stand_in(codec: str, channels: int) -> Codec:
    """The codec fitted to noise of so many channels: as fast and as large as a real one."""
    noise = torch.randn(max(256, channels), channels, generator=torch.Generator())
    return codec_of(codec).fitted(noise)


@contextmanager
def scratch(out: AnyPath) -> Iterator[Path]:
    """A folder on the file system of the store-to-be, gone afterwards. Raises CacheError.

    For a bucket it is where workers stage: $TMPDIR.
    """
    place = Path(tempfile.gettempdir()) if isinstance(out, Url) else out.absolute()
    while not os.path.isdir(place):
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".milan-plan-", dir=place) as name:
            yield Path(name)
    except OSError as error:
        raise CacheError(
            f"{out} cannot be written: {error.strerror}", fix="--out a folder of your own"
        ) from None


def _forward(work: Plan) -> float:
    views = _VIEWS if work.teacher.device.type == "cpu" else work.config.batch_size
    size = work.teacher.size
    pixels = np.random.default_rng(0).integers(0, 256, (views, size, size, 3), np.uint8)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        features, _attention = work.teacher.targets(pixels)
        features[0, 0, 0].item()  # a device works on its own until it is asked
        seconds.append(time.perf_counter() - started)
    return min(seconds) / views


def _write(spec: CacheSpec, folder: Path) -> float:
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
    """torch with so many threads, and then with the caller's own."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
