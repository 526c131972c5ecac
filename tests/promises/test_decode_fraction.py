"""Decoding a share of the masked patches: the draw, the decoder, the losses, whole runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import log_of, weights

import milan
from milan.core.rng import mask_noise
from milan.data.loader import Batch
from milan.models.masking import Mask, decode_share, importance_mask
from milan.models.student import build_student
from milan.objectives.base import Prediction
from milan.objectives.features import feature_regression, image_regression
from milan.objectives.pixels import pixel_regression
from milan.reporting.run_files import write_run

VIEWS, PATCHES, VISIBLE = 20_000, 16, 4


def test_the_draw_is_uniform_whatever_the_attention() -> None:
    """Each masked patch is decoded as often, though high attention keeps patches visible."""
    rows = np.arange(VIEWS)
    noise = torch.from_numpy(mask_noise(0, rows * 0, rows, rows * 0, PATCHES))
    attention = torch.linspace(1, 9, PATCHES).expand(VIEWS, -1)
    mask = importance_mask(attention, noise, visible=VISIBLE)
    chosen = decode_share(mask, noise, 0.25)
    assert chosen.decoded.shape == (VIEWS, 3)
    assert torch.equal(chosen.masked, mask.masked)
    hidden = mask.boolean()
    decoded = torch.zeros_like(hidden).scatter_(1, chosen.decoded, True)
    assert not (decoded & ~hidden).any()
    share = decoded.sum(dim=0) / hidden.sum(dim=0)
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / (0.4 * VIEWS)) ** 0.5
    for some in (mask, chosen):  # the decoder's order, and raster order
        assert torch.equal(some.split(some.order)[0], some.visible)
        assert torch.equal(some.split(some.rows)[1], 1 + some.decoded)
        assert torch.equal(some.in_raster(some.order[..., None])[..., 0], some.predicted)
    assert torch.equal(mask.predicted, torch.arange(PATCHES).expand(VIEWS, -1))


@pytest.mark.parametrize("kind", ["prompt", "mae"])
def test_the_decoder_of_all_is_the_decoder_without_a_choice(kind: str) -> None:
    """And a token that was left out is in no block: no other token changes with it."""
    student = build_student(
        "vit_tiny_patch16_224", img_size=32, target_width=24, decoder_kind=kind,
        model_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        decoder={"embed_dim": 32, "depth": 2, "num_heads": 2},
    ).eval()  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(3, PATCHES, generator=draw).clamp(1e-6, 1 - 1e-6)
    images = torch.randn(3, 3, 32, 32, generator=draw)
    mask = importance_mask(torch.ones_like(noise), noise, visible=VISIBLE)
    whole = student(images, mask)
    assert torch.equal(student(images, decode_share(mask, noise, 1.0)), whole)
    some = decode_share(mask, noise, 0.5)
    shared = student(images, some)
    assert shared.shape == (3, 1 + VISIBLE + 6, 24)
    if kind == "prompt":  # the class token and visible patches pass the decoder by
        first = 1 + VISIBLE
        torch.testing.assert_close(shared[:, :first], whole[:, :first])
    with torch.no_grad():  # the position of a patch that is not decoded is read by nobody
        gone = next(p for p in range(PATCHES) if p not in some.predicted[0].tolist())
        student.decoder.pos_embed[0, 1 + gone] = 1e3
    assert torch.equal(student(images, some)[0], shared[0])


def test_losses_mean_what_those_of_all_tokens_are() -> None:
    """Over all choices of 2 of 4 masked patches the mean loss is the loss of all, exactly."""
    draw = torch.Generator().manual_seed(0)
    tokens, features = torch.randn(2, 2, 10, 12, generator=draw, dtype=torch.float64).unbind(0)
    pixels = torch.randn(2, 3, 6, 6, generator=draw)
    visible = torch.tensor([[0, 2, 3, 5, 8]] * 2)
    masked = torch.tensor([[1, 4, 6, 7]] * 2)
    features_losses, pixel_losses = [], []
    for pair in itertools.combinations(range(4), 2):
        mask = Mask(visible, masked, masked[:, list(pair)])
        at = mask.rows[..., None].expand(-1, -1, 12)
        ours = Prediction(tokens.gather(1, at), pixels, mask, Batch(*[pixels] * 5, None, None))
        features_losses.append(image_regression(ours, features.gather(1, at)).mean())
        hidden = mask.boolean().gather(1, mask.predicted)
        pixel_losses.append(
            pixel_regression(ours.patches, pixels, hidden, patch=2, at=mask.predicted)
        )
    whole = Mask(visible, masked)
    expected = float(feature_regression(tokens, features))
    assert float(torch.stack(features_losses).mean()) == pytest.approx(expected, abs=1e-6)
    expected = float(pixel_regression(tokens, pixels, whole.boolean(), patch=2))
    assert float(torch.stack(pixel_losses).mean()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", ["milan", "pixels"])
def test_a_run_decodes_a_share(objective: str, store: Path, tmp_path: Path) -> None:
    """It resumes to the same bits, and validates on all patches; it is no run of another share."""
    small = {
        "epochs": 2, "warmup_epochs": 0.5, "batch_size": 8, "lr": 1e-3, "device": "cpu",
        "num_workers": 0, "log_every": 1, "report_to": "none", "objective": objective,
        "model": "vit_tiny_patch16_224", "held_out": 0.4,
        "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2}, "decode_fraction": 0.25,
    }  # fmt: skip
    figures = milan.pretrain(str(store), out=str(tmp_path / "whole"), **small)
    assert np.isfinite(figures["val_loss"])
    milan.pretrain(str(store), out=str(tmp_path / "two"), stop_after=1, **small)
    milan.pretrain(str(store), out=str(tmp_path / "two"), **small)
    assert weights(tmp_path / "two") == weights(tmp_path / "whole")
    milan.pretrain(str(store), out=str(tmp_path / "all"), **{**small, "decode_fraction": 1.0})
    first = [log_of(tmp_path / name)[0]["loss"] for name in ("whole", "all")]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.3)
    with pytest.raises(milan.MilanError, match="decode_fraction"):
        milan.pretrain(str(store), out=str(tmp_path / "all"), **small)
    before = json.loads((tmp_path / "all/run.json").read_text())
    del before["identity"]["decode_fraction"]  # a run of a version without it goes on
    write_run(tmp_path / "all", before)
    again = milan.pretrain(
        str(store), out=str(tmp_path / "all"), **{**small, "decode_fraction": 1.0}
    )
    assert again["finished"]
