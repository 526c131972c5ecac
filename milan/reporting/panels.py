"""What sheets are made of: panels, their colours and words, and a page of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from milan.core.paths import AnyPath, is_local
from milan.core.size import Size, grid_of, height_width
from milan.data.dataset import CachedDataset
from milan.errors import CacheError, DataError
from milan.store.cache import TargetCache

GREY = 128  # of masked patches
PANEL = 168  # pixels, about
MARGIN, GAP, LINE = 8, 6, 19  # pixels
_FITTED = 64  # images of a store that its colours are fitted to


class SheetInputs(NamedTuple):
    """B views as a student saw them, with the targets and its predictions."""

    rows: np.ndarray
    """[B]"""
    pixels: np.ndarray
    """[B, H, W, 3] uint8"""
    attention: np.ndarray
    """[B, N]"""
    masked: np.ndarray
    """[B, N], True = masked"""
    features: np.ndarray | None
    """[B, N, C] of the teacher; None where the student predicts pixels"""
    prediction: np.ndarray
    """[B, N, C], not a number where nothing is learnt; or the pixels, uint8 [B, H, W, 3]"""
    student: np.ndarray | None = None
    """Three channels that the student saw in place of the pixels, uint8 [B, H, W, 3]"""

    @classmethod
    def joined(cls, parts: list[SheetInputs]) -> SheetInputs:
        """All of several, in their order."""
        columns = zip(*parts, strict=True)
        return cls(*(None if c[0] is None else np.concatenate(c) for c in columns))  # type: ignore[arg-type]


class Column(NamedTuple):
    """Panels below one another, one for each image."""

    name: str
    explanation: str
    panels: np.ndarray
    """[B, H, W, 3] uint8"""


# --- columns that every sheet may have ------------------------------------------------------------


def view_column(pixels: np.ndarray) -> Column:
    """Views [B, H, W, 3]."""
    return Column("view", "the pixels that the teacher saw", pixels)


def attention_column(pixels: np.ndarray, attention: np.ndarray) -> Column:
    """The attention [B, N] on its views, in one colour map; each view has its own scale."""
    import matplotlib

    shape = (pixels.shape[1], pixels.shape[2])
    heat = upscale(to_grid(attention, shape), shape)
    low, high = heat.min(axis=(1, 2), keepdims=True), heat.max(axis=(1, 2), keepdims=True)
    colour = matplotlib.colormaps["inferno"]((heat - low) / np.maximum(high - low, 1e-12))
    panels = 0.65 * colour[..., :3] + 0.35 * pixels.mean(axis=-1, keepdims=True) / 255
    what = "the teacher's, of the class token: dark is little, yellow is much, within each view"
    return Column("attention", what, as_bytes(panels))


def visible_column(pixels: np.ndarray, masked: np.ndarray) -> Column:
    """Views with the `masked` patches [B, N] in grey."""
    shown = pixels.copy()
    shape = (pixels.shape[1], pixels.shape[2])
    shown[upscale(to_grid(masked, shape), shape)] = GREY
    return Column(
        "visible patches", "what the student sees of a view; grey patches are masked", shown
    )


def heat_column(name: str, explanation: str, values: np.ndarray, most: float, size: Size) -> Column:
    """Values of patches [B, N] from 0 to `most` in one colour map, dark to yellow."""
    import matplotlib

    colour = matplotlib.colormaps["inferno"]((to_grid(values, size) / most).clip(0, 1))
    return Column(name, explanation, upscale(as_bytes(colour[..., :3]), size))


def features_column(features: np.ndarray, colours: Colours, size: Size) -> Column:
    """The teacher's features of the patches [B, N, C]."""
    what = (
        "the teacher's, three principal components as red, green and blue: like colours are like "
        f"features; {colours.origin}"
    )
    return Column("features", what, upscale(as_bytes(colours(features, size)), size))


