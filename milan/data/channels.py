"""What a student sees of a store's images where it is not, or not only, the teacher's pixels.

Channels of the image's own file, which the store knows by its content digest; or of a file beside
it, in a folder where it has the image's key for a name. Of those the run keeps the digests.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from milan.core import rng
from milan.core.paths import AnyPath
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.data.dataset import CachedDataset
from milan.errors import DataError, ImageFault
from milan.images.channels import Channels
from milan.images.decode import content_digest
from milan.images.pairing import OF_CHANNELS, FilesBeside, read_beside, stem_of
from milan.images.samples import EXTENSIONS
from milan.images.views import View

TABLE = "channels.arrow"
"""In a run's folder: path and content digest of the file beside each image."""
SAMPLE = 1000
"""Images of which mean and deviation are measured."""
_THREADS = 16
_AT_ONCE = 1024


class Moments(NamedTuple):
    """Of the samples of one image's channels."""

    samples: int
    mean: np.ndarray
    """[n] float64"""
    variance: np.ndarray
    """[n] float64"""

    @classmethod
    def of(cls, samples: np.ndarray) -> Moments:
        """Those of [H, W, n]."""
        flat = samples.reshape(-1, samples.shape[-1]).astype(np.float64)
        return cls(len(flat), flat.mean(axis=0), flat.var(axis=0))


