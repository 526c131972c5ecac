"""Predictions of a segmenter: a mask for each image, and which classes fill how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from milan.errors import DataError
from milan.images.channels import picture_of, whole_image
from milan.inference.predict import Job
from milan.inference.tables import replaced
from milan.models.segmenter import fitted, load_segmenter, predict_scaled
from milan.reporting.mask_sheet import coloured
from milan.reporting.panels import Tile, thumbnail

_TOP = 5
_AT_ONCE = 8  # images, which are looked at one by one


class _Prepared(NamedTuple):
    """An image as it is looked at; of a large photograph no more is kept."""

    scaled: np.ndarray
    size: tuple[int, int]
    shown: np.ndarray | None
    """For the contact sheet."""


def predict_masks(job: Job) -> dict[str, Any]:
    """Of each image its key, size, mask, and up to 5 classes with the shares that they fill.

    Masks are PNGs of the image's size, class numbers as indices of a palette (16-bit grey above 256
    classes), in a folder beside the table: KEY.png. Their numbers are places in the file
    classes.txt there. Raises DataError if they cannot be written.
    """
    segmenter = load_segmenter(job.file).to(job.device)
    names, shown = segmenter.class_names, job.shown
    folder = job.place.with_name(f"{job.place.stem}_masks")

    channels = job.pictures.channels

    def prepare(row: int, data: bytes, beside: bytes) -> _Prepared:
        pixels = whole_image(channels, data, beside)
        small = thumbnail(picture_of(channels, pixels)) if row in shown else None
        return _Prepared(fitted(pixels, segmenter.window), pixels.shape[:2], small)

    top = min(_TOP, len(names))
    text, number = pa.string(), pa.int32()
    ranked = [(f"{what}{i + 1}", kind) for i in range(top)
              for what, kind in (("class", text), ("share", pa.float32()))]  # fmt: skip
    columns = [("key", text), ("height", number), ("width", number), ("mask", text), *ranked]
    schema, pixels_of = pa.schema(columns), np.zeros(len(names), np.int64)
    with job.table(schema) as table:
        job.context.ranks.on_rank0(lambda: _write_names(folder, names))
        for batch in job.pictures.batches(prepare, at_once=_AT_ONCE):
            rows = list[list[Any]]()
            for picture in batch:
                key = job.pictures.manifest.key(picture.row)
                ready: _Prepared = picture.prepared
                mask = predict_scaled(segmenter, ready.scaled, ready.size)
                counts = np.bincount(mask.ravel(), minlength=len(names))
                pixels_of += counts
                place = folder / f"{key}.png"
                _write_mask(place, mask, segmenter.colours)
                best = np.argsort(-counts, kind="stable")[:top].tolist()
                shares = [(names[n], counts[n] / mask.size) for n in best if counts[n]]
                ranks = [*shares, *[(None, None)] * (top - len(shares))]
                rows.append([key, *ready.size, str(place), *(v for pair in ranks for v in pair)])
                if ready.shown is not None:
                    said = [f"{name} {share:.0%}" for name, share in shares[:2]]
                    tile = _overlaid(ready.shown, mask, segmenter.colours)
                    job.tiles[picture.row] = Tile(tile, [key, *said])
            values = [list(column) for column in zip(*rows, strict=True)]
            arrays = [pa.array(v, field.type) for v, field in zip(values, schema, strict=True)]
            table.write_table(pa.Table.from_arrays(arrays, schema=schema))
    present = int((sum(job.over_ranks(pixels_of)) > 0).sum())
    return {"classes": len(names), "classes_found": present, "masks": str(folder)}


def _write_names(folder: Path, names: list[str]) -> None:
    with replaced(folder / "classes.txt") as part:
        part.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _write_mask(path: Path, mask: np.ndarray, colours: list[list[int]]) -> None:
    """A PNG of class numbers, there whole or not at all. Raises DataError."""
    if len(colours) > 256:
        image = Image.fromarray(mask.astype(np.uint16))
    else:
        image = Image.fromarray(mask.astype(np.uint8), "P")
        image.putpalette([part for colour in colours for part in colour])
    if ".." in path.parts:
        raise DataError(f"the key {path.name!r} leads out of its folder", fix="rename the image")
    with replaced(path) as part:
        image.save(part, format="png")


def _overlaid(small: np.ndarray, mask: np.ndarray, colours: list[list[int]]) -> np.ndarray:
    """A thumbnail with the colours of its classes over it."""
    height, width = small.shape[:2]
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    over = coloured(mask[rows[:, None], columns], colours)
    return ((small.astype(np.uint16) + over) // 2).astype(np.uint8)
