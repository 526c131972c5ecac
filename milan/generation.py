"""One committed group of a store: its records, its arrays, and the proof of what they say.

A shard is checked when it is first touched (its record's digest, its files' sizes), every chunk by
its crc32c, every row by the crc32c that its record keeps: a value that was damaged, shifted or
swapped is never returned. The only module that uses tensorstore.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milan.errors import CacheError
from milan.format import (
    FIDELITY,
    MANIFEST,
    ORIGIN,
    PIXELS,
    SHARDS,
    Entry,
    read_group,
    read_json,
    record_name,
)
from milan.manifest import Manifest

_HELD_RECORDS = 256  # of a loader worker: a window of shards, some 20 MB

_reader: dict[str, int] = {}
"""The process that uses tensorstore, by `pid`: used again after a fork, it aborts the child."""


class Generation:
    """One committed group of a store; rows and views count through the whole store."""

    def __init__(self, store: Path, entry: Entry) -> None:
        self.entry, self.root = entry, store / entry.path
        self.spec, self.attributes = read_group(self.root)
        if self.attributes["fingerprint"] != entry.fingerprint:
            raise CacheError(f"{store}: index and {entry.path} are of different stores")
        self._open: dict[str, Any] = {}
        self._records: OrderedDict[tuple[int, int], dict] = OrderedDict()

    def __getstate__(self) -> dict:
        # Handles and tables stay behind.
        state = {k: v for k, v in self.__dict__.items() if k != "shards"}
        return state | {"_open": {}, "_records": OrderedDict()}

    def holds_rows(self, rows: np.ndarray) -> np.ndarray:
        """[B] bool"""
        return (rows >= self.entry.rows[0]) & (rows < self.entry.rows[1])

    def holds(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B] bool"""
        first, last = self.entry.views
        return self.holds_rows(rows) & (views >= first) & (views < last)

    def proven(self, name: str) -> Path:
        """A file beside the shards, after its digest agreed with the index."""
        path = self.root / name
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CacheError(f"{path} is gone: {error.strerror}") from None
        if digest != self.entry.files.get(name):
            raise CacheError(f"{path} is damaged or of another store", expected="its digest")
        return path

    @property
    def origin(self) -> dict:
        """Where and how it was made: data, data_root, data_root_from_store, teacher, versions."""
        return read_json(self.root / ORIGIN)

    @property
    def fidelity(self) -> dict:
        """How near its codec is to the teacher's own output (pipeline.prepare.fidelity)."""
        return read_json(self.root / FIDELITY)

    def manifest(self) -> Manifest:
        """The images of this generation's rows."""
        manifest = Manifest.read(self.proven(MANIFEST))
        if manifest.digest() != self.spec.manifest:
            raise CacheError(f"{self.root / MANIFEST} is damaged or of another store")
        return manifest

    @cached_property
    def shards(self) -> pa.Table:
        """A row a shard, ordered by block and view: `record` (SHA-256), `sizes`, `bad`."""
        return pq.read_table(self.proven(SHARDS))

    def bad(self) -> Iterator[tuple[int, str]]:
        """(row, reason) of the images without targets."""
        if not self.entry.bad:
            return
        holders = np.flatnonzero(np.asarray(self.shards["bad"]))
        for shard in holders[holders % self.spec.views == 0].tolist():
            record = self.record(shard // self.spec.views, 0)
            for row, why in record["bad"].items():
                yield self.spec.first_row + int(row), why

    def files(self) -> Iterator[tuple[str, int]]:
        """(path inside the generation, bytes) of every shard file."""
        for shard, sizes in enumerate(self.shards["sizes"].to_pylist()):
            paths = self.spec.files(*divmod(shard, self.spec.views)).values()
            yield from ((path, size) for path, size in zip(paths, sizes, strict=True) if size >= 0)

    def record(self, block: int, view: int) -> dict:
        """The commit record of a shard (numbers inside the generation), proven by the index.

        On the way its files are checked: this is the first touch of a shard. Raises CacheError.
        """
        if (block, view) in self._records:
            self._records.move_to_end((block, view))
            return self._records[block, view]
        name = record_name(block, view)
        expected = self.shards["record"][block * self.spec.views + view].as_py()
        try:
            data = (self.root / "records" / name).read_bytes()
        except OSError as error:
            raise CacheError(f"record {name} of {self.root} is gone: {error.strerror}") from None
        if hashlib.sha256(data).digest() != expected:
            raise CacheError(f"record {name} of {self.root} is damaged", expected="its digest")
        record = json.loads(data)
        for file in record["files"]:
            try:
                size = os.stat(self.root / file["path"]).st_size
            except OSError:
                size = -1
            if size != file["bytes"]:
                raise CacheError(
                    f"{self.root / file['path']} is damaged: "
                    + ("it is gone" if size < 0 else f"{size:,} bytes"),
                    expected=f"{file['bytes']:,} bytes",
                    fix=f"milan repair {self.root.parent.parent}",
                )
        self._records[block, view] = record
        if len(self._records) > _HELD_RECORDS:
            self._records.popitem(last=False)
        return record

    def fact(self, name: str, row: int, view: int) -> Any:
        """What the record of (row, view) says of it: its item of the list `name`."""
        local = row - self.spec.first_row
        record = self.record(local // self.spec.shard_size, view - self.spec.first_view)
        return record[name][local - record["rows"][0]]

    def packed(self, row: int, view: int) -> bytes:
        """The stored picture of a view, as milan.views.unpack takes it. Raises CacheError."""
        local, v = row - self.spec.first_row, view - self.spec.first_view
        block = local // self.spec.shard_size
        record = self.record(block, v)
        at = local - record["rows"][0]
        start, end = record["ends"][at - 1] if at else 0, record["ends"][at]
        try:
            with open(self.root / self.spec.files(block, v)[PIXELS], "rb") as file:
                return os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise self._damaged(PIXELS, local, v, str(error)) from None

    def read(self, names: list[str], rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of each named array, compared with the checksums of their records."""
        local, view = rows - self.spec.first_row, views - self.spec.first_view
        blocks = local // self.spec.shard_size
        for shard in sorted(set(zip(blocks.tolist(), view.tolist(), strict=True))):
            self.record(*shard)
        futures = {name: self.array(name)[local, view].read() for name in names}
        try:
            got = {name: np.ascontiguousarray(f.result()) for name, f in futures.items()}
        except (ValueError, RuntimeError, OSError):
            raise self._blame(names, local, view) from None
        for i, (row, v, block) in enumerate(
            zip(local.tolist(), view.tolist(), blocks.tolist(), strict=True)
        ):
            record = self.record(block, v)
            for name in names:
                proof = record["crc32c"][name][row - record["rows"][0]]
                if google_crc32c.value(got[name][i].tobytes()) != proof:
                    raise self._damaged(
                        name, row, v, "it is intact, but of another row, view or run"
                    )
        return got

    def array(self, name: str) -> Any:
        """The tensorstore of an array, opened in this process. Raises CacheError after a fork."""
        if _reader.setdefault("pid", os.getpid()) != os.getpid():
            raise CacheError(
                f"{self.root}: a cache was read before this process was forked",
                expected="loader workers started by forkserver or spawn",
                fix='DataLoader(..., multiprocessing_context="forkserver")',
            )
        if name not in self._open:
            self._open[name] = open_array(self.root / name)
        return self._open[name]

    def _blame(self, names: list[str], local: np.ndarray, views: np.ndarray) -> CacheError:
        """Something in a batch cannot be read: which row it is."""
        for row, view in zip(local.tolist(), views.tolist(), strict=True):
            for name in names:
                try:
                    self.array(name)[row, view].read().result()
                except (ValueError, RuntimeError, OSError) as error:
                    return self._damaged(name, row, view, str(error))
        return CacheError(f"{self.root}: a batch could not be read, though each row of it can")

    def _damaged(self, name: str, local: int, view: int, why: str) -> CacheError:
        shard = record_name(local // self.spec.shard_size, view)[:-5]
        return CacheError(
            f"{self.root}: {name} of row {local + self.spec.first_row}, view "
            f"{view + self.spec.first_view} (shard {shard}) cannot be used: {why}",
            expected="what its record says",
            fix=f"milan repair {self.root.parent.parent}",
        )


def open_array(path: Path) -> Any:
    """A Zarr array as a tensorstore. Raises CacheError if its metadata cannot be used."""
    import tensorstore

    try:
        return tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(path.resolve()) + "/"},
                # A chunk that is not there is an error, never a fill value.
                "fill_missing_data_reads": False,
                # The store is immutable: what was read once need not be looked at again.
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            },
            read=True,
            open=True,
            # Small on purpose: it holds the shard indexes, of which a window of shards needs few.
            context=tensorstore.Context(
                {
                    "cache_pool": {"total_bytes_limit": 64 << 20},
                    "data_copy_concurrency": {"limit": 2},
                }
            ),
        ).result()
    except (ValueError, OSError) as error:
        raise CacheError(
            f"array {path} cannot be opened: {error}", expected="what the store's spec says"
        ) from None
