"""Tests of the store, written and read: a store is whole and proven, or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import tree

from milan.core.atomic import lock_folder
from milan.core.progress import NoProgress
from milan.errors import CacheError, ConfigError
from milan.images.manifest import Manifest, build_manifest
from milan.images.views import ViewSpec
from milan.store.cache import TargetCache
from milan.store.codecs import Codec, codec_of
from milan.store.format import GENERATION, CacheSpec, record_name
from pipeline.config import ExtractConfig
from pipeline.extract import extract_targets
from pipeline.extraction.plan import plan
from pipeline.extraction.worker import _row_checksums
from pipeline.writing.shards import stage_shard
from pipeline.writing.store import Store, Writer, group_attributes

ROWS, VIEWS, TOKENS, CHANNELS, SHARD = 10, 2, 5, 4, 4
"""The made-up stores: 10 rows in 3 blocks, the last of 2 rows, so 6 shards."""
ORIGIN, INDEX = f"{GENERATION}/origin.json", "index.json"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Ten names; their content is never read here."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(ROWS):
        (folder / f"{i}.jpg").touch()
    return build_manifest(folder, seed=0)


@pytest.fixture
def spec(manifest: Manifest) -> CacheSpec:
    return CacheSpec(
        manifest=manifest.digest(), rows=ROWS, views=VIEWS, tokens=TOKENS, channels=CHANNELS,
        codec="int8", shard_size=SHARD, view_law=ViewSpec(8).law(), teacher={"weights": "abc"},
    )  # fmt: skip


def open_store(path: Path, spec: CacheSpec, manifest: Manifest) -> Writer:
    """The first generation of a store; closing is `writer.store.close()`."""
    store = Store(path)
    tables = {f"codec/{name}": table for name, table in fitted(spec).tables.items()}
    files = {"manifest.parquet": manifest.to_parquet(), "fidelity.json": b"{}"}
    try:
        return store.generation(
            GENERATION,
            spec,
            lambda: (group_attributes(spec, {"name": "made up"}), tables, files),
        )
    except BaseException:
        store.close()
        raise


def fitted(spec: CacheSpec) -> Codec:
    return codec_of(spec.codec).fitted(torch.ones(1, CHANNELS))


def values(spec: CacheSpec, block: int, view: int, bad: tuple[int, ...] = ()) -> dict:
    """Arrays of one shard as a worker would stage them; rows in `bad` are all fill."""
    start, stop = spec.block_rows(block)
    generator = np.random.default_rng((block, view))
    attention = generator.random((stop - start, TOKENS - 1), np.float32) + 0.1
    features = generator.standard_normal((stop - start, TOKENS, CHANNELS)).astype(np.float32)
    codes, scale = fitted(spec).encode(torch.from_numpy(features))
    crop = generator.integers(0, 9, (stop - start, 5), np.int32)
    arrays = {"features": codes.numpy(), "attention": attention, "crop": crop}
    if scale is not None:
        arrays["scale"] = scale.numpy()
    for name, array in spec.arrays().items():
        arrays[name][[row - start for row in bad]] = array.fill
    return arrays


def stage(
    store: Writer, block: int, view: int, *, bad: tuple[int, ...] = ()
) -> tuple[Path, dict[str, Any]]:
    """A worker's part: (its staging folder, the record of the shard)."""
    spec = store.spec
    folder = store.store.backend.staging / f"{block}.{view}"
    folder.mkdir(parents=True)
    start, stop = spec.block_rows(block)
    arrays = values(spec, block, view, bad)
    reasons = {str(row): "truncated: made up" for row in bad}
    record = {
        "block": block, "view": view, "rows": [start, stop],
        "files": stage_shard(folder, spec, block, view, arrays),
        "bad": reasons,
        "crc32c": {name: _row_checksums(rows, reasons, start) for name, rows in arrays.items()},
        "digests": ["d"] * (stop - start), "pixels": [0] * (stop - start),
        "heights": [8] * (stop - start), "widths": [8] * (stop - start),
    }  # fmt: skip
    return folder, record


def finish(store: Writer) -> None:
    store.store.publish(store.finish("made up"))


def missing(store: Writer) -> list[tuple[int, int]]:
    """(block, view) of the shards that a new run would make."""
    fresh = Writer(store.store, store.name, store.spec).missing()
    return [(block, view) for block, view in np.argwhere(fresh).tolist()]


