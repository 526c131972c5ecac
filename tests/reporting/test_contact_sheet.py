"""Pictures: written, not blank, and every panel shows what it says, patch by patch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import make_photos, run_here
from PIL import Image, ImageColor

import milan
from milan.core.rng import mask_noise
from milan.images.views import View
from milan.models.masking import importance_mask
from milan.reporting import contact_sheet as visualise
from milan.reporting import panels, view_sheet
from milan.reporting.contact_sheet import contact_sheet
from milan.reporting.panels import Colours
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets

MASKS = [f"visible patches, seed {seed}" for seed in range(3)]
NAMES = ["image and crops", "view", "attention", *MASKS, "features"]


class Page(NamedTuple):
    title: str
    columns: dict[str, panels.Column]
    captions: list[str]


@pytest.fixture
def sheet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Page]:
    """Draw a sheet and return what is on its page; the picture is `sheet.png`."""
    drawn: list[Page] = []

    def kept(title: str, columns: list[panels.Column], captions: list[str]) -> np.ndarray:
        drawn.append(Page(title, {column.name: column for column in columns}, captions))
        return panels.draw_page(title, columns, captions)

    monkeypatch.setattr(visualise, "draw_page", kept)

    def draw(store: Path, **settings: Any) -> Page:
        assert contact_sheet(store, out=tmp_path / "sheet.png", **settings).exists()
        return drawn[-1]

    draw.pages = drawn  # type: ignore[attr-defined]
    return draw


def numbers(caption: str) -> tuple[int, int]:
    """Row and view."""
    row, view = re.findall(r"\d+", caption)[:2]
    return int(row), int(view)


def test_a_sheet_is_a_picture(store: Path, sheet: Callable[..., Page], tmp_path: Path) -> None:
    """A PNG of a readable size in which every panel varies, and which says what it shows."""
    page = sheet(store, images=3)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB"))
    assert 800 < width < 2000
    assert 500 < height < 1500
    assert pixels.std() > 20
    assert list(page.columns) == NAMES
    assert [name for name, column in page.columns.items() if not column.explanation] == MASKS[1:]
    for column in page.columns.values():
        for panel in column.panels:
            assert panel.std() > 2, column.name
    assert "dashed if flipped" in page.columns["image and crops"].explanation
    assert "fitted to 24 images of the store" in page.columns["features"].explanation
    assert page.title.startswith("24 images x 2 views, int8, teacher")


def test_a_row_is_one_image(store: Path, cache: TargetCache, sheet: Callable[..., Page]) -> None:
    """Its row, view, file and class above it; the boxes of its crops on the whole image."""
    page = sheet(store, images=4, seed=2)
    for caption, panel in zip(page.captions, page.columns[NAMES[0]].panels, strict=True):
        image, view = numbers(caption)
        key = cache.manifest.key(image)
        assert caption == f"row {image}, view {view}: {key} ({key.split('/')[0]})"
        record = cache.generations[0].record(image // cache.spec.shard_size, 0)
        at = image - record["rows"][0]
        height, width = record["heights"][at], record["widths"][at]
        scale = len(panel) / max(height, width)
        crops = cache.crops(np.full(2, image), np.arange(2))
        assert (panel[round(scale * height) + 2 :] == 255).all()  # lines are 3 wide
        assert (panel[:, round(scale * width) + 2 :] == 255).all()
        crop = View.of(crops[view])  # the thick one: its upper edge has its colour
        inset = 2 * view
        y = round(scale * crop.top) + inset
        left = round(scale * crop.left) + inset
        edge = panel[y, left : round(scale * (crop.left + crop.width)) - inset - 2]
        colour = np.array(ImageColor.getrgb(visualise._COLOURS[view]))
        painted = (np.abs(edge.astype(int) - colour) < 3).all(axis=1).mean()
        assert (0.4 < painted < 0.75) if crop.flip else painted > 0.8


def test_patches_lie_where_they_belong(
    store: Path, cache: TargetCache, sheet: Callable[..., Page]
) -> None:
    """Attention, mask and features in raster order on the view: row by row from the top left."""
    page = sheet(store, images=3, seed=1)
    for i, caption in enumerate(page.captions):
        number, view = numbers(caption)
        at, which = np.array([number]), np.array([view])
        (index,) = np.flatnonzero(cache.good_rows() == number)
        pixels = milan.open_cache(store)[2 * int(index) + view]["image"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(page.columns["view"].panels[i], pixels)

        attention = cache.read(at, which).attention
        heat = page.columns["attention"].panels[i].astype(float).mean(axis=-1)
        patches = heat.reshape(4, 8, 4, 8).mean(axis=(1, 3)) - 0.35 * pixels.mean(axis=-1).reshape(
            4, 8, 4, 8
        ).mean(axis=(1, 3))
        order = np.argsort(attention[0])
        assert (np.diff(patches.ravel()[order]) > -1).all(), "more attention is brighter"

        colours = page.columns["features"].panels[i]
        for seed, patch in np.ndindex(3, 16):
            noise = mask_noise(1 + seed, np.zeros(1, int), at, which, 16)
            mask = importance_mask(torch.from_numpy(attention), torch.from_numpy(noise), visible=4)
            shown = page.columns[f"visible patches, seed {1 + seed}"].panels[i]
            top, left = patch // 4 * 8, patch % 4 * 8
            square = (slice(top, top + 8), slice(left, left + 8))
            if patch in mask.visible[0].tolist():
                np.testing.assert_array_equal(shown[square], pixels[square])
            else:
                assert (shown[square] == 128).all()
            assert (colours[square] == colours[top, left]).all()


def test_colours_compare_between_sheets(
    store: Path, sheet: Callable[..., Page], finished_run: Callable[..., Path]
) -> None:
    """An image has the same colours whatever is beside it, and in the sheet of a run."""
    few, among = sheet(store, images=12), sheet(store, images=24)
    both = [caption for caption in few.captions if caption in among.captions]
    assert 0 < len(both) <= 12
    for caption in both:
        here, there = few.captions.index(caption), among.captions.index(caption)
        for name in ("features", "attention"):
            assert (few.columns[name].panels[here] == among.columns[name].panels[there]).all()
    page = np.asarray(Image.open(finished_run(epochs=2) / "sheet.png"))
    edge = panels.zoomed(32)[0]
    left = panels.MARGIN + 3 * (edge + panels.GAP)
    ours = page[panels.MARGIN + 3 * panels.LINE :, left:][:edge, :edge]  # of row 0, view 0
    at = next(i for i, caption in enumerate(among.captions) if caption.startswith("row 0, view 0:"))
    theirs = panels.upscale(among.columns["features"].panels[at][None], edge)[0]
    assert (ours == theirs).all()


def test_captions_that_cannot_be_drawn_as_they_are() -> None:
    """Names that are long, of another script, or no text: the page has its size, and their end."""
    names = ["price $5_{$", "a\nb\tc", "\udcff.jpg", "写真.jpg", "x" * 500 + "y.jpg", ""]
    grey = np.full((len(names), 32, 32, 3), 90, np.uint8)
    page = panels.draw_page("t" * 300, [panels.Column("view", "what it is " * 30, grey)], names)
    assert page.shape[1] == 2 * panels.MARGIN + panels.zoomed(32)[1]
    assert panels.cut("x" * 500 + "y.jpg", 200).endswith("y.jpg")
    assert panels.cut("a\nb\udcff", 200) == r"a\nb\udcff"
    assert panels.cut("short ü Ж", 200) == "short ü Ж"
    assert panels.cut("写真é.jpg", 200) == r"\u5199\u771fé.jpg"  # as JSON and Python write it


def test_like_features_have_like_colours_in_their_places() -> None:
    """One patch that differs stands out at its row and column, in its image."""
    features = np.ones((2, 16, 24), np.float32)
    features[0, 6, :12] = -1  # row 1, column 2
    features[1, 13] *= 5  # only directions count
    colours = Colours(features)(features, 1)
    assert colours.shape == (2, 4, 4, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    odd = (np.abs(colours - colours[0, 0, 0]) > 0.5).any(axis=-1)
    assert np.argwhere(odd).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "settings",
    [
        {"views": 1},
        {"views": 9, "codec": "float16"},
        {"views": 1, "limit": 1},
        {"views": 2, "img_size": 16},
    ],
)
def test_unusual_stores(
    settings: dict[str, Any], photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """One view, more views than colours, one image, half precision, a grid of 2 x 2 patches."""
    extract_targets(
        str(photos), out=str(tmp_path / "t.zarr"), executor="local",
        **{"limit": 3, **settings}, **teacher_files,
    )  # fmt: skip
    path = contact_sheet(tmp_path / "t.zarr", out=tmp_path / "deep" / "sheet.png", images=5)
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_random_weights_are_flagged(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, sheet: Callable[..., Page]
) -> None:
    """A picture of random weights must not be taken for a teacher's."""
    extract_targets(
        str(photos), out=str(tmp_path / "t.zarr"), views=1, limit=2, executor="local",
        teacher=teacher_files["teacher"], pretrained="none",
    )  # fmt: skip
    assert "random weights" in sheet(tmp_path / "t.zarr", images=1).title


