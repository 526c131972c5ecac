"""Writing the cache: shards staged in private, committed whole, the index last.

    worker   stage_shard     -> .staging/<run>/<block>/…   fsync, read back, digest
    driver   Writer.commit   -> generations/000/…          rename, fsync, then the record
    driver   Writer.finish   -> index.json                 when no record is missing

Only a record makes a shard exist. Killing anything at any time leaves staging (cleaned by the next
run, which holds the lock) or a whole shard. What a disk and a bucket do differently is said in
pipeline.writing.disk and pipeline.writing.bucket. The only module that imports zarr.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from milan.core.paths import AnyPath, Url, as_path, read_file
from milan.errors import CacheError, ConfigError
from milan.images.manifest import Manifest
from milan.store.format import (
    CONTENT,
    FORMAT,
    GENERATIONS,
    INDEX,
    ORIGIN,
    PIXELS,
    SHARDS,
    VERSION,
    CacheSpec,
    Entry,
    Index,
    canonical,
    read_group,
    record_name,
)
from pipeline.writing.bucket import Bucket, upload
from pipeline.writing.disk import Disk
from pipeline.writing.shard_table import ShardTable

BAD_CSV = "bad-images.csv"


# --- the worker's side ----------------------------------------------------------------------------


def create_arrays(
    root: Path, spec: CacheSpec, attributes: dict, tables: dict[str, np.ndarray]
) -> None:
    """A generation at `root`: its group, its arrays without a chunk, and small `tables` whole."""
    group = zarr.create_group(zarr.storage.LocalStore(root), zarr_format=3, attributes=attributes)
    for name, array in spec.arrays().items():
        group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunk,
            shards=array.shard,
            filters=None,
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            fill_value=array.fill,
            dimension_names=array.dimensions,
        )
    for name, values in tables.items():
        table = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            filters=None,
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        table[...] = values


def stage_shard(
    folder: AnyPath,
    spec: CacheSpec,
    block: int,
    view: int,
    arrays: dict[str, np.ndarray],
    pictures: Sequence[bytes] = (),
) -> list[dict]:
    """Write one shard below `folder`; returns its files: path, bytes, SHA-256.

    `arrays` holds each array of the spec for the block's rows; rows that are the fill value get
    no chunk. `pictures` are the stored views of the rows, if the spec has them. zarr re-reads a
    shard that exists, so `folder` must be new. Of a bucket it is the generation itself: the shard
    is staged on this machine's disk ($TMPDIR) and put to its place (bucket.deliver).
    """
    if isinstance(folder, Url):
        with tempfile.TemporaryDirectory(prefix="milan-shard-") as name:
            create_arrays(Path(name), spec, {}, {})
            files = stage_shard(Path(name), spec, block, view, arrays, pictures)
            upload(Path(name), folder, files)
        return files
    start, stop = spec.block_rows(block)
    for name, values in arrays.items():
        array = zarr.open_array(
            zarr.storage.LocalStore(folder / name),
            mode="r+",
            zarr_format=3,
            config={"write_empty_chunks": False},
        )
        rows = slice(start, stop)
        array[(rows, view) if spec.arrays()[name].of_views else rows] = values
    paths = spec.files(block, view)
    if PIXELS in paths and any(pictures):
        (folder / paths[PIXELS]).parent.mkdir(parents=True, exist_ok=True)
        (folder / paths[PIXELS]).write_bytes(b"".join(pictures))
    files = []
    for relative in paths.values():
        path = folder / relative
        if not path.exists():
            continue  # every image of the shard is bad: there is nothing to store
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files.append({"path": relative, "bytes": path.stat().st_size, "sha256": digest})
    return files


# --- the driver's side ----------------------------------------------------------------------------


def writable(out: str) -> AnyPath:
    """The place that `--out` means. Raises ConfigError for a URL that no store is written to."""
    where = as_path(out)
    if isinstance(where, Url) and not where.text.startswith("s3://"):
        raise ConfigError(
            f"--out {out}", expected="a path, or a URL of s3://",
            fix="extract to a disk, and copy the finished store",
        )  # fmt: skip
    return where


class Store:
    """A store that this process writes; it holds the lock until `close`."""

    def __init__(self, path: AnyPath) -> None:
        """Take the store at `path`, or make an empty one.

        Raises CacheError: a folder that is no store, a run that holds it, or a place that cannot
        be written.
        """
        self.path = path
        self.run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.files: Disk | Bucket = (
            Bucket(path, self.run) if isinstance(path, Url) else Disk(path, self.run)
        )
        self.staging: Path = self.files.staging

    def generation(
        self,
        name: str,
        spec: CacheSpec,
        make: Callable[[], tuple[dict, dict[str, np.ndarray], dict[str, bytes]]],
    ) -> Writer:
        """The generation called `name`, created or taken up again.

        `make` gives what a new one starts with: attributes, tables, files. Raises CacheError if
        the one that is there is of another spec, with the fields that differ.
        """
        root = self.path / name
        if (root / "zarr.json").exists():
            there, _ = read_group(root)
            if there.fingerprint() != spec.fingerprint():
                raise settings_differ(self.path, there, spec)
        else:
            self._create(name, spec, *make())
        return Writer(self, name, spec)

    def _create(
        self,
        name: str,
        spec: CacheSpec,
        attributes: dict,
        tables: dict[str, np.ndarray],
        files: dict[str, bytes],
    ) -> None:
        # Built aside and taken over: a group without its manifest or arrays never exists.
        fresh = self.staging / "generation"
        fresh.mkdir(parents=True)
        create_arrays(fresh, spec, attributes, tables)
        for file, data in files.items():
            (fresh / file).write_bytes(data)
        for group in ("zarr.json", f"{GENERATIONS}/zarr.json"):
            if self.files.read(group) is None:
                meta = {"zarr_format": 3, "node_type": "group", "attributes": {}}
                self.files.write(group, json.dumps(meta, indent=2).encode())
        self.files.adopt(fresh, name)

    def entries(self) -> tuple[Entry, ...]:
        """The committed generations, oldest first."""
        return Index.read(self.path).generations if (self.path / INDEX).exists() else ()

    def publish(self, entry: Entry) -> None:
        """Put a finished generation into the index, in the place of its earlier self if any."""
        before = self.files.read(INDEX)
        entries = list(self.entries())
        at = next((i for i, e in enumerate(entries) if e.path == entry.path), len(entries))
        entries[at : at + 1] = [entry]
        data = Index(tuple(entries)).to_bytes()
        if before != data:
            self.files.write(INDEX, data)

    def report_bad(self, bad: dict[int, str], manifest: Manifest) -> AnyPath | None:
        """Write the list of bad images as CSV beside the index; None if there are none."""
        before = self.files.read(BAD_CSV)
        if not bad:
            if before is not None:
                self.files.remove(BAD_CSV)
            return None
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["row", "key", "reason"])
        writer.writerows([row, manifest.key(row), why] for row, why in bad.items())
        if before != text.getvalue().encode():
            self.files.write(BAD_CSV, text.getvalue().encode())
        return self.path / BAD_CSV

    def log(self, event: str, **facts: Any) -> None:
        """Append what varies between runs (times, hosts, attempts) to the log."""
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "run": self.run, "event": event}
        self.files.log(json.dumps(entry | facts))

    def close(self) -> None:
        """Drop this run's staging and the lock."""
        self.files.close()


