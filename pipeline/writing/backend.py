"""Where a store is written: what a disk and a bucket must both be able to do, and which is which.

    Location   of a path: needs no lock, any process may ask (driver, workers, dry run)
    Backend    of the one process that holds the store's lock (driver)

To add a backend, write both in a file of their own, name the location in `location_of`, and say in
milan.store.generation how tensorstore reads it. tests/writing/test_backend.py checks what is
promised here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from milan.core.paths import AnyPath, Url, as_path
from milan.core.units import format_bytes
from milan.errors import CacheError, ConfigError
from pipeline.writing.bucket import BucketLocation
from pipeline.writing.disk import DiskLocation


class Location(Protocol):
    """A path or URL where a store, or a folder inside one, is or will be."""

    @property
    def path(self) -> AnyPath:
        """The path or URL itself."""

    @property
    def has_folders(self) -> bool:
        """Whether files lie in folders; False: objects, each under its whole name."""

    def open(self, run: str) -> Backend:
        """Lock the store, or create an empty one, for the run of this name.

        Raises CacheError: the folder holds something else, another process has the lock, or the
        location cannot be written. DataError if a server does not answer.
        """

    def check(self) -> None:
        """Try what writing a store here takes, and remove it again.

        Raises CacheError where something fails, DataError if a server does not answer.
        """

    def free_bytes(self) -> int | None:
        """Bytes that can still be written there; None if no limit is known."""

    def scratch_parent(self) -> Path:
        """An existing local folder for files that are thrown away: on the store's own disk if it
        has one, else where workers stage their shards.
        """

    @property
    def scratch_is_on_store(self) -> bool:
        """Whether writing to `scratch_parent` is as fast as writing to the store."""

    def shard_folder(self) -> AbstractContextManager[Path]:
        """Worker: a local folder to write shard files to, this location being the staging folder.

        It is either this location itself, with the metadata of the arrays, or empty and temporary.
        """

    def upload(self, folder: Path, files: Iterable[dict]) -> None:
        """Worker: bring the `files` (path, bytes, sha256) of a shard from `shard_folder` here.

        Nothing that is there already is replaced. Raises FileExistsError for a file that is there
        with other bytes, DataError if a server does not answer.
        """

    def relative_root(self, root: AnyPath) -> str | None:
        """The path from the store to the images' root, so that both may move together.

        None if one of them does not move with the other.
        """


class Backend(Protocol):
    """A locked store: its files by name (POSIX, below the store), each whole or absent.

    Whoever is killed at any moment leaves whole files and staging, never part of a file. Every
    method raises CacheError if the lock was lost, before it changes anything.
    """

    @property
    def path(self) -> AnyPath:
        """The store's path or URL."""

    @property
    def staging(self) -> Path:
        """A private local folder of this run, for what is built before it is added."""

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file; it is durable on return.

        Raises CacheError if another process has changed the file since this one read or wrote it
        (where the backend can tell).
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    def clear(self, generation: str, files: Collection[str]) -> None:
        """Make sure that `files` (names below `generation`) can be committed: they are leftovers
        of killed runs.
        """

    def add_generation(self, folder: Path, name: str) -> None:
        """Move a generation that was built in `staging` to `name`; its zarr.json exists last.

        Leftovers of a killed run under this name are removed first.
        """

    def remove_generation(self, name: str) -> None:
        """Remove all files of a generation that no index lists; what a kill leaves is removed by
        the next call.
        """

    def staging_folder(self, generation: str, attempt: str) -> AnyPath:
        """The location where a worker stages the shards of one attempt at a block."""

    def commit_files(self, folder: AnyPath, generation: str, files: list[dict]) -> None:
        """Make the staged `files` (path, bytes, sha256) of a shard part of the generation.

        Raises CacheError if one is missing or is not as the worker described it.
        """

    def drop_staging(self, folder: AnyPath) -> None:
        """Remove a worker's staging folder with whatever is left in it."""

    def file_names(self, folder: str, skip: Collection[str] = ()) -> Iterator[str]:
        """Names, below `folder`, of all files in it but those in its folders `skip`; any order."""

    def log(self, line: str) -> None:
        """Append a line to the store's log; it may become durable only at `close`."""

    def close(self) -> None:
        """Remove staging and release the lock. Never raises because of a server that is down."""


def location_of(where: str | AnyPath) -> Location:
    """The location that a path or URL names. Raises ConfigError if no backend writes to it."""
    path = as_path(where)
    if not isinstance(path, Url):
        return DiskLocation(path)
    if path.text.startswith("s3://"):
        return BucketLocation(path)
    raise ConfigError(
        f"a store cannot be written to {where}", expected="a path, or a URL of s3://",
        fix="write to a disk, and copy the finished store with the server's own tool",
    )  # fmt: skip


def check_space(location: Location, needed: int, *, fix: str) -> None:
    """Raises CacheError if `needed` bytes and 2 % more are not free, where free space is known."""
    free = location.free_bytes()
    if free is not None and needed * 1.02 > free:
        raise CacheError(
            f"the store needs {format_bytes(needed)}, and the disk of {location.path} has "
            f"{format_bytes(free)} free",
            fix=fix,
        )


def open_backend(where: str | AnyPath, run: str) -> Backend:
    """Lock the store at a path or URL. Raises what Location.open raises, and ConfigError."""
    return location_of(where).open(run)
