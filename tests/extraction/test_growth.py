"""A finished store grows: views, images, teachers, codecs; nothing committed is rewritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, STUDENT, make_photos, tree

from milan.data.dataset import open_cache
from milan.data.order import order_of
from milan.errors import CacheError, ConfigError, TrainError
from milan.store.cache import TargetCache
from milan.training.pretrain import pretrain
from pipeline.extract import extract_targets
from pipeline.verify import GOOD, Audit, verify


@pytest.fixture
def grow(photos: Path, teacher_files: dict[str, str], tmp_path: Path) -> Callable[..., dict]:
    """Extract into the test's own store; each call is the same line with other values."""

    def run(data: Path = photos, **changes: Any) -> dict:
        settings = {"views": 2, "shard_size": 8, "batch_size": 7, **teacher_files, **changes}
        return extract_targets(
            str(data), out=str(tmp_path / "t.zarr"), executor="local", **settings
        )

    return run


def decoded(cache: TargetCache, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
    targets = cache.read(rows, views)
    scale = None if targets.scale is None else torch.from_numpy(targets.scale)
    return cache.codec.decode(torch.from_numpy(targets.codes), scale)


def everything(cache: TargetCache) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.arange(cache.rows * cache.views), cache.views)


def committed(store: Path) -> dict[str, bytes]:
    """All but the index, the one file that is replaced."""
    return {name: data for name, data in tree(store).items() if name != "index.json"}


