"""Masks as pictures: image, truth and prediction side by side, and what each colour is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from milan.reporting.panels import GAP, LINE, MARGIN, cut, font

_WIDTH, _MOST = 288, 576  # pixels of a panel, and of its height
_SWATCH, _ENTRY = 13, 184  # pixels of a legend's colour, and of an entry
_LEGEND = 40  # classes named below a sheet
IGNORED_COLOUR = (24, 24, 24)
_TURN = 0.618034  # of the colour circle, from one class to the next: neighbours differ most


class MaskRow(NamedTuple):
    """An image as a sheet shows it."""

    name: str
    pixels: np.ndarray
    """uint8 [H, W, 3]"""
    truth: np.ndarray
    """[H', W'], the classes of an image of the same shape; -1: does not count"""
    named: np.ndarray
    """[H', W']"""


def class_colours(count: int) -> list[list[int]]:
    """A colour for each class: red, green, blue."""
    import matplotlib

    if count <= 20:  # ten strong colours first, then their light ones
        table = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        order = [*range(0, 20, 2), *range(1, 20, 2)]
        return [[round(255 * part) for part in table[order[i]]] for i in range(count)]
    from matplotlib.colors import hsv_to_rgb

    hsv = [(i * _TURN % 1, (0.9, 0.55)[i % 2], (0.95, 0.7, 0.5)[i % 3]) for i in range(count)]
    return [[round(255 * part) for part in hsv_to_rgb(colour)] for colour in hsv]


def coloured(mask: np.ndarray, colours: Sequence[Sequence[int]]) -> np.ndarray:
    """Classes [H, W] (-1: none) as colours, uint8 [H, W, 3]."""
    table = np.array([*colours, IGNORED_COLOUR], np.uint8)
    return table[mask]


def mask_sheet(
    title: str,
    rows: Sequence[MaskRow],
    names: Sequence[str],
    colours: Sequence[Sequence[int]],
    figures: Sequence[float | None] = (),
) -> np.ndarray:
    """A page, uint8 [H, W, 3]: a row for each image, and a legend of the classes in it.

    `figures`: the IoU of each class in percent, written in the legend.
    """
    from PIL import Image, ImageDraw

    entries = _legend(rows, names, colours, figures)
    width = 2 * MARGIN + 3 * _WIDTH + 2 * GAP
    columns = max(1, (width - 2 * MARGIN) // _ENTRY)
    sizes = [_panel_size(*row.pixels.shape[:2]) for row in rows]
    top = MARGIN + 2 * LINE
    legend_at = top + sum(high + LINE + GAP for _, high in sizes) + GAP
    height = legend_at + -(-len(entries) // columns) * LINE + MARGIN
    page = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str, most: int) -> None:
        pen.text((x, y), cut(text, most), (0, 0, 0), font())

    write(MARGIN, MARGIN, title, width - 2 * MARGIN)
    for column, name in enumerate(("image", "truth", "prediction")):
        write(MARGIN + column * (_WIDTH + GAP), MARGIN + LINE, name, _WIDTH)
    at = top
    for row, (wide, high) in zip(rows, sizes, strict=True):
        write(MARGIN, at, row.name, width - 2 * MARGIN)
        panels: list[tuple[np.ndarray, Any]] = [(row.pixels, Image.Resampling.BILINEAR)]
        panels += [
            (coloured(mask, colours), Image.Resampling.NEAREST) for mask in (row.truth, row.named)
        ]
        for column, (pixels, how) in enumerate(panels):
            panel = Image.fromarray(pixels).resize((wide, high), how)
            page.paste(panel, (MARGIN + column * (_WIDTH + GAP), at + LINE))
        at += high + LINE + GAP
    for number, (name, colour) in enumerate(entries):
        x = MARGIN + number % columns * _ENTRY
        y = legend_at + number // columns * LINE
        pen.rectangle((x, y, x + _SWATCH, y + _SWATCH), tuple(colour))
        write(x + _SWATCH + 4, y, name, _ENTRY - _SWATCH - 12)
    return np.asarray(page)


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of an image's panel: the column's width, or less for a tall one."""
    scale = min(_WIDTH / width, _MOST / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _legend(
    rows: Sequence[MaskRow],
    names: Sequence[str],
    colours: Sequence[Sequence[int]],
    figures: Sequence[float | None],
) -> list[tuple[str, Sequence[int]]]:
    """(name and IoU, colour) of each class that the rows show, the most frequent ones if many."""
    counts = np.zeros(len(names), np.int64)
    ignored = False
    for row in rows:
        for mask in (row.truth, row.named):
            counts += np.bincount(mask[mask >= 0].ravel(), minlength=len(names))
            ignored |= bool((mask < 0).any())
    shown = np.sort(np.argsort(-counts, kind="stable")[: min(_LEGEND, np.count_nonzero(counts))])
    entries: list[tuple[str, Sequence[int]]] = []
    for number in shown.tolist():
        figure = figures[number] if number < len(figures) else None
        iou = "" if figure is None else f" {figure:.1f}"
        entries.append((f"{names[number]}{iou}", colours[number]))
    if ignored:
        entries.append(("does not count", IGNORED_COLOUR))
    return entries