def fill(store: Writer, *, leave: tuple[tuple[int, int], ...] = (), **more: Any) -> None:
    """Commit every shard except `leave`."""
    for block in range(store.spec.blocks):
        for view in range(store.spec.views):
            if (block, view) not in leave:
                store.commit(*stage(store, block, view, **more))


@pytest.fixture
def made(tmp_path: Path, spec: CacheSpec, manifest: Manifest) -> Path:
    """A finished made-up store."""
    store = open_store(tmp_path / "made.zarr", spec, manifest)
    fill(store)
    finish(store)
    store.store.close()
    return store.store.path


@contextmanager
def dying_after(moves: int) -> Iterator[None]:
    """Stop at a rename, the steps between which a store changes; those of zarr's threads go on."""
    real, made = os.replace, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal made
        if threading.current_thread() is threading.main_thread():
            if made == moves:
                raise KeyboardInterrupt
            made += 1
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying)
        yield


# --- commit protocol ------------------------------------------------------------------------------


def test_only_a_record_makes_a_shard_exist(
    tmp_path: Path, spec: CacheSpec, manifest: Manifest
) -> None:
    """Staged is nothing; moved without a record is nothing; the record comes last."""
    store = open_store(tmp_path / "t.zarr", spec, manifest)
    everything = [(b, v) for b in range(3) for v in range(VIEWS)]
    assert missing(store) == everything
    folder, record = stage(store, 1, 0)
    assert missing(store) == everything
    for file in record["files"]:
        target = store.root / file["path"]
        target.parent.mkdir(parents=True)
        shutil.copyfile(folder / file["path"], target)
    assert missing(store) == everything
    store.commit(folder, record)
    assert missing(store) == [shard for shard in everything if shard != (1, 0)]
    store.store.close()


def test_a_commit_that_dies_leaves_no_record(
    tmp_path: Path, spec: CacheSpec, manifest: Manifest
) -> None:
    """Wherever it stops before its last step, the shard is made again; and nothing is littered."""
    store = open_store(tmp_path / "t.zarr", spec, manifest)
    for moves in range(5):  # four arrays, then the record
        folder, record = stage(store, 0, 0)
        with dying_after(moves), pytest.raises(KeyboardInterrupt):
            store.commit(folder, record)
        assert (0, 0) in missing(store)
        shutil.rmtree(folder)
    store.commit(*stage(store, 0, 0))
    assert missing(store)[0] == (0, 1)
    outside = [
        p.name
        for p in store.store.path.rglob("*.tmp")
        if store.store.backend.staging not in p.parents
    ]
    assert outside == []
    store.store.close()


def test_the_index_needs_every_record(tmp_path: Path, spec: CacheSpec, manifest: Manifest) -> None:
    """An index over holes would make an incomplete store look whole."""
    store = open_store(tmp_path / "t.zarr", spec, manifest)
    fill(store, leave=((2, 1),))
    with pytest.raises(CacheError, match=r"1 shards of .* no record, the first is 00002\.01"):
        finish(store)
    assert not (store.store.path / "index.json").exists()
    with pytest.raises(CacheError, match=r"is incomplete: 5 of 6 shards, no index\.json"):
        TargetCache(store.store.path)
    store.commit(*stage(store, 2, 1))
    finish(store)
    store.store.close()
    assert TargetCache(store.store.path).rows == ROWS
    assert not (store.store.path / ".staging").exists()


@pytest.mark.parametrize("damage", ["record", "torn record", "file", "cut", "empty"])
def test_what_is_lost_is_missing_and_only_that(
    made: Path, spec: CacheSpec, manifest: Manifest, damage: str
) -> None:
    """Records and sizes say what exists; the rest is made again, equal to the byte."""
    before = tree(made)
    root = made / GENERATION
    record = root / "records" / record_name(1, 1)
    file = root / "attention" / spec.arrays()["attention"].file(1, 1)
    if damage == "record":
        record.unlink()
    elif damage == "torn record":
        record.write_bytes(record.read_bytes()[:50])
    elif damage == "file":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        os.truncate(file, 0)
    store = open_store(made, spec, manifest)
    assert missing(store) == [(1, 1)]
    store.commit(*stage(store, 1, 1))
    assert missing(store) == []
    finish(store)
    store.store.close()
    assert tree(made) == before


