"""Benchmarks: what they put in a store's place is one, as far as a step and a reader ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import make_photos

from benchmarks.step import case
from benchmarks.synthetic import make_store
from milan.images.manifest import build_manifest
from milan.store.cache import TargetCache
from milan.training.memory import peak_bytes

SHAPE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "model_args": {"patch_size": 32, "depth": 1},
    "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2},
}  # fmt: skip


def test_a_step_without_a_store() -> None:
    """Of a teacher whose grid is not the student's: memory is foreseen, every part is learnt."""
    cpu = torch.device("cpu")
    made = case("fp32", 4, "ViT-L/14", 32, cpu, micro=2, decode_fraction=0.5, **SHAPE)
    assert peak_bytes(made.student, made.settings, made.targets, cpu, 2) > 0
    made.run(4)()
    learnt = [p for p in made.student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learnt)


def test_an_artificial_store_is_read(tmp_path: Path) -> None:
    """Its records and checksums are those of a store; every block has the same targets."""
    manifest = build_manifest(make_photos(tmp_path / "photos", count=8), seed=0)
    cache = TargetCache(make_store(tmp_path / "t.zarr", manifest, shard_size=4))
    found = cache.read(np.array([1, 5]), np.array([0, 0]))
    assert found.codes is not None
    assert found.codes.shape == (2, 197, 512)
    assert np.array_equal(found.codes[0], found.codes[1])
