"""Stores on a disk: workers stage shards in private folders, the driver renames them into place.

Implements Location and Backend of pipeline.writing.backend, where each method is described.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from milan.core.atomic import cannot_write, lock_folder, sync_folder
from milan.core.paths import AnyPath
from milan.errors import CacheError
from milan.store.format import CHECK, GENERATION, GENERATIONS, INDEX, LOG

STAGING = ".staging"


@dataclass(frozen=True)
class DiskLocation:
    """A folder of this machine, or of a disk that all machines share."""

    path: Path
    has_folders = True
    scratch_is_on_store = True

    def open(self, run: str) -> Disk:
        """Lock the folder, which is made if need be."""
        return Disk(self.path, run)

    def check(self) -> None:
        """Write, force, rename and lock a file beside where the store will be; leaves nothing."""
        if os.path.isfile(self.path):
            raise _is_a_file(self.path)
        try:
            if any(os.path.isfile(folder) for folder in self.path.absolute().parents):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            with tempfile.TemporaryDirectory(prefix=CHECK, dir=self.scratch_parent()) as name:
                folder = Path(name)
                write_whole(folder / "index", b"x", temporary_folder=folder)
                lock_folder(folder).close()
        except OSError as error:
            raise _not_writable(self.path, error) from None

    def free_bytes(self) -> int | None:
        """Of the file system; None for one without a size, which is no disk."""
        usage = shutil.disk_usage(self.scratch_parent())
        return usage.free if usage.total else None

    def scratch_parent(self) -> Path:
        """The folder itself, or the nearest of its parents that exists."""
        folder = self.path.absolute()
        # os.path: where a parent may not be searched, pathlib raises instead of answering.
        while not os.path.isdir(folder):
            folder = folder.parent
        return folder

    def shard_folder(self) -> AbstractContextManager[Path]:
        """The staging folder itself."""
        return nullcontext(self.path)

    def upload(self, folder: Path, files: Iterable[dict]) -> None:
        """Nothing: the driver renames what lies here."""

    def relative_root(self, root: AnyPath) -> str | None:
        """Of images on a disk."""
        return os.path.relpath(root, self.path.resolve()) if isinstance(root, Path) else None


class Disk:
    """A locked folder."""

    def __init__(self, store: Path, run: str) -> None:
        """Take the lock. Raises CacheError: other content, locked, or not writable."""
        self.path = store
        if os.path.exists(store) and not store.is_dir():
            raise _is_a_file(store)
        if os.path.isdir(store) and any(store.iterdir()) and not _is_store(store):
            raise CacheError(
                f"{store} is a folder with other content", expected="a new or empty folder",
                fix="--out another.zarr",
            )  # fmt: skip
        try:
            store.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(store)
        except BlockingIOError as holder:
            raise CacheError(
                f"{store} is in use by {holder}",
                expected="one extraction at a time into a store",
                fix="wait for it, or stop it and run this line again",
            ) from None
        except OSError as error:
            raise _not_writable(store, error) from None
        # Absolute: the workers of a cluster have other working directories.
        self.staging = store.absolute() / STAGING / run
        # We hold the lock, so these were left by runs that were killed.
        for left in (store / STAGING, *store.glob(f"{CHECK}*")):
            shutil.rmtree(left, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file by a rename."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / name, data, temporary_folder=self.staging)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        (self.path / name).unlink(missing_ok=True)
        sync_folder((self.path / name).parent)

    def clear(self, generation: str, files: Collection[str]) -> None:
        """Nothing: renames replace leftovers."""

    def add_generation(self, folder: Path, name: str) -> None:
        """Rename the folder, once everything in it is on the disk."""
        root = self.path / name
        shutil.rmtree(root, ignore_errors=True)
        (folder / "records").mkdir()
        for inner, _, names in os.walk(folder):
            for file in names:
                with open(Path(inner, file), "rb") as opened:
                    os.fsync(opened.fileno())
            sync_folder(Path(inner))
        root.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, root)
        sync_folder(root.parent)

    def remove_generation(self, name: str) -> None:
        """By a rename into staging, which the next run would empty."""
        os.replace(self.path / name, self.staging / f"{Path(name).name}.pruned")
        sync_folder((self.path / name).parent)
        shutil.rmtree(self.staging / f"{Path(name).name}.pruned")

    def staging_folder(self, generation: str, attempt: str) -> Path:
        """A private folder."""
        folder = self.staging / f"{Path(generation).name}.{attempt}"
        folder.mkdir(parents=True)
        return folder

    def commit_files(self, folder: AnyPath, generation: str, files: list[dict]) -> None:
        """Rename the staged files, once all have the sizes that the worker stated."""
        staged = Path(str(folder))
        for file in files:
            if (staged / file["path"]).stat().st_size != file["bytes"]:
                raise CacheError(f"staged file {staged / file['path']} has changed since staging")
        for file in files:
            target = self.path / generation / file["path"]
            if not target.parent.exists():
                target.parent.mkdir(parents=True)
                sync_folder(target.parent.parent)
            os.replace(staged / file["path"], target)
            sync_folder(target.parent)

    def drop_staging(self, folder: AnyPath) -> None:
        """Remove a worker's folder."""
        shutil.rmtree(str(folder), ignore_errors=True)

    def file_names(self, folder: str, skip: Collection[str] = ()) -> Iterator[str]:
        """Names of all files in a folder but those in its folders `skip`."""
        root = self.path / folder
        skipped = {root / name for name in skip}
        for inner, folders, names in os.walk(root):
            folders[:] = [f for f in folders if Path(inner, f) not in skipped]
            yield from (Path(inner, name).relative_to(root).as_posix() for name in names)

    def log(self, line: str) -> None:
        """Append a line to the log."""
        with open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Remove this run's staging and release the lock."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        self._lock.close()


def _is_a_file(path: Path) -> CacheError:
    return CacheError(
        f"{path} is a file", expected="a folder for the store", fix="--out another.zarr"
    )


def _not_writable(store: Path, error: OSError) -> CacheError:
    return CacheError(
        f"{store} cannot be written: {error.strerror}", fix="--out a folder of your own"
    )


def _is_store(path: Path) -> bool:
    # A run that was killed right after its start leaves only its lock and its staging.
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(CHECK)}
    ours = {".lock", STAGING, "zarr.json", GENERATIONS, LOG}
    first = (path / GENERATION / "zarr.json").exists()  # it may be pruned
    return first or {INDEX, GENERATIONS} <= names or names <= ours


def write_whole(path: Path, data: bytes, *, temporary_folder: Path) -> None:
    """Write a file so that it exists whole or not at all, even after a power cut.

    `temporary_folder` is on the same file system, and the next run empties it.
    """
    temporary = temporary_folder / f"{path.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def as_store_error(folder: str | AnyPath) -> Iterator[None]:
    """Raise CacheError where `folder` cannot be written: what is committed stays.

    Any other OSError stays what it is.
    """
    try:
        yield
    except OSError as error:
        reason = cannot_write(Path(str(folder)), error)
        if reason is None:
            raise
        expected = "a disk that takes the store; what is committed stays"
        raise CacheError(reason[0], expected=expected, fix=reason[1]) from None
