"""How long work tells what it is doing: the calls a watcher gets. Only `stages` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Progress(Protocol):
    """Gets the news of one piece of work at a time."""

    def note(self, text: str) -> None:
        """A line worth reading: a choice made, a file written."""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Work of `total` units starts; `done` of them were there before."""

    def advance(self, done: int, figures: str = "") -> None:
        """`done` units are finished; `figures` is a short text beside the bar."""

    def end(self) -> None:
        """The work begun last is over."""


class ForwardedProgress:
    """A watcher that passes everything on: to another process, which `tell`s its own watcher."""

    def __init__(self, send: Callable[[tuple[str, tuple, dict]], Any]) -> None:
        self._send = send

    def note(self, text: str) -> None:
        """Passed on."""
        self._send(("note", (text,), {}))

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Passed on."""
        self._send(("begin", (what, total, unit), {"done": done}))

    def advance(self, done: int, figures: str = "") -> None:
        """Passed on."""
        self._send(("advance", (done, figures), {}))

    def end(self) -> None:
        """Passed on."""
        self._send(("end", (), {}))


def replay(progress: Progress, passed: tuple[str, tuple, dict]) -> None:
    """Do at `watch` what was passed on."""
    name, arguments, options = passed
    getattr(progress, name)(*arguments, **options)


class NoProgress:
    """A watcher that says nothing: the default of every function called from Python."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Nothing."""

    def advance(self, done: int, figures: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
