"""The sheet of a run: views, masks, targets and predictions; cheap enough for every epoch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GREY = 128  # of masked patches
_PANEL, _GAP, _HEAD, _MARGIN = 112, 4, 20, 64  # pixels


class SheetInputs(NamedTuple):
    """B views as a student saw them, with the targets and its predictions."""

    rows: np.ndarray
    """[B]"""
    pixels: np.ndarray
    """[B, S, S, 3] uint8"""
    attention: np.ndarray
    """[B, N]"""
    masked: np.ndarray
    """[B, N], True = masked"""
    features: np.ndarray | None
    """[B, N, C] of the teacher; None where the student predicts pixels"""
    prediction: np.ndarray
    """[B, N, C], or the pixels predicted, uint8 [B, S, S, 3]"""

    @classmethod
    def joined(cls, parts: list[SheetInputs]) -> SheetInputs:
        """All of several, in their order."""
        columns = zip(*parts, strict=True)
        return cls(*(None if c[0] is None else np.concatenate(c) for c in columns))  # type: ignore[arg-type]


class Colours:
    """Features as red, green and blue: their first three principal components.

    Like colours are like features. Fitted once, to patches [B, N, C] with N a square number, so
    that what is coloured later can be compared. Only directions count.
    """

    def __init__(self, features: np.ndarray) -> None:
        flat = _unit(features).reshape(-1, features.shape[-1])
        self.mean = flat.mean(axis=0)
        centred = flat - self.mean
        # Of the small matrix: less than half the time of a singular value decomposition.
        _, axes = np.linalg.eigh(centred.T @ centred)
        self.axes = axes[:, :-4:-1]
        parts = centred @ self.axes
        self.low, self.high = np.percentile(parts, 2, axis=0), np.percentile(parts, 98, axis=0)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[B, N, C] to RGB [B, grid, grid, 3] in 0..1."""
        parts = (_unit(features) - self.mean) @ self.axes
        scaled = ((parts - self.low) / np.maximum(self.high - self.low, 1e-12)).clip(0, 1)
        scaled = np.pad(scaled, ((0, 0), (0, 0), (0, 3 - scaled.shape[-1])))
        return to_grid(scaled)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)


def to_grid(patches: np.ndarray) -> np.ndarray:
    """[B, N, ...] in raster order to [B, grid, grid, ...]."""
    grid = round(patches.shape[1] ** 0.5)
    return patches.reshape(len(patches), grid, grid, *patches.shape[2:])


def upscale(cells: np.ndarray, size: int) -> np.ndarray:
    """[B, g, g, ...] to [B, size, size, ...], each cell a square."""
    at = np.arange(size) * cells.shape[1] // size
    return cells[:, at][:, :, at]


def hide_patches(pixels: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Views [B, S, S, 3] with the `masked` patches [B, N] in grey."""
    shown = pixels.copy()
    shown[upscale(to_grid(masked), pixels.shape[1])] = GREY
    return shown


def draw_sheet(shown: SheetInputs) -> np.ndarray:
    """A row of panels for each view, uint8 [H, W, 3].

    The view, the teacher's attention on it (dark to light), its visible patches, and the target of
    all patches beside the student's prediction, in the same colours.
    """
    size = shown.pixels.shape[1]
    columns = {
        "view": shown.pixels,
        "attention": _glowing(shown.pixels, upscale(to_grid(shown.attention), size)),
        "visible patches": hide_patches(shown.pixels, shown.masked),
    }
    if shown.features is None:
        columns["prediction"] = shown.prediction
    else:
        colours = Colours(shown.features)
        features = {"target": shown.features, "prediction": shown.prediction}
        columns |= {k: upscale(_bytes(colours(v)), size) for k, v in features.items()}
    return _page(columns, [f"row {row}" for row in shown.rows])


def _glowing(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Views in grey under black, red, yellow and white heat [B, S, S]."""
    low, high = heat.min(axis=(1, 2), keepdims=True), heat.max(axis=(1, 2), keepdims=True)
    level = (heat - low) / np.maximum(high - low, 1e-12)
    colour = np.stack([3 * level, 3 * level - 1, 3 * level - 2], axis=-1).clip(0, 1)
    return _bytes(0.65 * colour + 0.35 * pixels.mean(axis=-1, keepdims=True) / 255)


def _bytes(colours: np.ndarray) -> np.ndarray:
    return (255 * colours).round().astype(np.uint8)


def _page(columns: dict[str, np.ndarray], labels: list[str]) -> np.ndarray:
    """Columns of panels [B, S, S, 3] under their names, rows beside their labels."""
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(columns.values()))
    zoom = max(1, round(_PANEL / first.shape[1]))  # small views would be too small to see
    step = first.shape[1] * zoom + _GAP
    page = Image.new(
        "RGB", (_MARGIN + len(columns) * step, _HEAD + len(labels) * step), (255, 255, 255)
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for x, (name, panels) in enumerate(columns.items()):
        pen.text((_MARGIN + x * step, 3), name, (0, 0, 0), font)
        for y, panel in enumerate(panels):
            picture = Image.fromarray(panel.repeat(zoom, axis=0).repeat(zoom, axis=1))
            page.paste(picture, (_MARGIN + x * step, _HEAD + y * step))
    for y, label in enumerate(labels):
        pen.text((4, _HEAD + y * step + step // 2 - 8), label, (0, 0, 0), font)
    return np.asarray(page)
