"""The format as it is written down: the documented reader, and a store kept from its first day."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from milan.images.views import ViewSpec
from milan.store.cache import TargetCache
from milan.store.format import CacheSpec
from pipeline.extract import extract_targets
from pipeline.verify import GOOD, verify

KEPT = ROOT / "tests/kept"


def example(store: Path, row: int, view: int, out: Path) -> dict[str, np.ndarray]:
    """What the reader in docs/cache-format.md gives, run as a program of its own."""
    text = (ROOT / "docs/cache-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    script = out.with_suffix(".py")
    script.write_text(code)
    arguments = [str(a) for a in (script, store, row, view, out)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.parametrize("codec", ["int8", "float16", "pq:16"])
def test_the_documented_reader(codec: str, tmp_path: Path) -> None:
    """Thirty lines of zarr and numpy read what milan reads, from any generation of a layer."""
    if codec == "pq:16":
        pytest.importorskip("faiss")
    store = tmp_path / "t.zarr"
    demo = ROOT / "demo"
    for limit in (24, 32):
        extract_targets(
            str(demo / "data/test.parquet"), out=str(store), limit=limit, views=2, codec=codec,
            teacher=str(demo / "teacher/config.json"), shard_size=8, executor="local",
            pretrained=str(demo / "teacher/model.safetensors"),
        )  # fmt: skip
    cache = TargetCache(store)
    for row, view in ((0, 1), (30, 0)):
        got = example(store, row, view, tmp_path / f"{row}.npz")
        at = np.array([row]), np.array([view])
        targets = cache.read(*at)
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        expected = cache.codec.decode(torch.from_numpy(targets.codes), scale)[0].numpy()
        np.testing.assert_allclose(got["features"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got["attention"], targets.attention[0])
        np.testing.assert_array_equal(got["crop"], cache.crops(*at)[0])


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.zarr")), ids=lambda p: p.name)
def test_kept_stores_open(path: Path) -> None:
    """A store written by an earlier version reads as it did: values kept beside it."""
    assert verify(path, deep=True).code == GOOD
    cache = TargetCache(path)
    kept = np.load(path.with_suffix(".npz"))
    rows, views = np.divmod(np.arange(cache.rows * cache.views), cache.views)
    targets = cache.read(rows, views)
    decoded = cache.codec.decode(torch.from_numpy(targets.codes), torch.from_numpy(targets.scale))
    np.testing.assert_array_equal(decoded.numpy(), kept["features"])
    np.testing.assert_array_equal(targets.attention, kept["attention"])
    np.testing.assert_array_equal(cache.crops(rows, views), kept["crop"])
    assert cache.digest == str(kept["digest"])
    assert [cache.manifest.key(row) for row in range(cache.rows)] == kept["keys"].tolist()


def test_there_is_a_kept_store() -> None:
    """Or the test above would hold nothing."""
    assert list(KEPT.glob("*.zarr"))


@pytest.mark.parametrize(
    ("codec", "limit"), [("float16", 203_000), ("int8", 103_000), ("pq:64", 15_000)]
)
def test_bytes_a_view(codec: str, limit: int) -> None:
    """At ViT-B/16's 197 tokens of 512 channels, class token, crop and checksums included."""
    spec = CacheSpec("", 1000, 2, 197, 512, codec, 1024, ViewSpec().law(), {})
    assert spec.view_bytes() <= limit
