"""How long work tells what it is doing: the calls a watcher gets. Only `stages` prints."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Gets the news of one piece of work at a time."""

    def note(self, text: str) -> None:
        """A line worth reading: a choice made, a file written."""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Work of `total` units starts; `done` of them were there before."""

    def advance(self, done: int, figures: str = "") -> None:
        """`done` units are finished; `figures` is a short text beside the bar."""

    def end(self) -> None:
        """The work begun last is over."""


class Silent:
    """A watcher that says nothing: the default of every function called from Python."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Nothing."""

    def advance(self, done: int, figures: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
