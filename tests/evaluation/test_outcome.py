"""From what a classifier says to figures, intervals and tables: the same for every protocol."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import board_of, run_here

from milan.core.distributed import Ranks
from milan.errors import DataError
from milan.evaluation.board import write_board
from milan.evaluation.iou import Areas, agreement
from milan.evaluation.meaning import accuracy_interval
from milan.evaluation.outcome import Answers

NAMES = ["ant", "bee", "cat, tame", "dog", "eel", "fox"]


def read(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_figures_and_tables_of_a_few_images(tmp_path: Path) -> None:
    """By hand: an image that cannot be read counts nowhere, an unknown class is wrong and has no
    line; pieces come in any order."""
    answers = Answers(np.array([0, 0, 1, 2, -1, 2]), NAMES)
    answers.see(np.array([5, 2]), torch.tensor([[2, 0, 1, 3, 4], [5, 1, 0, 2, 3]]))
    answers.see(0, torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4]]))
    answers.see(4, torch.tensor([[3, 0, 1, 2, 4]]))
    outcome = answers.of_all()
    figures = outcome.figures()
    assert (figures["top1"], figures["top5"]) == (40, 80)  # of five that can be read
    assert figures["top1_interval"] == [0, 80]
    assert outcome.predicted.tolist() == [0, 1, 5, -1, 3, 2]
    outcome.write_tables(tmp_path / "new")
    assert read(tmp_path / "new/classes.csv") == [
        ["class", "images", "correct", "top1"], ["ant", "2", "1", "50.00"],
        ["bee", "1", "0", "0.00"], ["cat, tame", "1", "1", "100.00"],
        *([name, "0", "0", ""] for name in NAMES[3:]),
    ]  # fmt: skip
    assert read(tmp_path / "new/confusion.csv") == [
        ["is", "taken for", "images"], ["ant", "bee", "1"], ["bee", "fox", "1"]
    ]  # fmt: skip


def test_five_classes_have_no_top5_and_nothing_read_is_refused() -> None:
    """A figure that cannot be wrong is none; no image is no figure."""
    answers = Answers(np.array([0, 1]), NAMES[:5])
    with pytest.raises(DataError, match="no image of those to measure on can be read"):
        answers.of_all()
    answers.see(0, torch.tensor([[0], [0]]))
    assert answers.of_all().figures()["top5"] is None


def test_ranks_see_their_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two ranks saw adds up to what one would have seen."""
    labels, best = np.arange(6), torch.tensor([[0, 1], [1, 0], [3, 2], [5, 4], [4, 3], [0, 1]])
    alone, parts = Answers(labels, NAMES), [Answers(labels, NAMES) for _ in range(2)]
    alone.see(0, best)
    for part, places in zip(parts, ([0, 3, 4], [1, 2, 5]), strict=True):
        part.see(np.array(places), best[places])
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(Ranks, "add_up", lambda _, tensor: kept.append(tensor.clone()))
    parts[1].of_all()
    monkeypatch.setattr(Ranks, "add_up", lambda _, tensor: tensor.add_(kept[0]))
    together = parts[0].of_all()
    monkeypatch.setattr(Ranks, "add_up", lambda *_: None)
    expected = alone.of_all()
    assert together.predicted.tolist() == expected.predicted.tolist()
    assert together.in_top5.tolist() == expected.in_top5.tolist()


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_intervals_take_any_seed(seed: int) -> None:
    """Those that settings allow, as every draw does."""
    low, high = accuracy_interval(np.arange(40) % 2 == 0, seed=seed)
    assert low < 50 < high
    areas = Areas(*(np.array([[3, 1], [1, 2]]),) * 3)
    low, high = agreement(np.array([[4, 0], [0, 3]]), areas, seed=seed).interval
    assert low <= high


def test_intervals_hold_what_they_promise() -> None:
    """About 95 of 100 samples of a known accuracy have it in their interval, few images or all
    right included; the same interval every time."""
    generator, inside = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = accuracy_interval(generator.random(150) < 0.8)
        inside += low <= 80 <= high
    assert 182 <= inside <= 198
    every = np.ones(12, bool)
    assert accuracy_interval(every) == (73.54, 100)  # scipy.stats.binomtest(12, 12)
    assert accuracy_interval(~every) == (0, 26.46)
    assert accuracy_interval(np.arange(9) > 2) == accuracy_interval(np.arange(9) > 2)


@pytest.mark.parametrize("protocol", ["knn", "linear-probe"])
def test_what_a_command_leaves(protocol: str, photos: Path, tmp_path: Path) -> None:
    """Intervals in the metrics, printed beside their figures; tables beside the metrics file."""
    ran = run_here(
        protocol, "--checkpoint", "random", "--model", "vit_tiny_patch16_224", "--data", photos,
        "--set", "model.img_size=32", "--set", "model.depth=1", "--out", tmp_path / "a/probe.json",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    metrics = json.loads((tmp_path / "a/probe.json").read_text())
    key = "k10" if protocol == "knn" else "top1"
    low, high = metrics[f"{key}_interval"]
    assert 0 <= low <= metrics[key] <= high <= 100
    assert f"{metrics[key]} ({low} to {high})" in " ".join(ran.out.split())
    (seen,) = board_of(tmp_path / "a/probe").Scalars(f"{protocol.replace('-', '_')}/{key}")
    assert seen.value == pytest.approx(metrics[key])
    write_board(tmp_path / "a/probe", "x", [key, "y"], {key: 3.0, "baseline": {key: 2.0}})
    assert board_of(tmp_path / "a/probe").Tags()["scalars"] == [f"x/{key}"]
    beside = tmp_path / "a/probe/tensorboard/baseline"  # its own run, in the same charts
    (tmp_path / "b").mkdir()
    (seen,) = board_of(beside.rename(tmp_path / "b/tensorboard").parent).Scalars(f"x/{key}")
    assert seen.value == 2
    classes = read(tmp_path / "a/probe/classes.csv")
    assert [line[0] for line in classes[1:]] == ["class 0", "class 1", "class 2"]
    assert sum(int(line[1]) for line in classes[1:]) == metrics["val_images"]
    confused = sum(int(line[2]) for line in read(tmp_path / "a/probe/confusion.csv")[1:])
    assert sum(int(line[2]) for line in classes[1:]) + confused == metrics["val_images"]
