"""Files that are there whole or not at all, folders that keep their renames, and the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milan.errors import CacheError
from milan.files import sync_folder


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
def told_if_full(doing: str) -> Iterator[None]:
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


def holds(path: Path, data: bytes) -> bool:
    """Whether the file is there with just this content."""
    return path.exists() and path.read_bytes() == data


def take_lock(path: Path) -> Any:
    """The lock of the store at `path`, held as long as this process lives (flock).

    The kernel frees it. Raises CacheError, naming the holder, if another process has it.
    """
    file = open(path / ".lock", "a+")  # noqa: SIM115 - held, not read
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CacheError(
            f"{path} is in use by {holder}", expected="one extraction at a time into a store",
            fix="wait for it, or stop it and run this line again",
        ) from None  # fmt: skip
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
