"""A picture of a store: views, attention, masks and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core import rng
from milan.core.paths import AnyPath
from milan.core.rng import mask_noise
from milan.data.dataset import CachedDataset
from milan.errors import CacheError
from milan.images.decode import decode
from milan.images.views import View
from milan.models.masking import importance_mask, visible_count
from milan.reporting.panels import Colours, hide_patches

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def contact_sheet(
    cache: str | AnyPath,
    *,
    out: str | Path,
    images: int = 8,
    seed: int = 0,
    data_root: str | None = None,
    mask_ratio: float = 0.75,
) -> Path:
    """Draw `images` images of a store, a row each: the image with the crops of its K views, one
    view, the teacher's attention, a sampled mask, and the patch features.

    The first three principal components of the features, fitted to all patches on the sheet, are
    shown as red, green and blue: similar colours are similar features. Returns the path of the
    picture. Raises CacheError if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    dataset = _open(cache, data_root)
    store = dataset.cache
    usable = dataset.good
    chosen = rng.permutation(seed, rng.SAMPLE, (1,), len(usable))[: max(1, images)]
    rows = np.sort(usable[chosen])
    views = np.arange(len(rows)) % store.views
    targets = store.read(rows, views)
    assert targets.codes is not None
    scale = None if targets.scale is None else torch.from_numpy(targets.scale)
    features = store.codec.decode(torch.from_numpy(targets.codes), scale)[:, 1:]
    colours = Colours(features.numpy())(features.numpy())
    pixels = dataset.pixels(rows, views)
    noise = mask_noise(seed, np.zeros_like(rows), rows, views, targets.attention.shape[1])
    mask = importance_mask(
        torch.from_numpy(targets.attention),
        torch.from_numpy(noise),
        visible=visible_count(noise.shape[1], mask_ratio),
    )
    visible = hide_patches(pixels, mask.boolean().numpy())

    titles = ["image and crops", "a view", "attention", "visible patches", "features"]
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.1 * len(titles), 2.15 * len(rows)), squeeze=False
    )
    for i, row in enumerate(rows.tolist()):
        image = decode(dataset.source.read(row))
        _draw_crops(
            axes[i, 0], image, store.crops(np.full(store.views, row), np.arange(store.views))
        )
        axes[i, 1].imshow(pixels[i])
        heat = targets.attention[i].reshape(store.grid, store.grid)
        axes[i, 2].imshow(pixels[i].mean(axis=-1), cmap="gray", vmin=0, vmax=255)
        axes[i, 2].imshow(
            heat, cmap="inferno", alpha=0.65, interpolation="nearest",
            extent=(-0.5, pixels.shape[2] - 0.5, pixels.shape[1] - 0.5, -0.5),
        )  # fmt: skip
        axes[i, 3].imshow(visible[i])
        axes[i, 4].imshow(colours[i], interpolation="nearest")
        axes[i, 0].set_ylabel(_caption(dataset, row), fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    about = store.attributes["about"]
    random = ", random weights" if about["random_weights"] else ""
    figure.suptitle(
        f"{store.rows:,} images x {store.views} views, {store.spec.codec}, "
        f"teacher {about['name']}{random}",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    return save_figure(figure, out)


def save_figure(figure: Any, out: str | Path) -> Path:
    """Write a picture; returns its path."""
    from matplotlib import pyplot as plt

    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be written: {error}", expected="a path.png") from None
    finally:
        plt.close(figure)
    return path


def _open(cache: str | AnyPath, data_root: str | None) -> CachedDataset:
    from milan.data.dataset import open_cache

    return open_cache(cache, data_root=data_root)


def _draw_crops(axis: Any, image: Any, crops: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(image)
    for view, numbers in enumerate(crops):
        crop = View.of(numbers)
        colour = _COLOURS[view % len(_COLOURS)]
        # Crops of the whole image would hide one another: each is drawn a little further in.
        inset = 0.012 * view * min(image.size)
        axis.add_patch(
            Rectangle(
                (crop.left - 0.5 + inset, crop.top - 0.5 + inset),
                crop.width - 2 * inset,
                crop.height - 2 * inset,
                fill=False,
                edgecolor=colour,
                linewidth=1.6,
                linestyle="--" if crop.flip else "-",
            )
        )


def _caption(dataset: CachedDataset, row: int) -> str:
    classes, label = dataset.cache.manifest.classes, int(dataset.labels[row])
    return f"row {row}" + (f"\n{classes[label]}" if classes and label >= 0 else "")
