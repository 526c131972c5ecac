"""Whole shards of a store, copied from a slow disk to a local one as they are needed.

    DIR/lock                        held while room is made
    DIR/<digest of a generation>/   laid out as the generation itself: arrays open below it
        features/zarr.json features/c/42/1/0/0 ...
        shards/42.1                 the shard is here, whole and checked: an empty file, as long as
                                    the shard's bytes (sparse), of the time of its last use
        shards/42.1.part            the same while one process copies it, and holds its lock

What is here is told by the files alone, so loader workers, runs and later runs share it, and any of
them may be killed at any time. Who needs a shard copies it, the others wait at its lock; `Ahead` is
one more that needs the shards of the next window. Room is made by evicting what was not used for
longest; a reader whose shard is evicted under it fetches it again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

from milan.core.paths import AnyPath, pieces_of
from milan.errors import CacheError, MilanError

if TYPE_CHECKING:
    from milan.store.generation import Generation

_PAUSE = 0.1  # seconds between two looks for room


Shard = tuple["Generation", int, int]
"""(generation, block, view)"""


class File(NamedTuple):
    """A file of a shard, as its record proves it."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LocalCopies:
    """The local copies of one generation; `limit` bytes hold for everything below `folder`."""

    source: AnyPath
    """The generation's folder on the slow disk, or in an object store."""
    folder: Path
    digest: str
    limit: int

    @property
    def root(self) -> Path:
        """Where the arrays of the generation open."""
        return self.folder / self.digest[:16]

    def prepare(self, arrays: Iterable[str], read_verified: Callable[[str], bytes]) -> None:
        """Make the folder, with the metadata of each array. Raises CacheError."""
        with _told(self.folder):
            (self.root / "shards").mkdir(parents=True, exist_ok=True)
            for name in arrays:
                (self.root / name).mkdir(exist_ok=True)
                fresh = self.root / name / f".zarr.json.{os.getpid()}"
                fresh.write_bytes(read_verified(f"{name}/zarr.json"))
                os.replace(fresh, self.root / name / "zarr.json")

    def marker(self, block: int, view: int) -> Path:
        """The file that says that a shard is here."""
        return self.root / "shards" / f"{block}.{view}"

    def has(self, block: int, view: int) -> bool:
        """Whether a shard is here; if so it counts as used now."""
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
        kept: Collection[Path] | None = None,
    ) -> bool:
        """Have a shard here, by copying it or by waiting for the process that does.

        With `kept` no shard among these is evicted for it: False if there is no room then. Raises
        CacheError: a file that is not what its record says, a full disk, a limit far too small.
        """
        here = self.marker(block, view)
        part = here.with_name(here.name + ".part")
        size = sum(file.bytes for file in files)
        with _told(self.folder):
            while not self.has(block, view):
                with open(part, "a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not _same(lock.fileno(), part):
                        continue  # whoever held it is done with it: look again
                    if self.has(block, view):
                        part.unlink()
                        break
                    if not self._make_room(lock.fileno(), size, kept):
                        part.unlink()
                        if kept is not None:
                            return False
                        time.sleep(_PAUSE)  # others are copying
                        continue
                    try:
                        for file in files:
                            self._copy(file)
                    except BaseException:
                        part.unlink()
                        raise
                    os.rename(part, here)
        return True

    def _copy(self, file: File) -> None:
        target = self.root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        fresh = target.with_name(target.name + ".part")
        with open(fresh, "wb") as copy:
            for piece in pieces_of(self.source / file.path):
                copy.write(piece)
                digest.update(piece)
                size += len(piece)
            copy.flush()
            os.fsync(copy.fileno())
        if (size, digest.hexdigest()) != (file.bytes, file.sha256):
            fresh.unlink()
            raise CacheError(
                f"{self.source / file.path} is damaged: {size:,} bytes arrived",
                expected=f"the {file.bytes:,} bytes and the SHA-256 of its record",
                fix=f"milan repair {self.source.parent.parent}",
            )
        os.replace(fresh, target)

    def _make_room(self, part: int, size: int, kept: Collection[Path] | None) -> bool:
        """Evict until `size` more bytes fit, and take them; False if that cannot be."""
        if size > self.limit:
            raise CacheError(
                f"a shard of {size:,} bytes does not fit a cache limit of {self.limit:,}",
                fix="a larger --cache-limit",
            )
        with open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            used, evictable = 0, []
            for entry in self.folder.glob("*/shards/*"):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue  # a part that has just become whole, or was given up
                if entry.suffix == ".part" and stat.st_size and _abandoned(entry):
                    continue
                used += stat.st_size
                if entry.suffix != ".part" and (kept is None or entry not in kept):
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


def _evict(entry: Path) -> None:
    """Remove a shard: first what says that it is here, then its files."""
    entry.unlink(missing_ok=True)
    block, view = entry.name.split(".")[:2]
    for folder in entry.parent.parent.glob(f"*/c/{block}/{view}"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Whether the process that copied it is dead, its lock free again; if so, remove its traces."""
    with open(part, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _evict(part)
    return True


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CacheError(
            f"shards cannot be copied to {folder}: {error}",
            fix="a smaller --cache-limit" if full else "--local a folder of your own",
        ) from None


class Prefetcher(Thread):
    """Fetches the shards of the window in use and of the next one, before they are asked for.

    `windows` gives (batches consumed when the window is over, its shards) in order; `consumed` is
    set by the run. What cannot be fetched is left to the loader worker that needs it, which then
    says why.
    """

    def __init__(self, windows: Iterator[tuple[int, list[Shard]]]) -> None:
        super().__init__(daemon=True)
        self.windows, self.consumed, self.stopped = windows, 0, Event()

    def run(self) -> None:
        """Until the windows end, something fails, or `stopped`."""
        held: deque[tuple[int, set[Path]]] = deque()
        try:
            for end, shards in self.windows:
                held.append((end, {g.local.marker(b, v) for g, b, v in shards if g.local}))
                while len(held) > 2 and self._wait(held):
                    pass
                for generation, block, view in shards:
                    kept = set().union(*(places for _, places in held))
                    while not generation.fetch(block, view, kept=kept) and self._wait(held):
                        kept = set().union(*(places for _, places in held))
                    if self.stopped.is_set():
                        return
        except MilanError:
            return

    def _wait(self, held: deque[tuple[int, set[Path]]]) -> bool:
        """Wait a little, let go of the windows that are behind; False once `stopped`."""
        stopped = self.stopped.wait(_PAUSE)
        while len(held) > 1 and held[0][0] <= self.consumed:
            held.popleft()
        return not stopped
