"""`milan store copy`: disk and bucket, verified, resumed after a kill, the index last."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EXTRACTION, FORK, forget, make_photos, run_here, tree

from milan.core.paths import AnyPath, as_path, files_below, read_file
from milan.errors import MilanError
from milan.store.cache import TargetCache
from pipeline.copy_store import copy_store
from pipeline.extract import extract_targets
from pipeline.verify import GOOD, verify
from pipeline.writing.bucket import Bucket
from pipeline.writing.disk import Disk

ORIGIN = "generations/000/origin.json"


def places(**marks: Any) -> Any:
    """The two kinds of targets, for the fixture `target`."""
    bucket = pytest.param("bucket", **marks)
    return pytest.mark.parametrize("target", ["disk", bucket], indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where nothing is."""
    if request.param == "disk":
        yield str(tmp_path / "copies" / "t.zarr")
        return
    s3 = request.getfixturevalue("s3")
    yield f"s3://models/{request.node.originalname}/t.zarr"
    s3.fault = lambda request: None


def files_of(store: str | Path) -> dict[str, bytes]:
    """Of a store at a path or URL, as helpers.tree."""
    where = as_path(str(store))
    if isinstance(where, Path):
        return tree(where)
    names = sorted(n for n, _ in files_below(where) if not n.startswith("extract.log"))
    return {name: read_file(where / name) for name in names}