def test_more_views_and_more_images(grow: Callable[..., dict], tmp_path: Path) -> None:
    """Each step adds generations; the result holds what one extraction of it all would."""
    store = tmp_path / "t.zarr"
    steps = [{"limit": 10}, {"limit": 10, "views": 3}, {"limit": 17, "views": 3}, {"views": 4}]
    held: dict[str, bytes] = {}
    for settings in steps:
        grow(**settings)
        now = committed(store)
        assert {name: now[name] for name in held} == held
        held = now
        assert verify(store, deep=True).code == GOOD
        assert grow(**settings)["images_per_second"] is None  # the same line again does nothing
        assert committed(store) == held
    cache = TargetCache(store)
    assert (cache.rows, cache.views, len(cache.generations)) == (24, 4, 6)
    assert (cache.manifest.table["key"].to_pylist()[:10]) == (
        TargetCache(store, pinned=1).manifest.table["key"].to_pylist()
    )

    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.move(store, whole / "grown.zarr")
    grow(views=4)
    at_once = TargetCache(store)
    assert at_once.manifest.digest() == cache.manifest.digest()
    cache = TargetCache(whole / "grown.zarr")
    rows, views = everything(cache)
    assert np.array_equal(cache.crops(rows, views), at_once.crops(rows, views))
    assert all(
        cache.checksum(r, v) == at_once.checksum(r, v) for r, v in zip(rows, views, strict=True)
    )
    one, other = cache.read(rows, views), at_once.read(rows, views)
    assert np.allclose(one.attention, other.attention, atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(
        decoded(cache, rows, views), decoded(at_once, rows, views), dim=-1
    )
    assert cosine.min() >= 0.9995


def test_new_images_come_after_the_old(
    grow: Callable[..., dict], photos: Path, tmp_path: Path
) -> None:
    """Names that sort first, or a class between the others: old rows keep their numbers."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    grow(data)
    store = tmp_path / "t.zarr"
    before, old = committed(store), TargetCache(store).manifest.table["key"].to_pylist()
    make_photos(tmp_path / "more", count=5, classes=1, seed=4)
    shutil.copytree(tmp_path / "more" / "class 0", data / "a new class")
    summary = grow(data)
    assert (summary["images"], summary["views"]) == (29, 2)
    cache = TargetCache(store)
    assert cache.manifest.table["key"].to_pylist()[:24] == old
    assert {k.split("/")[0] for k in cache.manifest.table["key"].to_pylist()[24:]} == {
        "a new class"
    }
    after = committed(store)
    assert {name: after[name] for name in before} == before
    items = open_cache(store)
    assert len(items) == 58
    assert items[57]["row"] == 28
    assert items[57]["image"].shape == (3, 32, 32)


def test_an_epoch_of_a_grown_store(grow: Callable[..., dict], tmp_path: Path) -> None:
    """Each image once an epoch, each view once in K epochs; shards go on being whole."""
    grow(limit=10)
    grow(limit=20, views=3)
    cache = TargetCache(tmp_path / "t.zarr")
    assert cache.shards_of(np.arange(20)).tolist() == [0] * 8 + [1] * 2 + [2] * 8 + [3] * 2
    order = order_of(cache, seed=0, batch_size=4)
    seen: dict[int, set[int]] = {row: set() for row in range(20)}
    for epoch in range(3):
        rows, views = order.epoch(epoch)
        assert sorted(rows.tolist()) == list(range(20))
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            seen[row].add(view)
        cache.read(rows, views)
    assert all(views == {0, 1, 2} for views in seen.values())


def test_another_codec_and_another_teacher(
    grow: Callable[..., dict], photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Only when asked; each is read by its name, and the views are the same rectangles."""
    store = tmp_path / "t.zarr"
    grow()
    before = committed(store)
    with pytest.raises(CacheError, match=r'codec: "int8" != "float16".*--extend'):
        grow(codec="float16")
    assert committed(store) == before
    grow(codec="float16", extend=True)
    grow(teacher=teacher_files["teacher"], pretrained="none", extend=True)
    after = committed(store)
    assert {name: after[name] for name in before} == before
    cache = TargetCache(store)
    assert len(cache.layers) == 3
    assert cache.layer == cache.layers[0]
    rows, views = everything(cache)
    exact = TargetCache(store, layer=cache.layers[1])
    other = TargetCache(store, layer=cache.layers[2])
    assert exact.codec.name == "float16"
    assert np.array_equal(cache.crops(rows, views), other.crops(rows, views))
    same = torch.nn.functional.cosine_similarity(
        decoded(cache, rows, views), decoded(exact, rows, views), dim=-1
    )
    assert same.min() > 0.999
    assert not np.array_equal(cache.read(rows, views).attention, other.read(rows, views).attention)
    with pytest.raises(CacheError, match=r"no targets called 'int8'.*one of"):
        TargetCache(store, layer="int8")
    with pytest.raises(ConfigError, match="another view spec"):
        grow(codec="float16", extend=True, seed=5)
    # Growing goes on in the layer that is named by its settings.
    grow(views=3, codec="float16")
    assert (TargetCache(store).views, TargetCache(store, layer=cache.layers[1]).views) == (2, 3)
    assert verify(store, deep=True).code == GOOD


def test_an_extension_that_was_stopped_goes_on(
    grow: Callable[..., dict], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old store stays readable meanwhile; the end is that of an undisturbed run."""
    from pipeline.extraction.worker import Extractor

    store = tmp_path / "t.zarr"
    grow()
    grow(views=3)
    expected = tree(store)
    shutil.rmtree(store)
    grow()
    plain, calls = Extractor.run, 0

    def dying(self: Extractor, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Extractor, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        grow(views=3)
    monkeypatch.setattr(Extractor, "run", plain)
    assert TargetCache(store).views == 2
    with pytest.raises(CacheError, match="views: 1 != 2"):
        grow(views=4)  # not what was begun
    grow(views=3)
    assert tree(store) == expected


def test_a_run_keeps_the_store_it_began_with(grow: Callable[..., dict], tmp_path: Path) -> None:
    """Resumed after the store grew, it ends in the same weights; a new run sees all."""
    store, settings = tmp_path / "t.zarr", {**STUDENT, "epochs": 2, "batch_size": 8, "seed": 3}
    settings |= {"num_workers": 0, "cache": str(store)}
    grow(limit=16)
    pretrain(out=str(tmp_path / "whole"), **settings)
    pretrain(out=str(tmp_path / "run"), stop_after=1, **settings)
    grow(views=3)
    pretrain(out=str(tmp_path / "run"), **settings)
    name = "encoder.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "run/run.json").read_text())["stretches"][0]["generations"] == 1
    figures = pretrain(out=str(tmp_path / "new"), **settings)
    assert figures["steps"] == 6
    shutil.rmtree(store)
    grow(limit=16, seed=9)
    with pytest.raises(TrainError, match=r"other settings \(cache: "):
        pretrain(out=str(tmp_path / "run"), **settings)


def test_a_floor_of_fidelity(grow: Callable[..., dict], tmp_path: Path) -> None:
    """A store that would miss it is not begun; the report stands in the store otherwise."""
    with pytest.raises(CacheError, match=r"codec int8 keeps .* at least 0\.99999999"):
        grow(min_cosine=0.99999999)
    assert not (tmp_path / "t.zarr" / "generations/000").exists()
    report = grow(min_cosine=0.999)["fidelity"]
    assert report == TargetCache(tmp_path / "t.zarr").generations[0].fidelity
    assert report["images"] == 12  # half of the images; the codec was fitted to the other half
    assert report["attention_rank"] == pytest.approx(1)
    assert report["mask_overlap"] == 1
    floor = 2 - 2 * np.mean([report["cosine"][kind]["mean"] for kind in ("patch",)])
    assert report["loss_floor"] == pytest.approx(floor, rel=0.3)


def test_pq(grow: Callable[..., dict], photos: Path, tmp_path: Path) -> None:
    """Codebooks in the store, fitted once: a resumed and a grown store decode by the same."""
    pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match=r"pq:64 with 24 channels"):
        grow(codec="pq:64")
    with pytest.raises(ConfigError, match=r"pq:16 with 24 channels.*--codec int8"):
        grow(codec="pq:16")
    demo = {
        "data": ROOT / "demo/data/test.parquet", "teacher": str(ROOT / "demo/teacher/config.json"),
        "pretrained": str(ROOT / "demo/teacher/model.safetensors"), "codec": "pq:16",
        "shard_size": 16, "batch_size": 64,
    }  # fmt: skip
    summary = grow(**demo, limit=32, views=1)
    assert summary["bytes_per_view"] == 50 * 16 + 20 + 49 * 4 + 20 + 20
    store = tmp_path / "t.zarr"
    before = committed(store)
    (store / "index.json").unlink()
    for name in ("00000.00.json", "00001.00.json"):
        (store / "generations/000/records" / name).unlink()
    grow(**demo, limit=32, views=1)
    assert committed(store) == before
    grow(**demo, limit=40, views=2)
    cache = TargetCache(store)
    assert {g.entry.path for g in cache.generations} == {f"generations/00{i}" for i in range(3)}
    verdict = verify(store, deep=True, audit=Audit(30))
    assert (verdict.code, verdict.corrupt) == (GOOD, [])
    report = cache.generations[2].fidelity  # of images that came later, by the first's codebooks
    assert report["cosine"]["patch"]["mean"] > 0.9
