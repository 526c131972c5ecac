"""A page of masked patches, each with the sentences that target and student are nearest to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from milan.core.size import grid_of
from milan.reporting.panels import (
    GAP,
    LINE,
    MARGIN,
    cut,
    font,
    upscale,
    visible_column,
    zoomed,
)

_TEXT = 400  # pixels of a column of sentences
_FRAME = (230, 25, 75)
Said = list[tuple[str, float]]
"""Sentences and their shares, the largest first."""


class NamedPatch(NamedTuple):
    """What is said of one masked patch."""

    name: str
    pixels: np.ndarray
    """The view [H, W, 3] uint8."""
    masked: np.ndarray
    """[N] bool"""
    patch: int
    """Which of the N."""
    target: Said
    student: Said


def draw_sentences(title: str, rows: list[NamedPatch], legend: list[str]) -> np.ndarray:
    """A page, uint8 [H, W, 3]: of each row the view and what is visible of it, its patch framed in
    red, and beside them what the target and the student say, the nearest sentence first."""
    from PIL import Image, ImageDraw

    shape = rows[0].pixels.shape[:2]
    high, wide = zoomed(shape)
    lines = max(len(row.target) for row in rows)
    step = LINE + max(high, (lines + 1) * LINE) + GAP
    first = MARGIN + 2 * (wide + GAP)
    width = first + 2 * (_TEXT + GAP) + MARGIN
    page = Image.new(
        "RGB", (width, 2 * MARGIN + LINE + len(rows) * step + len(legend) * LINE), (255, 255, 255)
    )
    pen = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str, room: int) -> None:
        pen.text((x, y), cut(text, room), (0, 0, 0), font())

    write(MARGIN, MARGIN, title, width - 2 * MARGIN)
    for number, row in enumerate(rows):
        top = MARGIN + LINE + number * step
        write(MARGIN, top, row.name, first - MARGIN)
        seen = visible_column(row.pixels[None], row.masked[None]).panels[0]
        grid = grid_of(len(row.masked), shape)
        line, column = divmod(row.patch, grid[1])
        for i, pixels in enumerate((row.pixels, seen)):
            at = MARGIN + i * (wide + GAP), top + LINE
            page.paste(Image.fromarray(upscale(pixels[None], (high, wide))[0]), at)
            left, above = at[0] + column * wide // grid[1], at[1] + line * high // grid[0]
            box = (left - 1, above - 1, left + wide // grid[1], above + high // grid[0])
            pen.rectangle(box, outline=_FRAME, width=2)
        for i, (who, said) in enumerate((("target", row.target), ("student", row.student))):
            x = first + i * (_TEXT + GAP)
            write(x, top + LINE, who, _TEXT)
            for k, (sentence, share) in enumerate(said):
                write(x, top + (k + 2) * LINE, f"{share:4.0%}  {sentence}", _TEXT)
    for k, text in enumerate(legend):
        write(MARGIN, MARGIN + LINE + len(rows) * step + k * LINE, text, width - 2 * MARGIN)
    return np.asarray(page)
