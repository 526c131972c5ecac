"""Atomic writes of small files, and the lock of a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk without room, or of a file that may not grow."""
_DIGEST = "digest"
_REFUSED = {
    errno.EACCES: "leave to write there (chmod, chown), or --out another folder",
    errno.EPERM: "leave to write there (chmod, chattr), or --out another folder",
    errno.EIO: "look at the disk (dmesg); then the same line goes on",
}


def ensure_writable(folder: Path) -> None:
    """Make a folder and check that files can be written in it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def lock_folder(folder: Path) -> Any:
    """Lock a folder, by a file in it. Returns and raises as lock_file does."""
    return lock_file(folder / ".lock")


def lock_file(path: Path) -> Any:
    """Lock a file until the result is closed or this process ends: the kernel frees it (flock).

    The file is made if it is not there. Raises BlockingIOError, whose text names the owner, if
    another process has the lock; OSError if the file cannot be opened, or the file system has no
    locks.
    """
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(owner) from None
        if is_open_file(file.fileno(), path):
            break
        file.close()  # its owner removed the folder meanwhile: this was the lock of nothing
    with suppress(OSError):  # on a full disk the lock is as good without its owner's name
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def is_open_file(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: readers see the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_with_digest(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with the digest that `read_with_digest` compares."""
    content = json.loads(json.dumps(value))
    content.pop(_DIGEST, None)
    write_json(path, content | {_DIGEST: digest_of(content)})


def read_with_digest(path: Path, parts: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A JSON object that `write_with_digest` wrote, or one from before it had digests.

    `parts` are the keys that it must have, with their types. Raises ValueError, whose text says
    what is wrong with it, and OSError if it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("it is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    stated = content.pop(_DIGEST, None)
    if stated is not None and stated != digest_of(content):
        raise ValueError("it is not what was written: its digest differs")
    for name, kind in parts.items():
        if name not in content or not isinstance(content[name], kind):
            raise ValueError(f"it has no usable {name!r}")
    return content


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
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


def cannot_write(folder: Path, error: OSError) -> tuple[str, str] | None:
    """(what is wrong, what to do) if an error says that files in `folder` cannot be written.

    None for an error of something else.
    """
    why, name = error.strerror or str(error), error.filename
    named = isinstance(name, str | os.PathLike)
    inside = named and _is_inside(Path(name), folder)
    if error.errno in (*FULL, errno.EROFS):  # of nothing but writing
        fix = "free some space: the same line goes on"
        if error.errno == errno.EROFS:
            fix = "--out a folder on a disk that can be written"
        return f"{name if named and not inside else folder} cannot be written: {why}", fix
    if not inside:
        return None
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE) and not folder.exists():
        gone = f"{folder} was deleted or moved while this command wrote there"
        return gone, "put it back and run the same line again, or begin in another folder"
    if error.errno in _REFUSED:
        return f"{name} cannot be written: {why}", _REFUSED[error.errno]
    return None


def _is_inside(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())
