"""Writing a store: shards are staged in private, committed whole, and the index comes last.

    worker   shards.stage_shard  -> .staging/<run>/<block>/…   fsync, SHA-256
    driver   Writer.commit       -> generations/000/…          rename, fsync, then the record
    driver   Store.publish       -> index.json                 when no record is missing

Only its record makes a shard exist. Whatever is killed at any time leaves staging, which the next
run removes once it has the lock, or a whole shard. This is the order for every backend; how a disk
and a bucket do each step is described in pipeline.writing.backend.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from milan.core.paths import AnyPath, folders_in, read_file
from milan.errors import CacheError
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
from pipeline.writing.backend import open_backend
from pipeline.writing.shard_table import ShardTable
from pipeline.writing.shards import create_arrays

BAD_CSV = "bad-images.csv"


class Store:
    """A store that this process writes; it has the lock until `close`."""

    def __init__(self, path: AnyPath) -> None:
        """Lock the store at `path`, or create an empty one. Raises as Location.open does."""
        self.path = path
        self.run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.backend = open_backend(path, self.run)

    def generation(
        self,
        name: str,
        spec: CacheSpec,
        initial: Callable[[], tuple[dict, dict[str, np.ndarray], dict[str, bytes]]],
    ) -> Writer:
        """The generation called `name`: a new one, or that of an earlier run.

        `initial` computes what a new one starts with: attributes, tables, files. Raises CacheError,
        with the fields that differ, if the existing one has another spec.
        """

        def build(folder: Path) -> None:
            attributes, tables, files = initial()
            create_arrays(folder, spec, attributes, tables)
            for file, data in files.items():
                (folder / file).write_bytes(data)

        return self.begin(name, spec, build)

    def begin(self, name: str, spec: CacheSpec, build: Callable[[Path], None]) -> Writer:
        """The same; `build` fills the empty folder of a new one with all but shards."""
        root = self.path / name
        if (root / "zarr.json").exists():
            existing, _ = read_group(root)
            if existing.fingerprint() != spec.fingerprint():
                raise self._begun_differently(name, existing, spec)
        else:
            self._create(name, build)
        return Writer(self, name, spec)

    def _begun_differently(self, name: str, existing: CacheSpec, spec: CacheSpec) -> CacheError:
        """The error for a generation that was begun, not finished, and now is to be another."""
        whole, images = self._index().generations, replace(
            spec, manifest=existing.manifest, rows=existing.rows
        )  # fmt: skip
        if not whole and existing.fingerprint() != images.fingerprint():
            return settings_differ(self.path, existing, spec)
        delete = f"delete {self.path / name if whole else self.path}"
        return CacheError(
            f"{self.path / name} was begun with other images or settings and is not finished "
            f"({'; '.join(existing.differences(spec))})",
            expected=f"the same line over the same {existing.rows:,} images; then a store can grow",
            fix=f"that line, or --out another.zarr, or {delete}: only what is finished of it is "
            "lost" + (f", the rest of {self.path} stays" if whole else ""),
        )

    def _create(self, name: str, build: Callable[[Path], None]) -> None:
        # Built in staging: a group without its manifest or arrays never exists in the store.
        folder = self.backend.staging / "generation"
        folder.mkdir(parents=True)
        build(folder)
        for group in ("zarr.json", f"{GENERATIONS}/zarr.json"):
            if self.backend.read(group) is None:
                meta = {"zarr_format": 3, "node_type": "group", "attributes": {}}
                self.backend.write(group, json.dumps(meta, indent=2).encode())
        self.backend.add_generation(folder, name)

    def begun(self) -> set[str]:
        """The paths of all generations that have a folder, whether they count or not."""
        folder = self.path / GENERATIONS
        return {f"{GENERATIONS}/{n}" for n in folders_in(folder)} if folder.is_dir() else set()

    def entries(self) -> tuple[Entry, ...]:
        """The committed generations, oldest first."""
        return self._index().generations

    def publish(self, *entries: Entry) -> None:
        """List finished generations in the index, all at once: readers see no part of a growth.

        A repaired one replaces its earlier entry.
        """

        def listed(index: Index) -> Index:
            by_path = {entry.path: entry for entry in (*index.generations, *entries)}
            return replace(index, generations=tuple(by_path.values()))

        self.replace_index(listed)

    def put_index(self, data: bytes) -> None:
        """Write the index of a store with the same generations, byte for byte."""
        if self.backend.read(INDEX) != data:
            self.backend.write(INDEX, data)

    def replace_index(self, change: Callable[[Index], Index]) -> Index:
        """Write what `change` makes of the index of a finished store; returns it."""
        before = self._read_index()
        index = change(before)
        self._replace_index(before, index)
        return index

    def remove_pruned(self) -> None:
        """Remove what is left of generations that do not count (Index.pruned)."""
        for name in sorted(self.begun() & {*self._index().pruned}):
            self.backend.remove_generation(name)

    def drop(self, dropped: dict[str, list[int]]) -> None:
        """List rows whose images are gone (Index.dropped), if the store is finished."""
        index = self._read_index()
        if index.generations:
            self._replace_index(index, replace(index, dropped={**index.dropped, **dropped}))

    def _index(self) -> Index:
        return Index.read(self.path) if (self.path / INDEX).exists() else Index(())

    def _read_index(self) -> Index:
        """The index, so that `write` replaces this one alone."""
        self.backend.read(INDEX)
        return self._index()

    def _replace_index(self, before: Index, index: Index) -> None:
        if before != index:
            self.backend.write(INDEX, index.to_bytes())

    def report_bad(self, bad: dict[int, str], manifest: Manifest) -> AnyPath | None:
        """Write the list of rejected files, row by reason, beside the index as CSV.

        Returns its path; None if no file was rejected, and then there is no list either.
        """
        before = self.backend.read(BAD_CSV)
        if not bad:
            if before is not None:
                self.backend.remove(BAD_CSV)
            return None
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["row", "key", "reason"])
        writer.writerows([row, manifest.key(row), reason] for row, reason in bad.items())
        if before != text.getvalue().encode():
            self.backend.write(BAD_CSV, text.getvalue().encode())
        return self.path / BAD_CSV

    def log(self, event: str, **facts: Any) -> None:
        """Append an event to the log: what varies between runs (times, hosts, attempts)."""
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "run": self.run, "event": event}
        self.backend.log(json.dumps(entry | facts))

    def close(self) -> None:
        """Remove this run's staging and release the lock."""
        self.backend.close()


