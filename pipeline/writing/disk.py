"""The place of a store on a disk: files that are there whole or not at all, renames, the lock."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milan.core.atomic import lock_folder, sync_folder
from milan.errors import CacheError
from milan.store.format import GENERATION, GENERATIONS, LOG

STAGING = ".staging"


class Disk:
    """A store's folder, for the one driver that holds its lock.

    pipeline.writing.bucket.Bucket has the same methods.
    """

    def __init__(self, store: Path, run: str) -> None:
        """Raises CacheError: no store, a run that holds it, a place that cannot be written."""
        self.path = store
        # os.path: where a parent may not be searched, pathlib raises instead of answering.
        if os.path.exists(store) and not store.is_dir():
            raise CacheError(f"{store} is a file", expected="a folder for the store", fix="--out …")
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
            raise CacheError(
                f"{store} cannot be written: {error.strerror}", fix="--out a folder of your own"
            ) from None
        # Absolute: a worker on a cluster that was there before has another working folder.
        self.staging = store.absolute() / STAGING / run
        # We hold the lock, so every other run's staging belongs to the dead.
        shutil.rmtree(store / STAGING, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def read(self, name: str) -> bytes | None:
        """A file; None if there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        folder = (self.path / name).parent
        if not folder.exists():
            folder.mkdir()
        write_whole(self.path / name, data, aside=self.staging)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)
        sync_folder((self.path / name).parent)

    def clear(self, generation: str, files: Collection[str]) -> None:
        """Nothing: what is left of shards that are to be made is replaced by renames."""

    def adopt(self, fresh: Path, name: str) -> None:
        """Rename a generation that was made in staging into its place."""
        root = self.path / name
        shutil.rmtree(root, ignore_errors=True)
        (fresh / "records").mkdir()
        for folder, _, names in os.walk(fresh):
            for file in names:
                with open(Path(folder, file), "rb") as opened:
                    os.fsync(opened.fileno())
            sync_folder(Path(folder))
        os.replace(fresh, root)
        sync_folder(root.parent)

    def stage(self, generation: str, attempt: str, arrays: Iterable[str]) -> Path:
        """A private folder for a worker's shards, with the metadata of the arrays."""
        root = self.path / generation
        folder = self.staging / f"{root.name}.{attempt}"
        for name in arrays:
            (folder / name).mkdir(parents=True)
            shutil.copyfile(root / name / "zarr.json", folder / name / "zarr.json")
        return folder

    def take(self, staged: Any, generation: str, files: list[dict]) -> None:
        """Rename the files of a shard that a worker staged into their places."""
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

    def leave(self, staged: Any) -> None:
        """Drop a worker's folder."""
        shutil.rmtree(staged, ignore_errors=True)

    def names(self, below: str, apart: Collection[str] = ()) -> Iterator[str]:
        """Names below a folder of all files but those in the folders `apart`."""
        root = self.path / below
        left_out = {root / folder for folder in apart}
        for folder, folders, names in os.walk(root):
            here = Path(folder)
            folders[:] = [f for f in folders if here / f not in left_out]
            yield from ((here / name).relative_to(root).as_posix() for name in names)

    def log(self, line: str) -> None:
        """Append a line to the log."""
        with open(self.path / LOG, "a") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Drop this run's staging and the lock."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        self._lock.close()


def _is_store(path: Path) -> bool:
    # A store killed at birth holds only its lock and its staging.
    names = {entry.name for entry in path.iterdir()}
    return (path / GENERATION / "zarr.json").exists() or names <= {
        ".lock", STAGING, "zarr.json", GENERATIONS, LOG
    }  # fmt: skip


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
def as_full_disk_error(doing: str) -> Iterator[None]:
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
