"""The process of a command: encodings, the limit on open files, and errors of the system."""

from __future__ import annotations

import errno
import os
import resource
import sys
from contextlib import suppress

_OPEN_FILES = 1 << 16  # what is asked for where the system sets no limit
_FIXES = {
    errno.EMFILE: "ulimit -n 4096, or a smaller --num-workers",
    errno.ENFILE: "end other programs: this machine has too many files open",
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EROFS: "a folder that can be written",
    errno.EACCES: "a file or folder that this user may use",
    errno.EPERM: "a file or folder that this user may use",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ENOMEM: "a smaller --num-workers or --batch-size, or a machine with more memory",
}


def prepare_process() -> None:
    """Read and write names as UTF-8, print what the terminal cannot show by its number, and allow
    as many open files as the system does. May start the command anew."""
    _use_utf8()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS states no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _use_utf8() -> None:
    """Start anew in Python's UTF-8 mode if this locale gives names of files another encoding.

    Stores name images in UTF-8: the same folder must have the same names in every shell.
    """
    if sys.getfilesystemencoding().lower() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def explain(error: OSError) -> str:
    """One line for an error of the system: what it is about, what is wrong, what to do."""
    why = error.strerror or str(error) or type(error).__name__
    what = f"{error.filename}: {why}" if error.filename is not None else why
    fix = _FIXES.get(error.errno or 0, "")
    if error.errno == errno.EMFILE:
        what += f" ({resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are allowed)"
    if "temporary directory" in why:
        fix = "TMPDIR=a folder that can be written"
    return f"{what}; try: {fix}" if fix else what
