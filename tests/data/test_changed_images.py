"""Images that changed since extraction: found before a run, left out of it, the same for ever."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STUDENT

import milan
from milan.core.progress import NoProgress
from milan.core.signals import Stop
from milan.data.changed_images import CSV, changed_images
from milan.data.dataset import open_cache
from milan.errors import ConfigError, DataError
from milan.objectives.base import Objective
from milan.store.cache import TargetCache

RUN: dict[str, Any] = {
    **STUDENT, "epochs": 4, "batch_size": 8, "num_workers": 0, "lr": 1e-3, "save_every": 2,
}  # fmt: skip
"""3 steps an epoch while all 24 images are there, 2 when some are not."""


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(row, view) of every image that a student is shown."""
    shown: list[tuple[int, int]] = []
    predict = Objective.predict

    def watched(objective: Any, student: Any, batch: Any) -> Any:
        if student.training:
            shown.extend(zip(batch.rows.tolist(), batch.views.tolist(), strict=True))
        return predict(objective, student, batch)

    monkeypatch.setattr(Objective, "predict", watched)
    return shown


def image(root: Path, cache: TargetCache, row: int) -> Path:
    return root / cache.manifest.key(row)


def rows_listed(run: Path) -> dict[int, tuple[str, int]]:
    with open(run / "changed-images.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    return {int(line["row"]): (line["reason"], int(line["from_step"])) for line in lines}


def test_which_changed(store: Path, copied: Path, cache: TargetCache) -> None:
    """Gone, other bytes, exchanged; a file touched but equal is not."""
    data = open_cache(store, data_root=str(copied))
    every = np.arange(24)
    assert changed_images(data, every, stop=Stop(), progress=NoProgress()) == {}
    image(copied, cache, 0).unlink()
    whole = image(copied, cache, 4).read_bytes()
    image(copied, cache, 4).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    image(copied, cache, 7).write_bytes(whole)
    image(copied, cache, 9).touch()
    found = changed_images(
        open_cache(store, data_root=str(copied)), every, stop=Stop(), progress=NoProgress()
    )
    assert sorted(found) == [0, 4, 7]
    assert found[0].startswith("missing")
    assert found[4] == found[7] == "other bytes than at extraction"
    assert sorted(changed_images(data, every[5:], stop=Stop(), progress=NoProgress())) == [7]


def test_known_at_the_start(
    store: Path, copied: Path, cache: TargetCache, tmp_path: Path, seen: list
) -> None:
    """Left out like bad images, told, listed, saved; the stream is that of a store without them."""
    for row in (0, 5):  # the first of all images, too
        image(copied, cache, row).unlink()
    run = {**RUN, "out": str(tmp_path / "run"), "data_root": str(copied)}
    with pytest.raises(DataError) as error:
        milan.pretrain(str(store), **{**run, "out": str(tmp_path / "stopped")})
    assert "--on-changed drop" in error.value.fix
    seen.clear()
    assert milan.pretrain(str(store), **run, on_changed="drop")["steps"] == 8
    assert not {0, 5} & {row for row, _ in seen}
    assert len(set(seen[:16])) == 16
    assert {row: at for row, (_, at) in rows_listed(tmp_path / "run").items()} == {0: 0, 5: 0}
    dropped = json.loads((tmp_path / "run" / "run.json").read_text())["dropped"]
    assert sorted(dropped) == ["0", "5"]


def test_a_run_resumes_with_what_it_dropped(
    store: Path, copied: Path, cache: TargetCache, tmp_path: Path, seen: list
) -> None:
    """The same stream in two calls as in one, even where the image is back, or not looked for."""
    image(copied, cache, 5).unlink()
    settings = {**RUN, "data_root": str(copied)}
    milan.pretrain(str(store), out=str(tmp_path / "a"), on_changed="drop", **settings)
    alone = list(seen)
    seen.clear()
    again = {**settings, "out": str(tmp_path / "b")}
    milan.pretrain(str(store), stop_after=3, on_changed="drop", **again)
    shutil.copy(
        image(Path(cache.generations[0].origin["data_root"]), cache, 5), image(copied, cache, 5)
    )
    (tmp_path / "b" / "changed-images.csv").unlink()  # a list for people: not what is read
    assert milan.pretrain(str(store), **again)["finished"]
    assert seen == alone
    assert sorted(rows_listed(tmp_path / "b")) == [5]
    encoders = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in "ab"]
    assert encoders[0] == encoders[1]


def test_found_in_the_middle(
    store: Path, copied: Path, cache: TargetCache, tmp_path: Path, seen: list
) -> None:
    """The run stops; resumed with drop, it keeps its steps and every other image its place."""
    settings = {**RUN, "data_root": str(copied)}
    milan.pretrain(str(store), out=str(tmp_path / "whole"), **settings)
    whole = list(seen)
    seen.clear()
    run = {**settings, "out": str(tmp_path / "run")}
    milan.pretrain(str(store), stop_after=4, **run)
    gone = [whole[-1][0], whole[40][0]]
    for row in gone:
        image(copied, cache, row).unlink()
    with pytest.raises(DataError, match="has changed since extraction: missing"):
        milan.pretrain(str(store), **run)
    reached = json.loads(
        max((tmp_path / "run/checkpoints").iterdir()).joinpath("state.json").read_text()
    )["step"]
    del seen[32:]
    first = milan.pretrain(str(store), stop_after=1, on_changed="drop", **run)
    assert (first["step"], first["steps"]) == (reached + 1, 12)
    assert milan.pretrain(str(store), on_changed="error", **run)["finished"]
    assert len(seen) == 32 + 8 * (12 - reached)
    for mine, theirs in zip(seen[32:], whole[8 * reached :], strict=True):
        assert mine == theirs or theirs[0] in gone
        assert mine[0] not in gone
    assert {at for _, at in rows_listed(tmp_path / "run").values()} == {reached}


def test_a_fresh_run_forgets(
    store: Path, photos: Path, copied: Path, cache: TargetCache, tmp_path: Path
) -> None:
    """Started anew, a run has dropped nothing of its predecessor's."""
    image(copied, cache, 5).unlink()
    run = {**RUN, "out": str(tmp_path / "run")}
    milan.pretrain(str(store), data_root=str(copied), stop_after=1, on_changed="drop", **run)
    assert rows_listed(tmp_path / "run")
    figures = milan.pretrain(str(store), data_root=str(photos), resume="never", stop_after=1, **run)
    assert figures["steps"] == 12
    assert not (tmp_path / "run" / CSV).exists()
    assert "dropped" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_too_few_are_left(store: Path, copied: Path, cache: TargetCache, tmp_path: Path) -> None:
    """A plan of no steps would be a division by zero."""
    for row in range(4, 24):
        image(copied, cache, row).unlink()
    with pytest.raises(ConfigError, match="batch size 8 with 4 usable"):
        milan.pretrain(
            str(store), data_root=str(copied), out=str(tmp_path / "run"), on_changed="drop", **RUN
        )
