"""Tests of milan.training.compilation: one graph, the same run, and no run lost to a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, Notes, log_of
from torch._dynamo.testing import CompileCounterWithBackend

import milan
from milan.errors import ConfigError
from milan.evaluation.config import DetectConfig, SegmentConfig
from milan.training import compilation

RUN: dict[str, Any] = {**SMALL, "epochs": 2, "micro_batch": 4, "log_every": 1}
OPTIONS: dict[str, Any] = {
    "loss": "smooth-l1", "target_norm": "standardise", "predict": "both", "class_weight": 0.5,
    "deep_supervision": "1", "decode_fraction": 0.5,
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts what is compiled; its graphs run as they are traced."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    torch._dynamo.reset()
    return counter


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"objective": "pixels"}, marks=pytest.mark.soak),
        pytest.param(OPTIONS, marks=pytest.mark.soak),
    ],
    ids=["milan", "pixels", "options"],
)
def test_a_run_is_two_graphs(
    more: dict[str, Any], graphs: CompileCounterWithBackend, copy: Path, tmp_path: Path
) -> None:
    """Student and loss, compiled once: neither steps nor validation compile again. The run is the
    one without compiling, but for rounding."""
    milan.pretrain(str(copy), compile="on", **{**RUN, **more, "out": str(tmp_path / "on")})
    assert graphs.frame_count == 2
    milan.pretrain(str(copy), compile="off", **{**RUN, **more, "out": str(tmp_path / "off")})
    assert graphs.frame_count == 2
    ours, theirs = ([line["loss"] for line in log_of(tmp_path / run)] for run in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_compiler_that_fails(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto goes on without it and says so in a line; on is refused."""

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no Triton here\nand more")

    monkeypatch.setattr(compilation, "BACKEND", broken)
    monkeypatch.setattr(compilation, "_pays", lambda device: True)
    notes, run = Notes(), {**RUN, "out": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"torch\.compile failed .*no Triton.*--compile off"):
        milan.pretrain(str(store), compile="on", progress=notes, **run)
    assert milan.pretrain(str(store), progress=notes, **run)["finished"]
    assert "no Triton here" in notes.line("torch.compile failed")
    assert notes.line("torch.compile failed").endswith("the run goes on without it")


def test_auto_leaves_a_cpu_alone(
    graphs: CompileCounterWithBackend, store: Path, tmp_path: Path
) -> None:
    """There compiling takes longer than it saves."""
    milan.pretrain(str(store), stop_after=1, **{**RUN, "out": str(tmp_path)})
    assert graphs.frame_count == 0


@pytest.mark.parametrize("kind", [SegmentConfig, DetectConfig])
def test_what_is_never_compiled_says_so(kind: type[SegmentConfig | DetectConfig]) -> None:
    """In place of a flag without effect."""
    with pytest.raises(ConfigError, match="compile 'on'; expected: one of auto, off"):
        kind("random", data="x", compile="on").check()
    kind("random", data="x", compile="off").check()


@pytest.mark.soak
def test_fine_tuning_is_one_graph(
    graphs: CompileCounterWithBackend, photos: Path, tmp_path: Path
) -> None:
    """Compiled once, and the run is the one without compiling, but for rounding."""
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    settings: dict[str, Any] = {
        "data": str(photos), "model": "vit_tiny_patch16_224", "model_args": shape, "epochs": 2,
        "batch_size": 8, "micro_batch": 4, "num_workers": 0, "report_to": "none", "log_every": 1,
    }  # fmt: skip
    for choice in ("on", "off"):
        out = str(tmp_path / f"{choice}.json")
        milan.finetune("random", compile=choice, out=out, **settings)
        assert graphs.frame_count == 1
    ours, theirs = ([line["loss"] for line in log_of(tmp_path / run)] for run in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-5)
