"""Being asked to stop: SIGINT, SIGTERM and SIGUSR1 let the work in hand finish.

And the end of a process that another one started, when that one has ended.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_ONE_PRESS = 0.5  # seconds
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75
"""Exit code of work that was asked to stop and can go on (EX_TEMPFAIL): a scheduler requeues it."""


class Stop:
    """Whether, and by what, this process was asked to stop."""

    def __init__(self) -> None:
        self.by: str | None = None
        self._at = 0.0

    def request(self, number: int) -> None:
        """A signal came; the first one counts. Raises KeyboardInterrupt at a second Ctrl-C.

        One Ctrl-C may come twice at once: from the terminal, and passed on by who started this.
        """
        if self.by is None:
            self.by, self._at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._at + _ONE_PRESS:
            raise KeyboardInterrupt


@contextmanager
def on_stop_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Inside, `act` gets the number of each such signal, which then does nothing else.

    Only the main thread can be told; in another, signals stay what they are.
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
    """Inside, such signals wait; processes that are started here begin with them waiting too."""
    resource_tracker.ensure_running()  # or the first start would let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_stop_signals() -> None:
    """Let those signals come that waited since this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def ignore_stop_signals() -> None:
    """Let such signals do nothing to this process, but for SIGTERM of the one that started it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: whoever sends it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def wait() -> None:
        parent = multiprocessing.parent_process()
        while parent is None or signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the process that started this one, and end with it; for a thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
