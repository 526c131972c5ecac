"""A watchdog: a thread that ends this process when it stands still in one call, and says where.

Python hears a signal between two instructions of its main thread. A collective whose other ranks
hang, or a read from a disk that does not answer, is one call in compiled code: it hears nothing,
and no exception can end it. Nothing on a disk is touched, so the end is as good as a kill.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from milan.core.signals import ONE_PRESS, REQUEUE, STOPPING, Stop
from milan.core.units import format_duration
from milan.core.waiting import Wait

LIMIT = 30 * 60.0
"""Seconds in one call; then the process ends with exit code 1."""
HEARD = 60.0
"""Seconds in one call after a signal, or twice the longest call before, where that took longer."""
_FIRST_WORD = 60.0  # seconds in one call until it is said; then again after twice as long
_SOON = 15.0  # the same, after a signal
_AGAIN = 2.0  # seconds in which a second Ctrl-C ends the process by itself
_PERIOD = 1.0  # seconds between two looks
_INTERRUPTED = 130
_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{_ROOT / name}{os.sep}" for name in ("milan", "pipeline", "stages"))
_log = logging.getLogger("milan")
_active: list[_Watchdog | None] = []  # the last one looks, if it is one


@contextmanager
def watched(stop: Stop | None = None, *, rank: int | None = None) -> Iterator[None]:
    """Inside, a watchdog looks at the thread that calls this.

    `stop` is what the process was asked; with None only Ctrl-C counts, which then ends it with 130.
    `rank`, where there are several, is named in what it says: by the logger `milan`, which writes
    to standard error unless somebody tells it otherwise.
    """
    watchdog = _Watchdog(stop, rank)
    hears = threading.current_thread() is threading.main_thread()
    # Of the kernel's signal, in whatever code it finds the main thread.
    before = -1
    if hears:
        before = signal.set_wakeup_fd(watchdog.sender.fileno(), warn_on_full_buffer=False)
    _active.append(watchdog)
    watchdog.start()
    try:
        yield
    finally:
        if hears:
            signal.set_wakeup_fd(before)
        watchdog.sender.close()
        _active.remove(watchdog)


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside, no watchdog looks: a person is asked, who may take all the time."""
    _active.append(None)
    try:
        yield
    finally:
        _active.pop()


class _Watchdog(threading.Thread):
    def __init__(self, stop: Stop | None, rank: int | None) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.stop, self.name_of_rank = stop, "" if rank is None else f"rank {rank}: "
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        self.receiver.settimeout(_PERIOD)
        self.watched = threading.get_ident()
        self.asked, self.asked_at, self.second_at = "", 0.0, 0.0
        """The first signal and its time; the time of a second Ctrl-C."""
        self.mark: tuple[int, int, int] | None = None
        self.frame: FrameType | None = None
        self.since, self.longest = time.monotonic(), 0.0
        """When the call in hand began, about; the seconds of the longest one before it."""
        self.next_word = 0.0

    def run(self) -> None:
        """Look about once a second, until the sender is closed."""
        while True:
            try:
                if not (numbers := self.receiver.recv(64)):
                    self.receiver.close()
                    return
            except TimeoutError:
                numbers = b""
            now = time.monotonic()
            for number in numbers:
                self._hear(number, now)
            if self.stop and self.stop.by and not self.asked:  # not by a signal of this process
                self.asked, self.asked_at = self.stop.by, now
            frame = sys._current_frames().get(self.watched)
            if _active and _active[-1] is self and frame:
                self._look(frame, now)
            else:
                self.mark, self.since = None, now
            del frame

    def _hear(self, number: int, now: float) -> None:
        wanted = STOPPING if self.stop else (signal.SIGINT,)
        if number not in wanted:
            return
        if not self.asked:
            self.asked, self.asked_at, self.next_word = signal.Signals(number).name, now, _SOON
        elif number == signal.SIGINT and now > self.asked_at + ONE_PRESS:
            self.second_at = self.second_at or now

    def _look(self, frame: FrameType, now: float) -> None:
        """See whether the thread is where it was, and whether that is too long."""
        mark = (id(frame), frame.f_lasti, Wait.checks)
        if mark != self.mark or (self.frame and frame is not self.frame):
            self.longest = max(self.longest, now - self.since)
            self.mark, self.frame, self.since, self.next_word = mark, None, now, 0.0
        stood = now - self.since
        if stood > 10 * _PERIOD:
            self.frame = frame  # from now on no other gets its id; not before: it holds tensors
        said = f"{self.name_of_rank}since {format_duration(stood)} in one call, {_place(frame)}"
        if self.second_at and now > self.second_at + _AGAIN:
            _end(_INTERRUPTED, f"a second Ctrl-C; {said}; {self._kept()}")
        patience = LIMIT
        if self.asked and not (self.stop and self.stop.saving):
            patience = max(HEARD, 2 * self.longest)
            stood = min(stood, now - self.asked_at)
        if stood > patience:
            code = 1 if not self.asked else REQUEUE if self.stop else _INTERRUPTED
            asked = f"{self.asked}: " if self.asked else ""
            _end(code, f"{asked}{said}; it ends by itself now; {self._kept()}")
        first = _SOON if self.asked else _FIRST_WORD
        if stood > (self.next_word or first):
            self.next_word = 2 * stood
            left = format_duration(patience - stood)
            _log.warning(
                "milan: %s%s; if it does not come back, it ends by itself in %s",
                f"{self.asked}: " if self.asked else "", said, left,
            )  # fmt: skip

    def _kept(self) -> str:
        return f"{self.stop.kept}; the same line goes on" if self.stop else "the same line goes on"


def _place(frame: FrameType) -> str:
    """The innermost line of ours, or of whoever called us, that the call belongs to."""
    inner: FrameType | None = frame
    while inner and not inner.f_code.co_filename.startswith(_OURS):
        inner = inner.f_back
    at = inner or frame
    name = at.f_code.co_filename.removeprefix(f"{_ROOT}{os.sep}")
    return f"{name}, line {at.f_lineno} ({at.f_code.co_name})"


def _end(code: int, text: str) -> None:
    """End this process at once; also if nobody reads what it says."""
    threading.Timer(5.0, os._exit, (code,)).start()
    _log.error("milan: %s", text)
    os._exit(code)
