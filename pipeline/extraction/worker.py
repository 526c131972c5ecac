"""The worker: a copy of the teacher, and the threads that decode images for it.

A task is a block of rows. Each of its images is read and decoded once, its views are rendered and
passed to the teacher, and the block's shards, one for each view, are staged for the driver.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Event, Lock
from typing import Any, Final

import google_crc32c
import numpy as np
import torch

from milan.core.ahead import Ahead
from milan.core.paths import as_path
from milan.core.transfer import through_device
from milan.errors import ImageFault, TeacherError
from milan.images.decode import content_digest
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, checksum, pack, render, unpack, view_of
from milan.store.codecs import NO_TARGETS, Codec
from milan.store.format import TEXT, TEXT_IDS, CacheSpec
from pipeline.extraction.growth import Part
from pipeline.extraction.hardware import Workers
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.writing.disk import as_store_error
from pipeline.writing.shards import stage_shard

BLOCKS_AT_ONCE: Final = 2
"""Blocks that a worker is given at a time: the shards of one are staged, the next is computed."""
_STAGERS = 4  # shards that a worker writes at a time: a core writes some 6,000 views a second


@dataclass
class _Rendered:
    """An image after decoding: its K views, or the reason why it was rejected."""

    row: int
    pixels: list[np.ndarray] | None = None  # K x [H, W, 3] uint8
    sums: list[int] | None = None  # their K checksums
    crops: np.ndarray | None = None  # [K, 5]
    packed: list[bytes] | None = None  # K pictures, if views are stored
    digest: str | None = None
    size: tuple[int, int] = (0, 0)  # height, width
    reason: str | None = None


class _Block:
    """What is known of a block: n rows, K views. Empty, and filled as the teacher computes."""

    def __init__(self, spec: CacheSpec, number: int) -> None:
        self.start, self.stop = spec.block_rows(number)
        count, k = self.stop - self.start, spec.views
        self.number, self.rows = number, range(self.start, self.stop)
        self.arrays = {
            name: np.full((k, count, *array.shape[2:]), array.fill, array.dtype)
            for name, array in spec.view_arrays().items()
        }
        """[K, n, ...] by name."""
        self.pictures = [[b""] * count for _ in range(k)]
        """[K][n], if views are stored."""
        self.rejected: dict[str, str] = {}
        """Reason by row."""
        self.record: dict[str, list[Any]] = {
            "digests": [None] * count, "heights": [0] * count, "widths": [0] * count
        }  # fmt: skip
        self.pixel_sums = np.zeros((k, count), np.int64)


class Extractor:
    """A copy of the teacher and its decoding threads; each call of `run` stages one block.

    BLOCKS_AT_ONCE threads may call `run`: the teacher works for one block, of the next the first
    images are decoded meanwhile, or the shards of the last are written.
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
        if not same_teacher(self.teacher, self.spec):
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
        self._decoders = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self._stagers = ThreadPoolExecutor(min(_STAGERS, BLOCKS_AT_ONCE * part.spec.views), "stage")

    def run(self, block: int, views: list[int], folder: str) -> list[dict]:
        """Stage the shards (block, view) for `views` in `folder` (or URL); returns their records.

        All K views are computed, whichever are asked for: the teacher then sees the same batches,
        and returns the same bits, as in a run without interruption. Raises TeacherError, CacheError
        (disk full), FileExistsError (Location.upload).
        """
        filled = _Block(self.spec, block)
        # A few batches ahead of the teacher, and before it is free for this block.
        ahead = 2 * max(1, self.batch_size // self.spec.views) + self.threads
        with Ahead(self._render, filled.rows, self._decoders, ahead) as images, self._feeding:
            self._compute(filled, images)
        staged = [self._stagers.submit(self._stage, filled, v, folder) for v in views]
        wait(staged)  # after an error too: then nobody writes to the folder any more
        return [shard.result() for shard in staged]

    def _compute(self, block: _Block, images: Iterable[_Rendered]) -> None:
        """Run the teacher on the views of a block's images."""
        for (rows, views), results in through_device(
            self._batches(block, images),
            partial(targets_of, self.teacher, self.codec),
            self.teacher.device,
            largest=self.batch_size,
        ):
            raise_faults(results.pop("faults"), self.spec.first_row + block.start + rows)
            for name, values in results.items():
                block.arrays[name][views, rows] = values

    def _batches(
        self, block: _Block, images: Iterable[_Rendered]
    ) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray]]]:
        """((rows of the block, views), their pixels) of `batch_size` views, the last of fewer."""
        rendered = self._views(block, images)
        while batch := list(islice(rendered, self.batch_size)):
            if self.stopped.is_set():
                raise CancelledError
            rows, views, pixels = zip(*batch, strict=True)
            yield (np.array(rows), np.array(views)), list(pixels)

    def _views(
        self, block: _Block, images: Iterable[_Rendered]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(row of the block, view, pixels) of each image that is not rejected."""
        for image in images:
            row = image.row - block.start
            block.record["digests"][row] = image.digest
            block.record["heights"][row], block.record["widths"][row] = image.size
            if image.pixels is None or image.crops is None or image.sums is None:
                block.rejected[str(image.row)] = image.reason or "unreadable"
                self.images += 1
                continue
            block.arrays["crop"][:, row] = image.crops
            block.pixel_sums[:, row] = image.sums
            for view, data in enumerate(image.packed or []):
                block.pictures[view][row] = data
            for view, pixels in enumerate(image.pixels):
                yield row, view, pixels
            self.images += 1

    def _stage(self, block: _Block, v: int, folder: str) -> dict:
        """Write the shard of a block's view number `v` to `folder`; returns its record."""
        start, stop, rejected, pictures = block.start, block.stop, block.rejected, block.pictures[v]
        views = {name: values[v] for name, values in block.arrays.items()}
        texts = self._texts(start, stop) if v == 0 else {}
        with as_store_error(folder):
            files = stage_shard(
                as_path(folder), self.spec, block.number, v, views | texts, pictures
            )
        sums = {name: _row_checksums(values, rejected, start) for name, values in views.items()}
        if texts:
            first = texts[TEXT_IDS].reshape(stop - start, -1)[:, 0]
            without = np.flatnonzero(first < 0) + start
            absent = set(map(str, without.tolist()))
            sums |= {n: _row_checksums(values, absent, start) for n, values in texts.items()}
        record = {"block": block.number, "view": v, "rows": [start, stop], "files": files}
        record |= {"bad": rejected, **block.record}
        record |= {"pixels": block.pixel_sums[v].tolist(), "crc32c": sums}
        if self.spec.stored_views != "none":
            record["ends"] = np.cumsum([len(data) for data in pictures]).tolist()
        return record

    def _texts(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The text arrays of rows [start, stop), also of rows whose images were rejected."""
        tower, arrays = self.teacher.texts, self.spec.arrays()
        if tower is None or TEXT_IDS not in arrays:
            return {}
        captions = self.manifest.captions(start, stop)
        rows = [i for i, some in enumerate(captions) if some]
        texts = {
            name: np.full((stop - start, *arrays[name].shape[1:]), arrays[name].fill, array.dtype)
            for name, array in arrays.items()
            if not array.of_views
        }
        if rows and not self.spec.has_targets:
            kept = [
                (i, m) for i in rows for m in range(len(captions[i][: arrays[TEXT_IDS].shape[1]]))
            ]
            ids = tower.tokenise([captions[i][m] for i, m in kept])
            for (i, m), values in zip(kept, ids, strict=True):
                texts[TEXT_IDS][i, m] = values
        elif rows:
            ids = tower.tokenise([captions[i][0] for i in rows])
            texts[TEXT_IDS][rows], texts[TEXT][rows] = ids, tower.features(ids)
            if not np.isfinite(texts[TEXT][rows]).all():
                raise TeacherError("a text feature is not finite", fix="without --texts")
        return texts

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
            image = self.view_spec.decode(data)
        except ImageFault as fault:
            return _Rendered(row, digest=digest, reason=str(fault))
        height, width = image.shape[:2]
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
            pixels,
            [checksum(p) for p in pixels],
            np.array([view.numbers() for view in views], np.int32),
            packed,
            digest,
            (height, width),
        )


def _row_checksums(values: np.ndarray, absent: Collection[str], start: int) -> list[int | None]:
    """crc32c of each row's bytes, by which a reader knows that it has the right row.

    None for the rows `absent`, whose numbers begin at `start`.
    """
    return [
        None if str(start + i) in absent else google_crc32c.value(row)
        for i, row in enumerate(np.ascontiguousarray(values))
    ]


def same_teacher(teacher: Teacher, spec: CacheSpec) -> bool:
    """Whether it is the one, with the same text tower or tokenizer, of a store."""
    texts = teacher.texts.identity if teacher.texts else None
    known = None if spec.texts is None else {k: v for k, v in spec.texts.items() if k != "captions"}
    return teacher.identity == spec.teacher and texts == known


@torch.inference_mode()
def targets_of(teacher: Teacher, codec: Codec, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored of views [B, H, W, 3] uint8, by array, and `faults` [B] (`target_faults`).

    All of it on the teacher's device, which nobody waits for.
    """
    if codec.name == NO_TARGETS.name:
        return {"faults": torch.zeros(len(pixels), dtype=torch.uint8)}
    features, attention = teacher.targets(pixels)
    codes, scale = codec.encode(features)
    targets = {"features": codes, "attention": attention}
    if scale is not None:
        targets["scale"] = scale
    return targets | {"faults": target_faults(features, attention, codes)}


_TEACHERS, _CODECS = 1, 2  # whose fault it is that a target must not be stored; 0: it may


def target_faults(
    features: torch.Tensor, attention: torch.Tensor, codes: torch.Tensor | None = None
) -> torch.Tensor:
    """[B] uint8: what is wrong with each target, for `raise_faults`; on the device of `features`.

    `features` [B, T, C] and `attention` [B, N] are finite, attention is above 0, `codes` are
    finite.
    """
    good = _finite(features) & _finite(attention) & (attention > 0).all(1)
    faults = (~good).to(torch.uint8) * _TEACHERS
    if codes is not None and codes.is_floating_point():
        faults += (good & ~_finite(codes)).to(torch.uint8) * _CODECS
    return faults


def _finite(values: torch.Tensor) -> torch.Tensor:
    """[B]: whether all of [B, ...] is finite; NaN is the maximum of what it is in."""
    flat = values.flatten(1)
    return flat.amax(1).isfinite() & flat.amin(1).isfinite()


def raise_faults(faults: np.ndarray, rows: np.ndarray) -> None:
    """Raises TeacherError for the first target that a store must not contain; `rows` [B]."""
    for row, fault in zip(rows.tolist(), faults.tolist(), strict=True):
        if fault == _TEACHERS:
            raise TeacherError(
                f"the teacher's output for row {row} is not finite or its attention not > 0",
                expected="finite features",
                fix="--precision fp32",
            )
        if fault == _CODECS:
            raise TeacherError(
                f"features of row {row} are beyond the range of float16", fix="--codec int8"
            )
