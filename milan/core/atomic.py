"""Atomic writes of small files, and the lock of a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any


def ensure_writable(folder: Path) -> None:
    """Make a folder and check that files can be written in it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def lock_folder(folder: Path) -> Any:
    """Lock a folder until the result is closed or this process ends: the kernel frees it (flock).

    Raises BlockingIOError, whose text names the owner, if another process has the lock.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - open as long as the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(owner) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: readers see the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
