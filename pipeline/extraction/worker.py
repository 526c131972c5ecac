"""The worker: a copy of the teacher, and the threads that decode images for it.

A task is a block of rows. Each of its images is read and decoded once, its views are rendered and
passed to the teacher, and the block's shards, one for each view, are staged for the driver.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

import google_crc32c
import numpy as np
import torch

from milan.core.paths import as_path
from milan.errors import ImageFault, TeacherError
from milan.images.decode import content_digest, decode
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, checksum, pack, render, unpack, view_of
from milan.store.codecs import Codec
from milan.store.format import TEXT, TEXT_IDS
from pipeline.extraction.growth import Part
from pipeline.extraction.hardware import Workers
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.writing.disk import as_store_error
from pipeline.writing.shards import stage_shard


@dataclass
class _Rendered:
    """An image after decoding: its K views, or the reason why it was rejected."""

    row: int
    pixels: np.ndarray | None = None  # [K, S, S, 3] uint8
    crops: np.ndarray | None = None  # [K, 5]
    packed: list[bytes] | None = None  # K pictures, if views are stored
    digest: str | None = None
    size: tuple[int, int] = (0, 0)  # height, width
    reason: str | None = None


@dataclass
class _Computed:
    """A block after the teacher: n rows, K views."""

    arrays: dict[str, np.ndarray]  # [K, n, ...] by name
    pictures: list[list[bytes]]  # [K][n], if views are stored
    rejected: dict[str, str]  # row -> reason
    record: dict[str, Any]  # digests and sizes of the n images
    pixel_sums: np.ndarray  # [K, n]


class Extractor:
    """A copy of the teacher and its decoding threads; each call of `run` stages one block.

    A second thread may call `run` for the next block: the teacher works for it while this one's
    shards are written.
    """

    def __init__(
        self,
        *,
        part: Part,
        codec: Codec,
        root: str,
        teacher: TeacherSpec | Teacher,
        device: str,
        batch_size: int,
        workers: Workers,
    ) -> None:
        """`root` is where the manifest's paths begin. Raises TeacherError for another teacher."""
        if workers.torch_threads:
            torch.set_num_threads(workers.torch_threads)
        self.part, self.spec, self.manifest = part, part.spec, part.manifest
        self.batch_size, self.threads = batch_size, workers.decode_threads
        self.view_spec = ViewSpec.from_law(part.spec.view_law)
        self.codec = codec
        self.source = ImageSource(part.manifest, root)
        self.teacher = (
            teacher if isinstance(teacher, Teacher) else load_teacher(teacher, device=device)
        )
        texts = self.teacher.texts.identity if self.teacher.texts else None
        if self.teacher.identity != self.spec.teacher or texts != self.spec.texts:
            raise TeacherError(
                "a worker loaded another teacher than the driver",
                expected="the same weight file and settings on every node",
            )
        self.images = 0
        """Images processed since the start; the driver reads it while a block is in work."""
        self.stopped = Event()
        """Set it, and calls of `run` end after the batch in hand, by CancelledError."""
        self._feeding = Lock()
        self._records = Lock()

    def run(self, block: int, views: list[int], folder: str) -> list[dict]:
        """Stage the shards (block, view) for `views` in `folder` (or URL); returns their records.

        All K views are computed, whichever are asked for: the teacher then sees the same batches,
        and returns the same bits, as in a run without interruption. Raises TeacherError, CacheError
        (disk full), FileExistsError (Location.upload).
        """
        with self._feeding:
            computed = self._compute(block)
        return [self._stage(block, v, computed, folder) for v in views]

    def _compute(self, block: int) -> _Computed:
        """Decode a block's images and run the teacher on their views."""
        start, stop = self.spec.block_rows(block)
        count, k = stop - start, self.spec.views
        arrays = {
            name: np.full((k, count, *array.shape[2:]), array.fill, array.dtype)
            for name, array in self.spec.view_arrays().items()
        }
        record: dict[str, Any] = {
            "digests": [None] * count,
            "heights": [0] * count,
            "widths": [0] * count,
        }
        pixel_sums = np.zeros((k, count), np.int64)
        rejected: dict[str, str] = {}
        pictures = [[b""] * count for _ in range(k)]

        def rendered() -> Iterator[tuple[int, int, np.ndarray]]:
            for image in self._images(range(start, stop)):
                row = image.row - start
                record["digests"][row] = image.digest
                record["heights"][row], record["widths"][row] = image.size
                if image.pixels is None or image.crops is None:
                    rejected[str(image.row)] = image.reason or "unreadable"
                    self.images += 1
                    continue
                arrays["crop"][:, row] = image.crops
                for view, data in enumerate(image.packed or []):
                    pictures[view][row] = data
                for view, pixels in enumerate(image.pixels):
                    pixel_sums[view, row] = checksum(pixels)
                    yield row, view, pixels
                self.images += 1

        for batch in _batches(rendered(), self.batch_size):
            if self.stopped.is_set():
                raise CancelledError
            rows = np.array([item[0] for item in batch])
            view = np.array([item[1] for item in batch])
            features, attention = self.teacher.targets(np.stack([item[2] for item in batch]))
            check_targets(features, attention, self.spec.first_row + rows + start)
            codes, scale = self.codec.encode(features)
            if not np.isfinite(codes).all():
                raise TeacherError("features beyond the range of float16", fix="--codec int8")
            arrays["features"][view, rows] = codes
            arrays["attention"][view, rows] = attention.cpu().numpy()
            if scale is not None:
                arrays["scale"][view, rows] = scale

        return _Computed(arrays, pictures, rejected, record, pixel_sums)

    def _stage(self, block: int, v: int, computed: _Computed, folder: str) -> dict:
        """Write the shard of a block's view number `v` to `folder`; returns its record."""
        start, stop = self.spec.block_rows(block)
        rejected, pictures = computed.rejected, computed.pictures[v]
        views = {name: values[v] for name, values in computed.arrays.items()}
        texts = self._texts(start, stop) if v == 0 else {}
        with as_store_error(folder):
            files = stage_shard(as_path(folder), self.spec, block, v, views | texts, pictures)
        sums = {name: _row_checksums(values, rejected, start) for name, values in views.items()}
        if texts:
            without = np.flatnonzero(texts[TEXT_IDS][:, 0] < 0) + start
            absent = set(map(str, without.tolist()))
            sums |= {n: _row_checksums(values, absent, start) for n, values in texts.items()}
        record = {"block": block, "view": v, "rows": [start, stop], "files": files, "bad": rejected}
        record |= computed.record
        record |= {"pixels": computed.pixel_sums[v].tolist(), "crc32c": sums}
        if self.spec.stored_views != "none":
            record["ends"] = np.cumsum([len(data) for data in pictures]).tolist()
        return record

    def _texts(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The text arrays of rows [start, stop), also of rows whose images were rejected."""
        tower, arrays = self.teacher.texts, self.spec.arrays()
        if tower is None or TEXT not in arrays:
            return {}
        captions = self.manifest.captions(start, stop)
        rows = [i for i, text in enumerate(captions) if text is not None]
        texts = {
            name: np.full((stop - start, *arrays[name].shape[1:]), arrays[name].fill, array.dtype)
            for name, array in arrays.items()
            if not array.of_views
        }
        if rows:
            ids = tower.tokenise([text for text in captions if text is not None])
            texts[TEXT_IDS][rows], texts[TEXT][rows] = ids, tower.features(ids)
            if not np.isfinite(texts[TEXT][rows]).all():
                raise TeacherError("a text feature is not finite", fix="without --texts")
        return texts

    def _images(self, rows: range) -> Iterator[_Rendered]:
        """The images of `rows` in order, decoded by threads a few batches ahead of the teacher."""
        ahead = 2 * max(1, self.batch_size // self.spec.views) + self.threads
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            pending: deque[Future[_Rendered]] = deque()
            for row in rows:
                pending.append(pool.submit(self._render, row))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _check_same(self, row: int, digest: str) -> None:
        """Raises ImageFault unless the image is that of the row's first views."""
        with self._records:
            same = self.part.is_same(row, digest)
        if not same:
            raise ImageFault("changed", "other bytes than when its first views were extracted")

    def _render(self, row: int) -> _Rendered:
        digest, reason = self.part.rejected.get(row, (None, None))
        if reason:
            return _Rendered(row, digest=digest, reason=reason)
        try:
            data = self.source.read(row)
            digest = content_digest(data)
            self._check_same(row, digest)
            image = decode(data)
        except ImageFault as fault:
            return _Rendered(row, digest=digest, reason=str(fault))
        width, height = image.size
        views = [
            view_of(
                self.view_spec,
                self.spec.first_row + row,
                view=self.spec.first_view + v,
                height=height,
                width=width,
            )
            for v in range(self.spec.views)
        ]
        pixels = [render(image, view, size=self.view_spec.size) for view in views]
        packed = None
        if self.spec.stored_views != "none":
            packed = [pack(p, self.spec.stored_views) for p in pixels]
            pixels = [unpack(data) for data in packed]
        return _Rendered(
            row,
            np.stack(pixels),
            np.array([view.numbers() for view in views], np.int32),
            packed,
            digest,
            (height, width),
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


def _row_checksums(values: np.ndarray, absent: Collection[str], start: int) -> list[int | None]:
    """crc32c of each row's bytes, by which a reader knows that it has the right row.

    None for the rows `absent`, whose numbers begin at `start`.
    """
    return [
        None if str(start + i) in absent else google_crc32c.value(row.tobytes())
        for i, row in enumerate(values)
    ]


def check_targets(features: torch.Tensor, attention: torch.Tensor, rows: np.ndarray) -> None:
    """Raises TeacherError, with the row, for targets that a store must not contain.

    `features` [B, T, C] and `attention` [B, N] are finite, attention is above 0; `rows` [B].
    """
    good = features.isfinite().flatten(1).all(1) & (attention > 0).all(1)
    good &= attention.isfinite().all(1)
    if not bool(good.all()):
        first = int(rows[int((~good).int().argmax())])
        raise TeacherError(
            f"the teacher's output for row {first} is not finite or its attention not > 0",
            expected="finite features",
            fix="--precision fp32",
        )
