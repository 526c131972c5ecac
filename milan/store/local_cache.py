"""The local cache: whole shards copied from a slow disk to a fast one as they are needed.

    DIR/lock                        locked while room is made
    DIR/<digest of a generation>/   laid out as the generation itself: arrays open below it
        features/zarr.json features/c/42/1/0/0 ...
        shards/42.1                 marker: shard (block 42, view 1) is here, whole and verified. An
                                    empty file, as long as the shard's bytes (sparse); its
                                    modification time is the shard's last use
        shards/42.1.part            the same while a process copies the shard; that process locks it

The files are the only state, so loader workers, runs and later runs share the folder, and any of
them may be killed at any time. The process that needs a shard copies it; others wait for its lock.
milan.data.prefetch copies the shards of the next window early. The least recently used shards are
evicted first; a reader whose shard is evicted while it reads copies it again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from milan.core.atomic import is_open_file
from milan.core.paths import AnyPath, pieces_of
from milan.core.retry import fix_for, passes
from milan.core.waiting import Wait
from milan.errors import CacheError

_LIMIT = 15 * 60.0  # seconds in which another process has to copy a shard
RETRY_SECONDS = 0.1
"""Pause before room for a shard is looked for again."""


class File(NamedTuple):
    """A file of a shard, as its record lists it."""

    path: str
    """Below the generation's folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LocalCopies:
    """The local copies of one generation; at most `limit` bytes of shards below `folder`."""

    source: AnyPath
    """The generation's folder on the slow disk, or in an object store."""
    folder: Path
    """Shared by all generations, stores and runs that name it."""
    digest: str
    """Of the generation."""
    limit: int
    """Bytes."""

    @property
    def root(self) -> Path:
        """The folder that the generation's arrays are opened below."""
        return self.folder / self.digest[:16]

    def prepare(self, arrays: Iterable[str], read_verified: Callable[[str], bytes]) -> None:
        """Make the folder and write the metadata of each array. Raises CacheError."""
        with _as_cache_error(self.folder):
            (self.root / "shards").mkdir(parents=True, exist_ok=True)
            for name in arrays:
                (self.root / name).mkdir(exist_ok=True)
                temporary = self.root / name / f".zarr.json.{os.getpid()}"
                temporary.write_bytes(read_verified(f"{name}/zarr.json"))
                os.replace(temporary, self.root / name / "zarr.json")

    def marker(self, block: int, view: int) -> Path:
        """The file whose presence means that a shard is here."""
        return self.root / "shards" / f"{block}.{view}"

    def has(self, block: int, view: int) -> bool:
        """Whether a shard is here; if so, it is marked as used now."""
        try:
            os.utime(self.marker(block, view))
        except FileNotFoundError:
            return False
        return True

    def fetch(
        self,
        block: int,
        view: int,
        files: Collection[File],
        *,
        protected: Collection[Path] | None = None,
    ) -> bool:
        """Have a shard here: copy it, or wait for the process that is copying it.

        With `protected`, shards with these markers are not evicted to make room; the result is
        False if there is no room without that. Raises CacheError: a file that differs from its
        record, a full disk, a limit smaller than one shard.
        """
        marker = self.marker(block, view)
        part = marker.with_name(marker.name + ".part")
        size = sum(file.bytes for file in files)
        with _as_cache_error(self.folder):
            while not self.has(block, view):
                with open(part, "ab") as lock:
                    _lock(lock, part)
                    if not is_open_file(lock.fileno(), part):
                        continue  # the process that had the lock removed the file: look again
                    if self.has(block, view):
                        part.unlink()
                        break
                    if not self._make_room(lock.fileno(), size, protected):
                        part.unlink()
                        if protected is not None:
                            return False
                        time.sleep(RETRY_SECONDS)  # others are copying
                        continue
                    try:
                        for file in files:
                            self._copy(file)
                    except BaseException:
                        part.unlink()
                        raise
                    with open(self.folder / "lock", "ab") as room:
                        _lock(room, self.folder / "lock")  # who counts sees one name or the other
                        os.rename(part, marker)
        return True

    def _copy(self, file: File) -> None:
        target = self.root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        temporary = target.with_name(target.name + ".part")
        with open(temporary, "wb") as copy:
            for piece in pieces_of(self.source / file.path):
                copy.write(piece)
                digest.update(piece)
                size += len(piece)
            copy.flush()
            os.fsync(copy.fileno())
        if (size, digest.hexdigest()) != (file.bytes, file.sha256):
            temporary.unlink()
            raise CacheError(
                f"{self.source / file.path} is damaged: {size:,} bytes arrived",
                expected=f"the {file.bytes:,} bytes and the SHA-256 of its record",
                fix=f"milan repair {self.source.parent.parent}",
            )
        os.replace(temporary, target)

    def _make_room(self, part: int, size: int, protected: Collection[Path] | None) -> bool:
        """Evict until `size` more bytes fit and reserve them; False if they cannot fit.

        `part` is the open part file: its length is the reservation.
        """
        if size > self.limit:
            raise CacheError(
                f"a shard of {size:,} bytes does not fit a cache limit of {self.limit:,}",
                fix="a larger --cache-limit",
            )
        with open(self.folder / "lock", "ab") as lock:
            _lock(lock, self.folder / "lock")
            used, evictable = 0, []
            for entry in self.folder.glob("*/shards/*"):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue  # a part that was just completed or abandoned
                if entry.suffix == ".part" and stat.st_size and _abandoned(entry):
                    continue
                used += stat.st_size
                if entry.suffix != ".part" and (protected is None or entry not in protected):
                    evictable.append((stat.st_mtime_ns, entry, stat.st_size))
            free = sum(bytes for _, _, bytes in evictable)
            if used - free + size > self.limit:
                return False
            for _, entry, bytes in sorted(evictable):
                if used + size <= self.limit:
                    break
                _evict(entry)
                used -= bytes
            os.truncate(part, size)
        return True


def _lock(file: IO[bytes], path: Path) -> None:
    """Lock an open file, once nobody else has it. Raises CacheError at the limit."""
    pause, wait = (
        0.001,
        Wait(
            f"the process that locks {path}, which copies a shard or makes room",
            limit=_LIMIT,
            fix=f"`fuser {path}` names it; end it, or --local another folder",
            error=CacheError,
        ),
    )
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            wait.check()
            time.sleep(pause)
            pause = min(0.1, 2 * pause)


def _evict(entry: Path) -> None:
    """Remove a shard: its marker first, then its files."""
    entry.unlink(missing_ok=True)
    block, view = entry.name.split(".")[:2]
    for folder in entry.parent.parent.glob(f"*/c/{block}/{view}"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def _abandoned(part: Path) -> bool:
    """Whether the copying process has exited, which frees its lock; if so, remove what it left."""
    try:
        lock = open(part, "rb+")  # noqa: SIM115 - never made here: it may be whole meanwhile
    except FileNotFoundError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not is_open_file(lock.fileno(), part):
            return False  # its copy was completed, or given up, before we had the lock
        _evict(part)
    return True


@contextmanager
def _as_cache_error(folder: Path) -> Iterator[None]:
    """An OSError inside becomes a CacheError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        fix = "a smaller --cache-limit" if full else "--local a folder of your own"
        raise CacheError(
            f"shards cannot be copied to {folder}: {error}",
            fix=fix if full or denied or not passes(error) else fix_for(error),
        ) from None
