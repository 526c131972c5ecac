"""Writing the cache: shards staged in private, committed whole, the index last.

    worker   stage_shard     -> .staging/<run>/<block>/…   fsync, read back, digest
    driver   Writer.commit   -> generations/000/…          rename, fsync, then the record
    driver   Writer.finish   -> index.json                 when no record is missing

Only a record makes a shard exist. Killing anything at any time leaves staging (cleaned by the next
run, which holds the lock) or a whole shard. The only module that imports zarr.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from milan.errors import CacheError
from milan.format import (
    FORMAT,
    GENERATION,
    GENERATIONS,
    INDEX,
    LOG,
    ORIGIN,
    PIXELS,
    SHARDS,
    VERSION,
    CacheSpec,
    Entry,
    Index,
    canonical,
    read_group,
    read_json,
    record_name,
)
from milan.manifest import Manifest

STAGING = ".staging"
BAD_CSV = "bad-images.csv"


# --- files ----------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes, *, aside: Path) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut.

    It is made in `aside`, a folder of the same file system that the next run clears.
    """
    temporary = aside / f"{path.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def told_if_full(doing: str) -> Iterator[None]:
    """A full disk becomes a CacheError: what is committed stays, and the next run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(
            f"no space left while {doing}",
            fix="free some space and run the same line again: nothing is lost",
        ) from None


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    folder: Path,
    spec: CacheSpec,
    block: int,
    view: int,
    arrays: dict[str, np.ndarray],
    pictures: Sequence[bytes] = (),
) -> list[dict]:
    """Write one shard below `folder`; returns its files: path, bytes, SHA-256.

    `arrays` holds each array of the spec for the block's rows; rows that are the fill value get
    no chunk. `pictures` are the stored views of the rows, if the spec has them. zarr re-reads a
    shard that exists, so `folder` must be new.
    """
    start, stop = spec.block_rows(block)
    for name, values in arrays.items():
        array = zarr.open_array(
            zarr.storage.LocalStore(folder / name),
            mode="r+",
            zarr_format=3,
            config={"write_empty_chunks": False},
        )
        array[start:stop, view] = values
    paths = spec.files(block, view)
    if PIXELS in paths and any(pictures):
        (folder / PIXELS).mkdir(exist_ok=True)
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


class Store:
    """A store that this process writes; it holds the lock until `close`."""

    def __init__(self, path: Path) -> None:
        """Take the store at `path`, or make an empty one.

        Raises CacheError: a folder that is no store, a run that holds it, or a place that cannot
        be written.
        """
        self.path = path
        # os.path: where a parent may not be searched, pathlib raises instead of answering.
        if os.path.exists(path) and not path.is_dir():
            raise CacheError(f"{path} is a file", expected="a folder for the store", fix="--out …")
        if os.path.isdir(path) and any(path.iterdir()) and not _is_store(path):
            raise CacheError(
                f"{path} is a folder with other content", expected="a new or empty folder",
                fix="--out another.zarr",
            )  # fmt: skip
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(path)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be written: {error.strerror}", fix="--out a folder of your own"
            ) from None
        self.run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        # Absolute: a worker on a cluster that was there before has another working folder.
        self.staging = path.absolute() / STAGING / self.run
        # We hold the lock, so every other run's staging belongs to the dead.
        shutil.rmtree(path / STAGING, ignore_errors=True)
        self.staging.mkdir(parents=True)

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
                raise other_settings(self.path, there, spec)
        else:
            self._create(root, spec, *make())
        return Writer(self, name, spec)

    def _create(
        self,
        root: Path,
        spec: CacheSpec,
        attributes: dict,
        tables: dict[str, np.ndarray],
        files: dict[str, bytes],
    ) -> None:
        # Built aside and renamed: a group without its manifest or arrays never exists.
        shutil.rmtree(root, ignore_errors=True)
        fresh = self.staging / "generation"
        fresh.mkdir(parents=True)
        create_arrays(fresh, spec, attributes, tables)
        (fresh / "records").mkdir()
        for name, data in files.items():
            write_whole(fresh / name, data, aside=self.staging)
        for folder, _, names in os.walk(fresh):
            for name in names:
                with open(Path(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        root.parent.mkdir(exist_ok=True)
        for group in (self.path, root.parent):
            if not (group / "zarr.json").exists():
                meta = {"zarr_format": 3, "node_type": "group", "attributes": {}}
                write_whole(
                    group / "zarr.json", json.dumps(meta, indent=2).encode(), aside=self.staging
                )
        os.replace(fresh, root)
        sync_folder(root.parent)

    def entries(self) -> tuple[Entry, ...]:
        """The committed generations, oldest first."""
        return Index.read(self.path).generations if (self.path / INDEX).exists() else ()

    def publish(self, entry: Entry) -> None:
        """Put a finished generation into the index, in the place of its earlier self if any."""
        entries = list(self.entries())
        at = next((i for i, e in enumerate(entries) if e.path == entry.path), len(entries))
        entries[at : at + 1] = [entry]
        data = Index(tuple(entries)).to_bytes()
        if not (self.path / INDEX).exists() or (self.path / INDEX).read_bytes() != data:
            write_whole(self.path / INDEX, data, aside=self.staging)

    def report_bad(self, bad: dict[int, str], manifest: Manifest) -> Path | None:
        """Write the list of bad images as CSV beside the index; None if there are none."""
        path = self.path / BAD_CSV
        if not bad:
            path.unlink(missing_ok=True)
            return None
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "key", "reason"])
            writer.writerows([row, manifest.key(row), why] for row, why in bad.items())
        return path

    def log(self, event: str, **facts: Any) -> None:
        """Append what varies between runs (times, hosts, attempts) to the log."""
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "run": self.run, "event": event}
        with open(self.path / LOG, "a") as file:
            file.write(json.dumps(entry | facts) + "\n")

    def close(self) -> None:
        """Drop this run's staging and the lock."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        self._lock.close()