def test_a_commit_checks_what_it_takes_over(
    tmp_path: Path, spec: CacheSpec, manifest: Manifest
) -> None:
    """A staged file that changed, or rows of another block, are not committed."""
    store = open_store(tmp_path / "t.zarr", spec, manifest)
    folder, record = stage(store, 0, 0)
    with pytest.raises(CacheError, match="staged rows"):
        store.commit(folder, {**record, "rows": [4, 8]})
    os.truncate(folder / record["files"][0]["path"], 3)
    with pytest.raises(CacheError, match="has changed since staging"):
        store.commit(folder, record)
    assert missing(store)[0] == (0, 0)
    store.store.close()


def test_staging_of_the_dead_goes_and_the_store_stays(
    made: Path, spec: CacheSpec, manifest: Manifest
) -> None:
    """A killed run's staging is cleaned by the next one; committed shards are not."""
    before = tree(made)
    litter = made / ".staging" / "20200101T000000-1-abc" / "00000.0" / "features"
    litter.mkdir(parents=True)
    (litter / "half").write_bytes(b"x")
    store = open_store(made, spec, manifest)
    assert not litter.exists()
    assert store.store.backend.staging.is_dir()
    assert tree(made) == before
    store.store.close()


@pytest.mark.parametrize("moves", range(3))
def test_a_store_killed_at_birth_is_no_obstacle(
    tmp_path: Path, spec: CacheSpec, manifest: Manifest, moves: int
) -> None:
    """Group files, the generation: whichever was last, the same line makes the store anew."""
    path = tmp_path / "t.zarr"
    with dying_after(moves), pytest.raises(KeyboardInterrupt):
        open_store(path, spec, manifest)
    store = open_store(path, spec, manifest)
    fill(store)
    finish(store)
    store.store.close()
    whole = open_store(tmp_path / "whole.zarr", spec, manifest)
    fill(whole)
    finish(whole)
    whole.store.close()
    assert tree(path) == tree(tmp_path / "whole.zarr")


# --- what is read back ---------------------------------------------------------------------------


