"""Corrupted images: seeded by what they show, worse with severity; figures of what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_photos

from milan.errors import ConfigError
from milan.evaluation import corruptions
from milan.evaluation.corruptions import SEVERITIES, Corruption, robustness
from milan.evaluation.evaluate import evaluate
from milan.evaluation.frozen import Frozen

VIT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Images to fit on and to measure on."""
    return {
        "data": str(make_photos(tmp_path / "data", count=24)),
        "val_data": str(make_photos(tmp_path / "val", count=12, seed=1)),
    }


@pytest.mark.parametrize("name", SEVERITIES)
def test_a_corruption(name: str) -> None:
    """Farther from the image with each severity; the same for an image, at any size."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    distances = []
    for severity in range(1, 6):
        corruption = Corruption(name, severity)
        got = corruption.apply(pixels, 2**64 - 1)
        assert (got.shape, got.dtype) == ((64, 64, 3), np.uint8)
        assert np.array_equal(got, corruption.apply(pixels.copy(), 2**64 - 1))
        same = np.array_equal(got, corruption.apply(pixels, 5))
        assert same == (name != "gaussian noise")
        distances.append(float(np.abs(got.astype(float) - pixels).mean()))
        for edge in (1, 2, 9):
            assert corruption.apply(pixels[:edge, :edge].copy(), 0).shape == (edge, edge, 3)
    if name != "pixelate":  # half of the pixels is even, which six tenths are not
        assert distances == sorted(distances)
    assert 0 < distances[0] < distances[4]


def test_what_is_left() -> None:
    """The mean over all, of the clean accuracy; none of nothing."""
    got = robustness(lambda c: 40.0 if c.name == "jpeg" else 10.0 * c.severity, 60.0)
    assert got["corruptions"]["jpeg"] == [40] * 5
    assert got["corruptions"]["contrast"] == [10, 20, 30, 40, 50]
    assert got["corrupted_top1"] == pytest.approx((6 * 30 + 40) / 7, abs=0.01)
    assert got["corrupted_share"] == pytest.approx(100 * got["corrupted_top1"] / 60, abs=0.02)
    assert robustness(lambda c: 0.0, 0.0)["corrupted_share"] is None


@pytest.mark.parametrize("protocol", ["few_shot", "attentive_probe", "finetune"])
def test_figures_of_corrupted_images(
    protocol: str, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corruption that changes nothing leaves the accuracy; one that leaves no picture, chance."""
    monkeypatch.setattr(
        corruptions, "SEVERITIES", {"brightness": (1.0, 1.0), "contrast": (0.0, 0.0)}
    )
    settings: dict[str, Any] = {"model_args": VIT, "model": "vit_tiny_patch16_224", **data}
    if protocol == "finetune":
        settings |= {
            "epochs": 1, "batch_size": 8, "num_workers": 0, "report_to": "none", "warmup_epochs": 0,
            "out": str(tmp_path / "a.json"),
        }  # fmt: skip
    else:
        settings |= {"features": str(tmp_path / "kept"), "baseline": "none"}
    if protocol == "few_shot":
        settings |= {"shots": 2, "draws": 2}
    got = evaluate(protocol, "random", corruptions=True, **settings)
    same, nothing = got["corruptions"]["brightness"], got["corruptions"]["contrast"]
    assert same == [got["top1"]] * 2
    assert nothing[0] == nothing[1]
    assert got["corrupted_top1"] == pytest.approx((got["top1"] + nothing[0]) / 2, abs=0.02)


def test_a_protocol_without_a_classifier(data: dict[str, Any]) -> None:
    """It is refused before any work."""
    network = Frozen(lambda pixels: pixels.float().mean(dim=(1, 2)), 8, "colours", {})
    with pytest.raises(ConfigError, match="corruptions with knn"):
        evaluate("knn", frozen=network, corruptions=True, **data)


def test_another_corruption_is_another_feature(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of corrupted images are kept for the next protocol, apart from the clean ones."""
    monkeypatch.setattr(corruptions, "SEVERITIES", {"contrast": (0.5, 0.2), "jpeg": (25, 7)})
    seen = [0]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        seen[0] += len(pixels)
        return pixels.float().mean(dim=(1, 2)) / 255

    network = Frozen(features, 8, "colours", {"network": "colours"})
    settings = {"frozen": network, "features": str(tmp_path / "kept"), **data}
    first = evaluate("linear_probe", corruptions=True, **settings)
    assert seen[0] == 24 + 12 + 4 * 12
    again = evaluate("linear_probe", corruptions=True, **settings)
    assert seen[0] == 24 + 12 + 4 * 12
    assert again["corruptions"] == first["corruptions"]
