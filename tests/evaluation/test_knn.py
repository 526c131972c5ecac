"""k nearest neighbours: the votes of a plain program, from pieces and from several shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Notes
from PIL import Image
from torch.nn import functional as F

from milan.core.distributed import Ranks
from milan.evaluation import features, knn
from milan.evaluation.evaluate import evaluate
from milan.evaluation.frozen import Frozen
from milan.evaluation.knn import Nearest, vote
from milan.evaluation.protocols import PROTOCOLS


def plain(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Weighted k-NN, one query after the other, in float64."""
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    named = []
    for query in queries:
        similarity = bank @ query
        nearest = np.argsort(-similarity)[:k]
        votes = np.zeros(labels.max() + 1)
        np.add.at(votes, labels[nearest], np.exp(similarity[nearest] / 0.07))
        named.append(votes.argmax())
    return np.array(named)


def test_votes_are_those_of_a_plain_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All k, with bank and queries in several pieces; a k above 130 has too few neighbours."""
    monkeypatch.setattr(features, "FILE_ROWS", 16)
    monkeypatch.setattr(knn, "_QUERIES", 20)
    generator, shown = np.random.default_rng(0), {"train": [], "val": []}
    for i in range(170):
        split = "val" if i >= 130 else "train"
        folder = tmp_path / split / f"class {i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 200, (4, 4, 3)).astype(np.uint8)
        pixels[..., 0] += 5 * np.uint8(i % 4)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        shown[split].append(pixels.ravel() / 255)
    bank, queries = (np.stack(shown[split]) for split in ("train", "val"))
    labels, expected = np.arange(130) % 4, np.arange(130, 170) % 4
    network = Frozen(lambda p: p.float().flatten(1) / 255, 4, "pixels", {"network": "pixels"})
    notes = Notes()
    got = evaluate(
        PROTOCOLS["knn"], data=str(tmp_path / "train"), val_data=str(tmp_path / "val"),
        crop_share=1.0, features="none", frozen=network, progress=notes, memory="1 KB",
    )  # fmt: skip
    for k in (10, 20, 100):
        right = (plain(bank, labels, queries, k) == expected).mean()
        assert got[f"k{k}"] == pytest.approx(100 * right)
    assert len({got[f"k{k}"] for k in (10, 20, 100)}) == 3  # k matters
    assert got["k200"] is None
    assert notes.line("k 200 left out: there are 130 images")
    assert notes.line("100 neighbours vote of 130 images in all")


def test_shares_of_ranks_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest of all shares are the nearest of the whole, where a share is smaller than k."""
    generator = torch.Generator().manual_seed(3)
    bank, queries = (torch.randn(n, 6, generator=generator) for n in (30, 9))
    labels = torch.arange(30)
    whole = Nearest(queries, 12)
    whole.see(bank, labels)
    shares = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 30)):
        shares.append(Nearest(queries, 12))
        shares[-1].see(bank[part], labels[part])

    def gather(_: Ranks, own: torch.Tensor) -> torch.Tensor:
        name = "labels" if own.dtype == torch.int64 else "similarity"
        fill = 0 if name == "labels" else -torch.inf
        parts = [getattr(share, name) for share in shares]
        return torch.cat([F.pad(p, (0, 12 - p.shape[1]), value=fill) for p in parts])

    monkeypatch.setattr(Ranks, "gather", gather)
    similarity, found = shares[1].of_all(Ranks(1, 3))
    assert found.equal(whole.labels)
    assert similarity.allclose(whole.similarity)
    assert vote(similarity, found, 30).equal(vote(whole.similarity, whole.labels, 30))