class Colours:
    """Features as red, green and blue: their first three principal components; grey where they are
    not a number.

    Like colours are like features. Fitted once, to patches [B, N, C], so that what is coloured
    later can be compared. Only directions count.
    """

    def __init__(self, features: np.ndarray, origin: str = "fitted to this sheet") -> None:
        flat = _unit(features).reshape(-1, features.shape[-1])
        self.origin = origin
        """What they are fitted to, in words."""
        self.mean = flat.mean(axis=0)
        centred = flat - self.mean
        # Of the small matrix: less than half the time of a singular value decomposition.
        _, axes = np.linalg.eigh(centred.T @ centred)
        axes = axes[:, :-4:-1]
        # Either sign of an axis is one: without a rule, libraries would differ in the colours.
        self.axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        parts = centred @ self.axes
        self.low, self.high = np.percentile(parts, 2, axis=0), np.percentile(parts, 98, axis=0)

    @classmethod
    def of_store(cls, cache: TargetCache) -> Colours:
        """Fitted to the first images of a store, so that all its sheets compare, grown or not."""
        rows = cache.good_rows()[:_FITTED]  # in the manifest's order, which is shuffled
        # A shard at a time: a local cache need not have room for more than a window's.
        parts = np.split(rows, np.flatnonzero(np.diff(cache.shards_of(rows))) + 1)
        features = np.concatenate([patch_features(cache, p, np.zeros_like(p)) for p in parts])
        images = "1 image" if len(rows) == 1 else f"{len(rows)} images"
        return cls(features, f"fitted to {images} of the store, the same in all its sheets")

    @property
    def width(self) -> int:
        """C."""
        return len(self.mean)

    def __call__(self, features: np.ndarray, shape: Size) -> np.ndarray:
        """[B, N, C] of views of a shape to RGB [B, rows, columns, 3] in 0..1."""
        parts = (_unit(features) - self.mean) @ self.axes
        scaled = ((parts - self.low) / np.maximum(self.high - self.low, 1e-12)).clip(0, 1)
        scaled = np.pad(scaled, ((0, 0), (0, 0), (0, 3 - scaled.shape[-1])))
        scaled[~np.isfinite(features).all(axis=-1)] = GREY / 255
        return to_grid(scaled, shape)


def patch_features(cache: TargetCache, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The teacher's decoded features of the patches of (rows[i], views[i]), [B, N, C] float32."""
    targets = cache.read(rows, views)
    assert targets.codes is not None
    scale = None if targets.scale is None else torch.from_numpy(targets.scale)
    return cache.codec.decode(torch.from_numpy(targets.codes), scale)[:, 1:].numpy()


def class_tokens(cache: TargetCache, rows: np.ndarray) -> np.ndarray:
    """The teacher's decoded class tokens of view 0 of `rows`, [B, C] float32."""
    targets = cache.read(rows, np.zeros_like(rows))
    assert targets.codes is not None
    scale = None if targets.scale is None else torch.from_numpy(targets.scale[:, :1].copy())
    return cache.codec.decode(torch.from_numpy(targets.codes[:, :1].copy()), scale)[:, 0].numpy()


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)


def to_grid(patches: np.ndarray, shape: Size) -> np.ndarray:
    """[B, N, ...] of views of a shape, in raster order, to [B, rows, columns, ...]."""
    return patches.reshape(len(patches), *grid_of(patches.shape[1], shape), *patches.shape[2:])


def upscale(cells: np.ndarray, size: Size) -> np.ndarray:
    """[B, rows, columns, ...] to [B, H, W, ...], each cell a rectangle."""
    height, width = height_width(size)
    down = np.arange(height) * cells.shape[1] // height
    along = np.arange(width) * cells.shape[2] // width
    return cells[:, down][:, :, along]


def as_bytes(colours: np.ndarray) -> np.ndarray:
    """Colours in 0..1 as uint8."""
    return (255 * colours).round().astype(np.uint8)


