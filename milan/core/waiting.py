"""Waits for something outside this process: each says what for, has a limit, and hears a stop."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.units import format_duration
from milan.errors import MilanError, TrainError

_SILENCE = 60.0  # seconds without a byte of a download
_FIRST_WORD = 15.0  # seconds of waiting before it is said; then again after twice as long


class Stopped(Exception):
    """A stop signal ended a wait: there is nothing to save. `by` is the signal's name."""

    def __init__(self, by: str) -> None:
        self.by = by
        super().__init__(by)


@contextmanager
def stalled_connections_fail() -> Iterator[None]:
    """Inside, a connection that is opened fails once it has been silent for a minute.

    For downloads by libraries that would wait for ever. Other threads are affected as well.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class Wait:
    """One wait for `what`; whoever waits calls `check` about once a second."""

    checks: ClassVar[int] = 0
    """How often any of them was checked: this process does not stand still."""

    def __init__(
        self,
        what: str,
        *,
        limit: float,
        fix: str,
        progress: Progress | None = None,
        stop: Stop | None = None,
        grace: float = 0.0,
        error: type[MilanError] = TrainError,
    ) -> None:
        """`limit`: seconds, then `error` is raised; `grace`: seconds that a stop still waits."""
        self.what, self.limit, self.fix, self.error = what, limit, fix, error
        self.progress, self.stop, self.grace = progress or NoProgress(), stop, grace
        self.restart()

    def restart(self) -> None:
        """Begin to wait: count from now."""
        self.began, self._next_word, self._asked = time.monotonic(), _FIRST_WORD, 0.0

    def check(self) -> None:
        """Say after a while that it waits. Raises `error` at the limit, Stopped after a signal."""
        Wait.checks += 1
        now = time.monotonic()
        if self.stop and self.stop.by:
            self._asked = self._asked or now
            if now - self._asked >= self.grace:
                raise Stopped(self.stop.by)
        waited = now - self.began
        if waited > self.limit:
            raise self.error(
                f"waited {format_duration(waited)} in vain for {self.what}",
                expected=f"an answer within {format_duration(self.limit)}",
                fix=self.fix,
            )
        if waited > self._next_word:
            self._next_word = 2 * waited
            self.progress.note(
                f"waiting for {self.what}, since {format_duration(waited)} "
                f"(at most {format_duration(self.limit)}); if it never comes: {self.fix}"
            )