class Writer:
    """One generation being written; blocks and views count from 0 inside it."""

    def __init__(self, store: Store, name: str, spec: CacheSpec) -> None:
        self.store, self.name, self.spec = store, name, spec
        self.root = store.path / name
        self.shard_table = ShardTable(spec)

    def missing(self) -> np.ndarray:
        """What still has to be made, [blocks, K] bool: no record, or a file gone or cut short."""
        self.shard_table.look(self.root)
        return self.shard_table.missing()

    def forget(self, block: int, view: int) -> None:
        """Take the record of a shard away: it does not exist any more, and is made again."""
        self.store.files.remove(f"{self.name}/records/{record_name(block, view)}")
        self.shard_table.forget(block, view)

    def clear(self, todo: np.ndarray) -> None:
        """Make room for the shards `todo` ([blocks, K] bool) where nothing may be replaced."""
        files: list[str] = []
        for block, view in np.argwhere(todo).tolist():
            files.append(f"records/{record_name(block, view)}")  # first: then it does not exist
            files += self.spec.files(block, view).values()
        self.store.files.clear(self.name, files)

    def stage(self, attempt: str) -> AnyPath:
        """Where a worker may stage shards (stage_shard)."""
        return self.store.files.stage(self.name, attempt, self.spec.arrays())

    def commit(self, folder: AnyPath, record: dict) -> None:
        """Take a staged shard over: check, rename, fsync, and then write its record."""
        block, view = record["block"], record["view"]
        if list(self.spec.block_rows(block)) != record["rows"]:
            raise CacheError(f"a worker staged rows {record['rows']} as block {block}")
        self.store.files.take(folder, self.name, record["files"])
        data = canonical(record)
        self.store.files.write(f"{self.name}/records/{record_name(block, view)}", data)
        self.shard_table.note(record, data)

    def bad(self) -> dict[int, str]:
        """Rows (of this generation) that no target could be made of, with the reason."""
        return dict(sorted(self.shard_table.reasons.items()))

    def finish(self, layer: str) -> Entry:
        """Write the table of shards, and the index, which makes the generation count.

        Raises CacheError if a shard is missing.
        """
        if not self.shard_table.known.all():
            left = np.argwhere(self.missing())
            if len(left):
                block, view = left[0].tolist()
                raise CacheError(
                    f"{len(left)} shards of {self.root} have no record, the first is "
                    f"{record_name(block, view)}",
                    fix="run the same extract-targets line again",
                )
        table = self.shard_table.parquet()
        if self.store.files.read(f"{self.name}/{SHARDS}") != table:
            self.store.files.write(f"{self.name}/{SHARDS}", table)
        files = self._static_files()
        tables = {name: digest for name, digest in files.items() if name.startswith(CONTENT)}
        spec, fingerprint = self.spec, read_group(self.root)[1]["fingerprint"]
        content = [fingerprint, tables, self.shard_table.digest()]
        entry = Entry(
            path=self.name,
            layer=layer,
            fingerprint=fingerprint,
            digest=hashlib.sha256(canonical(content)).hexdigest(),
            rows=(spec.first_row, spec.first_row + spec.rows),
            views=(spec.first_view, spec.first_view + spec.views),
            shards=spec.shards,
            bytes=self.shard_table.total(),
            bad=len(self.shard_table.reasons),
            files=files,
        )
        self.store.publish(entry)
        return entry

    def _static_files(self) -> dict[str, str]:
        """SHA-256 of every file beside shards, records and the origin."""
        apart = {f"{name}/c" for name in self.spec.arrays()} | {"records", PIXELS}
        names = sorted(self.store.files.names(self.name, apart))
        return {
            name: hashlib.sha256(read_file(self.root / name)).hexdigest()
            for name in names
            if name.rpartition("/")[2] != ORIGIN
        }


def settings_differ(path: AnyPath, there: CacheSpec, wanted: CacheSpec) -> CacheError:
    """The refusal to mix, with the fields that differ."""
    return CacheError(
        f"{path} was made with other settings ({'; '.join(there.differences(wanted))})",
        expected="one teacher, one codec, one law of views: targets are never mixed",
        fix=f"--out another.zarr, or delete {path} first, or --extend to keep both in one store",
    )


def group_attributes(spec: CacheSpec, about: dict) -> dict:
    """The attributes of a generation's group: static, written once."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": asdict(spec),
        "fingerprint": spec.fingerprint(),
        "about": about,
    }
