"""Pictures of boxes and masks: what is annotated beside what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from milan.reporting.panels import Column, draw_page, label_font, printable

SHOWN = 0.5
"""Score of a detection that is drawn."""
_EDGE = 400  # pixels of a panel
_COLOURS = (
    (230, 60, 60), (40, 110, 220), (20, 150, 70), (240, 150, 20), (150, 60, 190), (0, 170, 190),
    (220, 70, 160), (130, 100, 40), (110, 130, 30), (90, 90, 100),
)  # fmt: skip
"""Of classes, in turn."""


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    *,
    scores: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    edge: int = _EDGE,
    named: bool = True,
) -> np.ndarray:
    """A panel [edge, edge, 3] uint8: the image with boxes, names and scores.

    `image` [H, W, 3] uint8; `boxes` [n, 4] left, top, right, bottom in its pixels; `labels` [n] are
    numbers of `names`; `masks` [n, H, W]. Its longer side becomes the panel's edge.
    Names are left out unless `named`.
    """
    factor = edge / max(image.shape[:2])
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    colours = [np.array(_COLOURS[label % len(_COLOURS)]) for label in labels.tolist()]
    pixels = image.astype(np.float32)
    for mask, colour in zip(() if masks is None else masks, colours, strict=masks is not None):
        pixels[mask.astype(bool)] = 0.55 * pixels[mask.astype(bool)] + 0.45 * colour
    shown = Image.fromarray(pixels.round().astype(np.uint8)).resize((width, height))
    pen = ImageDraw.Draw(shown)
    # Small boxes last: they would lie under the names of large ones.
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for n in np.argsort(-areas, kind="stable").tolist():
        ink = tuple(colours[n].tolist())
        left, top, right, bottom = (boxes[n] * factor).tolist()
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=ink, width=2)
        if not named:
            continue
        text = printable(names[labels[n]]) + ("" if scores is None else f" {scores[n]:.2f}")
        wide, high = pen.textlength(text, label_font()) + 4, 13
        at = min(left, max(0, width - wide)), top - high if top >= high else top
        pen.rectangle((*at, at[0] + wide, at[1] + high), fill=ink)
        pen.text((at[0] + 2, at[1]), text, (255, 255, 255), label_font())
    panel = np.full((edge, edge, 3), 255, np.uint8)
    panel[:height, :width] = np.asarray(shown)
    return panel


def sheet_of_boxes(title: str, shown: list[dict[str, Any]], names: list[str]) -> np.ndarray:
    """A page [H, W, 3] uint8 with a row for each image.

    `shown`: key, image [H, W, 3], and `annotated` and `found`, arguments of draw_boxes.
    """
    columns = []
    for part, what in (
        ("annotated", "the boxes to be found"),
        ("found", f"those of the detector with a score of {SHOWN:g} and more, and their scores"),
    ):
        panels = [draw_boxes(one["image"], names=names, **one[part]) for one in shown]
        columns.append(Column(part, what, np.stack(panels)))
    captions = [
        f"{one['key']}: {len(one['annotated']['labels'])} annotated, "
        f"{len(one['found']['labels'])} found"
        for one in shown
    ]
    return draw_page(title, columns, captions)
