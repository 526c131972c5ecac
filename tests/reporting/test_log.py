"""The log of a run, and the curves that are made of it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import WATCHED, log_of

import milan


@pytest.fixture(scope="module")
def watched(finished_run: Callable[..., Path]) -> Path:
    """An uninterrupted run of WATCHED; not to be changed."""
    return finished_run(**WATCHED)


def curves_of(run: Path, name: str = "curves.csv") -> list[dict[str, str]]:
    with open(run / name, newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_alone_gives_the_curves(watched: Path, store: Path, tmp_path: Path) -> None:
    """Deleted curves come back, of a run that goes on and of one that is finished."""
    run = tmp_path / "run"
    milan.pretrain(str(store), stop_after=9, **{**WATCHED, "out": str(run)})
    (run / "curves.csv").unlink()
    milan.pretrain(str(store), stop_after=1, **{**WATCHED, "out": str(run)})
    lines = log_of(run)
    rows = curves_of(run)
    assert [{k: str(v) for k, v in line.items()} for line in lines] == [
        {k: v for k, v in row.items() if v} for row in rows
    ]
    assert {"val_loss", "val_cosine", "knn_top1"} <= rows[0].keys()
    # A plot of validation has a point for each of its lines, and no gaps.
    shown = [(line["epoch"], line["val_loss"]) for line in lines if "val_loss" in line]
    validation = curves_of(run, "validation.csv")
    assert shown == [(float(row["epoch"]), float(row["val_loss"])) for row in validation]
    done = tmp_path / "done"
    shutil.copytree(watched, done)
    (done / "curves.csv").unlink()
    milan.pretrain(str(store), **{**WATCHED, "out": str(done)})
    assert (done / "curves.csv").read_bytes() == (watched / "curves.csv").read_bytes()
