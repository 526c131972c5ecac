"""Views kept beside their targets: exact by construction, and the originals may go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STUDENT, make_photos, tree

from milan.data.dataset import open_cache
from milan.errors import CacheError, ConfigError
from milan.images.views import pack, unpack
from milan.store.cache import TargetCache
from milan.training.pretrain import pretrain
from pipeline.extract import extract_targets
from pipeline.repair import repair
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.verify import CORRUPT, GOOD, verify


@pytest.fixture(scope="module", params=["jpeg:95", "webp"])
def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, teacher_files: Any
) -> Path:
    """A store with its views, one image of it bad, whose originals are gone."""
    folder = tmp_path_factory.mktemp("kept")
    photos = make_photos(folder / "photos")
    (photos / "class 0" / "none.jpg").touch()
    extract_targets(
        str(photos), out=str(folder / "t.zarr"), views=2, shard_size=8, batch_size=7,
        store_views=request.param, executor="local", max_bad="1", **teacher_files,
    )  # fmt: skip
    photos.rename(folder / "away")
    return folder / "t.zarr"


def test_the_teacher_saw_the_stored_pixels(kept: Path, teacher_files: dict[str, str]) -> None:
    """Shown the unpacked pictures again, it says what is stored; and they are the views."""
    dataset = open_cache(kept)
    assert len(dataset) == 48
    rows = dataset.good[:6]
    pixels = dataset.pixels(rows, np.ones(6, int))
    teacher = load_teacher(TeacherSpec(**{
        "name": teacher_files["teacher"], "pretrained": teacher_files["pretrained"]
    }), device="cpu")  # fmt: skip
    features, attention = teacher.targets(pixels)
    cache = dataset.cache
    stored = cache.read(rows, np.ones(6, int))
    assert np.allclose(stored.attention, attention.numpy(), atol=1e-6)
    assert dataset[0]["image"].shape == (3, 32, 32)
    assert features.shape == (6, 17, 24)
    assert verify(kept, deep=True).code == GOOD


def test_originals_are_not_needed(kept: Path, tmp_path: Path) -> None:
    """Training runs from the store alone, in loader workers too."""
    settings = {**STUDENT, "epochs": 1, "batch_size": 8, "cache": str(kept)}
    one = pretrain(out=str(tmp_path / "a"), num_workers=0, **settings)
    two = pretrain(out=str(tmp_path / "b"), num_workers=1, **settings)
    assert one["loss"] == two["loss"]


def test_lossless_views_are_the_rendered_ones() -> None:
    """webp keeps every bit; JPEG is near; what is no picture is an error."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(unpack(pack(pixels, "webp")), pixels)
    smooth = np.repeat(np.arange(32, dtype=np.uint8)[:, None, None] * 8, 32, 1).repeat(3, 2)
    off = unpack(pack(smooth, "jpeg:95")).astype(int) - smooth
    assert np.abs(off).max() <= 12
    with pytest.raises(ValueError, match="cannot be decoded"):
        unpack(b"no picture")


def test_a_batch_is_read_in_any_order(kept: Path) -> None:
    """Rows of all shards and both views, some twice; each has its own pixels."""
    dataset = open_cache(kept)
    rows = np.random.default_rng(1).permutation(np.repeat(dataset.good, 3))[:40]
    views = np.arange(40) % 2
    pixels = dataset.pixels(rows, views)
    for i in range(40):
        assert np.array_equal(pixels[i], dataset.pixels(rows[i : i + 1], views[i : i + 1])[0])
    assert dataset.cache.packed(rows[:0], views[:0]) == []
    with pytest.raises(IndexError, match="no row 99"):
        dataset.pixels(np.array([1, 99]), np.array([0, 0]))


def test_a_picture_of_another_size(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not what the teacher saw, whatever decodes it."""
    dataset = open_cache(kept)
    how = dataset.cache.spec.stored_views
    other = pack(np.zeros((31, 32, 3), np.uint8), how)
    monkeypatch.setattr(TargetCache, "packed", lambda *_: [other])
    with pytest.raises(CacheError, match="other pixels"):
        dataset.pixels(dataset.good[:1], np.zeros(1, int))


@pytest.mark.parametrize("damage", ["bits", "cut", "gone"])
def test_damaged_pictures_are_found_and_made_again(kept: Path, tmp_path: Path, damage: str) -> None:
    """As any other file of a shard."""
    copy = tmp_path / "t.zarr"
    shutil.copytree(kept, copy)
    before = tree(copy)
    path = copy / "generations/000/pixels/c/1/1"
    data = bytearray(path.read_bytes())
    if damage == "bits":
        middle = len(data) // 2
        for at in range(middle, middle + 900):  # some of it is pixels, not headers
            data[at] ^= 16
        path.write_bytes(data)
    elif damage == "cut":
        os.truncate(path, 10)
    else:
        path.unlink()
    verdict = verify(copy, deep=True)
    assert (verdict.code, verdict.shards) == (CORRUPT, [("generations/000", 1, 1)])
    dataset = open_cache(copy)
    with pytest.raises(CacheError):
        dataset.pixels(dataset.good, np.ones(24, int))
    (kept.parent / "away").rename(kept.parent / "photos")
    try:
        assert repair(copy, data_root=str(kept.parent / "photos")).code == GOOD
    finally:
        (kept.parent / "photos").rename(kept.parent / "away")
    assert tree(copy) == before


def test_stored_views_are_part_of_what_a_store_is(
    kept: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """They decide what the teacher saw: another way to keep them is another store."""
    with pytest.raises(CacheError, match="stored_views"):
        extract_targets(
            str(kept.parent / "away"), out=str(kept), views=2, shard_size=8, executor="local",
            max_bad="1", **teacher_files,
        )  # fmt: skip
    for wrong in ("png", "jpeg", "jpeg:0", "jpeg:101"):
        with pytest.raises(ConfigError, match="none, webp, or jpeg:95"):
            extract_targets("photos", out=str(tmp_path / "t"), store_views=wrong)


def test_their_bytes_are_counted(kept: Path) -> None:
    """In the index; the plan's estimate is of that size."""
    cache = TargetCache(kept)
    pictures = sum(
        p.stat().st_size for p in (kept / "generations/000/pixels").rglob("*") if p.is_file()
    )
    arrays = sum(g.entry.bytes for g in cache.generations) - pictures
    assert arrays == pytest.approx(cache.spec.view_bytes() * 48, rel=0.05)
    assert pictures > 0