def same(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Byte for byte; of the origin all but the way to the images."""

    def told(files: dict[str, bytes]) -> dict[str, Any]:
        origin = json.loads(files[ORIGIN]) | {"data_root_from_store": ""}
        return {**files, ORIGIN: origin}

    return told(one) == told(other)


def index_of(store: str) -> AnyPath:
    return as_path(store) / "index.json"


@pytest.mark.soak
@places()
def test_copies_there_and_back(
    target: str, finished_store: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    """The same bytes, the images found from there; a second call writes nothing."""
    store = finished_store(limit=9, views=1)
    whole = files_of(store)
    copied = copy_store(store, target)
    assert (copied["shards"], copied["generations"]) == (2, 1)
    assert same(files_of(target), whole)
    assert verify(target).code == GOOD
    assert TargetCache(target).digest == TargetCache(store).digest
    assert TargetCache(target).find_data_roots() == [(0, photos)]
    once = files_of(target)
    copy_store(store, target)
    assert files_of(target) == once
    back = tmp_path / "back.zarr"
    copy_store(target, back)
    assert same(files_of(back), whole)
    origin = json.loads((back / ORIGIN).read_text())
    assert (back / origin["data_root_from_store"]).resolve() == photos


@places(marks=pytest.mark.soak)
def test_stopped_before_any_write(
    target: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index until the last write; the same line goes on, and commits no shard twice."""
    kind: Any = Disk if target.startswith("/") else Bucket
    write, left, records = kind.write, {"writes": 0}, list[str]()

    def counted(self: Any, name: str, data: bytes) -> None:
        if left["writes"] == 0:
            raise KeyboardInterrupt
        left["writes"] -= 1
        if "/records/" in name:
            records.append(name)
        write(self, name, data)

    monkeypatch.setattr(kind, "write", counted)
    number = 0
    while not index_of(target).exists():
        left["writes"] = number = number + 5
        try:
            copy_store(store, target)
        except KeyboardInterrupt:
            assert not index_of(target).exists()
        assert number < 40
    assert len(records) == len(set(records)) == 6
    assert same(files_of(target), files_of(store))


def test_a_grown_store_is_copied_again(
    store: Path, photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """What came since; and shards that were lost in the copy come again."""
    source, target = tmp_path / "t.zarr", tmp_path / "copy.zarr"
    shutil.copytree(store, source)
    copy_store(source, target)
    settings = {**EXTRACTION, **teacher_files, "views": 3}
    extract_targets(str(photos), out=str(source), **settings)
    (target / "generations/000/features/c/0/1/0/0").unlink()
    copy_store(source, target)
    assert same(tree(target), tree(source))
    ahead = tmp_path / "ahead.zarr"
    shutil.copytree(source, ahead)
    with pytest.raises(MilanError, match=r"ahead.zarr has a generation that .* has not"):
        copy_store(store, ahead)
    assert tree(ahead) == tree(source)


def damaged(source: Path, below: str) -> None:
    """One bit of a file is another."""
    data = bytearray((source / below).read_bytes())
    data[len(data) // 2] ^= 1
    (source / below).write_bytes(data)


DAMAGE = {
    "features/c/1/0/0/0": "features/c/1/0/0/0 does not have the SHA-256 .*; try: milan repair",
    "records/00001.00.json": "record 00001.00.json of .* is damaged",
    "manifest.parquet": "manifest.parquet is damaged or of another store",
    "shards.parquet": "shards.parquet is damaged or of another store",
}


@pytest.mark.parametrize("below", DAMAGE)
def test_damage_is_not_copied(below: str, store: Path, tmp_path: Path) -> None:
    """Whatever file it is in: one line, no index, and the repaired store is copied by the same."""
    source = Path(shutil.copytree(store, tmp_path / "t.zarr"))
    whole = (source / "generations/000" / below).read_bytes()
    damaged(source / "generations/000", below)
    with pytest.raises(MilanError, match=DAMAGE[below]):
        copy_store(source, tmp_path / "copy.zarr")
    assert not (tmp_path / "copy.zarr/index.json").exists()
    (source / "generations/000" / below).write_bytes(whole)
    copy_store(source, tmp_path / "copy.zarr")
    assert same(tree(tmp_path / "copy.zarr"), tree(store))


def test_another_store_is_refused(
    store: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """A finished one, one that is begun, one whose shards are others; and other folders."""
    photos = make_photos(tmp_path / "photos", count=9, seed=8)
    other, begun, mixed = (tmp_path / f"{name}.zarr" for name in ("other", "begun", "mixed"))
    extract_targets(str(photos), out=str(other), **{**EXTRACTION, **teacher_files})
    shutil.copytree(other, begun)
    (begun / "index.json").unlink()
    shutil.copytree(store, mixed)
    (mixed / "index.json").unlink()
    record = mixed / "generations/000/records/00001.00.json"
    record.write_text(record.read_text().replace('"digests":["', '"digests":["a'))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    cases = {
        (store, other): "other.zarr has a generation that .* has not .generations/000",
        (store, begun): "begun.zarr has a generation that .* has not .generations/000",
        (store, mixed): r"has a shard .block 1, view 0. that is not the one of",
        (store, tmp_path / "letters"): "is a folder with other content",
        (store, store): "would be in the store",
        (store, store / "copy"): "would be in the store",
        (tmp_path / "none.zarr", tmp_path / "x.zarr"): "no store at",
        (tmp_path / "empty", tmp_path / "x.zarr"): "is not a target cache",
        (store, "gs://bucket/t.zarr"): "cannot be written to gs://bucket/t.zarr; expected: a path",
    }
    before = {where: tree(where) for where in (store, other, begun, mixed)}
    for (source, target), match in cases.items():
        ran = run_here("store", "copy", source, target)
        assert ran.code == 1
        with pytest.raises(MilanError, match=match):
            copy_store(source, target)
    assert {where: tree(where) for where in before} == before
    assert not (tmp_path / "x.zarr").exists()


def test_the_command(store: Path, tmp_path: Path) -> None:
    ran = run_here("store", "copy", store, tmp_path / "copy.zarr")
    assert (ran.code, ran.err) == (0, "")
    assert "copy: 6 shards in" in ran.out
    assert ran.out.splitlines()[-1].endswith(f": milan verify --deep {tmp_path / 'copy.zarr'}")


@places()
@pytest.mark.soak
def test_killed_at_random_moments(target: str, store: Path) -> None:
    """Thirty kills: no index, or a whole copy; the same line ends with the same bytes. The lease of
    a driver that was killed is waited for, by the same line again."""
    moment, whole, process = random.Random(3), files_of(store), in_a_fork
    copies = 0
    for _ in range(30 if target.startswith("/") else 6):
        running = process(store, target)
        time.sleep(moment.uniform(0, 0.6))
        running.kill()
        running.join()
        if index_of(target).exists():
            assert same(files_of(target), whole)
            shutil.rmtree(target, ignore_errors=True)
            copies += 1
    end = time.monotonic() + 90
    while time.monotonic() < end and not index_of(target).exists():
        running = process(store, target)
        running.join()
        time.sleep(0 if running.exitcode == 0 else 5)
    assert same(files_of(target), whole)
    assert copies < 30


def in_a_fork(store: Path, target: str) -> Any:
    process = FORK.Process(target=_copy, args=(str(store), target))
    process.start()
    return process


def _copy(store: str, target: str) -> None:
    forget()
    copy_store(store, target)
