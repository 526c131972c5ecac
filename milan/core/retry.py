"""Errors that pass: those of a disk, a network or this process, which say nothing about a file.

Whatever reads images or records tries again for a few seconds. An error that does not pass ends the
run with its name; it never makes an image or a shard bad.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

PAUSES: tuple[float, ...] = (0.05, 0.25, 1.0, 4.0)
"""Seconds between the tries."""

# What the system says about the file: it is absent, a folder, a link to itself, no file at all.
_OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
    errno.ENODEV, errno.EILSEQ,
}  # fmt: skip
SAME_LINE = "then the same line goes on"
_FIXES = {
    errno.EMFILE: f"ulimit -n 65536, or a smaller --num-workers; {SAME_LINE}",
    errno.ENFILE: f"fewer open files on this machine (sysctl fs.file-max); {SAME_LINE}",
    errno.ENOMEM: f"a smaller --num-workers, or more memory; {SAME_LINE}",
    errno.EACCES: f"leave to read it: chmod, or another user; {SAME_LINE}",
    errno.EPERM: f"leave to read it: chmod, or another user; {SAME_LINE}",
}
T = TypeVar("T")


def passes(error: BaseException) -> bool:
    """Whether an error is the machine's or the network's, and not about the file.

    An OSError without a number is what a library says of a file's content.
    """
    if isinstance(error, OSError):
        return bool(number_of(error)) and number_of(error) not in _OF_THE_FILE
    return isinstance(error, MemoryError)


def patiently(do: Callable[[], T]) -> T:
    """`do()`, tried again after each of PAUSES while its error is one that passes.

    Raises what `do` raises, in the end also an error that passes.
    """
    for pause in PAUSES:
        try:
            return do()
        except (OSError, MemoryError) as error:
            if not passes(error):
                raise
        time.sleep(pause)
    return do()


def number_of(error: OSError | MemoryError) -> int | None:
    """The errno of an error, also where a library left it out."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if error.errno is None:
        kinds = {PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
        kinds |= {ConnectionError: errno.ECONNRESET, BlockingIOError: errno.EAGAIN}
        return next((number for kind, number in kinds.items() if isinstance(error, kind)), None)
    return error.errno


def described(error: OSError | MemoryError) -> str:
    """An error with the name of its errno: `EMFILE (Too many open files)`."""
    number = number_of(error)
    text = getattr(error, "strerror", None) or str(error)
    if number is None:
        return text or type(error).__name__
    return f"{errno.errorcode.get(number, number)} ({text or os.strerror(number)})"


def fix_for(error: OSError | MemoryError) -> str:
    """What to type after an error that did not pass."""
    return _FIXES.get(number_of(error) or 0, "the same line, when the disk or server answers again")
