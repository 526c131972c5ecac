"""The manifest: the images and their order, a row per image, fixed before extraction begins.

It is built from a listing alone: no image is read for it. Rows are shuffled by a seed, so that a
shard is not one class. A row number is an image's identity everywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from milan.core import rng
from milan.core.paths import AnyPath, as_data_error, as_path, check_unicode, is_local
from milan.errors import DataError
from milan.images.classes import ClassTable, class_name
from milan.images.formats import extensions
from milan.images.listing import Listing, list_images
from milan.images.rows import SCHEMA
from milan.images.splits import WantedSplit, show_counts
from milan.images.tars import BETWEEN_CAPTIONS

__all__ = ["SCHEMA", "Manifest", "build_manifest", "resolve_data"]

# Parquet row groups are shuffled in windows of about this many bytes: a reader caches a window.
_WINDOW_BYTES = 256 << 20
_PIECE = 1 << 18  # rows of captions looked at at once
_KINDS = 12  # of files left out that are named


@dataclass(frozen=True)
class Manifest:
    """An ordered table of images. `table` has SCHEMA's columns; row i is image i."""

    table: pa.Table
    classes: list[str] | None = None
    """Names of the class numbers in `label`, the same for all rows; None: numbers without names."""
    listing: Listing | None = field(default=None, compare=False)
    """What it was built from, without its rows; None for one that a store kept."""

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def root(self) -> AnyPath:
        """The folder that paths are relative to; of a fresh manifest, a store knows its own."""
        assert self.listing is not None
        return self.listing.root

    def key(self, row: int) -> str:
        """The unique name of the image in `row`."""
        return self.table["key"][row].as_py()

    def keys(self) -> list[str]:
        """The name of each image. Older stores left out the name of a Parquet file that was alone:
        here it is always in front.
        """
        if self.table["group"].null_count == len(self):
            return self.table["key"].to_pylist()
        rows = self.table.select(["key", "path", "group"]).to_pydict().values()
        return [
            key if group is None or key.startswith(f"{path}/") else f"{path}/{key}"
            for key, path, group in zip(*rows, strict=True)
        ]

    def without_file_name(self) -> Manifest:
        """The same rows with keys as older stores have them, if all are of one Parquet file."""
        table = self.table
        paths = pc.unique(table["path"])
        if len(paths) != 1 or table["group"].null_count:
            return self
        keys = pc.replace_substring_regex(table["key"], f"^{re.escape(paths[0].as_py())}/", "")
        return replace(self, table=table.set_column(0, "key", keys))

    def digest(self) -> str:
        """SHA-256 over keys in their order; the root folder is not in it."""
        sha = hashlib.sha256()
        for key in self.table["key"].to_pylist():
            sha.update(key.encode() + b"\n")
        return sha.hexdigest()

    def labels(self) -> np.ndarray:
        """[rows] int64; -1 where there is no label."""
        column = self.table["label"].combine_chunks().fill_null(-1)
        return column.to_numpy(zero_copy_only=False).astype(np.int64).clip(-1)

    def captions(self, first: int, last: int) -> list[list[str]]:
        """The captions of each of rows [first, last); none where there is only white space."""
        texts = self.table["caption"].slice(first, last - first).to_pylist()
        captioned = self.captioned(slice(first, last))
        return [
            text.split(BETWEEN_CAPTIONS) if has else []
            for text, has in zip(texts, captioned, strict=True)
        ]

    def most_captions(self) -> int:
        """How many captions the image has that has the most."""
        counts = pc.count_substring(self.table["caption"], BETWEEN_CAPTIONS)
        return 1 + (pc.max(counts).as_py() or 0)

    def captioned(self, rows: slice = slice(None)) -> np.ndarray:
        """Which of `rows` have a caption, [B] bool; in pieces, because trimming copies them."""
        first, last, _ = rows.indices(len(self))
        captioned = np.zeros(max(0, last - first), bool)
        for at in range(first, last, _PIECE):
            column = self.table["caption"].slice(at, min(_PIECE, last - at))
            filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False)
            captioned[at - first : at - first + len(filled)] = filled
        return captioned

    def head(self, limit: int) -> Manifest:
        """The first `limit` rows of the same order."""
        return replace(self, table=self.table.slice(0, limit))

    def to_parquet(self) -> bytes:
        """The file that a store keeps; a pure function of the rows and class names."""
        meta = {"milan_classes": json.dumps(self.classes)} if self.classes else None
        sink = io.BytesIO()
        pq.write_table(
            self.table.replace_schema_metadata(meta),
            sink,
            compression="zstd",
            write_page_checksum=True,
        )
        return sink.getvalue()

    @classmethod
    def join(cls, parts: list[Manifest], classes: list[str] | None = None) -> Manifest:
        """Parts of one order, one after the other, with one table of classes.

        `classes` give the first numbers, as far as the parts name them or a later one. Labels that
        cannot be matched by name become unknown.
        """
        names, tables = ClassTable(classes), []
        for part in parts:
            table = part.table.replace_schema_metadata(None)
            try:
                table = names.renumbered(table, part.classes, "a part")
            except DataError:
                unknown = pa.nulls(len(table), pa.int32())
                table = table.set_column(table.schema.get_field_index("label"), "label", unknown)
            tables.append(table)
        own = {name for part in parts for name in part.classes or []}
        last = max((i for i, name in enumerate(names.names) if name in own), default=-1)
        return cls(pa.concat_tables(tables), names.names[: last + 1] or None)

    def take(self, rows: np.ndarray) -> Manifest:
        """These rows, in this order."""
        return replace(self, table=self.table.take(pa.array(rows)))

    @classmethod
    def read(cls, path: Path | pa.NativeFile) -> Manifest:
        """The manifest of a store."""
        table = pq.read_table(path, page_checksum_verification=True)
        if not table.schema.equals(SCHEMA, check_metadata=False):
            raise DataError(f"{path} is not a manifest", expected=f"columns {SCHEMA.names}")
        meta = (table.schema.metadata or {}).get(b"milan_classes")
        return cls(table, [class_name(name) for name in json.loads(meta)] if meta else None)


