"""The views that a law would take of a data set, before there is a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from milan.core.progress import NoProgress, Progress
from milan.core.size import size_in_words
from milan.errors import ImageFault, none_readable
from milan.images.manifest import build_manifest, describe_source, resolve_data
from milan.images.source import ImageSource
from milan.images.splits import WantedSplit
from milan.images.views import View, ViewSpec, render, view_of
from milan.reporting.contact_sheet import COLOUR_NAMES, draw_crops
from milan.reporting.panels import (
    Column,
    check_apart,
    draw_page,
    save_picture,
    view_column,
    zoomed,
)

_VIEWS = 6  # that have a column: more would be too small to see


def view_sheet(
    data: str,
    law: ViewSpec,
    views: int,
    *,
    out: str | Path,
    images: int = 8,
    split: str | None = None,
    data_root: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draw the first images of a data set in the order of a store, with the crops of their views.

    They are the rows and views that an extraction with this law, number of views and split would
    store. Returns the path of the picture. Raises DataError if there are no images or the picture
    would lie among them, CacheError if it cannot be written.
    """
    progress, wanted = progress or NoProgress(), WantedSplit(split)
    manifest = build_manifest(resolve_data(data, data_root), seed=law.seed, split=wanted)
    for line in describe_source(manifest, wanted.flag):
        progress.note(line)
    listing = manifest.listing
    assert listing is not None
    check_apart(Path(out), [listing.root / listing.file if listing.file else listing.root])
    source = ImageSource(manifest, manifest.root)
    panel, shown, captions, shares = zoomed(law.size), [], [], []
    for row in range(len(manifest)):
        try:
            image = Image.fromarray(law.decode(source.read(row)))
        except ImageFault as fault:
            progress.note(f"left out: {manifest.key(row)} ({fault})")
            continue
        width, height = image.size
        crops = [view_of(law, row, view=v, height=height, width=width) for v in range(views)]
        shares.append([crop.height * crop.width / (height * width) for crop in crops])
        panels = [render(image, crop, size=law.size) for crop in crops[:_VIEWS]]
        shown.append((draw_crops(image, crops, panel), panels, _covered(crops, height, width)))
        captions.append(f"row {row}: {manifest.key(row)}, {width} x {height}")
        if len(shown) == images:
            break
    if not shown:
        raise none_readable(str(data))
    boxes, rendered, covered = zip(*shown, strict=True)
    colours = "a box is the crop of a view, dashed if flipped"
    columns = [Column("image and crops", colours, np.stack(boxes))]
    for number, pixels in enumerate(zip(*rendered, strict=True)):
        name = f"view {number}, {COLOUR_NAMES[number]}"
        column = view_column(np.stack(pixels))._replace(name=name)
        columns.append(column._replace(explanation="" if number else _what(law)))
    title = (
        f"{len(manifest):,} images, {views} views of each: a view has "
        f"{np.mean(shares):.0%} of an image, together they have {np.mean(covered):.0%} (means here)"
    )
    return save_picture(draw_page(title, columns, captions), Path(out))


def _what(law: ViewSpec) -> str:
    return (
        f"and so on: {size_in_words(law.size)}, {law.scale[0]:.0%} to {law.scale[1]:.0%} of "
        f"the image's area, width / height {law.ratio[0]:.3g} to {law.ratio[1]:.3g}, "
        f"{law.hflip:.0%} flipped, seed {law.seed}"
    )


def _covered(crops: list[View], height: int, width: int) -> float:
    """The share of an image that lies in any of its crops."""
    inside = np.zeros((height, width), bool)
    for crop in crops:
        inside[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width] = True
    return float(inside.mean())
