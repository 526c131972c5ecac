"""Pictures: written, not blank, and every panel shows what it says, patch by patch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import STUDENT, make_photos, run_here
from matplotlib import pyplot as plt
from PIL import Image

import milan
from milan.core.rng import mask_noise
from milan.images.views import View
from milan.models.masking import importance_mask
from milan.reporting import contact_sheet as visualise
from milan.reporting.contact_sheet import contact_sheet
from milan.reporting.panels import Colours
from milan.reporting.report import build_report
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets

TITLES = ["image and crops", "a view", "attention", "visible patches", "features"]


@pytest.fixture
def sheet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Draw a sheet and return its matplotlib figure; the picture is `sheet.png`."""
    drawn: list[Any] = []
    save = visualise.save_figure

    def kept(figure: Any, out: str | Path) -> Path:
        drawn.append(figure)
        return save(figure, out)

    monkeypatch.setattr(visualise, "save_figure", kept)

    def draw(store: Path, **settings: Any) -> Any:
        assert contact_sheet(store, out=tmp_path / "sheet.png", **settings).exists()
        return drawn[-1]

    return draw


def panels(figure: Any) -> list[list[Any]]:
    """Axes of the sheet by row and column."""
    axes = figure.axes
    assert len(axes) % len(TITLES) == 0
    return [axes[i : i + len(TITLES)] for i in range(0, len(axes), len(TITLES))]


def test_a_sheet_is_a_picture(store: Path, sheet: Callable[..., Any], tmp_path: Path) -> None:
    """A PNG of a readable size in which every panel varies."""
    figure = sheet(store, images=3)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB"))
    assert 900 < width < 2000
    assert 500 < height < 1500
    assert pixels.std() > 20
    rows = panels(figure)
    assert [axis.get_title() for axis in rows[0]] == TITLES
    for row in rows:
        for axis in row:
            assert axis.images
            for image in axis.images:
                assert np.asarray(image.get_array(), float).std() > 0.01, axis.get_title()
    assert "24 images x 2 views, int8, teacher" in figure.get_suptitle()
    assert not plt.get_fignums(), "a figure left open is memory left taken"