def test_images_that_moved(photos: Path, teacher_files: dict[str, str], tmp_path: Path) -> None:
    """`--data-root` finds them, as in training."""
    data = make_photos(tmp_path / "old", count=3)
    extract_targets(
        str(data), out=str(tmp_path / "t.zarr"), views=1, executor="local", **teacher_files
    )
    data.rename(tmp_path / "new")
    refused = run_here("visualise", "t.zarr", cwd=tmp_path)
    assert refused.code == 1
    assert "--data-root FOLDER" in refused.err
    done = run_here("visualise", "t.zarr", "--data-root", tmp_path / "new", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out == "picture: sheet.png\n"


def test_what_the_codec_changed(
    finished_store: Callable[..., Path], sheet: Callable[..., Page], tmp_path: Path
) -> None:
    """The teacher's features now, the stored ones, and how far apart they are, patch by patch."""
    store, errors = finished_store(), {}
    done = run_here("visualise", store, "--codec-error", "--images", 3, "--out", tmp_path / "e.png")
    assert (done.code, done.err) == (0, "")
    with Image.open(tmp_path / "e.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    for name, noise in (("as stored", 0.0), ("one patch differs", 5.0)):
        views = milan.open_cache(store)

        def teacher(pixels: np.ndarray, noise: float = noise, views: Any = views) -> torch.Tensor:
            items = [views[i] for i in range(len(views))]
            seen = {item["image"].permute(1, 2, 0).numpy().tobytes(): item for item in items}
            found = torch.stack([seen[view.tobytes()]["features"] for view in pixels])
            found[1, 1 + 6, 0] += noise * found[1, 1 + 6].norm()
            return found

        visualise.codec_sheet(store, teacher, out=tmp_path / "sheet.png", images=3)
        page = sheet.pages[-1]
        assert list(page.columns) == ["view", "teacher", "store", "codec error"]
        errors[name] = page.columns["codec error"].panels.astype(int).sum(axis=-1)
    changed = errors["one patch differs"]
    assert changed.max() == changed[1, 8, 16]
    assert np.argwhere(changed > 300).min(axis=0).tolist() == [1, 8, 16]  # row 1, column 2
    assert np.argwhere(changed > 300).max(axis=0).tolist() == [1, 15, 23]


def test_views_before_there_is_a_store(
    photos: Path, store: Path, cache: TargetCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows and pixels that an extraction stores; nothing else is written."""
    drawn: list[tuple[str, list[panels.Column], list[str]]] = []
    monkeypatch.setattr(
        view_sheet, "draw_page", lambda *page: drawn.append(page) or panels.draw_page(*page)
    )
    done = run_here(
        "visualise", "--data", photos, "--views", 2, "--img-size", 32, "--images", 3, cwd=tmp_path
    )
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    (title, columns, captions), *_ = drawn
    assert title.startswith("24 images, 2 views of each: a view has ")
    views = milan.open_cache(store)
    for row in range(3):
        assert captions[row].startswith(f"row {row}: {cache.manifest.key(row)}, ")
        for number in range(2):
            stored = views.pixels(np.array([row]), np.array([number]))[0]
            np.testing.assert_array_equal(columns[1 + number].panels[row], stored)
    assert "20% to 100% of the image's area" in columns[1].explanation
    for arguments, told in (
        (["--data", photos, "--out", photos / "x.png"], "lies in the folder of the images"),
        ([store, "--scale", "0.5,1"], "--scale with a store"),
        (["--data", photos, "--scale", "0,1"], "scale"),
    ):
        refused = run_here("visualise", *arguments, cwd=tmp_path)
        assert refused.code == 1
        assert told in refused.err
        assert refused.err.count("\n") == 1
