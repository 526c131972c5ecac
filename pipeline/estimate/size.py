"""What a store takes on its disk: bytes, files and folders, before any of them is written.

Exact but for images that will be rejected, missing captions, and the digits of some numbers: small
parts are written to a temporary folder and measured, the rest is arithmetic on the spec.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from milan.images.manifest import Manifest
from milan.store.format import (
    FIDELITY,
    MANIFEST,
    PROTOTYPES,
    SHARDS,
    CacheSpec,
    Entry,
    Index,
    canonical,
)
from pipeline.estimate.throughput import stand_in
from pipeline.extraction.fidelity import CANARIES
from pipeline.extraction.plan import Plan
from pipeline.writing.shard_table import ShardTable
from pipeline.writing.shards import create_arrays
from pipeline.writing.store import group_attributes

_SAMPLE = 100_000  # rows of a manifest, shards of a table; larger ones are extrapolated
_REPORT, _LOG_LINE, _LOCK = 300, 145, 20  # bytes of fidelity.json, of a line of the log, of .lock


@dataclass(frozen=True)
class Sizes:
    """Bytes and files of a store, or of a part of it."""

    shards: int
    """Bytes of the arrays' files."""
    records: int
    manifest: int
    other: int
    """Tables of codec and shards, canaries, descriptions, index, log."""
    files: int
    folders: int

    @property
    def total(self) -> int:
        """Bytes of everything in the store's folder."""
        return self.shards + self.records + self.manifest + self.other

    def __add__(self, more: Sizes) -> Sizes:
        pairs = zip(asdict(self).values(), asdict(more).values(), strict=True)
        return Sizes(*(a + b for a, b in pairs))


def sizes_of(spec: CacheSpec, manifest: Manifest, attributes: dict, *, first: bool) -> Sizes:
    """The sizes of a generation of `spec`, its share of the index and the log included.

    `first`: of its layer; it has the codec's tables and the canaries.
    """
    last = spec.blocks - 1
    records = 0
    for view, views in ((0, 1), (spec.views - 1, spec.views - 1)):
        full, rest = (len(canonical(made_up_record(spec, b, view))) for b in (0, last))
        records += views * (full * last + rest)
    sample = manifest.head(_SAMPLE)
    manifest_bytes = round(len(sample.to_parquet()) * len(manifest) / max(1, len(sample)))
    other, files, folders = _fixed(spec, attributes, first, len(manifest.classes or []))
    # Each view of a shard has a folder of its own in each array, and one more in the features'.
    arrays, view_arrays = spec.arrays(), len(spec.view_arrays())
    nested = sum(len(array.shape) - 2 for array in arrays.values())
    return Sizes(
        shards=spec.total_bytes(),
        records=records,
        manifest=manifest_bytes,
        other=other + _table_bytes(spec) + _LOG_LINE * (spec.blocks + 2),
        files=files + spec.shards * (view_arrays + 1) + spec.blocks * (len(arrays) - view_arrays),
        folders=folders + spec.shards * nested + (spec.blocks + 1) * len(arrays),
    )


def made_up_record(spec: CacheSpec, block: int, view: int) -> dict[str, Any]:
    """A record as of a shard without rejected images, of the same size but for some digits."""
    start, stop = spec.block_rows(block)
    count, noise = stop - start, np.random.default_rng((block, view))
    arrays = spec.arrays() if view == 0 else spec.view_arrays()
    pixels, *sums = (noise.integers(0, 1 << 32, count).tolist() for _ in range(1 + len(arrays)))
    files = [
        {"path": path, "bytes": 100_000_000, "sha256": noise.bytes(32).hex()}
        for path in spec.files(block, view).values()
    ]
    return {
        "block": block, "view": view, "rows": [start, stop], "files": files, "bad": {},
        "digests": [noise.bytes(16).hex() for _ in range(count)],
        "heights": [375] * count, "widths": [500] * count, "pixels": pixels,
        "crc32c": dict(zip(arrays, sums, strict=True)),
    }  # fmt: skip


def _table_bytes(spec: CacheSpec) -> int:
    shards = max(1, min(spec.shards, _SAMPLE))
    shard_table = ShardTable(replace(spec, rows=shards, shard_size=1, views=1))
    shard_table.records[:] = np.random.default_rng(0).integers(
        0, 256, shard_table.records.shape, np.uint8
    )
    return round(len(shard_table.parquet()) * max(1, spec.shards / shards))


def _fixed(spec: CacheSpec, attributes: dict, first: bool, classes: int) -> tuple[int, int, int]:
    """(bytes, files, folders) of a generation without its rows, its index entry included."""
    tables: dict[str, np.ndarray] = {}
    if first:
        canaries = min(CANARIES, spec.rows)
        tables = {
            f"codec/{name}": table
            for name, table in stand_in(spec.codec, spec.channels).tables.items()
        }
        tables["canary/pixels"] = np.zeros((canaries, *spec.view_shape, 3), np.uint8)
        tables["canary/features"] = np.zeros((canaries, spec.tokens, spec.channels), np.float32)
        tables["canary/attention"] = np.zeros((canaries, spec.tokens - 1), np.float32)
    if spec.texts and classes and spec.first_view == 0:
        sentences = (classes, len(spec.texts["templates"]), spec.texts["context"])
        tables[f"{PROTOTYPES}/features"] = np.zeros((classes, spec.channels), np.float32)
        tables[f"{PROTOTYPES}/ids"] = np.zeros(sentences, np.int32)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        create_arrays(root, spec, attributes, tables)
        files = [path for path in root.rglob("*") if path.is_file()]
        folders = 2 + sum(path.is_dir() for path in root.rglob("*"))  # itself and its records
        total = sum(path.stat().st_size for path in files)
        names = [path.relative_to(root).as_posix() for path in files]
    names += [FIDELITY, MANIFEST, SHARDS]
    entry = Entry(
        "generations/000", f"{attributes['about']['name']}/{spec.codec}", "0" * 64, "0" * 64,
        (0, spec.rows), (0, spec.views), spec.shards, spec.total_bytes(), 0,
        dict.fromkeys(names, "0" * 64),
    )  # fmt: skip
    return total + len(Index((entry,)).to_bytes()) + _REPORT, len(names) + 1, folders


def size_of_store(work: Plan) -> Sizes:
    """The sizes of a plan's finished layer, the store's own few files included."""
    groups = canonical({"attributes": {}, "node_type": "group", "zarr_format": 3})
    total = Sizes(0, 0, 0, 2 * (len(groups) + 12) + _LOCK, 5, 1)
    for part in work.parts:
        attributes = group_attributes(part.spec, work.teacher.about)
        first = part is work.parts[0]
        total += sizes_of(part.spec, part.manifest, attributes, first=first)
        total += Sizes(0, 0, 0, len(canonical(work.origin())), 0, 0)
    return total