def sheet_of_run(shown: SheetInputs, colours: Mapping[str, Colours] | None) -> list[Column]:
    """The columns of a run's sheet: the target of all patches beside the student's prediction.

    `colours` are those of each teacher by its name, in the order of their channels; None for
    targets that are not the features of a store.
    """
    size = (shown.pixels.shape[1], shown.pixels.shape[2])
    columns = [
        view_column(shown.pixels),
        attention_column(shown.pixels, shown.attention),
        visible_column(shown.pixels, shown.masked),
    ]
    if shown.student is not None:
        what = "three channels that the student saw; grey is a channel's mean, black and white 2 "
        what += "deviations from it (shown_channels)"
        columns.insert(1, Column("student's view", what, shown.student))
    if shown.features is None:
        what = "the student's pixels; MAE trains those of masked patches only"
        return [*columns, Column("prediction", what, shown.prediction)]
    first = 0
    for name, own in (colours or {"": Colours(shown.features)}).items():
        part = slice(first, first + own.width)
        target = features_column(shown.features[..., part], own, size)
        predicted = upscale(as_bytes(own(shown.prediction[..., part], size)), size)
        what = "the student's features, in the same colours"
        what += "; grey patches are not learnt" * bool(np.isnan(shown.prediction).any())
        pair = [target, Column("prediction", what, predicted)]
        if colours and len(colours) > 1:  # a pair for each teacher, explained once
            short = cut(name, PANEL // 2)
            pair = [
                column._replace(
                    name=f"{short} {column.name}", explanation="" if first else column.explanation
                )
                for column in pair
            ]
        columns += pair
        first = part.stop
    return columns


# --- a page ---------------------------------------------------------------------------------------


def caption_of(dataset: CachedDataset, row: int, view: int) -> str:
    """What an image is called: row, view, key, and its class where it has one."""
    classes, label = dataset.classes, int(dataset.labels[row])
    name = f" ({classes[label]})" if classes and label >= 0 else ""
    return f"row {row}, view {view}: {dataset.cache.manifest.key(row)}{name}"


def draw_page(title: str, columns: list[Column], captions: list[str]) -> np.ndarray:
    """A page, uint8 [H, W, 3]: the title, columns under their names, a caption above each row of
    panels, and what the columns show.
    """
    from PIL import Image, ImageDraw

    smallest = min((column.panels.shape[1:3] for column in columns), key=max)
    panel = zoomed(smallest)
    across, down = panel[1] + GAP, panel[0] + GAP
    width = 2 * MARGIN + len(columns) * across - GAP
    legend = [
        line
        for column in columns
        if column.explanation
        for line in _wrapped(f"{column.name}: {column.explanation}", width - 2 * MARGIN)
    ]
    top = MARGIN + 2 * LINE
    height = top + len(captions) * (LINE + down) + len(legend) * LINE + MARGIN
    page = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str) -> None:
        pen.text((x, y), cut(text, width - MARGIN - x), (0, 0, 0), font())

    write(MARGIN, MARGIN, title)
    for x, column in enumerate(columns):
        write(MARGIN + x * across, MARGIN + LINE, column.name)
        for y, pixels in enumerate(upscale(column.panels, panel)):
            at = MARGIN + x * across, top + LINE + y * (LINE + down)
            page.paste(Image.fromarray(pixels), at)
    for y, caption in enumerate(captions):
        write(MARGIN, top + y * (LINE + down), caption)
    for y, line in enumerate(legend):
        write(MARGIN, top + len(captions) * (LINE + down) + y * LINE, line)
    return np.asarray(page)


