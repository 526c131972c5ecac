"""Faults put into a store: each is found by name, none is read as data, and repair mends shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from helpers import make_photos, run_here, tree

from milan.core.units import format_bytes
from milan.errors import CacheError
from milan.store.cache import TargetCache
from milan.store.format import GENERATION, Index
from pipeline.extract import extract_targets
from pipeline.repair import repair
from pipeline.teachers.spec import TeacherSpec
from pipeline.verify import CORRUPT, FOREIGN, GOOD, INCOMPLETE, Audit, verify


def file(store: Path, name: str, block: int, view: int) -> Path:
    tail = {"features": "0/0", "scale": "0", "attention": "0", "crop": "0"}[name]
    return store / GENERATION / name / "c" / str(block) / str(view) / tail


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def shift_rows(path: Path, chunks: int = 8) -> None:
    """Let the shard's index name the chunk of the next row for each, with a valid checksum."""
    data = path.read_bytes()
    size = 16 * chunks + 4
    table = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2)
    shifted = np.roll(table, -1, axis=0).tobytes()
    checksum = struct.pack("<I", google_crc32c.value(shifted))
    path.write_bytes(data[:-size] + shifted + checksum)


def half_copied(store: Path) -> None:
    """As a copy looks that was stopped: the index came early, the last folders never."""
    shutil.rmtree(store / GENERATION / "scale")


# name: (damage, what is said, found without --deep, a shard that repair makes again)
FAULTS: dict[str, tuple[Callable[[Path], object], str, bool, bool]] = {
    "bit of a chunk": (
        lambda s: flip(file(s, "features", 1, 1), 300), "shard 00001.01: features .* SHA-256",
        False, True,
    ),
    "bit of a shard index": (
        lambda s: flip(file(s, "features", 1, 1), -50),
        "shard 00001.01: features .* has a damaged shard index", True, True,
    ),
    "bit of an unsharded chunk": (
        lambda s: flip(file(s, "crop", 2, 0), 30), "shard 00002.00: crop .* SHA-256", False, True,
    ),
    "bit of an array's zarr.json": (
        lambda s: flip(s / GENERATION / "features/zarr.json", 100),
        r"generations/000/features/zarr\.json is damaged", True, False,
    ),
    "bit of the group's zarr.json": (
        lambda s: flip(s / GENERATION / "zarr.json", -400), r"000/zarr\.json is damaged",
        True, False,
    ),
    "bit of a codec's table": (
        lambda s: flip(s / GENERATION / "codec/channel/c/0", 3), "codec/channel/c/0 is damaged",
        True, False,
    ),
    "bit of the manifest": (
        lambda s: flip(s / GENERATION / "manifest.parquet", 200), "manifest.parquet is damaged",
        True, False,
    ),
    "bit of the table of shards": (
        lambda s: flip(s / GENERATION / "shards.parquet", 200), "shards.parquet is damaged",
        True, False,
    ),
    "bit of a record": (
        lambda s: flip(s / GENERATION / "records/00001.01.json", 100),
        r"record 00001\.01\.json .* is damaged", True, True,
    ),
    "record gone": (
        lambda s: (s / GENERATION / "records/00001.01.json").unlink(),
        r"record 00001\.01\.json .* is gone", True, True,
    ),
    "file cut": (
        lambda s: os.truncate(file(s, "attention", 0, 1), 100),
        "shard 00000.01: .*attention.* is damaged: 100 bytes", True, True,
    ),
    "file of zero bytes": (
        lambda s: os.truncate(file(s, "scale", 0, 1), 0),
        "shard 00000.01: .*scale.* is damaged: 0 bytes", True, True,
    ),
    "file gone": (
        lambda s: file(s, "features", 2, 1).unlink(),
        "shard 00002.01: .*features.* it is gone", True, True,
    ),
    "two shards swapped": (
        lambda s: swap(file(s, "features", 0, 1), file(s, "features", 1, 1)),
        "shard 00000.01: features .* SHA-256", False, True,
    ),
    "rows shifted by one": (
        lambda s: shift_rows(file(s, "attention", 1, 0)),
        "shard 00001.00: attention .* SHA-256", False, True,
    ),
    "store half copied": (half_copied, "scale", True, False),
}  # fmt: skip


def read_everything(store: Path) -> None:
    """As training would, with the checks that it makes."""
    cache = TargetCache(store)
    cache.check_files()
    rows, views = np.divmod(np.arange(cache.rows * cache.views), cache.views)
    assert len(cache.manifest) == cache.rows
    cache.read(rows, views)
    cache.crops(rows, views)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_name_and_never_read(copy: Path, fault: str) -> None:
    """verify says which, by the level that sees it; the reader refuses too; repair mends shards."""
    before = tree(copy)
    damage, said, cheap, repairable = FAULTS[fault]
    damage(copy)
    assert verify(copy).code == (CORRUPT if cheap else GOOD)
    verdict = verify(copy, deep=True)
    assert verdict.code == CORRUPT
    assert any(re.search(said, line) for line in verdict.corrupt), verdict.corrupt
    assert verdict.repairable == repairable
    with pytest.raises(CacheError):
        read_everything(copy)
    if repairable:
        assert repair(copy).code == GOOD
        assert tree(copy) == before
    else:
        with pytest.raises(CacheError, match="cannot be repaired"):
            repair(copy)


def test_a_good_store(store: Path) -> None:
    """Every image and view counted once; nothing found, by any level."""
    verdict = verify(store, deep=True, audit=Audit(6))
    assert (verdict.code, verdict.corrupt, verdict.foreign) == (GOOD, [], [])
    assert verdict.checked["shards"] == 6
    assert verdict.checked["targets"] == verdict.checked["images x views"] == 48
    assert verdict.checked["audited views"] == 6


