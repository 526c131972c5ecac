"""What a run is said to take before it begins, against what it then takes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, STUDENT, run_here, tree

import milan
from milan.config import PretrainConfig
from milan.core.units import parse_bytes
from milan.errors import ConfigError, TrainError
from milan.reporting.run_files import read_run, update_run
from milan.training import estimate
from milan.training.estimate import estimate_run
from milan.training.pretrain import Call


def figures(store: Path, **changes: Any) -> dict[str, str]:
    return dict(estimate_run(milan.PretrainConfig(str(store), **{**SMALL, **changes})))


def test_steps_are_those_of_the_run(store: Path, tmp_path: Path) -> None:
    """Steps, images and weights as the run has them."""
    told = figures(store, held_out=0.34)
    assert told["images"] == "16 an epoch, 8 for validation"
    assert told["steps"] == "14: 7 epochs of 2"
    assert re.search(r"a core loads [\d,]+ \(originals\): [\d,.]+ cores are", told["data loading"])
    run = milan.pretrain(str(store), out=str(tmp_path), **SMALL, held_out=0.34)
    assert run["steps"] == 14
    size = (tmp_path / "checkpoints/step-00000014").iterdir()
    saved = sum(p.stat().st_size for p in size)
    assert parse_bytes(told["checkpoint"].split(",")[0]) == pytest.approx(saved, rel=0.1)


def test_ranks_share_a_step(store: Path) -> None:
    """Two ranks take half of each step."""
    assert figures(store, devices=2)["ranks"] == "2, 1 x 4 images of a step each"
    assert figures(store, micro_batch=2)["ranks"] == "1, 4 x 2 images of a step each"
    with pytest.raises(ConfigError, match="batch size 8 over 3 ranks"):
        figures(store, devices=3)


def test_another_grid_than_the_teachers(store: Path, tmp_path: Path) -> None:
    """NamedPatch of a student with other patches, which can be trained afterwards."""
    grid = {**SMALL, "model_args": STUDENT["model_args"] | {"patch_size": 4}}
    told = dict(estimate_run(milan.PretrainConfig(str(store), **grid)))
    assert told["time"]
    assert milan.pretrain(str(store), out=str(tmp_path), stop_after=1, **grid)["step"] == 1


def test_a_run_that_is_there(
    store: Path, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Its own decoder and the steps that are left; without one, the weights to start from."""
    run = tmp_path / "run"
    shutil.copytree(finished_run(), run)
    update_run(run, decoder=read_run(run)["decoder"] | {"depth": 1})
    before = tree(run)
    told = figures(store, out=str(run))
    assert (told["steps"], told["steps that are left"]) == ("21: 7 epochs of 3", "0")
    with pytest.raises(TrainError, match=r"holds a run of other settings \(lr"):
        figures(store, out=str(run), lr=0.5)
    anew = PretrainConfig(str(store), **{**SMALL, "lr": 0.5, "out": str(run)})
    fresh = dict(estimate_run(anew, call=Call(overwrite=True)))
    assert "steps that are left" not in fresh
    assert parse_bytes(fresh["checkpoint"].split(",")[0]) > parse_bytes(
        told["checkpoint"].split(",")[0]
    )
    assert tree(run) == before
    with pytest.raises(ConfigError, match="nowhere"):
        figures(store, out=str(tmp_path / "new"), init=str(tmp_path / "nowhere"))


def test_a_dry_run_waits_for_its_own_gpu(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--device cuda:1: it is the current one, and a time ends when it is done, not cuda:0."""
    gpu, current, awaited = torch.device("cuda", 1), list[Any](), list[Any]()
    monkeypatch.setattr(estimate, "pick_device", lambda name: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: awaited.append(device))
    monkeypatch.setattr(estimate, "_estimate", lambda config, device, *_: [("device", device)])
    assert figures(store) == {"device": gpu}
    trial = estimate._Trial(*[None] * 4, gpu)  # type: ignore[arg-type]
    assert trial._seconds(lambda: None) > 0
    assert (current, awaited) == ([gpu], [gpu])


def test_the_command_writes_nothing(store: Path, tmp_path: Path) -> None:
    """--dry-run prints a table and leaves no folder; the store is what it was."""
    before = tree(store)
    sets = [f"--set=model.{k}={v}" for k, v in STUDENT["model_args"].items()]
    ran = run_here(
        "pretrain", "--cache", store, "--out", "run", "--batch-size", 8, "--dry-run", *sets,
        cwd=tmp_path,
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert "a step" in ran.out
    assert not list(tmp_path.iterdir())
    assert tree(store) == before
