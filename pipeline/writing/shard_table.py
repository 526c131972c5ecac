"""The shard table: what the driver keeps of each shard's record, 69 bytes with four arrays.

A run reads each record at most once: at its start; or it has the record in memory at its commit.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milan.core.paths import AnyPath, names_in, read_file, read_files, sizes_below
from milan.store.format import SHARDS, CacheSpec, record_name

_SCHEMA = pa.schema(
    [
        ("record", pa.binary(32)),  # SHA-256 of the shard's record
        ("sizes", pa.list_(pa.int64())),  # bytes of each of its files by name; -1: no file
        ("bad", pa.int32()),  # rejected files: images without targets
    ]
)


class ShardTable:
    """A row for each shard, in the order block * K + view; rows are `known` once added or read."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.names = spec, list(spec.files(0, 0))
        self.known = np.zeros(spec.shards, bool)
        """[shards]: whether the shard exists: it has a record, and files of the recorded sizes."""
        self.records = np.zeros((spec.shards, 32), np.uint8)
        """[shards, 32]: SHA-256 of the records."""
        self.sizes = np.full((spec.shards, len(self.names)), -1, np.int64)
        """[shards, files]: bytes of the files in the order of `names`; -1: no file."""
        self.bad = np.zeros(spec.shards, np.int32)
        """[shards]: how many files were rejected."""
        self.reasons: dict[int, str] = {}
        """Rows without targets, with the reason of the rejection."""

    def add(self, record: dict[str, Any], data: bytes) -> None:
        """Add the record of a shard that exists; `data` is the content of the record's file."""
        shard = record["block"] * self.spec.views + record["view"]
        for row in range(*record["rows"]):  # of a record that this one replaces
            self.reasons.pop(row, None)
        size = {file["path"].split("/")[0]: file["bytes"] for file in record["files"]}
        self.records[shard] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        self.sizes[shard] = [size.get(name, -1) for name in self.names]
        self.bad[shard] = len(record["bad"])
        self.reasons |= {int(row): reason for row, reason in record["bad"].items()}
        self.known[shard] = True

    def forget(self, block: int, view: int) -> None:
        """Mark a shard as one to be written again."""
        self.known[block * self.spec.views + view] = False
        for row in range(*self.spec.block_rows(block)):
            self.reasons.pop(row, None)

    def missing(self) -> np.ndarray:
        """[blocks, K] bool, True = not known to exist."""
        return ~self.known.reshape(self.spec.blocks, self.spec.views)

    def read_records(self, root: AnyPath) -> None:
        """Add the records of the generation at `root` that are new and whose files are whole.

        A finished generation has its table, and a record whose digest is in it is not parsed.
        """
        finished = self._read_table(root / SHARDS)
        folder = root / "records"
        recorded = np.zeros(self.spec.shards, bool)
        for name in names_in(folder):
            numbers = name.removesuffix(".json").split(".")
            if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
                block, view = map(int, numbers)
                if block < self.spec.blocks and view < self.spec.views:
                    recorded[block * self.spec.views + view] = True
        unread = np.flatnonzero(recorded & ~self.known).tolist()
        if not unread:
            return
        size_of = sizes_below(root)
        records = read_files(folder, (record_name(*divmod(s, self.spec.views)) for s in unread))
        for shard, data in zip(unread, records, strict=True):
            block, view = divmod(shard, self.spec.views)
            if finished is not None and not finished.bad[shard]:
                digest = hashlib.sha256(data).digest()
                if digest == finished.records[shard].tobytes() and finished._whole(size_of, shard):
                    self.records[shard] = finished.records[shard]
                    self.sizes[shard] = finished.sizes[shard]
                    self.bad[shard], self.known[shard] = 0, True
                    continue
            try:
                record = json.loads(data)
                self._check(record, block, view)
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # damaged: the shard is written again
            self.add(record, data)
            if not self._whole(size_of, shard):
                self.forget(block, view)

    def _check(self, record: dict[str, Any], block: int, view: int) -> None:
        """Raises an error of some kind unless a record has all its parts, of this shard."""
        first, last = self.spec.block_rows(block)
        paths = self.spec.files(block, view)
        bad = [int(row) for row, reason in record["bad"].items() if isinstance(reason, str)]
        per_row = [record[name] for name in ("digests", "heights", "widths", "pixels")]
        per_row += record["crc32c"].values()
        per_row += [record["ends"]] if self.spec.stored_views != "none" else []
        names = {file["path"] for file in record["files"]}
        whole = (
            (record["block"], record["view"], record["rows"]) == (block, view, [first, last])
            and len(bad) == len(record["bad"])
            and all(first <= row < last for row in bad)
            and record["crc32c"].keys() >= self.spec.view_arrays().keys()
            and all(isinstance(values, list) and len(values) == last - first for values in per_row)
            and all(file["bytes"] >= 0 and len(file["sha256"]) == 64 for file in record["files"])
            and names <= {*paths.values()}
            # A shard without one good image has no files; one without a text has none of texts.
            and (len(bad) == last - first or paths["features"] in names)
        )
        if not whole:
            raise ValueError("a part is missing")

    def _whole(self, size_of: Callable[[str], int | None], shard: int) -> bool:
        """Whether the files of a shard have the sizes of its record."""
        paths = self.spec.files(*divmod(shard, self.spec.views))
        return all(
            size < 0 or size_of(paths[name]) == size
            for name, size in zip(self.names, self.sizes[shard].tolist(), strict=True)
        )

    def _read_table(self, path: AnyPath) -> ShardTable | None:
        """The table of a finished generation; None if it is absent or damaged."""
        try:
            table = pq.read_table(pa.BufferReader(read_file(path)), page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid):
            return None
        if not table.schema.equals(_SCHEMA) or table.num_rows != self.spec.shards:
            return None
        finished = ShardTable(self.spec)
        digests = table["record"].combine_chunks()
        start = 32 * digests.offset
        finished.records = np.frombuffer(digests.buffers()[1], np.uint8)[start:].reshape(-1, 32)
        sizes = table["sizes"].combine_chunks().flatten().to_numpy()
        finished.sizes = sizes.reshape(self.spec.shards, -1)
        finished.bad = table["bad"].combine_chunks().to_numpy()
        return finished

    def digest(self) -> str:
        """SHA-256 over the digests of all records."""
        return hashlib.sha256(self.records.tobytes()).hexdigest()

    def total_bytes(self) -> int:
        """Bytes of all files of all shards."""
        return int(self.sizes.clip(min=0).sum())

    def parquet(self) -> bytes:
        """The content of shards.parquet, the table of a finished generation."""
        shards, arrays = self.sizes.shape
        offsets = pa.array(np.arange(shards + 1, dtype=np.int32) * arrays)
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), shards, [None, pa.py_buffer(self.records)]
            ),
            pa.ListArray.from_arrays(offsets, pa.array(self.sizes.ravel())),
            pa.array(self.bad),
        ]
        sink = io.BytesIO()
        table = pa.Table.from_arrays(columns, schema=_SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()
