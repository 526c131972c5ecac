"""Committing shards that another generation has: the same bytes, and the same records."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from milan.core.ahead import Ahead
from milan.core.paths import AnyPath, is_local, pieces_of
from milan.core.progress import Progress
from milan.core.units import format_bytes
from milan.errors import CacheError
from milan.store.format import SHARDS
from milan.store.generation import Generation
from pipeline.writing.backend import location_of
from pipeline.writing.store import Writer

_AT_ONCE = 4  # shards: a bucket has each of their files in memory once


def copy_shards(source: Generation, writer: Writer, progress: Progress, *, link: bool) -> None:
    """Commit the shards that `writer` lacks from those of `source` with the same block and view.

    Every file is compared with the SHA-256 of its record; with `link` files of a disk get a second
    name instead, for the first one is to go. What an earlier call committed stays.

    Raises CacheError if a file of `source` is damaged, or a shard that is there already is another.
    """
    todo = writer.missing()
    _check_same(source, writer, todo)
    writer.clear(todo)
    shards = np.argwhere(todo).tolist()
    store, done, copied = writer.store, int((~todo).sum()), 0
    progress.begin("copy", todo.size, "shards", done=done)

    def stage(shard: list[int]) -> tuple[AnyPath, dict]:
        block, view = shard
        record = source.record(block, view)
        folder = writer.stage(f"{block:05d}.{view:02d}")
        _stage(folder, source, record, link)
        return folder, record

    with ThreadPoolExecutor(_AT_ONCE) as pool, Ahead(stage, shards, pool, _AT_ONCE) as ahead:
        for i, (folder, record) in enumerate(ahead, done + 1):
            writer.commit(folder, record)
            store.backend.drop_staging(folder)
            copied += sum(file["bytes"] for file in record["files"])
            progress.advance(i, format_bytes(copied))
    progress.end()


def _check_same(source: Generation, writer: Writer, todo: np.ndarray) -> None:
    """Raises CacheError unless the shards that are there already have the records of `source`."""
    table = source.shards["record"].to_pylist()
    for block, view in np.argwhere(~todo).tolist():
        here = writer.shard_table.records[block * writer.spec.views + view].tobytes()
        if here != table[block * source.spec.views + view]:
            raise CacheError(
                f"{writer.root} has a shard (block {block}, view {view}) that is not the one of "
                f"{source.root}",
                expected="an empty folder, or a copy that was begun from the same store",
                fix="another folder",
            )


def _stage(folder: AnyPath, source: Generation, record: dict, link: bool) -> None:
    """Bring the files of a record to where the driver commits them from."""
    location = location_of(folder)
    with location.shard_folder() as local:
        for file in record["files"]:
            path, target = source.root / file["path"], local / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if link and is_local(path) and location.has_folders:
                with suppress(OSError):  # a file system without second names
                    os.link(path, target)
                    continue
            with open(target, "wb") as opened:
                for piece in pieces_of(path):
                    opened.write(piece)
                opened.flush()
                os.fsync(opened.fileno())
            with open(target, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != file["sha256"]:
                raise CacheError(
                    f"{path} does not have the SHA-256 of its record",
                    fix=f"milan repair {source.store}, then the same line",
                )
        location.upload(local, record["files"])


def small_files(source: Generation, folder: Path, *, skip: frozenset[str] = frozenset()) -> None:
    """Write the files of a generation that are neither shards nor records, each verified, to a
    folder: all but those called `skip` and the shard table.
    """
    for name in source.entry.files:
        if name != SHARDS and name not in skip:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_verified(name))
