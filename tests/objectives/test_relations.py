"""Relations of tokens as targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, log_of

import milan
from milan.errors import ConfigError
from milan.objectives.relations import TAU, relation_distance
from milan.training.trained import load_student


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_divergence_of_softmaxes() -> None:
    """Written out for one token of one image."""
    said, true = randn(2, 3, 8), randn(2, 3, 5, seed=1)  # of any width: only angles are compared

    def row(tokens: torch.Tensor) -> list[float]:
        unit = [[v / math.hypot(*t) for v in t] for t in tokens.tolist()]
        products = [sum(a * b for a, b in zip(unit[1], other, strict=True)) for other in unit]
        weights = [math.exp(p / TAU) for p in products]
        return [w / sum(weights) for w in weights]

    p, q = row(true[1]), row(said[1])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = relation_distance(said, true)
    assert found.shape == (2, 3)
    assert found[1, 1].item() == pytest.approx(expected, rel=1e-4)


def test_a_turn_of_all_tokens_changes_nothing() -> None:
    """And lengths do not count; a token on its own does."""
    true = randn(2, 6, 8)
    turn, _ = torch.linalg.qr(randn(8, 8, seed=1))
    assert relation_distance(3 * true @ turn, true).abs().max() < 1e-5
    moved = true.clone()
    moved[0, 2] = randn(8, seed=2)
    found = relation_distance(moved, true)
    assert found[0, 2] > 1e-4
    assert found[1].abs().max() < 1e-6


def test_gradients_are_finite_for_zeros_and_halves() -> None:
    """A zero has no direction; a half is compared in float32."""
    said, true = randn(1, 4, 8), randn(1, 4, 8, seed=1)
    said[0, 0], true[0, 1] = 0, 0
    said.requires_grad_()
    relation_distance(said, true).mean().backward()
    assert said.grad is not None
    assert said.grad.isfinite().all()
    half = relation_distance(300 * randn(1, 4, 8).half(), true)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, relation_distance(randn(1, 4, 8), true), atol=1e-2, rtol=1e-2)


def test_a_run_learns_relations(store: Path, tmp_path: Path) -> None:
    """By their loss alone: what it predicts is not compared with features or texts."""
    given: dict[str, Any] = {**SMALL, "loss": "relation", "held_out": 0.34, "lr": 3e-3, "epochs": 3}
    milan.pretrain(str(store), out=str(tmp_path / "run"), **given)
    losses = [line["val_loss"] for line in log_of(tmp_path / "run") if "val_loss" in line]
    assert losses[-1] < losses[0]
    assert not any("val_cosine" in line for line in log_of(tmp_path / "run"))
    with pytest.raises(ConfigError, match="predicts how tokens are related"):
        load_student(tmp_path / "run")