def mean_and_std(parts: list[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over the samples of all images, each [n] float64."""
    counts, means, variances = (np.array(column) for column in zip(*parts, strict=True))
    weights = (counts / counts.sum())[:, None]
    mean = (weights * means).sum(axis=0)
    return mean, np.sqrt((weights * (variances + (means - mean) ** 2)).sum(axis=0))


def sample_of(rows: np.ndarray, seed: int) -> np.ndarray:
    """SAMPLE of `rows`, ascending, drawn by the seed; int64."""
    return np.sort(rows[rng.permutation(seed, rng.SAMPLE, (3,), len(rows))[:SAMPLE]])


class StudentChannels:
    """Channels of (row, view) of a dataset."""

    def __init__(
        self, law: Channels, dataset: CachedDataset, folder: AnyPath | None = None
    ) -> None:
        """`folder` has the files beside the images, if channels are of such. Raises DataError if
        what has to be read is not there."""
        self.law, self.dataset, self.folder = law, dataset, folder
        self.table: Path | pa.Table | None = None
        """Row, path and digest of the files beside images: in a run's folder, or here."""
        if folder is None:
            _ = dataset.source  # originals, of stores that keep their views too
        elif not folder.is_dir():
            raise DataError(
                f"no folder at {folder}", expected="the files that belong to the images",
                fix="--student-data FOLDER",
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_columns"}

    def of_run(self, run: Path) -> None:
        """The same, with the table in a run's folder: it is not sent to loader workers."""
        if self.folder is not None:
            self.table = run / TABLE
            self.__dict__.pop("_columns", None)

    @cached_property
    def _columns(self) -> tuple[np.ndarray, Any, Any]:
        """(rows ascending, paths, digests), opened in the process that reads them."""
        table = self.table
        if isinstance(table, Path):
            table = pa.ipc.open_file(pa.memory_map(str(table))).read_all()
        assert table is not None
        return table["row"].to_numpy(), table["path"], table["digest"]

    def load(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the teacher's pixels uint8 [B, H, W, 3], channels float32 [B, C, H, W]) of views.

        Raises DataError as CachedDataset.pixels, and for a file that is gone, has changed or has
        no such channels.
        """
        spec, crops = self.dataset.cache.view_spec, self.dataset.cache.crops(rows, views)
        out = np.empty((len(rows), self.law.count, *spec.shape), np.float32)

        def fill(i: int, data: bytes | None, pixels: np.ndarray) -> None:
            row = int(rows[i])
            try:
                data = self._bytes(row) if data is None else data
                self._check(row, data)
                samples = self.law.samples(data)
                out[i] = self.law.view(samples, View.of(crops[i]), spec.size, pixels)
            except ImageFault as fault:
                raise self._refused(row, str(fault)) from None

        own = self.folder is None and not self.dataset.stored
        pixels = self.dataset.pixels(rows, views, fill if own else None)
        for i in range(0 if own else len(rows)):
            fill(i, None, pixels[i])
        return pixels, out

    def _bytes(self, row: int, path: str | None = None) -> bytes:
        if self.folder is None:
            return self.dataset.source.read(row)
        return read_beside(self.folder, path or self._place(row)[0])

    def _place(self, row: int) -> tuple[str, str]:
        """(path, digest) of the file beside an image. Raises ImageFault."""
        rows, paths, digests = self._columns
        at = int(np.searchsorted(rows, row))
        if at == len(rows) or rows[at] != row:
            raise ImageFault("missing", "no file beside it when the run began")
        return paths[at].as_py(), digests[at].as_py()

    def _check(self, row: int, data: bytes) -> None:
        """Raises ImageFault for bytes that are not those of extraction, or of the run's start."""
        known = self.dataset.cache.content_digest(row, 0)
        if self.folder is not None:
            known = self._place(row)[1]
        if content_digest(data) != known:
            since = "extraction" if self.folder is None else "the run began"
            raise ImageFault("changed", f"other bytes than when {since}")

    def _refused(self, row: int, why: str) -> DataError:
        key = self.dataset.cache.manifest.key(row)
        where = f"of {key!r}" if self.folder is None else f"beside {key!r} in {self.folder}"
        return DataError(
            f"the channels {where} (row {row}) cannot be used: {why}",
            expected=f"channels {self.law.spelled}, of the image's size, all numbers",
            fix="mend the file, or the same line with --on-changed drop, which leaves it out",
        )

    # --- before the first step --------------------------------------------------------------------

    def examine(
        self, rows: np.ndarray, sample: np.ndarray, *, stop: Stop, progress: Progress
    ) -> Examined:
        """Read and decode the channels of `rows` (ascending) once; moments of those of `sample`.

        Until it is asked to `stop`. Raises DataError for two files of one image.
        """
        examined, cache = Examined({}, {}, {}), self.dataset.cache
        paths: dict[int, str] = {}
        if self.folder is not None and len(rows):
            keys = cache.manifest.take(rows).keys()
            files = FilesBeside.below(self.folder, EXTENSIONS).of_images(keys, OF_CHANNELS)
            for row, key, file in zip(rows.tolist(), keys, files, strict=True):
                if file is None:
                    examined.faults[row] = f"missing: {self.folder / stem_of(key)}.*"
                else:
                    paths[row] = file[0]
        wanted = set(sample.tolist())

        def look(row: int, size: tuple[int, int]) -> tuple[str, Moments | None] | str:
            try:
                data = self._bytes(row, paths.get(row))
                if self.folder is None:
                    self._check(row, data)
                samples = self.law.samples(data, size)
            except ImageFault as fault:
                return str(fault)
            return content_digest(data), Moments.of(samples) if row in wanted else None

        left = rows[~np.isin(rows, list(examined.faults))]
        progress.begin("check channels", len(left), "images")
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(left), _AT_ONCE):
                if stop.by:
                    break
                some = left[first : first + _AT_ONCE]
                answers = pool.map(look, some.tolist(), cache.image_sizes(some))
                for row, answer in zip(some.tolist(), answers, strict=True):
                    if isinstance(answer, str):
                        examined.faults[row] = answer
                        continue
                    examined.files[row] = paths.get(row, ""), answer[0]
                    if answer[1]:
                        examined.moments[row] = answer[1]
                progress.advance(first + len(some), f"{len(examined.faults)} cannot be used")
        progress.end()
        return examined

    def changed(self, rows: np.ndarray, *, stop: Stop, progress: Progress) -> dict[int, str]:
        """Which of `rows` have a file beside them that is gone or has other bytes; with the reason.

        Reads every file once, until it is asked to `stop`.
        """

        def compare(row: int) -> str | None:
            try:
                self._check(row, self._bytes(row))
            except ImageFault as fault:
                return str(fault)
            return None

        changed: dict[int, str] = {}
        progress.begin("check files of channels", len(rows), "images")
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(rows), _AT_ONCE):
                if stop.by:
                    break
                some = rows[first : first + _AT_ONCE].tolist()
                answers = zip(some, pool.map(compare, some), strict=True)
                changed |= {row: why for row, why in answers if why}
                progress.advance(first + len(some), f"{len(changed)} changed")
        progress.end()
        return changed


class Examined(NamedTuple):
    """What was found of rows."""

    files: dict[int, tuple[str, str]]
    """(path of the file beside the image, content digest) of those that can be used."""
    faults: dict[int, str]
    """Why the others cannot."""
    moments: dict[int, Moments]
    """Of the rows of a sample."""

    def as_table(self) -> pa.Table:
        """`StudentChannels.table`."""
        rows = sorted(self.files)
        paths, digests = zip(*(self.files[row] for row in rows), strict=True) if rows else ((), ())
        return pa.table({
            "row": pa.array(rows, pa.int64()), "path": pa.array(paths, pa.string()),
            "digest": pa.array(digests, pa.string()),
        })  # fmt: skip
