"""Output on the terminal or in a notebook: progress with speed and time left, notes, tables.

Only stages print. The public functions of milan show their progress here too (milan.core.progress).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import IO, Any, Literal

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

_NOTEBOOK = "ipykernel" in sys.modules
# There a bar is a widget. Without ipywidgets rich would show nothing, so lines are printed.
_BAR = None if not _NOTEBOOK or find_spec("ipywidgets") else False
out = Console(highlight=False, soft_wrap=True, force_jupyter=_BAR, force_terminal=_BAR)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# In a file or a pipe a table is as wide as it is; rich would fold it at 80 columns.
_ANY_WIDTH = 10_000
if not (out.is_terminal or out.is_jupyter or "COLUMNS" in os.environ):
    out.width = _ANY_WIDTH

# Seconds between lines where there is no bar; in a notebook somebody is watching.
_PLAIN_EVERY = 10.0 if _NOTEBOOK else 60.0


class _Progress(Progress):
    """A bar, and a line of figures below it: beside it they would be cut off."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the figures."""
        yield from super().get_renderables()
        yield Text(self.figures)


class ConsoleProgress:
    """A progress bar on a terminal or in a notebook; elsewhere a plain line a minute.

    Speed and time left are averages since the beginning, so that regular pauses (validation) count.
    """

    def __init__(self) -> None:
        self._bar: _Progress | None = None
        self._what, self._unit, self._figures, self._total = "", "", "", 0
        self._started = self._printed = 0.0
        self._first = self._done = 0

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar after an error too: it hides the terminal's cursor."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        (self._bar.console if self._bar else out).print(text, markup=False)

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Start a bar."""
        self._what, self._unit, self._figures, self._total = what, unit, "", int(total)
        self._started = self._printed = time.monotonic()
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
        """Move the bar; without a terminal, print a line if the last one is a minute old."""
        self._done, self._figures = done, figures or self._figures
        now = time.monotonic()
        rate = (done - self._first) / max(1e-9, now - self._started)
        left = format_duration((self._total - done) / rate) if rate > 0 else "?"
        if self._bar:
            text = _rate(rate, self._unit)
            self._bar.figures = self._figures
            self._bar.update(self._task, completed=done, rate=text, left=f"{left} left")
        elif now - self._printed >= _PLAIN_EVERY:
            self._printed = now
            parts = [f"{self._what}: {done:,}/{self._total:,}", _rate(rate, self._unit)]
            parts += [f"{left} left", *([self._figures] if self._figures else [])]
            out.print(", ".join(parts), markup=False)
            sys.stdout.flush()

    def end(self) -> None:
        """Remove the bar and print one line."""
        self.__exit__()
        seconds = time.monotonic() - self._started
        count = self._done - self._first
        out.print(
            f"{self._what}: {count:,} {self._unit} in {format_duration(seconds)}, "
            + _rate(count / max(seconds, 1e-9), self._unit),
            markup=False,
        )


def _rate(rate: float, unit: str) -> str:
    """Units a second; for slow work, seconds a unit."""
    if 0 < rate < 0.1:
        return f"{1 / rate:,.1f} s/{unit.removesuffix('s')}"
    return f"{rate:,.1f} {unit}/s"


def table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    *,
    text: bool = False,
    to: Console = out,
) -> None:
    """Print a table: a left-aligned column and columns of figures, or of `text`."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if i == 0 or text else "right"
        shown.add_column(column, justify=justify, overflow="fold", no_wrap=i == 0 and text)
    for row in rows:
        shown.add_row(*[str(cell) for cell in row])
    to.print(shown)


def tables(by_title: Mapping[str, Iterable[Iterable[Any]]]) -> None:
    """Print tables of two columns: title -> rows."""
    for title, rows in by_title.items():
        table(title, ("what", ""), rows)


def text_file(file: IO[str]) -> Console:
    """What prints to an open file, whatever the terminal's width."""
    return Console(file=file, width=_ANY_WIDTH, highlight=False, soft_wrap=True)
