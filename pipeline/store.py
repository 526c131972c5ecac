"""Writing the cache: shards staged in private, committed whole, the index last.

    worker   stage_shard     -> .staging/<run>/<block>/…   fsync, read back, digest
    driver   Writer.commit   -> generations/000/…          rename, fsync, then the record
    driver   Writer.finish   -> index.json                 when no record is missing

Only a record makes a shard exist. Killing anything at any time leaves staging (cleaned by the next
run, which holds the lock) or a whole shard. The only module that imports zarr.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from milan.errors import CacheError
from milan.files import sync_folder
from milan.format import (
    CONTENT,
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
    record_name,
)
from milan.manifest import Manifest
from pipeline.files import holds, take_lock, write_whole
from pipeline.tally import Tally

STAGING = ".staging"
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
            self._lock = take_lock(path)
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
        self.tally = Tally(spec)

    def missing(self) -> np.ndarray:
        """What still has to be made, [blocks, K] bool: no record, or a file gone or cut short."""
        self.tally.look(self.root)
        return self.tally.missing()

    def forget(self, block: int, view: int) -> None:
        """Take the record of a shard away: it does not exist any more, and is made again."""
        (self.root / "records" / record_name(block, view)).unlink(missing_ok=True)
        sync_folder(self.root / "records")
        self.tally.forget(block, view)

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
        data = canonical(record)
        write_whole(proof, data, aside=self.store.staging)
        self.tally.note(record, data)

    def bad(self) -> dict[int, str]:
        """Rows (of this generation) that no target could be made of, with the reason."""
        return dict(sorted(self.tally.reasons.items()))

    def finish(self, layer: str) -> Entry:
        """Write the table of shards, and the index, which makes the generation count.

        Raises CacheError if a shard is missing.
        """
        if not self.tally.known.all():
            left = np.argwhere(self.missing())
            if len(left):
                block, view = left[0].tolist()
                raise CacheError(
                    f"{len(left)} shards of {self.root} have no record, the first is "
                    f"{record_name(block, view)}",
                    fix="run the same extract-targets line again",
                )
        table = self.tally.parquet()
        if not holds(self.root / SHARDS, table):
            write_whole(self.root / SHARDS, table, aside=self.store.staging)
        files = self._static_files()
        tables = {name: digest for name, digest in files.items() if name.startswith(CONTENT)}
        spec, fingerprint = self.spec, read_group(self.root)[1]["fingerprint"]
        content = [fingerprint, tables, self.tally.digest()]
        entry = Entry(
            path=self.name,
            layer=layer,
            fingerprint=fingerprint,
            digest=hashlib.sha256(canonical(content)).hexdigest(),
            rows=(spec.first_row, spec.first_row + spec.rows),
            views=(spec.first_view, spec.first_view + spec.views),
            shards=spec.shards,
            bytes=self.tally.total(),
            bad=len(self.tally.reasons),
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


def _is_store(path: Path) -> bool:
    # A store killed at birth holds only its lock and its staging.
    names = {entry.name for entry in path.iterdir()}
    return (path / GENERATION / "zarr.json").exists() or names <= {
        ".lock", STAGING, "zarr.json", GENERATIONS, LOG
    }  # fmt: skip
