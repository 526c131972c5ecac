"""Being asked to stop: SIGINT, SIGTERM and SIGUSR1 let the work in hand finish.

And the end of a process that another one started, when that one has ended.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75
"""Exit code of work that was asked to stop and can go on (EX_TEMPFAIL): a scheduler requeues it."""


class Stop:
    """Whether, and by what, this process was asked to stop."""

    def __init__(self) -> None:
        self.by: str | None = None

    def ask(self, number: int) -> None:
        """A signal came; the first one counts."""
        self.by = self.by or signal.Signals(number).name


@contextmanager
def told(act: Callable[[int], None]) -> Iterator[None]:
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


def end_with_parent() -> None:
    """Wait for the process that started this one, and end with it; for a thread."""
    import multiprocessing.connection
    import os

    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
