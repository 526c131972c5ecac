"""Evaluation protocols: one from outside milan gets its command, metrics file and report row."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import STUDENT, make_photos, run_here

import milan
from milan.errors import ConfigError
from milan.evaluation.config import (
    DetectConfig,
    EvaluationConfig,
    FinetuneConfig,
    SegmentConfig,
)
from milan.evaluation.protocols import PROTOCOLS, find_protocol, get_protocol
from milan.reports.pipeline import check_alike

NEAREST_MEAN = '''
from dataclasses import dataclass

from milan.evaluation.config import EvaluationConfig
from milan.evaluation.protocols import Column, Protocol


@dataclass(frozen=True)
class Settings(EvaluationConfig):
    shrink: float = 1.0
    """Factor on the class means."""


PROTOCOL = Protocol(
    name="nearest_mean",
    title="Nearest mean",
    help="Classify by the nearest class mean.",
    run="nearest_mean:run",
    columns=(Column("accuracy", "top-1 %", "{:.2f}"),),
    settings=Settings,
)


def run(evaluation):
    import torch

    x, y = evaluation.table(evaluation.train)
    val_x, val_y = evaluation.table(evaluation.val)
    shrink = evaluation.config.shrink
    means = torch.stack([x[y == c].mean(dim=0) for c in range(evaluation.classes)])
    right = torch.cdist(val_x, shrink * means).argmin(dim=1) == val_y
    return {"accuracy": 100 * right.float().mean().item(), "shrink": shrink}
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package as pip installs it, which declares the protocol `nearest_mean`."""
    site = tmp_path / "site"
    about = site / "nearest_mean-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "nearest_mean.py").write_text(NEAREST_MEAN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-mean\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[milan.protocols]\nnearest_mean = nearest_mean:PROTOCOL\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("nearest_mean", None)


def test_a_protocol_from_outside(package: None, store: Path, photos: Path, tmp_path: Path) -> None:
    """A declaration and a function: the rest is the machinery of the built-in ones."""
    milan.pretrain(
        str(store), out=str(tmp_path / "runs/milan"), epochs=1, batch_size=8, num_workers=0,
        **STUDENT,
    )  # fmt: skip
    val = make_photos(tmp_path / "val", count=9, seed=3)
    encoders = {"trained": "runs/milan", "random": "runs/random"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({
        "evaluation": {"protocols": ["linear_probe", "nearest_mean"]},
        "linear_probe": {"data": str(photos), "val_data": str(val)},
        "nearest_mean": {"data": str(photos), "val_data": str(val), "shrink": 0.5},
        "report": {
            "out": "report", "cache": str(store), "encoders": encoders,
            "runs": {"trained": "runs/milan"},
        },
    }))  # fmt: skip

    shown = run_here("nearest-mean", "--help")
    assert shown.code == 0
    assert "Classify by the nearest class mean." in shown.out
    assert "--shrink" in shown.out
    assert "Factor on the class means." in shown.out
    assert "--val-data" in shown.out
    for name in ("linear_probe", "nearest_mean"):
        for flags in (("runs/milan",), ("random", "--like", "runs/milan")):
            line = (name, "--params", "params.yaml", "--checkpoint", *flags)
            done = run_here(*line, cwd=tmp_path)
            assert (done.code, done.err) == (0, ""), done.out
            assert get_protocol(name).title in done.out
    metrics = json.loads((tmp_path / "runs/milan/nearest_mean.json").read_text())
    assert metrics["shrink"] == 0.5

    done = run_here("report", "--params", "params.yaml", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "report/report.txt").read_text()
    assert text.index("Linear probe") < text.index("Nearest mean") < text.index("Cost")
    assert f"{metrics['accuracy']:.2f}" in text
    figures = json.loads((tmp_path / "report/metrics.json").read_text())
    assert figures["nearest_mean"]["accuracy"]["trained"] == metrics["accuracy"]
    assert set(figures["linear_probe"]["top5"]) == {"trained", "random"}
    assert sorted(p.name for p in (tmp_path / "report/evaluation").iterdir()) == [
        "linear_probe.csv", "linear_probe.png", "nearest_mean.csv", "nearest_mean.png",
    ]  # fmt: skip


def test_an_unknown_protocol() -> None:
    """On the command line a usage error; in a parameter file the nearest name."""
    assert find_protocol("nearest_mean") is None
    assert run_here("nearest-mean").code == 2
    with pytest.raises(ConfigError, match="unknown evaluation protocol 'linear_prob'") as error:
        get_protocol("linear_prob")
    assert error.value.fix == "linear_probe"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_declarations(name: str) -> None:
    """What a declaration names is there."""
    protocol = PROTOCOLS[name]
    assert name == protocol.name == protocol.name.lower()
    assert callable(protocol.load())
    assert protocol.columns
    protocol.settings().check()


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [
        ("runs/pretrain", "runs/pretrain"),
        ("random", "runs/random"),
        ("teacher", "runs/teacher"),
        ("timm:vit_tiny_patch16_224", "runs/timm-vit_tiny_patch16_224"),
        ("published:a/milan-vit_base.pth", "runs/published-milan-vit_base"),
        ("published", "runs/published"),
    ],
)
def test_where_metrics_go(checkpoint: str, folder: str) -> None:
    """Into the run's folder; what has none gets one; `out` wins."""
    probe = PROTOCOLS["linear_probe"]
    assert probe.metrics_path(EvaluationConfig(checkpoint)) == Path(folder, "linear_probe.json")
    assert probe.metrics_path(EvaluationConfig(checkpoint, out="a.json")) == Path("a.json")


def test_the_teacher_needs_its_network() -> None:
    """`milan` cannot load teachers: from Python the network is passed."""
    with pytest.raises(ConfigError, match=r"frozen=pipeline\.teachers\.frozen"):
        milan.linear_probe("teacher", data="x")


def test_a_report_compares_like_with_like() -> None:
    """One linear probe beside another kind is refused; metrics from before say no kind."""
    probe = get_protocol("linear_probe")
    check_alike(probe, {"a": {"top1": 1.0}, "b": {"top1": 2.0, "protocol": "logistic"}})
    check_alike(get_protocol("knn"), {"a": {"k20": 1.0}, "b": {"k20": 2.0}})
    with pytest.raises(ConfigError, match="linear-probe: a by logistic, b by dinov2"):
        check_alike(probe, {"a": {"top1": 1.0}, "b": {"top1": 2.0, "protocol": "dinov2"}})


@pytest.mark.parametrize("out", ["runs/v1.0", "runs/v1.0/", "runs/v1.0.json"])
def test_a_training_may_be_named_by_its_folder(out: str) -> None:
    """Its metrics lie beside it, whatever dots the name has."""
    for kind in (FinetuneConfig, SegmentConfig, DetectConfig):
        config = kind("runs/a", out=out)
        assert config.run == Path("runs/v1.0")
        assert config.out == "runs/v1.0.json"
        assert PROTOCOLS[kind.section].metrics_path(config) == Path("runs/v1.0.json")