class Writer:
    """One generation being written; blocks and views count from 0 inside it."""

    def __init__(self, store: Store, name: str, spec: CacheSpec) -> None:
        self.store, self.name, self.spec = store, name, spec
        self.root = store.path / name
        self.shard_table = ShardTable(spec)

    def missing(self) -> np.ndarray:
        """[blocks, K] bool, True = to be written: no record, or a file is gone or cut short."""
        self.shard_table.read_records(self.root)
        return self.shard_table.missing()

    def forget(self, block: int, view: int) -> None:
        """Remove the record of a shard, which then no longer exists and is written again."""
        self.store.backend.remove(f"{self.name}/records/{record_name(block, view)}")
        self.shard_table.forget(block, view)

    def forget_partial_blocks(self) -> None:
        """Forget the shards of blocks that have some and lack others.

        The views of a block are of one reading of its images, which may have changed since.
        """
        missing = self.missing()
        for block in np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1)).tolist():
            for view in np.flatnonzero(~missing[block]).tolist():
                self.forget(block, view)

    def clear(self, todo: np.ndarray) -> None:
        """Remove leftovers in the way of the shards `todo` ([blocks, K] bool)."""
        files: list[str] = []
        for block, view in np.argwhere(todo).tolist():
            files.append(f"records/{record_name(block, view)}")  # first: the shard exists by it
            files += self.spec.files(block, view).values()
        self.store.backend.clear(self.name, files)

    def stage(self, attempt: str) -> AnyPath:
        """The folder where a worker stages the shards of one attempt (stage_shard)."""
        return self.store.backend.staging_folder(self.name, attempt)

    def commit(self, folder: AnyPath, record: dict) -> None:
        """Commit a staged shard: check it, move its files, and then write its record.

        Raises CacheError if the record or a file is not what was to be staged.
        """
        block, view = record["block"], record["view"]
        if list(self.spec.block_rows(block)) != record["rows"]:
            raise CacheError(f"a worker staged rows {record['rows']} as block {block}")
        self.store.backend.commit_files(folder, self.name, record["files"])
        data = canonical(record)
        self.store.backend.write(f"{self.name}/records/{record_name(block, view)}", data)
        self.shard_table.add(record, data)

    def bad(self) -> dict[int, str]:
        """Rejected files: rows (of this generation) without targets, with the reason."""
        return dict(sorted(self.shard_table.reasons.items()))

    def finish(self, layer: str) -> Entry:
        """Write the shard table; returns the entry that makes the generation count when the index
        has it (Store.publish). Raises CacheError if a shard is missing.
        """
        if not self.shard_table.known.all():
            missing = np.argwhere(self.missing())
            if len(missing):
                block, view = missing[0].tolist()
                raise CacheError(
                    f"{len(missing)} shards of {self.root} have no record, the first is "
                    f"{record_name(block, view)}",
                    fix="run the same extract-targets line again",
                )
        table = self.shard_table.parquet()
        if self.store.backend.read(f"{self.name}/{SHARDS}") != table:
            self.store.backend.write(f"{self.name}/{SHARDS}", table)
        files = self._static_files()
        tables = {name: digest for name, digest in files.items() if name.startswith(CONTENT)}
        spec, fingerprint = self.spec, read_group(self.root)[1]["fingerprint"]
        content = [fingerprint, tables, self.shard_table.digest()]
        return Entry(
            path=self.name,
            layer=layer,
            fingerprint=fingerprint,
            digest=hashlib.sha256(canonical(content)).hexdigest(),
            rows=(spec.first_row, spec.first_row + spec.rows),
            views=(spec.first_view, spec.first_view + spec.views),
            shards=spec.shards,
            bytes=self.shard_table.total_bytes(),
            bad=len(self.shard_table.reasons),
            files=files,
        )

    def _static_files(self) -> dict[str, str]:
        """SHA-256, by name, of every file but shards, records and the origin."""
        skip = {f"{name}/c" for name in self.spec.arrays()} | {"records", PIXELS}
        names = sorted(self.store.backend.file_names(self.name, skip))
        return {
            name: hashlib.sha256(read_file(self.root / name)).hexdigest()
            for name in names
            if name.rpartition("/")[2] != ORIGIN
        }


def settings_differ(
    path: AnyPath, existing: CacheSpec, wanted: CacheSpec, *, extends: bool = False
) -> CacheError:
    """The error for targets of other settings, with the fields that differ.

    `extends` says whether they may be another layer of the store.
    """
    return CacheError(
        f"{path} was made with other settings ({'; '.join(existing.differences(wanted))})",
        expected="one teacher, one codec, one view spec: targets are never mixed",
        fix=f"--out another.zarr, or delete {path} first"
        + (", or --extend to keep both in one store" if extends else ""),
    )


def group_attributes(spec: CacheSpec, about: dict) -> dict:
    """The attributes of a generation's group, which are written once."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": asdict(spec),
        "fingerprint": spec.fingerprint(),
        "about": about,
    }
