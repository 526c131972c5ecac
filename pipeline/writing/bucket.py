"""The place of a store in a bucket: no renames, so that every object is put whole and once.

    worker   deliver       shard files, staged on the worker's disk -> final keys, one PUT each
    driver   Bucket.take   are they there, as the worker said?
    driver   Bucket.write  the record; at the end the tables, and the index last

A shard's objects are put only where nothing is, and never replaced: what has a record stays as it
is, whatever workers of the dead may still do. What the dead left without a record is removed by the
next driver, which holds the lock, before it begins.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from milan.core.paths import Url, files_below, names_in
from milan.errors import CacheError, MilanError
from milan.store.format import GENERATION, GENERATIONS, LOGS
from pipeline.writing.lease import Lease
from pipeline.writing.s3 import delete, get, head, put, same

_LOG_EVERY = 30.0  # seconds between two puts of the log


def upload(staged: Path, generation: Url, files: Iterable[dict]) -> None:
    """Put the files of a staged shard to their places. Raises FileExistsError.

    That is for other bytes in one of these places: of another attempt on another kind of device,
    or of a later run, to which this worker is of the dead. The attempt counts as failed.
    """
    for file in files:
        where = generation / file["path"]
        if put(where, (staged / file["path"]).read_bytes(), over=None) is None:
            raise FileExistsError(f"{where} is there already, with other bytes")


class Bucket:
    """A store's objects, for the one driver that holds its lock."""

    def __init__(self, store: Url, run: str) -> None:
        """Raises CacheError: other content, a run that holds it; DataError if S3 refuses."""
        self.path = store
        if store.is_file():
            raise CacheError(f"{store} is an object", expected="a folder for the store",
                             fix="--out …")  # fmt: skip
        names = set(names_in(store)) - {""}
        ours = {".lock", "zarr.json", GENERATIONS, LOGS}
        if not names <= ours and head(store / GENERATION / "zarr.json") is None:
            raise CacheError(
                f"{store} is a folder with other content", expected="a new or empty folder",
                fix="--out another.zarr",
            )  # fmt: skip
        self._lease = Lease(store, run)
        self._made_in = tempfile.TemporaryDirectory(prefix="milan-store-")
        self.staging = Path(self._made_in.name)
        self._read: dict[str, str | None] = {}
        self._lines: list[str] = []
        self._log = store / LOGS / f"{run}.jsonl"
        self._logged: str | None = None
        self._log_time = time.monotonic()

    def read(self, name: str) -> bytes | None:
        """A file; None if there is none. `write` then replaces this one and no other."""
        found = get(self.path / name)
        self._read[name] = found[1].etag if found else None
        return found[0] if found else None

    def write(self, name: str, data: bytes) -> None:
        """Put a file whole, over the one that was read, or where there is none.

        Raises CacheError if something else is there, or the lock is lost.
        """
        self._lease.check()
        etag = put(self.path / name, data, over=self._read.get(name))
        if etag is None:
            raise CacheError(
                f"{self.path / name} was changed by another process",
                expected="one extraction at a time into a store",
                fix="run the same line again",
            )
        if name in self._read:
            self._read[name] = etag

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._lease.check()
        delete(self.path / name)
        self._read.pop(name, None)

    def clear(self, generation: str, files: Collection[str]) -> None:
        """Remove what is there of shards that are to be made: nothing of them will be replaced."""
        there = {name for name, _ in files_below(self.path / generation)}
        for name in files:
            if name in there:
                self.remove(f"{generation}/{name}")

    def adopt(self, fresh: Path, name: str) -> None:
        """Put a generation that was made in staging; its zarr.json, which makes it count, last."""
        for left in list(self.names(name)):  # of a run that was killed here
            self.remove(f"{name}/{left}")
        files = [path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (file == "zarr.json", file)):
            self.write(f"{name}/{file}", (fresh / file).read_bytes())
        shutil.rmtree(fresh)

    def stage(self, generation: str, attempt: str, arrays: Iterable[str]) -> Url:
        """Where a worker takes its shards: at once to their places."""
        return self.path / generation

    def take(self, staged: Any, generation: str, files: list[dict]) -> None:
        """Make sure that the files of a shard are in their places, as the worker put them."""
        self._lease.check()
        for file in files:
            where = self.path / generation / file["path"]
            held = head(where)
            if held is None or not same(where, held, file["bytes"], file["sha256"]):
                raise CacheError(
                    f"{where} has changed since a worker put it" if held else f"{where} is gone",
                    fix="run the same line again",
                )

    def leave(self, staged: Any) -> None:
        """Nothing: there is no folder of a worker's own."""

    def names(self, below: str, apart: Collection[str] = ()) -> Iterator[str]:
        """Names below a folder of all files but those in the folders `apart`."""
        for name, _ in files_below(self.path / below):
            if not any(name.startswith(folder + "/") for folder in apart):
                yield name

    def log(self, line: str) -> None:
        """Add a line to this run's log, which is put anew now and then."""
        self._lines.append(line)
        if time.monotonic() - self._log_time > _LOG_EVERY:
            self._put_log()

    def close(self) -> None:
        """Give the lock back, and put the log."""
        # What ends the run is told by whoever ends it; a server that is down is asked once.
        with suppress(MilanError):
            self._lease.close()
            self._put_log()
        self._made_in.cleanup()

    def _put_log(self) -> None:
        self._log_time = time.monotonic()
        if self._lines:
            text = "".join(line + "\n" for line in self._lines)
            self._logged = put(self._log, text.encode(), over=self._logged)
