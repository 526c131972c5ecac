"""What a call does to a store is decided once it has the lock: another may have been faster."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import EXTRACTION, Notes

import pipeline.extract
import pipeline.repair
from milan.store.format import GENERATION
from pipeline.extract import extract_targets
from pipeline.repair import repair
from pipeline.verify import GOOD, verify


def test_a_store_that_grew_since_the_plan_is_planned_anew(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call adds images while this one, which adds views, loads its teacher."""
    settings = {**EXTRACTION, **teacher_files, "out": str(tmp_path / "t.zarr")}
    extract_targets(str(photos), **settings | {"limit": 16, "views": 1})
    real, others = pipeline.extract.Store, [{"views": 1}]

    def late(path: Any) -> Any:
        if others:
            extract_targets(str(photos), **settings | others.pop())
        return real(path)

    monkeypatch.setattr(pipeline.extract, "Store", late)
    notes = Notes()
    summary = extract_targets(str(photos), progress=notes, **settings | {"views": 2})
    assert notes.line("planned anew")
    assert (summary["images"], summary["views"]) == (24, 2)
    assert verify(tmp_path / "t.zarr", deep=True).code == GOOD


def test_what_another_call_mended_is_not_written_again(
    store: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another device its bytes would be others, for a reader that has begun."""
    copy = Path(shutil.copytree(store, tmp_path / "copy.zarr"))
    os.truncate(copy / GENERATION / "features/c/1/0/0/0", 50)
    real, others, mended = pipeline.repair.Store, [1], list[int]()
    shard = copy / GENERATION / "features/c/1/0/0/0"

    def late(path: Any) -> Any:
        if others.pop() if others else 0:
            repair(copy, data_root=str(photos))
            mended.append(shard.stat().st_ino)
        return real(path)

    monkeypatch.setattr(pipeline.repair, "Store", late)
    assert repair(copy, data_root=str(photos)).code == GOOD
    assert mended == [shard.stat().st_ino]
