"""A store that is not whole, or not of this format, is refused; damage names its row."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from milan.errors import CacheError
from milan.images.manifest import Manifest
from milan.store.cache import TargetCache
from milan.store.format import GENERATION, record_name


def edit_json(path: Path, change: Callable[[dict], Any]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_bytes(json.dumps(data).encode())


def _truncate(store: Path) -> None:
    file = store / GENERATION / "features/c/0/0/0/0"
    os.truncate(file, file.stat().st_size - 16)


def _remove_file(store: Path) -> None:
    (store / GENERATION / "scale/c/0/0/0").unlink()


GROUP, INDEX = f"{GENERATION}/zarr.json", "index.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (shutil.rmtree, "no store at"),
    "no index": (lambda s: (s / INDEX).unlink(), "is incomplete: 6 of 6 shards"),
    "torn index": (lambda s: os.truncate(s / INDEX, 99), "index.json is damaged"),
    "list for an index": (lambda s: (s / INDEX).write_text("[]"), "is not the index of"),
    "format of the index": (
        lambda s: edit_json(s / INDEX, lambda i: i.update(format="zip")), "is not the index of",
    ),
    "version of the index": (
        lambda s: edit_json(s / INDEX, lambda i: i.update(version=2)),
        "format version 2.*pip install --upgrade",
    ),
    "version of the group": (
        lambda s: edit_json(s / GROUP, lambda g: g["attributes"].update(version=9)),
        "format version 9.*pip install --upgrade",
    ),
    "another kind of group": (
        lambda s: edit_json(s / GROUP, lambda g: g["attributes"].update(format="x")),
        "is a Zarr group of another kind",
    ),
    "spec edited": (
        lambda s: edit_json(s / GROUP, lambda g: g["attributes"]["spec"].update(views=1)),
        "does not have the stated fingerprint",
    ),
    "index of another store": (
        lambda s: edit_json(
            s / INDEX,
            lambda i: i.pop("digest") and i["generations"][0].update(fingerprint="0" * 64),
        ),
        "are of different stores",
    ),
    "index edited": (
        lambda s: edit_json(s / INDEX, lambda i: i["generations"][0].update(bad=1)),
        "index.json is damaged: its digest differs",
    ),
    "a file missing": (_remove_file, "1 files missing and 0 of the wrong size.*scale/c/0"),
    "a file cut": (_truncate, "0 files missing and 1 of the wrong size.*features/c/0"),
    "group missing": (lambda s: (s / GROUP).unlink(), "is damaged or gone"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_opening_refuses(copy: Path, damage: str) -> None:
    """Training must never start on a store that is not whole and of this format."""
    inflict, message = DAMAGES[damage]
    inflict(copy)
    with pytest.raises(CacheError, match=message):
        TargetCache(copy).check_files()


def test_other_folders_are_no_stores(tmp_path: Path) -> None:
    """A folder of other things, a Zarr group of another program, a file."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    zarr.create_group(zarr.storage.LocalStore(tmp_path / "other.zarr"), zarr_format=3)
    (tmp_path / "file").touch()
    for name in ("notes", "other.zarr", "file"):
        with pytest.raises(CacheError, match=r"is not a target cache: it has no index\.json"):
            TargetCache(tmp_path / name)


def test_a_manifest_of_another_order_is_refused(copy: Path) -> None:
    """Rows would name other images: the fingerprint holds the manifest's digest."""
    path = copy / GENERATION / "manifest.parquet"
    there = Manifest.read(path)
    order = np.roll(np.arange(len(there)), 1)
    path.write_bytes(there.take(order).to_parquet())
    with pytest.raises(CacheError, match="is damaged or of another store"):
        _ = TargetCache(copy).manifest


def chunk_place(data: bytes, chunks: int, number: int) -> tuple[int, int]:
    """(offset, bytes) of an inner chunk, by the shard index at the file's end (Zarr v3)."""
    index = data[-(16 * chunks + 4) : -4]
    return struct.unpack_from("<QQ", index, 16 * number)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["features", "scale", "attention"])
def test_a_flipped_bit_names_its_shard_and_row(copy: Path, name: str) -> None:
    """One bit of a chunk: that row is refused by name, in whatever batch; others still read."""
    spec = TargetCache(copy).spec
    path = copy / GENERATION / name / spec.arrays()[name].file(1, 1)
    offset, size = chunk_place(path.read_bytes(), 8, 3)  # row 11 is the fourth of block 1
    flip_bit(path, offset + size // 2)
    cache = TargetCache(copy)
    rows = np.array([0, 5, 11, 12, 23])
    with pytest.raises(
        CacheError, match=rf"{name} of row 11, view 1 \(shard 00001\.01\) cannot be used"
    ):
        cache.read(rows, np.ones(5, int))
    assert cache.read(np.array([10, 12]), np.ones(2, int)).attention.shape == (2, 16)
    assert cache.read(np.array([11]), np.zeros(1, int)).attention.shape == (1, 16)


@pytest.mark.parametrize("name", ["features", "attention"])
def test_a_flipped_bit_in_a_shard_index_is_seen(copy: Path, name: str) -> None:
    """The index of a shard could send a reader to another row's bytes: it has a checksum too."""
    spec = TargetCache(copy).spec
    path = copy / GENERATION / name / spec.arrays()[name].file(2, 0)
    flip_bit(path, path.stat().st_size - (16 * 8 + 4) + 16 * 2)
    with pytest.raises(CacheError, match=rf"{name} of row 16, view 0 \(shard 00002\.00\)"):
        TargetCache(copy).read(np.array([1, 16, 17]), np.zeros(3, int))


def test_a_flipped_bit_in_the_crops_is_seen(copy: Path) -> None:
    """Or the student would see another rectangle than the teacher did."""
    spec = TargetCache(copy).spec
    flip_bit(copy / GENERATION / "crop" / spec.arrays()["crop"].file(0, 1), 30)
    cache = TargetCache(copy)
    with pytest.raises(CacheError, match=r"crop of row 2, view 1 \(shard 00000\.01\)"):
        cache.crops(np.array([9, 2]), np.array([1, 1]))
    assert (cache.crops(np.array([9, 2]), np.array([1, 0])) >= 0).all()


def test_an_edited_record_is_seen_when_it_is_used(copy: Path) -> None:
    """A record proves pixels and bytes of images: it is itself proven by the index."""
    path = copy / GENERATION / "records" / record_name(1, 0)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"pixels":[', b'"pixels":[1'))
    cache = TargetCache(copy)
    cache.checksum(3, 0)
    with pytest.raises(CacheError, match=r"record 00001\.00\.json .* is damaged"):
        cache.checksum(9, 0)
