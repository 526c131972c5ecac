"""What the driver knows of a generation's shards: 69 bytes each with four arrays, in numpy.

A record is read at most once in a run: when the run begins, or, from memory, at its commit.
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
        ("bad", pa.int32()),  # images without targets
    ]
)


class ShardTable:
    """Digests, sizes and bad images of the shards whose records were seen.

    Shards are numbered by block and view: block * K + view.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.names = spec, list(spec.files(0, 0))
        self.known = np.zeros(spec.shards, bool)
        self.records = np.zeros((spec.shards, 32), np.uint8)
        self.sizes = np.full((spec.shards, len(self.names)), -1, np.int64)
        self.bad = np.zeros(spec.shards, np.int32)
        self.reasons: dict[int, str] = {}
        """Rows without targets, with the reason."""

    def note(self, record: dict[str, Any], data: bytes) -> None:
        """Take in the record of a shard that is whole; `data` are the bytes of its file."""
        at = record["block"] * self.spec.views + record["view"]
        size = {file["path"].split("/")[0]: file["bytes"] for file in record["files"]}
        self.records[at] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        self.sizes[at] = [size.get(name, -1) for name in self.names]
        self.bad[at] = len(record["bad"])
        self.reasons |= {int(row): why for row, why in record["bad"].items()}
        self.known[at] = True

    def forget(self, block: int, view: int) -> None:
        """The shard is to be made again."""
        self.known[block * self.spec.views + view] = False

    def missing(self) -> np.ndarray:
        """[blocks, K] bool, True = not known to exist."""
        return ~self.known.reshape(self.spec.blocks, self.spec.views)

    def look(self, root: AnyPath) -> None:
        """Take in the records at `root` that were not seen yet and whose files are whole.

        Where a finished generation has its table, a record that has the digest it states need not
        be parsed.
        """
        held = self._table(root / SHARDS)
        folder = root / "records"
        there = np.zeros(self.spec.shards, bool)
        for name in names_in(folder):
            numbers = name.removesuffix(".json").split(".")
            if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
                block, view = map(int, numbers)
                if block < self.spec.blocks and view < self.spec.views:
                    there[block * self.spec.views + view] = True
        unseen = np.flatnonzero(there & ~self.known).tolist()
        if not unseen:
            return
        size_of = sizes_below(root)
        records = read_files(folder, (record_name(*divmod(s, self.spec.views)) for s in unseen))
        for at, data in zip(unseen, records, strict=True):
            block, view = divmod(at, self.spec.views)
            if held is not None and not held.bad[at]:
                proof = hashlib.sha256(data).digest()
                if proof == held.records[at].tobytes() and held._whole(size_of, at):
                    self.records[at], self.sizes[at] = held.records[at], held.sizes[at]
                    self.bad[at], self.known[at] = 0, True
                    continue
            try:
                record = json.loads(data)
                if (record["block"], record["view"]) == (block, view):
                    self.note(record, data)
                    self.known[at] = self._whole(size_of, at)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged: the shard is made again

    def _whole(self, size_of: Callable[[str], int | None], at: int) -> bool:
        """Whether the files of a shard have the sizes noted."""
        paths = self.spec.files(*divmod(at, self.spec.views))
        return all(
            size < 0 or size_of(paths[name]) == size
            for name, size in zip(self.names, self.sizes[at].tolist(), strict=True)
        )

    def _table(self, path: AnyPath) -> ShardTable | None:
        """What the table of a finished generation says; None where there is none to use."""
        try:
            table = pq.read_table(pa.BufferReader(read_file(path)), page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid):
            return None
        if not table.schema.equals(_SCHEMA) or table.num_rows != self.spec.shards:
            return None
        held = ShardTable(self.spec)
        proofs = table["record"].combine_chunks()
        first = 32 * proofs.offset
        held.records = np.frombuffer(proofs.buffers()[1], np.uint8)[first:].reshape(-1, 32)
        sizes = table["sizes"].combine_chunks().flatten().to_numpy()
        held.sizes = sizes.reshape(len(held.known), -1)
        held.bad = table["bad"].combine_chunks().to_numpy()
        return held

    def digest(self) -> str:
        """SHA-256 over the digests of all records."""
        return hashlib.sha256(self.records.tobytes()).hexdigest()

    def total(self) -> int:
        """Bytes of all files of all shards."""
        return int(self.sizes.clip(min=0).sum())

    def parquet(self) -> bytes:
        """The table of shards, as a generation keeps it."""
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
