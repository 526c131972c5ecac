"""Disks that are too small for a store, or fill up while it is written."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from helpers import tree

import pipeline.extraction.worker
import pipeline.writing.disk
from milan.errors import CacheError
from milan.store.cache import TargetCache
from milan.store.format import GENERATION, INDEX, record_name
from pipeline.extract import extract_targets

ORIGIN = f"{GENERATION}/origin.json"
Usage = namedtuple("Usage", "total used free")


def settings_for(out: Path, teacher_files: dict[str, str]) -> dict[str, Any]:
    return {
        "out": str(out), "views": 2, "shard_size": 8, "batch_size": 7, "executor": "local",
        **teacher_files,
    }  # fmt: skip


def test_too_little_disk_is_refused_before_anything_is_written(
    photos: Path, store: Path, teacher_files: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run of days must not end in a full disk; a resumed one needs only what is missing."""
    settings = settings_for(tmp_path / "deep" / "t.zarr", teacher_files)
    needed = TargetCache(store).spec.total_bytes()
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, free))
    with pytest.raises(CacheError, match=r"the store needs .* free.*--codec int8"):
        extract_targets(str(photos), **settings)
    with pytest.raises(CacheError, match="the store needs"):
        extract_targets(str(photos), dry_run=True, **settings)
    assert list(tmp_path.iterdir()) == []
    free = int(needed * 1.03)
    extract_targets(str(photos), **settings)
    # Two of six shards are missing: a third of the bytes is enough.
    for view in (0, 1):
        (Path(settings["out"]) / GENERATION / "records" / record_name(2, view)).unlink()
    free = int(needed * 0.3)
    with pytest.raises(CacheError, match="the store needs"):
        extract_targets(str(photos), **settings)
    free = int(needed * 0.4)
    extract_targets(str(photos), **settings)
    assert tree(Path(settings["out"])) == tree_with_same_origin(store, Path(settings["out"]))


def tree_with_same_origin(store: Path, other: Path) -> dict[str, bytes]:
    """The tree of `store`, but the origin of `other`: data lies elsewhere from it."""
    files = tree(store)
    files[ORIGIN] = (other / ORIGIN).read_bytes()
    return files


@pytest.mark.parametrize("where", ["staging", "record", "index"])
def test_a_disk_that_fills_up_loses_nothing(
    photos: Path, store: Path, teacher_files: dict[str, str], tmp_path: Path, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No space in the middle: one clear line; after some is freed the same line completes."""
    settings = settings_for(tmp_path / "t.zarr", teacher_files)
    module = pipeline.extraction.worker if where == "staging" else pipeline.writing.disk
    name = "stage_shard" if where == "staging" else "write_whole"
    real, calls = getattr(module, name), 0

    def full(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        # Two whole files come with the empty store; then the records, then the index.
        calls += where != "index" or arguments[0].name == INDEX
        if calls == {"staging": 4, "record": 5, "index": 1}[where]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, full)
    with pytest.raises(CacheError, match=r"cannot be written: .* what is committed stays"):
        extract_targets(str(photos), **settings)
    assert not (tmp_path / "t.zarr" / INDEX).exists()
    monkeypatch.setattr(module, name, real)
    extract_targets(str(photos), **settings)
    assert tree(tmp_path / "t.zarr") == tree_with_same_origin(store, tmp_path / "t.zarr")
