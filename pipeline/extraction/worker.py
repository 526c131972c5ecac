"""The worker: a copy of the teacher and the threads that feed it; stages whole shards.

A task is a block of rows. Each image of it is read and decoded once, its views are rendered and
shown to the teacher, and the block's shards, one a view, are staged; the driver commits them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch

from milan.core.paths import as_path
from milan.errors import ImageFault, TeacherError
from milan.images.decode import content_digest, decode
from milan.images.manifest import Manifest
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, checksum, pack, render, unpack, view_of
from milan.store.codecs import Codec
from milan.store.format import TEXT, TEXT_IDS, CacheSpec, record_name
from pipeline.teachers.load import Teacher, TeacherSpec, load_teacher
from pipeline.writing.disk import as_full_disk_error
from pipeline.writing.store import stage_shard


@dataclass
class _Rendered:
    """An image after decoding: its K views, or why there are none."""

    row: int
    pixels: np.ndarray | None = None  # [K, S, S, 3] uint8
    crops: np.ndarray | None = None  # [K, 5]
    packed: list[bytes] | None = None  # K pictures, if views are stored
    digest: str | None = None
    size: tuple[int, int] = (0, 0)  # height, width
    reason: str | None = None


class Extractor:
    """A copy of the teacher and the threads that feed it; stages whole shards, one block a call."""

    def __init__(
        self,
        *,
        spec: CacheSpec,
        codec: Codec,
        manifest: Manifest,
        root: str,
        teacher: TeacherSpec | Teacher,
        device: str,
        batch_size: int,
        threads: int,
        torch_threads: int | None = None,
    ) -> None:
        if torch_threads:
            torch.set_num_threads(torch_threads)
        self.spec, self.batch_size, self.threads = spec, batch_size, threads
        self.view_spec = ViewSpec.from_law(spec.view_law)
        self.codec = codec
        self.source = ImageSource(manifest, root)
        self.captions = manifest if spec.texts else None
        self.teacher = (
            teacher if isinstance(teacher, Teacher) else load_teacher(teacher, device=device)
        )
        texts = self.teacher.texts.identity if self.teacher.texts else None
        if self.teacher.identity != spec.teacher or texts != spec.texts:
            raise TeacherError(
                "a worker loaded another teacher than the driver",
                expected="the same weight file and settings on every node",
            )
        self.images = 0
        """Images dealt with since the start; read by the driver while a block is in work."""

    def run(self, block: int, views: list[int], folder: str) -> list[dict]:
        """Stage the shards (block, view) for `views` in `folder` (or URL); returns their records.

        All K views are computed whichever are asked for, so that the teacher meets the same
        batches, and gives the same bits, as in an undisturbed run.
        """
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
        bad: dict[str, str] = {}
        pictures = [[b""] * count for _ in range(k)]

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
                for view, data in enumerate(image.packed or []):
                    pictures[view][at] = data
                for view, pixels in enumerate(image.pixels):
                    pixel_sums[view, at] = checksum(pixels)
                    yield at, view, pixels
                self.images += 1

        for batch in _batches(rendered(), self.batch_size):
            at = np.array([item[0] for item in batch])
            view = np.array([item[1] for item in batch])
            features, attention = self.teacher.targets(np.stack([item[2] for item in batch]))
            check_targets(features, attention, self.spec.first_row + at + start)
            codes, scale = self.codec.encode(features)
            if not np.isfinite(codes).all():
                raise TeacherError("features beyond the range of float16", fix="--codec int8")
            arrays["features"][view, at] = codes
            arrays["attention"][view, at] = attention.cpu().numpy()
            if scale is not None:
                arrays["scale"][view, at] = scale

        staged = []
        for v in views:
            texts = self._texts(start, stop) if v == 0 else {}
            with as_full_disk_error(f"staging shard {record_name(block, v)[:-5]}"):
                files = stage_shard(
                    as_path(folder),
                    self.spec,
                    block,
                    v,
                    {n: a[v] for n, a in arrays.items()} | texts,
                    pictures[v],
                )
            sums = {name: _row_sums(values[v], bad, start) for name, values in arrays.items()}
            if texts:
                without = np.flatnonzero(texts[TEXT_IDS][:, 0] < 0) + start
                absent = set(map(str, without.tolist()))
                sums |= {name: _row_sums(values, absent, start) for name, values in texts.items()}
            staged.append(
                {"block": block, "view": v, "rows": [start, stop], "files": files, "bad": bad}
                | record
                | {"pixels": pixel_sums[v].tolist(), "crc32c": sums}
            )
            if self.spec.stored_views != "none":
                staged[-1]["ends"] = np.cumsum([len(data) for data in pictures[v]]).tolist()
        return staged

    def _texts(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The arrays of texts for rows [start, stop), whether their images are good or not."""
        tower, arrays = self.teacher.texts, self.spec.arrays()
        if tower is None or self.captions is None or TEXT not in arrays:
            return {}
        captions = self.captions.captions(start, stop)
        at = [i for i, text in enumerate(captions) if text is not None]
        made = {
            name: np.full((stop - start, *arrays[name].shape[1:]), arrays[name].fill, array.dtype)
            for name, array in arrays.items()
            if not array.of_views
        }
        if at:
            ids = tower.tokenise([text for text in captions if text is not None])
            made[TEXT_IDS][at], made[TEXT][at] = ids, tower.features(ids)
            if not np.isfinite(made[TEXT][at]).all():
                raise TeacherError("a text feature is not finite", fix="without --texts")
        return made

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


def _row_sums(values: np.ndarray, bad: Collection[str], start: int) -> list[int | None]:
    """crc32c of each row's bytes, by which a reader knows that it holds the right row."""
    return [
        None if str(start + i) in bad else google_crc32c.value(row.tobytes())
        for i, row in enumerate(values)
    ]


def check_targets(features: torch.Tensor, attention: torch.Tensor, rows: np.ndarray) -> None:
    """Raises TeacherError, with the row, for targets that no store must hold."""
    good = features.isfinite().flatten(1).all(1) & (attention > 0).all(1)
    good &= attention.isfinite().all(1)
    if not bool(good.all()):
        first = int(rows[int((~good).int().argmax())])
        raise TeacherError(
            f"the teacher's output for row {first} is not finite or its attention not > 0",
            expected="finite features",
            fix="--precision fp32",
        )
