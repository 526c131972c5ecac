"""A picture of a store: views, attention, masks and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core import rng
from milan.core.config_fields import check_seed
from milan.core.paths import AnyPath, check_unicode
from milan.core.rng import mask_noise
from milan.data.dataset import open_cache
from milan.images.decode import decode
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
    patch_features,
    save_picture,
    view_column,
    visible_column,
    zoom_of,
)

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def contact_sheet(
    cache: str | AnyPath,
    *,
    out: str | Path,
    images: int = 8,
    seed: int = 0,
    data_root: str | None = None,
    mask_ratio: float = 0.75,
    among_images: bool = False,
) -> Path:
    """Draw `images` images of a store, a row each: the image with the crops of its K views, one
    view, the teacher's attention, a sampled mask, and the patch features.

    Features are shown by the colours of the store (panels.Colours.of_store), as in the sheets of
    runs. Returns the path of the picture, whose ending says its format. Raises CacheError if it
    cannot be written, and DataError if it would lie in the folder of the images and be read as one
    of them; `among_images` says that it would not be.
    """
    check_unicode(str(out), "the path")
    check_seed(seed)
    dataset = open_cache(cache, data_root=data_root)
    if not dataset.cache.spec.has_targets:
        raise dataset.cache.no_targets()
    if not among_images:
        check_apart(Path(out), dataset.cache.image_places(data_root))
    store = dataset.cache
    usable = dataset.good
    chosen = rng.permutation(seed, rng.SAMPLE, (1,), len(usable))[: max(1, images)]
    rows = np.sort(usable[chosen])
    views = np.arange(len(rows)) % store.views
    attention = store.read(rows, views, features=False).attention
    pixels = dataset.pixels(rows, views)
    size = pixels.shape[1]
    noise = mask_noise(seed, np.zeros_like(rows), rows, views, attention.shape[1])
    mask = importance_mask(
        torch.from_numpy(attention),
        torch.from_numpy(noise),
        visible=visible_count(noise.shape[1], mask_ratio),
    )
    crops = [
        _crops(
            decode(dataset.source.read(row)),
            store.crops(np.full(store.views, row), np.arange(store.views)),
            size * zoom_of(size),
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
        visible_column(pixels, mask.boolean().numpy()),
        features_column(features, Colours.of_store(store), size),
    ]
    about = store.attributes["about"]
    random = ", random weights" if about["random_weights"] else ""
    page = draw_page(
        f"{store.images:,} images x {store.views} views, {store.spec.codec}, "
        f"teacher {about['name']}{random}",
        columns,
        [caption_of(dataset, *at) for at in zip(rows.tolist(), views.tolist(), strict=True)],
    )
    return save_picture(page, Path(out))


def _crops(image: Any, crops: np.ndarray, edge: int, *, thick: int) -> np.ndarray:
    """An image with a box for each of its views [K, 5], in a square of `edge` pixels."""
    from PIL import Image, ImageDraw

    scale = edge / max(image.size)
    small = image.convert("RGB").resize([max(1, round(scale * n)) for n in image.size])
    panel = Image.new("RGB", (edge, edge), (255, 255, 255))
    panel.paste(small)
    pen = ImageDraw.Draw(panel)
    for view, numbers in enumerate(crops):
        crop = View.of(numbers)
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