def test_two_kinds_of_damage_are_both_told(copy: Path) -> None:
    """One fault does not hide the next; only the damaged shards are made again."""
    flip(file(copy, "features", 0, 0), 40)
    file(copy, "crop", 2, 1).unlink()
    verdict = verify(copy, deep=True)
    assert verdict.shards == [(GENERATION, 0, 0), (GENERATION, 2, 1)]
    kept = {p: p.stat().st_mtime_ns for p in copy.rglob("*/c/1/*") if p.is_file()}
    assert repair(copy).code == GOOD
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_what_is_not_finished_is_incomplete(copy: Path, store: Path) -> None:
    """No index, no store, or an extension that is not in the index."""
    (copy / "index.json").unlink()
    assert verify(copy).code == INCOMPLETE
    assert verify(copy.parent / "nowhere.zarr").code == INCOMPLETE
    shutil.copyfile(store / "index.json", copy / "index.json")
    shutil.copytree(copy / GENERATION, copy / "generations/001")
    verdict = verify(copy)
    assert verdict.code == INCOMPLETE
    assert verdict.incomplete == ["generations/001 is begun and not in the index"]
    os.truncate(copy / "index.json", 80)
    assert verify(copy).code == CORRUPT


def test_a_record_of_another_shard_is_no_proof(copy: Path) -> None:
    """Even where index and table agree with it."""
    records = copy / GENERATION / "records"
    swap(records / "00000.00.json", records / "00001.00.json")
    verdict = verify(copy)
    assert verdict.code == CORRUPT
    assert verdict.shards == [(GENERATION, 0, 0), (GENERATION, 1, 0)]


def test_an_audit_sees_another_teacher_and_other_images(
    store: Path, photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Exit code 5; wrong targets under valid checksums are corruption."""
    other = TeacherSpec(teacher_files["teacher"], "none")
    verdict = verify(store, audit=Audit(4, teacher=other))
    assert (verdict.code, len(verdict.foreign)) == (FOREIGN, 1)
    elsewhere = tmp_path / "photos"
    shutil.copytree(photos, elsewhere)
    for path in make_photos(tmp_path / "others", seed=5).rglob("*.jpg"):
        shutil.copyfile(path, elsewhere / path.relative_to(tmp_path / "others"))
    verdict = verify(store, audit=Audit(4, data_root=str(elsewhere)))
    assert verdict.code == FOREIGN
    assert "has changed since extraction" in verdict.foreign[0]


def test_an_audit_sees_targets_of_other_rows(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that mixes rows up writes valid checksums of wrong targets: only the audit sees."""
    from pipeline.teachers.load import Teacher

    plain = Teacher.targets

    def mixed(self, pixels):  # type: ignore[no-untyped-def]
        features, attention = plain(self, pixels)
        return features.roll(1, 0), attention.roll(1, 0)

    out = tmp_path / "t.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "targets", mixed)
        extract_targets(
            str(photos), out=str(out), views=1, shard_size=8, executor="local", **teacher_files
        )
    assert verify(out, deep=True).code == GOOD
    verdict = verify(out, audit=Audit(24))
    assert verdict.code == CORRUPT
    assert any("the teacher's output differs" in line for line in verdict.corrupt)


def test_the_commands(copy: Path, tmp_path: Path) -> None:
    """inspect tells, verify ends with its codes, repair mends."""
    told = run_here("inspect", copy)
    assert told.code == 0
    for part in ("bytes a view", "cosine, patch tokens", "licence of the weights", "generations"):
        assert part in told.out
    whole = run_here("verify", copy, "--deep", "--audit", 3)
    assert whole.code == 0
    assert "not read" not in whole.out
    flip(file(copy, "features", 0, 0), 40)
    shallow = run_here("verify", copy)
    assert (shallow.code, verify(copy, deep=True).unread) == (0, 0)
    assert "good, as far as it was read" in shallow.out
    unread = sum(entry.bytes for entry in Index.read(copy).generations)
    assert f"not read: the contents of {format_bytes(unread)} of targets" in shallow.out
    *_, advice = shallow.out.split("milan ")
    damaged = run_here(*advice.split())
    assert (damaged.code, damaged.err) == (3, "")
    assert "corrupt: generations/000, shard 00000.00" in damaged.out
    assert f"milan repair {copy}" in damaged.out
    assert run_here("repair", copy).code == 0
    assert run_here("verify", copy, "--deep").code == 0
    (copy / "index.json").unlink()
    assert run_here("verify", copy).code == 4
    assert run_here("verify", tmp_path / "nothing").code == 4


def test_canaries_refuse_a_teacher_that_moved(copy: Path, photos: Path) -> None:
    """The same file, but its outputs are no longer those: extending would mix two teachers."""
    origin = json.loads((copy / GENERATION / "origin.json").read_bytes())["teacher"]
    settings = {"teacher": origin["name"], "pretrained": origin["pretrained"]}
    path = copy / GENERATION / "canary/features/c/0/0/0"
    values = np.frombuffer(path.read_bytes()[:-4], "<f4") * np.float32(1.01)
    data = values.tobytes()
    path.write_bytes(data + struct.pack("<I", google_crc32c.value(data)))
    with pytest.raises(Exception, match=r"canary images are off by 0\.0"):
        extract_targets(
            str(photos), out=str(copy), views=3, shard_size=8, executor="local", **settings
        )
