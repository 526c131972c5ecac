"""What people see: progress with rate and time left, notes, tables. The one place that prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from milan.core.units import format_duration

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_PLAIN_EVERY = 60.0  # seconds between lines where there is no terminal


class _Progress(Progress):
    """A bar, and below it a line of figures: beside it, they would be cut off."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown, line by line."""
        yield from super().get_renderables()
        yield Text(self.figures)


class ConsoleProgress:
    """A progress bar on a terminal; without one, a plain line a minute.

    Rate and time left are of everything since the beginning, so that a pause (a run that is judged)
    is in both by its share.
    """

    def __init__(self) -> None:
        self._bar: _Progress | None = None
        self._what, self._unit, self._figures, self._total = "", "", "", 0
        self._started = self._spoke = 0.0
        self._first = self._done = 0

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away after an error too: it hides the terminal's cursor."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        (self._bar.console if self._bar else out).print(text, markup=False)

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Show the work begun."""
        self._what, self._unit, self._figures, self._total = what, unit, "", int(total)
        self._started = self._spoke = time.monotonic()
        self._first = self._done = done
        if out.is_terminal:
            self._bar = _Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=out,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                what, total=self._total, completed=done, rate="", left=""
            )

    def advance(self, done: int, figures: str = "") -> None:
        """Move the bar, or say a line if the last one is a minute old."""
        self._done, self._figures = done, figures or self._figures
        now = time.monotonic()
        rate = (done - self._first) / max(1e-9, now - self._started)
        left = format_duration((self._total - done) / rate) if rate > 0 else "?"
        if self._bar:
            text = _rate(rate, self._unit)
            self._bar.figures = self._figures
            self._bar.update(self._task, completed=done, rate=text, left=f"{left} left")
        elif now - self._spoke >= _PLAIN_EVERY:
            self._spoke = now
            told = [f"{self._what}: {done:,}/{self._total:,}", _rate(rate, self._unit)]
            told += [f"{left} left", *([self._figures] if self._figures else [])]
            out.print(", ".join(told), markup=False)
            sys.stdout.flush()

    def end(self) -> None:
        """Take the bar away and leave one line."""
        self.__exit__()
        seconds = time.monotonic() - self._started
        count = self._done - self._first
        out.print(
            f"{self._what}: {count:,} {self._unit} in {format_duration(seconds)}, "
            + _rate(count / max(seconds, 1e-9), self._unit),
            markup=False,
        )


def _rate(rate: float, unit: str) -> str:
    """How much a second; of slow work, how many seconds for one."""
    if 0 < rate < 0.1:
        return f"{1 / rate:,.1f} s/{unit.removesuffix('s')}"
    return f"{rate:,.1f} {unit}/s"


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table; the first column is left-aligned, the others right."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*[str(cell) for cell in row])
    out.print(shown)


def tables(found: Mapping[str, Iterable[Iterable[Any]]]) -> None:
    """Print tables of two columns by their titles."""
    for title, rows in found.items():
        table(title, ("what", ""), rows)


@contextmanager
def kept_in(path: str) -> Iterator[None]:
    """What is printed inside is also written to a text file."""
    out.record = True
    yield
    with open(path, "w") as file:
        file.write(out.export_text())
    out.record = False
