"""An objective from outside milan: named module:Class, trained, validated, drawn and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import SMALL, Notes, log_of, weights
from PIL import Image

import milan
from milan.config import OBJECTIVES
from milan.errors import ConfigError
from milan.objectives.base import objective_class

MODULE = '''
import torch
from milan.objectives.base import Objective, Prediction, attention_of


class AttentionRegression(Objective):
    """Predict how much the teacher attends to each patch."""

    decoder, masking, needs_features = "mae", "random", False

    def target_width(self, encoder) -> int:
        return 1

    def loss(self, prediction: Prediction) -> torch.Tensor:
        target = attention_of(prediction.batch).log()
        return (prediction.patches[..., 0].float() - target).square().mean()

    def metrics(self, prediction: Prediction) -> dict[str, torch.Tensor]:
        loss = self.loss(prediction)
        return {"loss": loss, "rmse": loss.sqrt()}

    def picture(self, prediction: Prediction):
        target = attention_of(prediction.batch).log()[..., None]
        return target.expand(-1, -1, 3), prediction.patches.float().expand(-1, -1, 3)


NOT_ONE = 3
'''
NAME = "outside_objective:AttentionRegression"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module, on the path of this process and of those it starts."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "outside_objective.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    sys.modules.pop("outside_objective", None)


def test_it_trains(outside: Path, store: Path, tmp_path: Path) -> None:
    """Its defaults, its width, its own metric and its picture; resumed, it is the same run."""
    run = {**SMALL, "objective": NAME, "held_out": 0.34, "lr": 1e-2}
    notes = Notes()
    milan.pretrain(str(store), out=str(tmp_path / "whole"), progress=notes, **run)
    assert "random masks of 75%, mae decoder" in notes.line("objective: ")
    lines = log_of(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    last = [line for line in lines if "val_rmse" in line][-1]
    assert last["val_rmse"] == pytest.approx(last["val_loss"] ** 0.5, rel=0.1)
    curves = (tmp_path / "whole/curves.csv").read_text().splitlines()[0]
    assert curves.endswith(",val_loss,val_rmse")
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["val_rmse"] > 0
    assert Image.open(tmp_path / "whole/sheet.png").size[0] > 100
    for steps in (5, None):
        milan.pretrain(str(store), out=str(tmp_path / "parts"), stop_after=steps, **run)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.soak
def test_two_ranks_train_it(outside: Path, store: Path, tmp_path: Path, forked_ranks: None) -> None:
    """Each process of a run imports it by its name."""
    run = {**SMALL, "objective": NAME, "epochs": 1, "log_every": 1}
    for ranks in (1, 2):
        milan.pretrain(str(store), out=str(tmp_path / str(ranks)), devices=ranks, **run)
    one, two = (log_of(tmp_path / str(ranks))[-1]["loss"] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mila", "objective 'mila'; expected: one of milan, pixels, rils, rils-cached, or package"),
        ("no_such_module:Class", "No module named 'no_such_module'"),
        ("outside_objective:Missing", "has no attribute 'Missing'"),
        ("outside_objective:NOT_ONE", "is no subclass of"),
    ],
)
def test_names_that_are_none(outside: Path, tmp_path: Path, name: str, message: str) -> None:
    """One line, before anything is read."""
    with pytest.raises(ConfigError, match=message):
        milan.pretrain("nowhere.zarr", out=str(tmp_path / "run"), objective=name)


def test_names_of_ours() -> None:
    """Each name of the table is importable, and says what it needs."""
    for name in OBJECTIVES:
        chosen = objective_class(name)
        assert chosen.decoder in ("prompt", "mae")
        assert chosen.masking in ("semantic", "random")
