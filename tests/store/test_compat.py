"""Stores of earlier versions: what they lack is told, and nothing fails for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, make_photos, run_here

from milan.data.dataset import open_cache
from milan.errors import CacheError
from milan.store.cache import TargetCache
from milan.store.compat import missing_features
from milan.store.format import CONTENT, GENERATION, canonical
from pipeline.extract import extract_targets
from pipeline.verify import CORRUPT, FOREIGN, GOOD, verify


def rewritten(store: Path, change: Callable[[Path], object]) -> Path:
    """`store` as an earlier version would have written its first generation: changed, and proven.

    Digests of files and records, the fingerprint and the content's identity are taken anew.
    """
    root = store / GENERATION
    change(root)
    spec = json.loads((root / "zarr.json").read_bytes())
    attributes = spec["attributes"]
    attributes["fingerprint"] = hashlib.sha256(canonical(attributes["spec"])).hexdigest()
    (root / "zarr.json").write_text(json.dumps(spec))
    records = sorted((root / "records").iterdir())
    proofs = [hashlib.sha256(path.read_bytes()).digest() for path in records]
    table = pq.read_table(root / "shards.parquet")
    column = pa.array(proofs, table.schema.field("record").type)
    pq.write_table(
        table.set_column(0, table.schema.field("record"), column), root / "shards.parquet"
    )
    index = json.loads((store / "index.json").read_bytes())
    entry = index["generations"][0]
    entry["files"] = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in entry["files"]
        if (root / name).exists()
    }
    tables = {name: digest for name, digest in entry["files"].items() if name.startswith(CONTENT)}
    entry["fingerprint"] = attributes["fingerprint"]
    content = [entry["fingerprint"], tables, hashlib.sha256(b"".join(proofs)).hexdigest()]
    entry["digest"] = hashlib.sha256(canonical(content)).hexdigest()
    (store / "index.json").write_bytes(canonical(index))
    return store


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    shutil.copytree(store, tmp_path / "t.zarr")
    return tmp_path / "t.zarr"


def without(*names: str) -> Callable[[Path], None]:
    """Take files and folders out."""

    def change(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return change


def no_field(name: str) -> Callable[[Path], None]:
    """Take a field out of the spec as it is written."""

    def change(root: Path) -> None:
        meta = json.loads((root / "zarr.json").read_bytes())
        del meta["attributes"]["spec"][name]
        (root / "zarr.json").write_text(json.dumps(meta))

    return change


def no_key(name: str) -> Callable[[Path], None]:
    """Take a key out of every record."""

    def change(root: Path) -> None:
        for path in (root / "records").iterdir():
            record = json.loads(path.read_bytes())
            del record[name]
            path.write_bytes(canonical(record))

    return change


def test_a_store_of_this_version_lacks_nothing(store: Path) -> None:
    """Else every store would be told of."""
    assert missing_features(store) == []
    assert verify(store).missing_features == []
    assert "not in it" not in run_here("inspect", store).out


def test_a_kept_store_lacks_what_came_later(tmp_path: Path) -> None:
    """The store of the first day: no field for texts, by which version, and good all the same."""
    shutil.copytree(ROOT / "tests/kept/v1.zarr", tmp_path / "v1.zarr")
    verdict = verify(tmp_path / "v1.zarr", deep=True)
    assert verdict.code == GOOD
    (line,) = verdict.missing_features
    assert line.startswith("no texts in its spec: it was made before")
    assert line.endswith("generations/000, generations/001, generations/002, made by milan 0.1.0")
    told = run_here("verify", tmp_path / "v1.zarr")
    assert told.code == 0
    assert "not in it: no texts in its spec" in told.out
    assert "no texts in its spec" in run_here("inspect", tmp_path / "v1.zarr").out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("canary"), "no canaries: a teacher"),
        (without("fidelity.json"), "no fidelity report: how near"),
        (without("origin.json"), "no origin.json: where it was made is not known"),
        (no_field("stored_views"), "no stored_views in its spec: it was made before"),
        (no_key("widths"), "no widths in its records: generations/000, made by milan"),
    ],
    ids=["canaries", "fidelity", "origin", "stored_views", "widths"],
)
def test_what_is_not_there_is_told(copy: Path, change: Callable[[Path], None], said: str) -> None:
    """By verify and inspect, with exit code 0; targets are read as before."""
    before = TargetCache(copy).read(np.arange(24), np.zeros(24, int))
    rewritten(copy, change)
    verdict = verify(copy, deep=True)
    assert (verdict.code, verdict.corrupt) == (GOOD, [])
    (line,) = verdict.missing_features
    assert line.startswith(said)
    for command in ("verify", "inspect"):
        told = run_here(command, copy)
        assert told.code == 0, told.out + told.err
        assert said.split(":")[0] in told.out
    after = TargetCache(copy).read(np.arange(24), np.zeros(24, int))
    np.testing.assert_array_equal(after.codes, before.codes)


def test_a_store_without_origin_or_report_goes_on(
    copy: Path, photos: Path, teacher_files: dict[str, str]
) -> None:
    """It trains with --data-root, an audit asks for the teacher, and it grows."""
    rewritten(copy, without("origin.json", "fidelity.json", "canary"))
    rewritten(copy, no_field("texts"))
    assert len(verify(copy).missing_features) == 4
    with pytest.raises(CacheError, match=r"origin\.json"):
        open_cache(copy)
    assert open_cache(copy, data_root=str(photos)).pixels(np.array([3]), np.array([1])).any()
    verdict = verify(copy, audit=2, data_root=str(photos))
    assert verdict.code == FOREIGN
    assert "origin.json" in verdict.foreign[0]
    settings = {"views": 3, "shard_size": 8, "batch_size": 7, "executor": "local"}
    summary = extract_targets(str(photos), out=str(copy), **settings, **teacher_files)
    assert summary["views"] == 3
    assert TargetCache(copy).views == 3


def test_stored_views_without_ends(tmp_path: Path, teacher_files: dict[str, str]) -> None:
    """They cannot be told apart: said by verify, and one error where they are read."""
    photos, out = make_photos(tmp_path / "p", count=4), tmp_path / "t.zarr"
    extract_targets(
        str(photos), out=str(out), views=1, shard_size=4, executor="local", store_views="webp",
        **teacher_files,
    )  # fmt: skip
    assert missing_features(out) == []
    rewritten(out, no_key("ends"))
    verdict = verify(out)
    assert verdict.code == GOOD
    assert verdict.missing_features[0].startswith("no ends in its records: its stored views cannot")
    assert verify(out, deep=True).code == CORRUPT
    with pytest.raises(CacheError, match="does not say where pictures end"):
        open_cache(out).pixels(np.array([0]), np.array([0]))
