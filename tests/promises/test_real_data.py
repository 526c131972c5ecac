"""Real photographs at real size, and CIFAR-10; skipped where ../shared/data is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import milan
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets

LIMITS = {"int8": 103_000, "float16": 203_000}
"""Bytes a view of ViT-B/16 at 224 pixels: 197 tokens of 512 channels, and attention."""


def bytes_on_disk(store: Path) -> int:
    """Of the arrays' files."""
    root = store / "generations/000"
    return sum(p.stat().st_size for p in root.glob("*/c/**/*") if p.is_file())


@pytest.fixture(scope="module")
def imagenet(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict]]:
    """Two photographs through the published teacher's architecture, in both codecs."""
    out = {}
    for codec, views in (("int8", 2), ("float16", 1)):
        store = tmp_path_factory.mktemp("imagenet") / f"{codec}.zarr"
        summary = extract_targets(
            "imagenet-sample", data_root=str(shared_data), out=str(store),
            teacher="ViT-B-16-quickgelu", pretrained="none", limit=2, views=views, codec=codec,
            executor="local", batch_size=4,
        )  # fmt: skip
        out[codec] = store, summary
    return out


@pytest.mark.parametrize("codec", LIMITS)
def test_bytes_a_view(codec: str, imagenet: dict[str, tuple[Path, dict]]) -> None:
    """What a store of ImageNet takes is planned to the byte, and stays in the budget."""
    store, summary = imagenet[codec]
    cache = TargetCache(store)
    assert (cache.spec.tokens, cache.spec.channels) == (197, 512)
    assert summary["bytes_per_view"] == cache.spec.view_bytes() <= LIMITS[codec]
    measured = bytes_on_disk(store) / (cache.rows * cache.views)
    # A shard of 2 rows of 1,024 keeps index entries for the other 1,022: 16 bytes an array each.
    entries = 1022 / 2 * 16 * sum(1 for array in cache.spec.arrays().values() if array.shard)
    crops = 1022 / 2 * 20
    assert measured <= LIMITS[codec] + entries + crops
    assert measured >= cache.spec.view_bytes() * 0.99


def test_targets_of_photographs(imagenet: dict[str, tuple[Path, dict]]) -> None:
    """Random weights, and flagged as such; features finite, attention > 0."""
    cache = TargetCache(imagenet["int8"][0])
    assert cache.attributes["about"]["random_weights"] is True
    assert cache.attributes["about"]["licence"] == "none (random weights)"
    assert cache.attributes["about"]["normalisation"] == "imagenet"
    assert cache.spec.teacher["architecture"]["quick_gelu"] is True
    rows, views = np.repeat(np.arange(2), 2), np.tile(np.arange(2), 2)
    targets = cache.read(rows, views)
    assert targets.scale is not None
    assert (targets.scale > 0).all()
    assert (targets.attention > 0).all()
    np.testing.assert_allclose(targets.attention.sum(axis=1), 1, atol=0.2)
    dataset = milan.open_cache(imagenet["int8"][0])
    assert dataset[0]["image"].shape == (3, 224, 224)


@pytest.mark.soak
def test_pretraining_at_real_size(imagenet: dict[str, tuple[Path, dict]], tmp_path: Path) -> None:
    """ViT-B/16 and the published decoder: a step, a resume, another step."""
    torch.set_num_threads(2)
    settings: dict[str, Any] = {
        "out": str(tmp_path / "run"), "epochs": 1, "warmup_epochs": 0, "batch_size": 1,
        "num_workers": 0, "keep": 1,
    }  # fmt: skip
    store = str(imagenet["int8"][0])
    first = milan.pretrain(store, stop_after=1, **settings)
    assert (first["step"], first["finished"]) == (1, False)
    second = milan.pretrain(store, stop_after=1, **settings)
    assert (second["step"], second["finished"]) == (2, True)
    assert 1.5 < second["loss"] < 2.5
    encoder = milan.load_encoder(tmp_path / "run")
    assert sum(p.numel() for p in encoder.parameters()) == 85_798_656
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert "model" not in told["differs"]


def test_cifar(shared_data: Path, teacher_files: dict[str, str], tmp_path: Path) -> None:
    """Parquet of the hub as it is: extract, an epoch of a small student, the loss is sane."""
    store = str(tmp_path / "cifar.zarr")
    summary = extract_targets(
        str(shared_data / "cifar10"), out=store, limit=64, views=2, executor="local",
        **teacher_files,
    )  # fmt: skip
    assert summary["bad"] == {}
    cache = TargetCache(store)
    assert (cache.rows, cache.views, cache.grid) == (64, 2, (4, 4))
    assert cache.manifest.classes is not None
    assert "airplane" in cache.manifest.classes
    assert len(set(cache.manifest.labels().tolist())) > 5
    figures = milan.pretrain(
        store, out=str(tmp_path / "run"), epochs=1, batch_size=16, num_workers=0,
        model_args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        decoder={"embed_dim": 32, "depth": 1, "num_heads": 2},
    )  # fmt: skip
    assert (figures["step"], figures["finished"]) == (4, True)
    assert 1.5 < figures["loss"] < 2.5