def test_attention_that_is_not_positive_is_refused(
    tmp_path: Path, spec: CacheSpec, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zero weight would break the draw of masks: the reader names row and view."""
    store = open_store(tmp_path / "t.zarr", spec, manifest)
    plain = values

    def with_a_zero(spec: CacheSpec, block: int, view: int, bad: tuple[int, ...]) -> dict:
        arrays = plain(spec, block, view, bad)
        if (block, view) == (1, 1):
            arrays["attention"][2, 3] = 0
        return arrays

    monkeypatch.setitem(globals(), "values", with_a_zero)
    fill(store)
    finish(store)
    store.store.close()
    with pytest.raises(CacheError, match="row 6, view 1 has attention that is not > 0"):
        TargetCache(store.store.path).read(np.array([0, 6]), np.array([1, 1]))


@pytest.mark.parametrize("codec", ["int8", "float16"])
def test_bad_rows_have_no_chunk(
    tmp_path: Path, spec: CacheSpec, manifest: Manifest, codec: str
) -> None:
    """Absence is loud: reading a bad row raises, its neighbours read; a fill value is no target."""
    spec = dataclasses.replace(spec, codec=codec)
    store = open_store(tmp_path / "t.zarr", spec, manifest)
    for block in range(3):
        for view in range(VIEWS):
            bad = {0: (1,), 1: (4, 5, 6, 7), 2: ()}[block]  # one row; a whole shard; none
            store.commit(*stage(store, block, view, bad=bad))
    finish(store)
    store.store.close()
    cache = TargetCache(store.store.path)
    assert cache.good_rows().tolist() == [0, 2, 3, 8, 9]
    got = cache.read(cache.good_rows(), np.zeros(5, int))
    assert got.codes is not None
    expected = values(spec, 0, 0)
    assert np.array_equal(got.codes[:3], expected["features"][[0, 2, 3]])
    assert np.array_equal(got.attention[:3], expected["attention"][[0, 2, 3]])
    for row in (1, 5):
        for features in (True, False):
            with pytest.raises(CacheError, match=rf"row {row}, view 1 \(shard .* cannot be used"):
                cache.read(np.array([0, row]), np.ones(2, int), features=features)
    assert not (store.root / "features" / spec.arrays()["features"].file(1, 0)).exists()
    assert cache.generations[0].record(1, 0)["files"] == []
    # Through plain Zarr a bad row reads as the fill value, which no target is made of.
    plain: Any = zarr.open_group(store.root, mode="r")
    fill_value = plain["features"][1, 0]
    assert (fill_value == -128).all() if codec == "int8" else np.isnan(fill_value).all()
    assert np.isnan(plain["attention"][1, 0]).all()
    assert (plain["crop"][1, 0] == -1).all()


def test_any_zarr_reader_opens_it(store: Path, cache: TargetCache) -> None:
    """Codecs of the core specification only, and the same values through zarr-python."""
    group: Any = zarr.open_group(store / GENERATION, mode="r")
    names = ("features", "scale", "attention", "crop")
    rows, views = np.repeat(np.arange(24), 2), np.tile([0, 1], 24)
    got = cache.read(rows, views)
    read = {"features": got.codes, "scale": got.scale, "attention": got.attention}
    read["crop"] = cache.crops(rows, views)
    for name in names:
        meta = json.loads((store / GENERATION / name / "zarr.json").read_text())
        assert codecs_of(meta["codecs"]) <= {"bytes", "crc32c", "sharding_indexed"}
        assert meta["codecs"][0]["name"] == ("bytes" if name == "crop" else "sharding_indexed")
        whole = group[name][:]
        assert np.array_equal(whole.reshape(48, *whole.shape[2:]), read[name]), name
    # The groups above are plain groups too: the whole store opens at its top.
    assert zarr.open_group(store, mode="r")[f"{GENERATION}/features"].shape == (24, 2, 17, 24)


def codecs_of(codecs: list[dict]) -> set[str]:
    """Names of codecs, those inside shards included."""
    found = set()
    for codec in codecs:
        found.add(codec["name"])
        for inner in ("codecs", "index_codecs"):
            found |= codecs_of(codec.get("configuration", {}).get(inner, []))
    return found


# --- identity -------------------------------------------------------------------------------------


def test_every_field_of_the_spec_is_in_the_fingerprint(spec: CacheSpec) -> None:
    """A field that did not count would let two kinds of targets mix."""
    other = {
        "manifest": "0" * 64, "rows": 11, "views": 3, "tokens": 10, "channels": 5,
        "codec": "float16", "shard_size": 5, "version": 2, "teacher": {"weights": "abd"},
        "view_law": {**spec.view_law, "seed": 1}, "first_row": 4, "first_view": 1,
        "stored_views": "webp", "texts": {"weights": "abe"},
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(CacheSpec)}
    seen = {spec.fingerprint()}
    for name, value in other.items():
        changed = dataclasses.replace(spec, **{name: value})
        seen.add(changed.fingerprint())
        (difference,) = spec.differences(changed)
        assert difference.startswith(name)
    assert len(seen) == 1 + len(other)
    # Inside the nested ones every leaf counts, and is named with its path.
    for key in spec.view_law:
        law = {**spec.view_law, key: "other"}
        changed = dataclasses.replace(spec, view_law=law)
        assert changed.fingerprint() not in seen
        assert spec.differences(changed)[0].startswith(f"view_law.{key}: ")
    assert spec.differences(spec) == []


def test_how_the_work_is_done_is_not_in_the_fingerprint(
    photos: Path, teacher_files: dict[str, str]
) -> None:
    """Another batch size, executor or machine goes on with the same store; not another seed."""

    def fingerprint(**changes: Any) -> str:
        config = ExtractConfig(str(photos), **{**teacher_files, "views": 2, **changes})
        return plan(config, NoProgress()).parts[0].spec.fingerprint()

    same = fingerprint()
    free = {
        "batch_size": 3, "executor": "local", "replicas": 2, "num_workers": 5, "out": "x.zarr",
        "max_bad": "5%", "device": "cpu", "offline": True, "address": "nobody:1",
    }  # fmt: skip
    assert fingerprint(**free) == same
    counts = {
        "views": 3, "seed": 1, "hflip": 0.4, "codec": "float16", "shard_size": 8, "limit": 5,
        "scale": (0.3, 1.0), "ratio": (0.5, 2.0), "img_size": 48, "teacher_norm": "imagenet",
        "precision": "bf16", "pretrained": "none",
    }  # fmt: skip
    found = {fingerprint(**{key: value}) for key, value in counts.items()}
    assert len(found) == len(counts)
    assert same not in found


def test_a_store_of_another_spec_is_not_touched(
    made: Path, spec: CacheSpec, manifest: Manifest
) -> None:
    """Refused, with each field that differs; not a byte of the store changes."""
    before = tree(made)
    law = {**spec.view_law, "hflip": 0.0}
    other = dataclasses.replace(spec, view_law=law, teacher={"weights": "abd"}, channels=6)
    with pytest.raises(CacheError) as error:
        open_store(made, other, manifest)
    for difference in ("channels: 4 != 6", "view_law.hflip: 0.5 != 0.0", "teacher.weights: "):
        assert difference in str(error.value)
    assert "--out another.zarr" in str(error.value)
    assert tree(made) == before
    # The refusal let go of the lock.
    open_store(made, spec, manifest).store.close()


# --- one writer -----------------------------------------------------------------------------------


@contextmanager
def holder_of(path: Path) -> Iterator[int]:
    """A second process that holds the lock of the store at `path`; its pid."""
    ready, replay = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            lock = lock_folder(path)
            os.write(replay, b"x")
            signal.pause()
            lock.close()
        finally:
            os._exit(1)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(ready)
        os.close(replay)


def test_a_second_writer_is_refused_and_told_who_writes(
    copy: Path, photos: Path, teacher_files: dict[str, str]
) -> None:
    """Two writers would clean each other's staging; SIGKILL of the first frees the store."""
    (copy / INDEX).unlink()
    settings: dict[str, Any] = {
        "out": str(copy), "views": 2, "shard_size": 8, "batch_size": 7, "executor": "local",
        **teacher_files,
    }  # fmt: skip
    with holder_of(copy) as pid:
        with pytest.raises(CacheError, match=f"is in use by pid {pid} on "):
            extract_targets(str(photos), **settings)
        assert not (copy / INDEX).exists()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        extract_targets(str(photos), **settings)
    assert TargetCache(copy).rows == 24


# --- places ---------------------------------------------------------------------------------------


def test_places_that_are_no_place(tmp_path: Path, spec: CacheSpec, manifest: Manifest) -> None:
    """A file, a folder of other things, a place nobody can write: told, and left as they are."""
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CacheError, match=r"is a file; expected: a folder"):
        open_store(file, spec, manifest)
    with pytest.raises(CacheError, match="cannot be written: Not a directory"):
        open_store(file / "t.zarr", spec, manifest)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(CacheError, match=r"other content.*--out another\.zarr"):
        open_store(folder, spec, manifest)
    assert sorted(p.name for p in folder.iterdir()) == ["thesis.tex"]
    assert file.read_text() == "mine"
    with pytest.raises(CacheError, match=r"/proc/t\.zarr cannot be written"):
        open_store(Path("/proc/t.zarr"), spec, manifest)
    empty = tmp_path / "empty"
    empty.mkdir()
    open_store(empty, spec, manifest).store.close()


