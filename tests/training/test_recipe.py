"""The published recipe: defaults, micro-batches, the rate of every step, the optimiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import SMALL, Notes
from timm.optim import param_groups_weight_decay

import milan
from milan import PretrainConfig
from milan.core.distributed import Ranks
from milan.data.order import Order
from milan.models.decoder import PUBLISHED, Decoder
from milan.models.student import build_student
from milan.training.build import micro_batch_of, resolve_defaults
from milan.training.optim import Schedule


def test_the_defaults_are_the_published_recipe() -> None:
    """MILAN, table 8, and its PRETRAIN.sh, for ViT-B/16 and any batch."""
    settings = resolve_defaults(PretrainConfig(num_workers=0), torch.device("cpu"))
    config = settings.config
    assert config.model == "vit_base_patch16_224"
    assert (config.epochs, settings.warmup_epochs, config.batch_size) == (400, 40, 4096)
    assert settings.lr == pytest.approx(2.4e-3)
    assert (config.min_lr, config.weight_decay, config.beta2) == (0, 0.05, 0.95)
    assert (config.mask_ratio, settings.masking) == (0.75, "semantic")
    assert (config.objective, settings.decoder_kind, config.decoder) == ("milan", "prompt", {})
    assert PUBLISHED == {
        "embed_dim": 512, "depth": 8, "num_heads": 16, "mlp_ratio": 4.0
    }  # fmt: skip
    assert resolve_defaults(
        PretrainConfig(batch_size=512), torch.device("cpu")
    ).lr == pytest.approx(3e-4)
    pixels = resolve_defaults(PretrainConfig(objective="pixels"), torch.device("cpu"))
    assert (pixels.decoder_kind, pixels.masking) == ("mae", "random")


@pytest.mark.parametrize(
    ("device", "given", "ranks", "micro", "said"),
    [
        ("cuda", {"batch_size": 4096}, 1, 256, ""),
        ("cuda", {"batch_size": 4096, "micro_batch": 100}, 2, 64, ""),
        ("cuda", {"batch_size": 514}, 2, 1, "nearer to 256; --batch-size 512"),
        ("cpu", {"batch_size": 4096}, 1, 16, ""),  # 20 would stay in the cache
        ("cpu", {"batch_size": 8}, 1, 8, ""),
        ("cpu", {"batch_size": 4096, "micro_batch": 256}, 1, 256, ""),
        ("cpu", {"batch_size": 64, "decoder": {"embed_dim": 32}}, 1, 32, ""),
    ],
)
def test_micro_batches(device: str, given: dict, ranks: int, micro: int, said: str) -> None:
    """As published on a GPU; what a CPU's cache holds of ViT-B; told if few images divide."""
    some, where, notes = Ranks(size=ranks), torch.device(device), Notes()
    config = PretrainConfig(num_workers=0, precision="fp32", **given)
    student = build_student(
        config.model, img_size=224, target_width=512, decoder=config.decoder,
        model_args={"depth": 1},
    )  # fmt: skip
    assert micro_batch_of(config, student, where, some, notes) == micro
    assert said in "".join(notes.lines) if said else not notes.lines


def test_the_rate_of_every_step() -> None:
    """Per step, not per epoch, at the published length: 312 steps of 4,096 an epoch."""
    schedule = Schedule(
        data=Order(*[np.arange(312 * 4096)] * 2, 1, 1, 0, 4096, 1), epochs=400, accumulate=16,
        lr=2.4e-3, warmup_epochs=40, min_lr=0, precision="fp32", save_every=312, save_minutes=15,
        keep=2, log_every=10,
    )  # fmt: skip
    assert schedule.learning_rate(0) == 0
    assert schedule.learning_rate(20 * 312) == pytest.approx(1.2e-3)
    assert schedule.learning_rate(20 * 312 + 156) == pytest.approx(1.23e-3)
    assert schedule.learning_rate(40 * 312) == 2.4e-3
    assert schedule.learning_rate(220 * 312) == pytest.approx(1.2e-3)
    assert schedule.learning_rate(399 * 312) == pytest.approx(2.4e-3 * math.sin(math.pi / 720) ** 2)
    assert schedule.learning_rate(schedule.steps) == pytest.approx(0, abs=1e-12)
    rates = [schedule.learning_rate(step) for step in range(0, schedule.steps, 97)]
    assert max(rates) <= 2.4e-3
    assert min(rates) >= 0


def test_the_optimiser_is_the_published_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW, betas .9/.95, no decay of biases and norms, positions not trained."""
    made: list[torch.optim.AdamW] = []
    kind = torch.optim.AdamW

    def noted(*arguments: Any, **options: Any) -> torch.optim.AdamW:
        made.append(kind(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", noted)
    milan.pretrain(str(store), stop_after=1, **{**SMALL, "out": str(tmp_path)})
    (optimiser,) = made
    free, decayed = optimiser.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == free["betas"] == (0.9, 0.95)
    assert {p.ndim for p in free["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) >= 2


@pytest.mark.parametrize(("model", "decayed", "free"), [("vit_base_patch16_224", 93, 175)])
def test_decay_groups_of_the_published_model(model: str, decayed: int, free: int) -> None:
    """timm's grouping, by dimension: 93 with and 175 without decay for ViT-B and its decoder."""
    with torch.device("meta"):
        encoder = timm.create_model(model, num_classes=0)
        encoder.pos_embed.requires_grad_(False)
    decoder = Decoder(
        "prompt", encoder_width=8, grid=14, target_width=512, embed_dim=512, depth=8,
        num_heads=16, mlp_ratio=0.1,
    )  # fmt: skip
    without, with_decay = param_groups_weight_decay(torch.nn.ModuleList([encoder, decoder]), 0.05)
    assert (len(with_decay["params"]), len(without["params"])) == (decayed, free)
