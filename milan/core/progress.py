"""Progress of long work, as calls that a console or another process receives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from milan.core.beside import ours

_CONSOLE = "stages.console"  # the one module that prints; imported only where nobody else listens


class Progress(Protocol):
    """Receives the progress of one piece of work at a time. Only `stages` prints."""

    def note(self, text: str) -> None:
        """A line for the user: a choice, a file written."""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Work of `total` units starts; `done` of them were finished before."""

    def advance(self, done: int, figures: str = "") -> None:
        """`done` units are finished; `figures` is a short text beside the bar."""

    def end(self) -> None:
        """The current work is over."""


class ForwardedProgress:
    """Sends every call to another process, which calls `replay` on its own Progress."""

    def __init__(self, send: Callable[[tuple[str, tuple, dict]], Any]) -> None:
        self._send = send

    def note(self, text: str) -> None:
        """Sent on."""
        self._send(("note", (text,), {}))

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Sent on."""
        self._send(("begin", (what, total, unit), {"done": done}))

    def advance(self, done: int, figures: str = "") -> None:
        """Sent on."""
        self._send(("advance", (done, figures), {}))

    def end(self) -> None:
        """Sent on."""
        self._send(("end", (), {}))


def replay(progress: Progress, call: tuple[str, tuple, dict]) -> None:
    """Make a call that a ForwardedProgress sent: (method, arguments, keyword arguments)."""
    name, arguments, options = call
    getattr(progress, name)(*arguments, **options)


class NoProgress:
    """Ignores every call: `progress=milan.NoProgress()` keeps a function of milan quiet."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Nothing."""

    def advance(self, done: int, figures: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as people call it: with the command line's progress, unless they pass another.

    In a notebook too. While it runs, `pipeline` and `stages` are ours (milan.core.beside).
    """

    @functools.wraps(function)
    def call(*arguments: Any, progress: Progress | None = None, **settings: Any) -> Any:
        with ours():
            if progress is not None:
                return function(*arguments, progress=progress, **settings)
            with import_module(_CONSOLE).ConsoleProgress() as console:
                return function(*arguments, progress=console, **settings)

    return call
