"""Stores in a bucket: there are no renames, so every object is put whole and only once.

    worker   BucketLocation.upload   shard files, staged on the worker's disk -> one PUT each
    driver   Bucket.commit_files     does each object have the content that the worker stated?
    driver   Bucket.write            the record; at the end the tables, and the index last

A shard's objects are put only where there is none, and never replaced: what has a record stays as
it is, whatever the workers of a killed run may still do. Objects that a killed run left without a
record are removed by the next driver, which holds the lock, before it begins.

Implements Location and Backend of pipeline.writing.backend, where each method is described.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from milan.core.paths import AnyPath, Url, files_below, names_in
from milan.errors import CacheError, DataError, MilanError
from milan.store.format import CHECK, GENERATION, GENERATIONS, INDEX, LOGS
from pipeline.writing.lease import Lease, check_conditions
from pipeline.writing.s3 import delete, get, has_content, head, put

_REQUESTS = 16  # at once
_LOG_EVERY = 30.0  # seconds between two PUTs of the log


@dataclass(frozen=True)
class BucketLocation:
    """A prefix of an S3 bucket."""

    path: Url
    has_folders = False
    scratch_is_on_store = False

    def open(self, run: str) -> Bucket:
        """Lock the prefix."""
        return Bucket(self.path, run)

    def check(self) -> None:
        """Put an object on conditions, and remove it."""
        probe = self.path / f"{CHECK}{uuid.uuid4().hex}"
        put(probe, b"x", over=None)
        try:
            check_conditions(self.path, probe, b"xy")
        finally:
            delete(probe)

    def free_bytes(self) -> None:
        """None: a bucket has no limit."""

    def scratch_parent(self) -> Path:
        """$TMPDIR, where workers stage."""
        return Path(tempfile.gettempdir())

    def shard_folder(self) -> AbstractContextManager[Path]:
        """A temporary folder on this machine ($TMPDIR)."""
        return _temporary_folder()

    def upload(self, folder: Path, files: Iterable[dict]) -> None:
        """Put the files under their final names. Raises FileExistsError.

        That is for an object with other bytes: of another attempt on another kind of device, or of
        a later run, if this worker's own run was killed. The attempt counts as failed.
        """
        for file in files:
            where = self.path / file["path"]
            if put(where, (folder / file["path"]).read_bytes(), over=None) is None:
                raise FileExistsError(f"{where} is there already, with other bytes")

    def relative_root(self, root: AnyPath) -> None:
        """None: a bucket has no disk beside it."""


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="milan-shard-") as name:
        yield Path(name)


class Bucket:
    """A locked prefix."""

    def __init__(self, store: Url, run: str) -> None:
        """Take the lock. Raises CacheError: other content, or locked; DataError if S3 refuses."""
        self.path = store
        if store.is_file():
            raise CacheError(f"{store} is an object", expected="a folder for the store",
                             fix="--out …")  # fmt: skip
        present = set(names_in(store)) - {""}
        checks = {name for name in present if name.startswith(CHECK)}
        names = present - checks
        ours = {".lock", "zarr.json", GENERATIONS, LOGS}
        finished = {INDEX, GENERATIONS} <= names
        if not (names <= ours or finished or head(store / GENERATION / "zarr.json")):
            raise CacheError(
                f"{store} is a folder with other content", expected="a new or empty folder",
                fix="--out another.zarr",
            )  # fmt: skip
        self._lease = Lease(store, run)
        try:
            for name in checks:  # of runs that were killed
                delete(store / name)
        except DataError:
            self._lease.close()
            raise
        self._temporary = tempfile.TemporaryDirectory(prefix="milan-store-")
        self.staging = Path(self._temporary.name)
        self._etags: dict[str, str | None] = {}  # of the files read or written; None: no file
        self._log_lines: list[str] = []
        self._log_url = store / LOGS / f"{run}.jsonl"
        self._log_etag: str | None = None
        self._log_time = time.monotonic()

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none. `write` then replaces only this one."""
        answer = get(self.path / name)
        self._etags[name] = answer[1].etag if answer else None
        return answer[0] if answer else None

    def write(self, name: str, data: bytes) -> None:
        """Put an object over the one that was read, or where there is none."""
        self._lease.check()
        etag = put(self.path / name, data, over=self._etags.get(name))
        if etag is None:
            raise CacheError(
                f"{self.path / name} was changed by another process",
                expected="one extraction at a time into a store",
                fix="run the same line again",
            )
        if name in self._etags:
            self._etags[name] = etag

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""
        self._lease.check()
        delete(self.path / name)
        self._etags.pop(name, None)

    def clear(self, generation: str, files: Collection[str]) -> None:
        """Remove the leftovers: no PUT of a shard replaces an object."""
        existing = {name for name, _ in files_below(self.path / generation)}
        for name in files:
            if name in existing:
                self.remove(f"{generation}/{name}")

    def add_generation(self, folder: Path, name: str) -> None:
        """Put the files one by one; the zarr.json of the group, which makes it count, last."""
        for leftover in list(self.file_names(name)):
            self.remove(f"{name}/{leftover}")
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        for file in sorted(files, key=lambda file: (file == "zarr.json", file)):
            self.write(f"{name}/{file}", (folder / file).read_bytes())
        shutil.rmtree(folder)

    def remove_generation(self, name: str) -> None:
        """Object by object, some at a time."""
        with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="remove") as pool:
            for _ in pool.map(self.remove, [f"{name}/{file}" for file in self.file_names(name)]):
                pass

    def staging_folder(self, generation: str, attempt: str) -> Url:
        """The generation itself: workers put their shards under their final names."""
        return self.path / generation

    def commit_files(self, folder: AnyPath, generation: str, files: list[dict]) -> None:
        """Check that the objects exist, with the content that the worker stated."""
        self._lease.check()
        for file in files:
            where = self.path / generation / file["path"]
            info = head(where)
            if info is None or not has_content(where, info, file["bytes"], file["sha256"]):
                raise CacheError(
                    f"{where} has changed since a worker put it" if info else f"{where} is gone",
                    fix="run the same line again",
                )

    def drop_staging(self, folder: AnyPath) -> None:
        """Nothing: a worker has no folder of its own."""

    def file_names(self, folder: str, skip: Collection[str] = ()) -> Iterator[str]:
        """Names of all objects below a folder but those in its folders `skip`."""
        for name, _ in files_below(self.path / folder):
            if not any(name.startswith(skipped + "/") for skipped in skip):
                yield name

    def log(self, line: str) -> None:
        """Add a line to this run's log, an object that is put again now and then."""
        self._log_lines.append(line)
        if time.monotonic() - self._log_time > _LOG_EVERY:
            self._put_log()

    def close(self) -> None:
        """Release the lock, and put the log."""
        # The error that ends the run is reported by its caller; a server that is down is asked once
        # more, not waited for.
        with suppress(MilanError):
            self._lease.close()
            self._put_log()
        self._temporary.cleanup()

    def _put_log(self) -> None:
        self._log_time = time.monotonic()
        if self._log_lines:
            text = "".join(line + "\n" for line in self._log_lines)
            self._log_etag = put(self._log_url, text.encode(), over=self._log_etag)
