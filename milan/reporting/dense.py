"""Dense maps: where in an image its patches are most like the text of a class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from milan.core.size import Size
from milan.reporting.panels import Column, draw_page, to_grid, upscale, view_column


class DenseMap(NamedTuple):
    """One image by one network."""

    caption: str
    pixels: np.ndarray
    """[H, W, 3] uint8"""
    cosines: np.ndarray
    """[N, P]: each patch with each class."""


def draw_dense(title: str, maps: list[DenseMap], classes: list[str]) -> np.ndarray:
    """A page, uint8 [H, W, 3]: a row for each map, a column for each of its P classes.

    Cosines less their mean over all P classes, for a patch that is like every text says nothing.
    A row has one scale.
    """
    import matplotlib

    inferno = matplotlib.colormaps["inferno"]
    shape: Size = max((map_.pixels.shape[:2] for map_ in maps), key=max)
    views = np.stack([upscale(map_.pixels[None], shape)[0] for map_ in maps])
    columns = [view_column(views)._replace(explanation="what the networks see of an image")]
    heats = []
    for map_ in maps:
        above = map_.cosines - map_.cosines.mean(axis=1, keepdims=True)
        low, high = above.min(), above.max()
        heats.append((above - low) / max(high - low, 1e-12))
    grey = views.mean(axis=-1, keepdims=True) / 255
    what = (
        "cosine of each patch with the text of the class, less its mean over these classes; dark "
        "is little, yellow is much, with one scale for a row"
    )
    for number, name in enumerate(classes):
        grids = [
            to_grid(heat[None, :, number], map_.pixels.shape[:2])
            for heat, map_ in zip(heats, maps, strict=True)
        ]
        heat = np.stack([upscale(grid, shape)[0] for grid in grids])
        panels = 0.7 * inferno(heat)[..., :3] + 0.3 * grey
        panels = (255 * panels).round().astype(np.uint8)
        columns.append(Column(name, "" if number else f"as every class: {what}", panels))
    return draw_page(title, columns, [map_.caption for map_ in maps])
