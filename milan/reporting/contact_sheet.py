"""Pictures of a store: views, attention, masks and features; and what its codec changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from milan.core import rng
from milan.core.config_fields import check_seed
from milan.core.paths import AnyPath, check_unicode
from milan.core.rng import mask_noise
from milan.data.dataset import CachedDataset, open_cache
from milan.images.views import View
from milan.models.masking import importance_mask, visible_count
from milan.reporting.panels import (
    Colours,
    Column,
    attention_column,
    caption_of,
    check_apart,
    draw_page,
    features_column,
    heat_column,
    patch_features,
    save_picture,
    view_column,
    visible_column,
    zoomed,
)

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
COLOUR_NAMES = ("red", "green", "blue", "orange", "purple", "teal", "brown", "olive")
"""Of the boxes of views, in turn."""


def contact_sheet(
    cache: str | AnyPath,
    *,
    out: str | Path,
    images: int = 8,
    seed: int = 0,
    data_root: str | None = None,
    mask_ratio: float = 0.75,
    masks: int = 3,
    among_images: bool = False,
) -> Path:
    """Draw `images` images of a store, a row each: the image with the crops of its K views, one
    view, the teacher's attention, masks by so many seeds from `seed` on, and the patch features.

    Features are shown by the colours of the store (panels.Colours.of_store), as in the sheets of
    runs. Returns the path of the picture, whose ending says its format. Raises CacheError if it
    cannot be written, and DataError if it would lie in the folder of the images and be read as one
    of them; `among_images` says that it would not be.
    """
    check_unicode(str(out), "the path")
    check_seed(seed)
    dataset = open_cache(cache, data_root=data_root)
    rows, views = _drawn(dataset, out, images, seed, data_root, among_images)
    store = dataset.cache
    attention = store.read(rows, views, features=False).attention
    pixels = dataset.pixels(rows, views)
    size = (pixels.shape[1], pixels.shape[2])
    masked = list[Column]()
    for number in range(seed, seed + masks):
        noise = mask_noise(number, np.zeros_like(rows), rows, views, attention.shape[1])
        mask = importance_mask(
            torch.from_numpy(attention),
            torch.from_numpy(noise),
            visible=visible_count(noise.shape[1], mask_ratio),
        )
        column = visible_column(pixels, mask.boolean().numpy())
        name, explanation = f"{column.name}, seed {number}", column.explanation
        masked.append(Column(name, "" if masked else explanation, column.panels))
    crops = [
        draw_crops(
            Image.fromarray(store.view_spec.decode(dataset.source.read(row))),
            [View.of(c) for c in store.crops(np.full(store.views, row), np.arange(store.views))],
            zoomed(size),
            thick=view,
        )
        for row, view in zip(rows.tolist(), views.tolist(), strict=True)
    ]
    features = patch_features(store, rows, views)
    columns = [
        Column(
            "image and crops",
            "a box is the crop of a view, dashed if flipped; the thick one is the view beside it",
            np.stack(crops),
        ),
        view_column(pixels),
        attention_column(pixels, attention),
        *masked,
        features_column(features, Colours.of_store(store), size),
    ]
    return _saved(dataset, rows, views, columns, Path(out))


def codec_sheet(
    cache: str | AnyPath,
    teacher: Callable[[np.ndarray], torch.Tensor],
    *,
    out: str | Path,
    images: int = 8,
    seed: int = 0,
    data_root: str | None = None,
) -> Path:
    """Draw what the codec changed, a row for each view: the teacher's features of it, computed now
    by `teacher` (uint8 [B, H, W, 3] to [B, T, C]), those of the store, and 1 - cosine of the two.

    The same views as in the contact sheet of this seed. Raises as contact_sheet does.
    """
    check_unicode(str(out), "the path")
    check_seed(seed)
    dataset = open_cache(cache, data_root=data_root)
    rows, views = _drawn(dataset, out, images, seed, data_root)
    pixels, colours = dataset.pixels(rows, views), Colours.of_store(dataset.cache)
    stored = patch_features(dataset.cache, rows, views)
    computed = teacher(pixels)[:, 1:].float().cpu().numpy()
    lengths = np.linalg.norm(stored, axis=-1) * np.linalg.norm(computed, axis=-1)
    error = 1 - (stored * computed).sum(axis=-1) / lengths.clip(1e-12)
    size, most = (pixels.shape[1], pixels.shape[2]), max(float(error.max()), 1e-12)
    by_teacher = features_column(computed, colours, size)
    columns = [
        view_column(pixels),
        by_teacher._replace(name="teacher"),
        Column("store", "what the codec made of them, in the same colours",
               features_column(stored, colours, size).panels),
        heat_column(
            "codec error",
            f"1 - cosine of the two: black is 0, yellow {most:.2g}, the greatest here; "
            f"mean {error.mean():.2g}",
            error, most, size,
        ),
    ]  # fmt: skip
    return _saved(dataset, rows, views, columns, Path(out))


def _drawn(
    dataset: CachedDataset,
    out: str | Path,
    images: int,
    seed: int,
    data_root: str | None,
    among_images: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, views) of a sheet that is written to `out`. Raises CacheError and DataError."""
    if not dataset.cache.spec.has_targets:
        raise dataset.cache.no_targets()
    if not among_images:
        check_apart(Path(out), dataset.cache.image_places(data_root))
    chosen = rng.permutation(seed, rng.SAMPLE, (1,), len(dataset.good))[: max(1, images)]
    rows = np.sort(dataset.good[chosen])
    return rows, np.arange(len(rows)) % dataset.cache.views


def _saved(
    dataset: CachedDataset, rows: np.ndarray, views: np.ndarray, columns: list[Column], out: Path
) -> Path:
    store = dataset.cache
    about = store.attributes["about"]
    random = ", random weights" if about["random_weights"] else ""
    page = draw_page(
        f"{store.images:,} images x {store.views} views, {store.spec.codec}, "
        f"teacher {about['name']}{random}",
        columns,
        [caption_of(dataset, *at) for at in zip(rows.tolist(), views.tolist(), strict=True)],
    )
    return save_picture(page, out)


def draw_crops(
    image: Any, crops: list[View], shape: tuple[int, int], *, thick: int | None = None
) -> np.ndarray:
    """An image with a box for each of its crops, in a panel of this height and width, uint8."""
    from PIL import ImageDraw

    scale = min(shape[0] / image.size[1], shape[1] / image.size[0])
    small = image.convert("RGB").resize([max(1, round(scale * n)) for n in image.size])
    panel = Image.new("RGB", shape[::-1], (255, 255, 255))
    panel.paste(small)
    pen = ImageDraw.Draw(panel)
    for view, crop in enumerate(crops):
        # Crops of the whole image would hide one another: each is drawn a little further in.
        inset = 2 * view
        left, top = scale * crop.left + inset, scale * crop.top + inset
        right = scale * (crop.left + crop.width) - 1 - inset
        bottom = scale * (crop.top + crop.height) - 1 - inset
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            _line(pen, a, b, _COLOURS[view % len(_COLOURS)], 3 if view == thick else 1, crop.flip)
    return np.asarray(panel)


def _line(
    pen: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    width: int,
    dashed: bool,
) -> None:
    """Pillow draws no dashes itself."""
    a, b = np.array(start), np.array(end)
    pieces = max(1, round(float(np.abs(b - a).max()) / 5)) if dashed else 1
    for i in range(0, pieces, 2):
        pen.line([*(a + (b - a) * i / pieces), *(a + (b - a) * (i + 1) / pieces)], colour, width)
