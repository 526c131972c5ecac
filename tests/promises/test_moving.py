"""A run whose store grows: it keeps to what it began with, or moves on when told to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SMALL, Notes, log_of, make_photos, rows_seen, weights

import milan
from milan.data.order import GrownOrder, draw_validation_rows, order_of
from milan.errors import CacheError
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets

RUN: dict[str, Any] = {**SMALL, "epochs": 5, "batch_size": 6, "log_every": 1}
"""4 steps an epoch of 24 images; 6 of 36."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, teacher_files: dict[str, str]) -> Path:
    """A folder with `small`, a store of 24 images, and `large`, the same with 12 more."""
    root = tmp_path_factory.mktemp("grown")
    data = make_photos(root / "data")
    settings = {"views": 2, "shard_size": 8, "executor": "local", **teacher_files}
    extract_targets(str(data), out=str(root / "small"), **settings)
    shutil.copytree(root / "small", root / "large")
    make_photos(root / "data" / "more", count=12, seed=1)
    extract_targets(str(data), out=str(root / "large"), **settings)
    return root


def pretrain(grown: Path, run: Path, store: str, **changes: Any) -> tuple[dict, Notes]:
    """Train on the store of that name; the run is told the same path each time."""
    link = run.parent / "store"
    link.unlink(missing_ok=True)
    link.symlink_to(grown / store)
    notes = Notes()
    found = milan.pretrain(
        str(link),
        progress=notes,
        **RUN | {"out": str(run), "data_root": str(grown / "data")} | changes,
    )
    return found, notes


def test_a_run_keeps_to_what_it_began_with(grown: Path, tmp_path: Path) -> None:
    """The store grew in the middle of a run: the same bits as if it had not."""
    pretrain(grown, tmp_path / "quiet", "small")
    pretrain(grown, tmp_path / "run", "small", stop_after=7)
    figures, notes = pretrain(grown, tmp_path / "run", "large")
    assert figures["steps"] == 20
    assert notes.line("pinned: the first 1 of 2 generations")
    assert weights(tmp_path / "run") == weights(tmp_path / "quiet")


def test_a_run_moves_on_at_the_next_epoch(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 1 ends as it began; from epoch 2 all images are seen; resumed, it is the same run."""
    seen, _ = rows_seen(monkeypatch)
    run = tmp_path / "run"
    pretrain(grown, run, "small", stop_after=7)
    pretrain(grown, run, "large", on_growth="move", stop_after=5)
    figures, _ = pretrain(grown, run, "large")  # having moved, it stays there
    assert figures["steps"] == 4 + 4 + 6 + 6 + 6
    epochs = np.split(np.array(seen), np.cumsum([24, 24, 36, 36]))
    assert [len(e) for e in epochs] == [24, 24, 36, 36, 36]
    assert [len(set(e)) for e in epochs] == [24, 24, 36, 36, 36]
    assert [line["epoch"] for line in log_of(run)][7:10] == [2.0, 2.1667, 2.3333]
    about = json.loads((run / "run.json").read_text())
    assert [(s["epoch"], s["generations"]) for s in about["stretches"]] == [(0, 1), (2, 2)]


def test_moving_is_exact_after_a_kill(grown: Path, tmp_path: Path) -> None:
    """The same bits whether the run that moved was stopped in between or not."""
    for name, steps in (("one", 99), ("two", 3)):
        pretrain(grown, tmp_path / name, "small", stop_after=4)
        pretrain(grown, tmp_path / name, "large", on_growth="move", stop_after=steps)
        pretrain(grown, tmp_path / name, "large", on_growth="move")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_another_store_is_refused(grown: Path, tmp_path: Path) -> None:
    """A run that has moved on needs what it moved to."""
    pretrain(grown, tmp_path / "run", "small", stop_after=4)
    pretrain(grown, tmp_path / "run", "large", on_growth="move", stop_after=1)
    with pytest.raises(CacheError, match="has 1 generations"):
        pretrain(grown, tmp_path / "run", "small")


def test_where_steps_are_in_a_run_that_moved(grown: Path) -> None:
    """Steps, epochs and the order of each, at the seams."""
    small, large = (
        order_of(TargetCache(grown / name), seed=0, batch_size=6) for name in ("small", "large")
    )
    moved = GrownOrder(((0, small), (2, large), (4, large)))
    assert [moved.first_step(epoch) for epoch in range(6)] == [0, 4, 8, 14, 20, 26]
    assert [moved.position(step) for step in (0, 3, 4, 7, 8, 13, 14, 20)] == [
        (0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 5), (3, 0), (4, 0)
    ]  # fmt: skip
    assert [moved.for_epoch(epoch) is large for epoch in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_held_out_rows_keep_their_role(grown: Path) -> None:
    """What was held out of the small store is held out of the large one, and some of the new."""
    small, large = (TargetCache(grown / name) for name in ("small", "large"))
    before = draw_validation_rows(small, small.good_rows(), seed=0, share=0.4)
    after = draw_validation_rows(large, large.good_rows(), seed=0, share=0.7)
    assert len(before) == 8
    assert set(before) < set(after)
    assert (after >= 24).sum() == 8
    assert (
        draw_validation_rows(small, small.good_rows(), seed=1, share=0.4).tolist()
        != before.tolist()
    )
