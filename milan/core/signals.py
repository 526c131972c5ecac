"""Stop signals: at SIGINT, SIGTERM and SIGUSR1 a process finishes its current step, then ends.

Also child processes: which signals they get, and that they end with their parent.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import ModuleType
from typing import Any

ONE_PRESS = 0.5
"""Seconds within which two SIGINTs count as one."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75
"""Exit code of a run that was stopped and can go on (EX_TEMPFAIL): a scheduler requeues it."""
_LIBRARY = "a fault in a library's compiled code, or in a driver; memory was not the cause"
_CAUSES = {
    "SIGKILL": "memory that is full (the kernel then kills a process), or somebody's kill -9",
    "SIGBUS": "a mapped file that lost its bytes: shared memory, or the disk of a file, is full",
    "SIGTERM": "somebody's kill, or a scheduler",
    "SIGXCPU": "the limit on processor time (ulimit -t)",
    "SIGXFSZ": "the limit on the size of files (ulimit -f)",
    **dict.fromkeys(("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE", "SIGSYS"), _LIBRARY),
}


class Stop:
    """Whether this process was asked to stop, and by which signal; and what is kept if it does."""

    def __init__(self) -> None:
        self.by: str | None = None  # the signal's name
        self.kept = "no checkpoint is written yet"
        self.saving = False  # what a stop is waited for with patience
        self._at = 0.0

    def request(self, number: int) -> None:
        """Note the signal `number`; the first counts. Raises KeyboardInterrupt at a second Ctrl-C.

        One Ctrl-C may arrive twice at once: from the terminal, and passed on by the parent.
        """
        if self.by is None:
            self.by, self._at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._at + ONE_PRESS:
            raise KeyboardInterrupt


@contextmanager
def on_stop_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Inside, `act` is called with the number of each stop signal, which then does nothing else.

    Python handles signals in the main thread only; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda n, _: act(n)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def blocked_stop_signals() -> Iterator[None]:
    """Inside, stop signals are blocked; processes that are started here begin with them blocked."""
    resource_tracker.ensure_running()  # else the first start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_stop_signals() -> None:
    """Deliver the stop signals that were blocked when this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def ignore_stop_signals() -> None:
    """Ignore stop signals in this process, except for SIGTERM from its parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: SIGTERM from anyone
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def wait() -> None:
        parent = multiprocessing.parent_process()
        while parent is None or signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def how_it_ended(exitcode: int | None) -> tuple[str, str]:
    """(how a process ended, the likely cause) of multiprocessing's exit code, both in words."""
    code = exitcode or 0
    if code >= 0:
        return f"exit code {code}", "an error that it printed above"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-code}"
    return name, _CAUSES.get(name, "somebody's signal")


@contextmanager
def without_main_module() -> Iterator[None]:
    """Inside, processes that are started do not import the user's script.

    They need nothing of it, and a script that starts a run outside `if __name__ == "__main__"`
    would start another one in each of them.
    """
    before, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def short_folder(most: int) -> str:
    """The folder for temporary files, or /tmp if the path has more than `most` bytes.

    A socket's path has 107 bytes at most (104 on macOS).
    """
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= most else "/tmp"


def keep_sockets_short() -> None:
    """Let multiprocessing make its sockets in /tmp if the path of TMPDIR is too long for them."""
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is None and short_folder(70) == "/tmp":
        config["tempdir"] = folder = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def exit_with_parent() -> None:
    """Wait until the parent process has ended, then end this one; to be run in a thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
