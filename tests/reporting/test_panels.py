"""The sheet of a run: when it is drawn, and what it shows."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, WATCHED, board_of
from PIL import Image

import milan
from milan.core.device import MEAN, STD, denormalise, normalise
from milan.data.dataset import CachedDataset
from milan.objectives.pixels import patchify, pixel_regression, unpatchify_prediction
from milan.reporting import panels
from milan.reporting.mask_sheet import MaskRow, mask_sheet
from milan.reporting.panels import SheetInputs
from milan.store.cache import TargetCache


@pytest.fixture(scope="module")
def watched(finished_run: Callable[..., Path]) -> Path:
    """An uninterrupted run of WATCHED; not to be changed."""
    return finished_run(**WATCHED)


def test_a_sheet_every_so_often(watched: Path) -> None:
    """After the first epoch, every fourth, and the last; the newest lies in the run's folder."""
    events = board_of(watched).Images("sheet")
    assert [event.step for event in events] == [2, 10, 16]
    shown = [np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events]
    assert np.array_equal(shown[-1], np.asarray(Image.open(watched / "sheet.png")))
    assert not np.array_equal(shown[0], shown[-1])
    assert not panels_of(shown[0])[0].std() < 10


def panels_of(page: np.ndarray, size: int = 32, columns: int = 5, rows: int = 4) -> np.ndarray:
    """[columns, rows, size, size, 3] of a sheet."""
    zoom = panels.zoomed(size)[0] // size
    edge, top = size * zoom, panels.MARGIN + 3 * panels.LINE
    step = edge + panels.GAP
    body = page[top:, panels.MARGIN :]
    found = [
        [body[y * (panels.LINE + step) :, x * step :][:edge:zoom, :edge:zoom] for y in range(rows)]
        for x in range(columns)
    ]
    return np.array(found)


def test_what_a_sheet_shows() -> None:
    """The view, heat where attention is, grey where nothing is seen, and what is the same in the
    same colours."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    attention = np.full((3, 16), 0.01)
    attention[:, 6] = 0.9
    hidden = draw.random((3, 16)) < 0.75
    features = draw.normal(size=(3, 16, 12))
    said = features * draw.uniform(0.5, 2, (3, 16, 1))  # only directions count
    said[2, 15] *= -1
    shown = SheetInputs(np.arange(3), pixels, attention, hidden, features, said)
    columns = panels.sheet_of_run(shown, None)
    page = panels.draw_page("", columns, ["a", "b", "c"])
    view, heat, seen, theirs, ours = panels_of(page, rows=3)
    assert [column.name for column in columns] == [
        "view", "attention", "visible patches", "features", "prediction"
    ]  # fmt: skip
    assert np.array_equal(view, pixels)
    patches = heat.reshape(3, 4, 8, 4, 8, 3).mean(axis=(2, 4, 5)).reshape(3, 16)
    assert (patches.argmax(axis=1) == 6).all()
    grey = hidden.reshape(3, 4, 4).repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(seen[~grey], pixels[~grey])
    assert (seen[grey] == 128).all()
    differ = (theirs != ours).any(axis=-1)
    assert np.argwhere(differ.any(axis=(1, 2))).tolist() == [[2]]
    assert differ[2, 24:, 24:].all()
    assert not differ[2, :24].any()


def test_pixels_are_painted(store: Path, tmp_path: Path) -> None:
    """A student of pixels is shown by what it paints: a perfect one paints the image."""
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    images = normalise(pixels, MEAN, STD)
    patches = patchify(images, 8)
    deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    perfect = (patches - patches.mean(dim=-1, keepdim=True)) / deviation
    perfect = torch.cat([torch.zeros(2, 1, 192), perfect], dim=1)
    hidden = torch.ones(2, 16, dtype=torch.bool)
    assert float(pixel_regression(perfect, images, hidden, patch=8)) < 1e-10
    again = denormalise(unpatchify_prediction(perfect, images, patch=8), MEAN, STD)
    assert torch.equal(again, pixels)
    run = {**SMALL, "out": str(tmp_path), "epochs": 1, "objective": "pixels"}
    milan.pretrain(str(store), **run)  # nothing is held out: training rows are shown
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    view, _, _, said = panels_of(page, columns=4)
    rows = np.arange(4)
    expected = CachedDataset(TargetCache(store)).pixels(rows, np.zeros_like(rows))
    assert np.array_equal(view, expected)
    assert said.std() > 5


def test_a_sheet_of_masks_has_no_endless_rows() -> None:
    """Whatever the sides of an image: a tall one is narrower, with its shape."""
    tall = np.zeros((900, 3, 3), np.uint8)
    rows = [MaskRow("tall", tall, *2 * [np.zeros((900, 3), np.int64)])]
    sheet = mask_sheet("title", rows, ["ground"], [[9, 200, 9]])
    assert sheet.shape[0] < 700
    assert (sheet == (9, 200, 9)).all(axis=2).any(axis=0).sum() < 40  # two panels and a swatch