def test_a_place_of_somebody_else(tmp_path: Path, spec: CacheSpec, manifest: Manifest) -> None:
    """Without permission: a folder that may only be read, and one that may not be searched."""
    if os.geteuid() != 0:
        pytest.skip("becomes another user, which only root can")
    closed, shut = tmp_path / "closed", tmp_path / "shut"
    for folder, mode in ((closed, 0o755), (shut, 0o700)):
        folder.mkdir()
        folder.chmod(mode)
    parents = [p for p in (tmp_path, *tmp_path.parents) if p.stat().st_uid == 0]
    modes = {p: p.stat().st_mode & 0o7777 for p in parents[:-2]}
    for parent, mode in modes.items():
        parent.chmod(mode | 0o555)
    os.seteuid(65534)
    try:
        for folder in (closed, shut):
            with pytest.raises(CacheError, match=r"t\.zarr cannot be written: Permission denied"):
                open_store(folder / "t.zarr", spec, manifest)
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


def test_settings_out_of_range_are_told(photos: Path, teacher_files: dict[str, str]) -> None:
    """Before anything else happens."""
    for wrong in ({"views": 0}, {"shard_size": 0}, {"batch_size": -1}, {"codec": "int9"},
                  {"executor": "dask"}, {"max_bad": "-1"}, {"max_bad": "101%"},
                  {"executor": "local", "replicas": 2}):  # fmt: skip
        with pytest.raises(ConfigError):
            extract_targets(str(photos), out="/nowhere/t.zarr", **{**teacher_files, **wrong})