class Writer:
    """One generation being written; blocks and views count from 0 inside it."""

    def __init__(self, store: Store, name: str, spec: CacheSpec) -> None:
        self.store, self.name, self.spec = store, name, spec
        self.root = store.path / name

    def missing(self) -> list[tuple[int, list[int]]]:
        """(block, views) that still have to be made: no record, or a file gone or cut short."""
        todo = []
        for block in range(self.spec.blocks):
            views = [v for v in range(self.spec.views) if not self._whole(block, v)]
            if views:
                todo.append((block, views))
        return todo

    def _whole(self, block: int, view: int) -> bool:
        path = self.root / "records" / record_name(block, view)
        if not path.exists():
            return False
        try:
            files = read_json(path)["files"]
            return all((self.root / f["path"]).stat().st_size == f["bytes"] for f in files)
        except (CacheError, KeyError, TypeError, FileNotFoundError):
            return False

    def forget(self, block: int, view: int) -> None:
        """Take the record of a shard away: it does not exist any more, and is made again."""
        (self.root / "records" / record_name(block, view)).unlink(missing_ok=True)
        sync_folder(self.root / "records")

    def commit(self, folder: Path, record: dict) -> None:
        """Take a staged shard over: check, rename, fsync, and then write its record."""
        block, view = record["block"], record["view"]
        if list(self.spec.block_rows(block)) != record["rows"]:
            raise CacheError(f"a worker staged rows {record['rows']} as block {block}")
        for file in record["files"]:
            if (folder / file["path"]).stat().st_size != file["bytes"]:
                raise CacheError(f"staged file {folder / file['path']} has changed since staging")
        for file in record["files"]:
            target = self.root / file["path"]
            if not target.parent.exists():
                target.parent.mkdir(parents=True)
                sync_folder(target.parent.parent)
            os.replace(folder / file["path"], target)
            sync_folder(target.parent)
        proof = self.root / "records" / record_name(block, view)
        write_whole(proof, canonical(record), aside=self.store.staging)

    def records(self) -> Iterator[tuple[dict, bytes]]:
        """(record, its bytes) of every shard, ordered by block and view."""
        for block in range(self.spec.blocks):
            for view in range(self.spec.views):
                data = (self.root / "records" / record_name(block, view)).read_bytes()
                yield json.loads(data), data

    def bad(self) -> dict[int, str]:
        """Rows (of this generation) that no target could be made of, with the reason."""
        found: dict[int, str] = {}
        for record, _ in self.records():
            found |= {int(row): why for row, why in record["bad"].items()}
        return dict(sorted(found.items()))

    def finish(self, layer: str, bad: int) -> Entry:
        """Write the table of shards, and the index, which makes the generation count."""
        names = list(self.spec.files(0, 0))
        columns: dict[str, list] = {"record": [], "sizes": [], "bad": []}
        total, records = 0, hashlib.sha256()
        for record, data in self.records():
            proof = hashlib.sha256(data).digest()
            records.update(proof)
            size = {file["path"].split("/")[0]: file["bytes"] for file in record["files"]}
            total += sum(size.values())
            columns["record"].append(proof)
            columns["sizes"].append([size.get(name, -1) for name in names])
            columns["bad"].append(len(record["bad"]))
        table = pa.table(columns, schema=_SHARDS)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        if not _holds(self.root / SHARDS, sink.getvalue()):
            write_whole(self.root / SHARDS, sink.getvalue(), aside=self.store.staging)
        files = self._static_files()
        tables = {name: digest for name, digest in files.items() if name.startswith("codec/")}
        spec, fingerprint = self.spec, read_group(self.root)[1]["fingerprint"]
        content = [fingerprint, tables, records.hexdigest()]
        entry = Entry(
            path=self.name,
            layer=layer,
            fingerprint=fingerprint,
            digest=hashlib.sha256(canonical(content)).hexdigest(),
            rows=(spec.first_row, spec.first_row + spec.rows),
            views=(spec.first_view, spec.first_view + spec.views),
            shards=spec.shards,
            bytes=total,
            bad=bad,
            files=files,
        )
        self.store.publish(entry)
        return entry

    def _static_files(self) -> dict[str, str]:
        """SHA-256 of every file beside shards, records and the origin."""
        digests = {}
        apart = {self.root / name / "c" for name in self.spec.arrays()}
        apart |= {self.root / "records", self.root / PIXELS}
        for folder, folders, names in os.walk(self.root):
            here = Path(folder)
            folders[:] = [f for f in folders if here / f not in apart]
            for name in names:
                if name == ORIGIN:
                    continue
                path = here / name
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                digests[path.relative_to(self.root).as_posix()] = digest
        return dict(sorted(digests.items()))


_SHARDS = pa.schema(
    [
        ("record", pa.binary(32)),  # SHA-256 of the shard's record
        ("sizes", pa.list_(pa.int64())),  # bytes of its file of each array by name; -1: no file
        ("bad", pa.int32()),  # images without targets
    ]
)


def other_settings(path: Path, there: CacheSpec, wanted: CacheSpec) -> CacheError:
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


def _holds(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _is_store(path: Path) -> bool:
    # A store killed at birth holds only its lock and its staging.
    names = {entry.name for entry in path.iterdir()}
    return (path / GENERATION / "zarr.json").exists() or names <= {
        ".lock", STAGING, "zarr.json", GENERATIONS, LOG
    }  # fmt: skip


def _take_lock(path: Path) -> Any:
    """The store's lock, held as long as this process lives (flock: the kernel frees it)."""
    file = open(path / ".lock", "a+")  # noqa: SIM115 - held, not read
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CacheError(
            f"{path} is in use by {holder}", expected="one extraction at a time into a store",
            fix="wait for it, or stop it and run this line again",
        ) from None  # fmt: skip
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