def test_a_row_is_one_image(store: Path, cache: TargetCache, sheet: Callable[..., Any]) -> None:
    """Row number and class in the margin, its boxes on the whole image, as the store has them."""
    for row in panels(sheet(store, images=4, seed=2)):
        number, name = row[0].get_ylabel().removeprefix("row ").split("\n")
        image = int(number)
        assert cache.manifest.key(image).startswith(f"{name}/")
        shape = np.asarray(row[0].images[0].get_array()).shape
        record = cache.generations[0].record(image // cache.spec.shard_size, 0)
        at = image - record["rows"][0]
        assert shape[:2] == (record["heights"][at], record["widths"][at])
        boxes = row[0].patches
        assert len(boxes) == 2
        crops = cache.crops(np.full(2, image), np.arange(2))
        for view, (box, crop) in enumerate(zip(boxes, map(View.of, crops), strict=True)):
            inset = 0.012 * view * min(shape[:2])
            assert box.get_x() == pytest.approx(crop.left - 0.5 + inset)
            assert box.get_y() == pytest.approx(crop.top - 0.5 + inset)
            assert box.get_width() == pytest.approx(crop.width - 2 * inset)
            assert box.get_height() == pytest.approx(crop.height - 2 * inset)
            assert box.get_linestyle() == ("--" if crop.flip else "-")


def test_patches_lie_where_they_belong(
    store: Path, cache: TargetCache, sheet: Callable[..., Any]
) -> None:
    """Attention, mask and features in raster order on the view: row by row from the top left."""
    rows = panels(sheet(store, images=3, seed=1))
    for i, row in enumerate(rows):
        number, view = int(row[0].get_ylabel().removeprefix("row ").split("\n")[0]), i % 2
        at, which = np.array([number]), np.array([view])
        (index,) = np.flatnonzero(cache.good_rows() == number)
        pixels = milan.open_cache(store)[2 * int(index) + view]["image"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(row[1].images[0].get_array(), pixels)

        attention = cache.read(at, which).attention
        heat = row[2].images[1]
        np.testing.assert_array_equal(heat.get_array(), attention.reshape(4, 4))
        assert heat.get_extent() == [-0.5, 31.5, 31.5, -0.5]
        assert heat.origin == "upper"

        noise = mask_noise(1, np.zeros(1, int), at, which, 16)
        mask = importance_mask(torch.from_numpy(attention), torch.from_numpy(noise), visible=4)
        shown = np.asarray(row[3].images[0].get_array())
        for patch in range(16):
            top, left = patch // 4 * 8, patch % 4 * 8
            square = (slice(top, top + 8), slice(left, left + 8))
            if patch in mask.visible[0].tolist():
                np.testing.assert_array_equal(shown[square], pixels[square])
            else:
                assert (shown[square] == 128).all()
        assert np.asarray(row[4].images[0].get_array()).shape == (4, 4, 3)


def test_like_features_have_like_colours_in_their_places() -> None:
    """One patch that differs stands out at its row and column, in its image."""
    features = np.ones((2, 16, 24), np.float32)
    features[0, 6, :12] = -1  # row 1, column 2
    features[1, 13] *= 5  # only directions count
    colours = Colours(features)(features)
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
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, sheet: Callable[..., Any]
) -> None:
    """A picture of random weights must not be taken for a teacher's."""
    extract_targets(
        str(photos), out=str(tmp_path / "t.zarr"), views=1, limit=2, executor="local",
        teacher=teacher_files["teacher"], pretrained="none",
    )  # fmt: skip
    assert "random weights" in sheet(tmp_path / "t.zarr", images=1).get_suptitle()


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


def test_the_report(store: Path, photos: Path, tmp_path: Path) -> None:
    """Tables, one JSON of figures, a CSV that DVC plots, three pictures; by the command."""
    runs = {}
    for objective in ("milan", "pixels"):
        runs[objective] = str(tmp_path / objective)
        milan.pretrain(
            str(store), out=runs[objective], objective=objective, epochs=2, batch_size=8,
            num_workers=0, **STUDENT,
        )  # fmt: skip
        assert run_here("linear-probe", "--checkpoint", runs[objective], "--data", photos).code == 0
    section = {"out": "rep", "cache": str(store), "runs": runs, "encoders": runs}
    protocols = "evaluation: {protocols: [linear_probe]}\n"
    (tmp_path / "p.yaml").write_text(f"{protocols}report: {section}")
    done = run_here("report", "--params", "p.yaml", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "rep/report.txt").read_text()
    assert text in done.out
    for word in ("milan", "pixels", "top-1 %", "bytes a view", "extraction, images/s", "sheet.png"):
        assert word in text
    for name in ("sheet.png", "curves.png", "evaluation/linear_probe.png"):
        with Image.open(tmp_path / "rep" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    lines = (tmp_path / "rep/evaluation/linear_probe.csv").read_text().splitlines()
    assert lines[0] == "encoder,metric,value"
    assert [line.split(",")[0] for line in lines[1:]] == ["milan", "pixels"]
    metrics = json.loads((tmp_path / "rep/metrics.json").read_text())
    for name, run in runs.items():
        probe = json.loads(Path(run, "linear_probe.json").read_text())
        assert metrics["linear_probe"]["top1"][name] == probe["top1"]
        assert metrics["linear_probe"]["top5"][name] == probe["top5"]
    section = f"report: {{out: {tmp_path}/rep, cache: x, runs: {{a: none}}, encoders: {{}}}}"
    (tmp_path / "p.yaml").write_text(section)
    with pytest.raises(milan.MilanError, match=r"section evaluation of .* has no 'protocols'"):
        build_report(str(tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").write_text(protocols + section)
    with pytest.raises(milan.MilanError, match="no metrics at none"):
        build_report(str(tmp_path / "p.yaml"))