class Tile(NamedTuple):
    """A picture on a page of many, and what is written below it."""

    pixels: np.ndarray
    """[h, w, 3] uint8, at most PANEL high and wide (`thumbnail`)."""
    lines: list[str]


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] uint8 whose longer edge is PANEL."""
    from PIL import Image

    scale = PANEL / max(pixels.shape[:2])
    height, width = (max(1, round(scale * edge)) for edge in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height)))


def draw_tiles(title: str, tiles: list[Tile], *, across: int = 6) -> np.ndarray:
    """A page, uint8 [H, W, 3]: the title, and rows of `across` pictures with their lines."""
    from PIL import Image, ImageDraw

    across = max(1, min(across, len(tiles)))
    below = max((len(tile.lines) for tile in tiles), default=0) * LINE
    step, down = PANEL + GAP, PANEL + below + GAP
    rows = -(-len(tiles) // across)
    size = 2 * MARGIN + across * step - GAP, 2 * MARGIN + LINE + rows * down
    page = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), cut(title, size[0] - 2 * MARGIN), (0, 0, 0), font())
    for number, tile in enumerate(tiles):
        x, y = MARGIN + number % across * step, MARGIN + LINE + number // across * down
        height, width = tile.pixels.shape[:2]
        page.paste(
            Image.fromarray(tile.pixels), (x + (PANEL - width) // 2, y + (PANEL - height) // 2)
        )
        for i, line in enumerate(tile.lines):
            pen.text((x, y + PANEL + i * LINE), cut(line, PANEL), (0, 0, 0), font())
    return np.asarray(page)


def check_apart(out: Path, roots: Sequence[AnyPath]) -> None:
    """Raises DataError if `out` lies in one of the folders of the images, or is a file that is
    read."""
    for root in roots:
        if not is_local(root) or not out.resolve().is_relative_to(root.resolve()):
            continue
        if out.resolve() == root.resolve():
            raise DataError(
                f"--out {out} is what is read",
                expected="another place: nothing is written over it",
                fix=f"--out {out.with_stem(out.stem + '-2')}",
            )
        raise DataError(
            f"{out} lies in the folder of the images, {root}",
            expected="a place where it is not taken for an image",
            fix=f"--out {root.resolve().parent / out.name}",
        )


def save_picture(page: np.ndarray, path: Path) -> Path:
    """Write a page; the ending says the format. What was there stays until it is whole. Raises
    CacheError if it cannot be written."""
    from PIL import Image

    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(page).save(part)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise CacheError(
            f"{path} cannot be written: {why}",
            expected="a folder that can be written, on a disk with room, and an ending of pictures",
            fix=f"--out elsewhere, for a picture as {path.stem or 'sheet'}.png",
        ) from None
    return path


def zoomed(size: Size) -> tuple[int, int]:
    """(height, width) in which a view of `size` pixels is drawn: small ones could not be seen."""
    height, width = height_width(size)
    zoom = max(1, round(PANEL / max(height, width)))
    return zoom * height, zoom * width


def _font_file() -> str:
    """Of matplotlib, because it has more letters than Pillow's."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@lru_cache
def font() -> Any:
    """Of all that is written on a page."""
    from PIL import ImageFont

    return ImageFont.truetype(_font_file(), 12)


@lru_cache
def label_font() -> Any:
    """The font of names within a panel."""
    from PIL import ImageFont

    return ImageFont.truetype(_font_file(), 10)


@lru_cache
def _letters() -> frozenset[int]:
    """The characters that the font can draw."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file())).get_charmap())


def printable(text: str) -> str:
    """Text as it can be drawn: what is no character, would break the line, or is not in the font
    (Chinese, Japanese, Korean), as its escape: a name can still be told and found by it.
    """
    return "".join(c if c.isprintable() and ord(c) in _letters() else ascii(c)[1:-1] for c in text)


def cut(text: str, width: int) -> str:
    """Text of at most `width` pixels. The middle is left out: names differ at their ends."""
    whole = text = printable(text)
    half = len(whole) // 2
    while half > 4 and font().getlength(text) > width:
        half -= 1
        text = f"{whole[:half]}…{whole[-half:]}"
    return text


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines, line = list[str](), ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font().getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]