def resolve_data(name: str, root: str | None = None) -> AnyPath:
    """The folder, file or URL that `--data name` means.

    An existing path or URL wins. Else a name means a folder below the data root (`root`, else
    $MILAN_DATA, else ./data, each a path or a URL). Raises DataError listing every path looked at.
    """
    candidates = [as_path(name)]
    if not candidates[0].is_absolute():
        candidates.append(as_path(root or os.environ.get("MILAN_DATA") or "data") / name)
    for where in candidates:
        with as_data_error(where):
            if where.exists():
                return where
    raise DataError(
        f"no data found for --data {name}; looked at: " + ", ".join(str(p) for p in candidates),
        expected="a folder of images, Parquet files or tars, or one such file",
        fix="give a path, or name the folder that contains it with --data-root or $MILAN_DATA"
        if is_local(candidates[0])
        else "look at the names of the bucket and the folder",
    )


def build_manifest(
    source: AnyPath, *, seed: int, limit: int | None = None, split: WantedSplit | None = None
) -> Manifest:
    """List `source` and freeze the order of its images.

    `source`: a tree of class folders, a folder of images, a Parquet file or a folder of them in the
    Hugging Face image schema, a WebDataset tar or a folder of them. `split` says which of its
    splits is taken, by default train. `limit` keeps the first rows of the same permutation. Raises
    DataError if there are no images, a key twice, a name that is not UTF-8, a split that is not
    there, or something that cannot be read.
    """
    listing = list_images(source, split)
    check_unicode(str(listing.root.resolve()), "the folder")
    rows = _permute(listing, seed)
    if not len(rows):
        raise DataError(
            f"no images in {source} (it holds {_counts(listing.ignored) or 'nothing'})",
            expected="files ending in "
            + " ".join(extensions())
            + ", Parquet files, or tars of them",
            fix="--data the folder that has them",
        )
    keys = rows["key"].to_pylist()
    if len(set(keys)) < len(keys):
        twice = [key for key, n in Counter(keys).items() if n > 1]
        raise DataError(
            f"{len(twice)} keys stand for several images, the first is {twice[0]!r}",
            expected="a name of its own for every image: unique paths, or null, in Parquet",
        )
    manifest = Manifest(rows, listing.classes, replace(listing, tables=[]))
    return manifest if limit is None else manifest.head(limit)


def describe_source(manifest: Manifest, flag: str = "--split") -> list[str]:
    """What a fresh manifest was made of, a line each for the user: root, split, every file."""
    listing = manifest.listing
    assert listing is not None
    root = listing.root.resolve()
    lines = [f"data: {root / listing.file if listing.file else root}"]
    if listing.split:
        lines.append(
            f"split: {listing.split}, of {show_counts(listing.splits)}; {flag} NAME takes another, "
            f"{flag} all takes all"
        )
    left_out = _counts(listing.ignored)
    lines.append(
        f"found: {sum(listing.used.values()) + sum(listing.ignored.values()):,} files: "
        + _counts(listing.used)
        + (f"; left out: {left_out}" if left_out else "")
    )
    unknown = np.flatnonzero(manifest.labels() < 0)
    if len(unknown) and (manifest.classes or len(unknown) < len(manifest)):
        lines.append(
            f"without a class: {len(unknown):,} images, such as {manifest.key(int(unknown[0]))!r}"
        )
    return lines


def _counts(kinds: dict[str, int]) -> str:
    """'12 .txt, 3 hidden': the most frequent first, and only so many."""
    counts = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    named = [f"{n:,} {kind}" for kind, n in counts[:_KINDS]]
    if rest := counts[_KINDS:]:
        named.append(f"{sum(n for _, n in rest):,} of {len(rest):,} other kinds")
    return ", ".join(named)


def _permute(listing: Listing, seed: int) -> pa.Table:
    """The rows of a listing, shuffled."""
    if listing.group_bytes is None:
        rows = pa.concat_tables(listing.tables)
        order = rng.permutation(seed, rng.MANIFEST, (0,), len(rows))
        return rows.take(pa.array(order)).combine_chunks()
    # Groups are permuted, then rows within windows of groups: well mixed, yet a shard touches few
    # groups, so that a reader need not decode a whole file for one image.
    order = rng.permutation(seed, rng.MANIFEST, (1,), len(listing.tables))
    tables, window, window_bytes = [SCHEMA.empty_table()], [], 0
    for position, g in enumerate(order):
        window.append(listing.tables[g])
        window_bytes += listing.group_bytes[g]
        if window_bytes >= _WINDOW_BYTES or position == len(order) - 1:
            rows = pa.concat_tables(window)
            inner = rng.permutation(seed, rng.MANIFEST, (2, len(tables)), len(rows))
            tables.append(rows.take(pa.array(inner)))
            window, window_bytes = [], 0
    return pa.concat_tables(tables).combine_chunks()
