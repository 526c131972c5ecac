"""Writing the cache: shards staged in private, committed whole, the index last.

    worker   stage_shard     -> .staging/<run>/<block>/…   fsync, read back, digest
    driver   Store.commit    -> generations/000/…          rename, fsync, then the record
    driver   Store.finish    -> index.json                 when no record is missing

Only a record makes a shard exist. Killing anything at any time leaves staging (cleaned by the next
run, which holds the lock) or a whole shard. The only module that imports zarr.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from milan.cache import (
    FORMAT,
    GENERATION,
    INDEX,
    LOG,
    VERSION,
    CacheSpec,
    canonical,
    read_group,
    read_json,
    record_name,
)
from milan.errors import CacheError
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


def create_arrays(root: Path, spec: CacheSpec, attributes: dict) -> None:
    """The metadata of a generation at `root`: group and arrays, no chunk yet."""
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


def stage_shard(
    folder: Path, spec: CacheSpec, block: int, view: int, arrays: dict[str, np.ndarray]
) -> list[dict]:
    """Write one shard below `folder`; returns its files: path, bytes, SHA-256.

    `arrays` holds each array of the spec for the block's rows; rows that are the fill value get
    no chunk. zarr re-reads a shard that exists, so `folder` must be new.
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
    files = []
    for name in sorted(arrays):
        relative = f"{name}/{spec.arrays()[name].file(block, view)}"
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
    """A store being written by this process, which holds its lock until `close`."""

    def __init__(self, path: Path, spec: CacheSpec, attributes: dict, manifest: Manifest) -> None:
        """Create the store, or take up the one that is there if it is of the same spec.

        Raises CacheError: another spec (with the fields that differ), a folder that is no store,
        a run that holds it, or a place that cannot be written.
        """
        self.path, self.spec = path, spec
        self.root = path / GENERATION
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
        try:
            self._open(attributes, manifest)
        except BaseException:
            self.close()
            raise
        self.run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        # Absolute: a worker on a cluster that was there before has another working folder.
        self.staging = path.absolute() / STAGING / self.run
        # We hold the lock, so every other run's staging belongs to the dead.
        shutil.rmtree(path / STAGING, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def _open(self, attributes: dict, manifest: Manifest) -> None:
        if not (self.root / "zarr.json").exists():
            # Built aside and renamed: a group without its manifest or arrays never exists.
            shutil.rmtree(self.root, ignore_errors=True)
            fresh = self.path / STAGING / "generation"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            create_arrays(fresh, self.spec, attributes)
            (fresh / "records").mkdir()
            write_whole(fresh / "manifest.parquet", manifest.to_parquet(), aside=fresh.parent)
            for folder, _, files in os.walk(fresh):
                for name in files:
                    with open(Path(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(folder))
            self.root.parent.mkdir(exist_ok=True)
            for group in (self.path, self.root.parent):
                if not (group / "zarr.json").exists():
                    meta = {"zarr_format": 3, "node_type": "group", "attributes": {}}
                    data = json.dumps(meta, indent=2).encode()
                    write_whole(group / "zarr.json", data, aside=fresh.parent)
            os.replace(fresh, self.root)
            sync_folder(self.root.parent)
            return
        there, _ = read_group(self.root)
        if there.fingerprint() != self.spec.fingerprint():
            fields = there.differences(self.spec)
            raise CacheError(
                f"{self.path} was made with other settings ({'; '.join(fields)})",
                expected="one store, one teacher, one set of views: stores are never mixed",
                fix=f"--out another.zarr, or delete {self.path} first",
            )

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
        write_whole(proof, canonical(record), aside=self.staging)

    def records(self) -> Iterable[tuple[str, dict, bytes]]:
        """(file name, record, its bytes) of every shard, in order."""
        for block in range(self.spec.blocks):
            for view in range(self.spec.views):
                name = record_name(block, view)
                data = (self.root / "records" / name).read_bytes()
                yield name, json.loads(data), data

    def bad(self) -> dict[int, str]:
        """Rows that no target could be made of, with the reason."""
        found: dict[int, str] = {}
        for _, record, _ in self.records():
            found |= {int(row): why for row, why in record["bad"].items()}
        return dict(sorted(found.items()))

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

    def finish(self) -> dict:
        """Write the index, which makes the store complete; returns its generation entry."""
        files: dict[str, int] = {}
        digests: dict[str, str] = {}
        for name, record, data in self.records():
            digests[name] = hashlib.sha256(data).hexdigest()
            files |= {file["path"]: file["bytes"] for file in record["files"]}
        generation = {
            "path": GENERATION,
            "fingerprint": self.spec.fingerprint(),
            "rows": [0, self.spec.rows],
            "views": [0, self.spec.views],
            "bad": {str(row): why for row, why in self.bad().items()},
            "records": digests,
            "files": files,
        }
        generation["digest"] = hashlib.sha256(canonical(generation)).hexdigest()
        index = {"format": FORMAT, "version": VERSION, "generations": [generation]}
        data = canonical(index)
        if not (self.path / INDEX).exists() or (self.path / INDEX).read_bytes() != data:
            write_whole(self.path / INDEX, data, aside=self.staging)
        return generation

    def log(self, event: str, **facts: Any) -> None:
        """Append what varies between runs (times, hosts, attempts) to the log."""
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "run": self.run, "event": event}
        with open(self.path / LOG, "a") as file:
            file.write(json.dumps(entry | facts) + "\n")

    def close(self) -> None:
        """Drop this run's staging and the lock."""
        if hasattr(self, "staging"):
            shutil.rmtree(self.path / STAGING, ignore_errors=True)
        self._lock.close()


def group_attributes(spec: CacheSpec, about: dict, versions: dict) -> dict:
    """The attributes of a generation's group: static, written once."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": asdict(spec),
        "fingerprint": spec.fingerprint(),
        "about": about,
        "versions": versions,
    }


def _is_store(path: Path) -> bool:
    # A store killed at birth holds only its lock and its staging.
    names = {entry.name for entry in path.iterdir()}
    return (path / GENERATION / "zarr.json").exists() or names <= {
        ".lock", STAGING, "zarr.json", "generations", LOG
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
