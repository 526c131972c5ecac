"""Rejected images, tried again: by growth once a store is finished, and never in one view alone."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Notes, make_photos, tree
from PIL import Image

from milan.data.dataset import open_cache
from milan.errors import CacheError, DataError
from milan.store.cache import TargetCache
from milan.store.describe import describe
from milan.store.format import Index
from pipeline.extract import extract_targets
from pipeline.repair import repair
from pipeline.verify import GOOD, verify
from pipeline.writing.store import Store, Writer

Extract = Callable[..., dict]


@pytest.fixture
def extract(teacher_files: dict[str, str], tmp_path: Path) -> Extract:
    """One view into the test's own store; each call is the same line, changed a little."""

    def run(data: Path, **changes: Any) -> dict:
        settings = {"views": 1, "shard_size": 8, "batch_size": 7, **teacher_files, **changes}
        return extract_targets(
            str(data), out=str(tmp_path / "t.zarr"), executor="local", **settings
        )

    return run


def committed(store: Path) -> dict[str, bytes]:
    """All but the index and the list of rejected images, which are replaced."""
    replaced = ("index.json", "bad-images.csv")
    return {name: data for name, data in tree(store).items() if name not in replaced}


def damaged(data: Path, *numbers: int) -> dict[Path, bytes]:
    """Cut some photographs short; returns what they were."""
    paths = [sorted(data.rglob("*.jpg"))[number] for number in numbers]
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(whole[path][:200])
    return whole


def trained(store: Path, *, layer: str | None = None) -> list[str]:
    """The key of each image that training would see, once a view."""
    dataset = open_cache(store, layer=layer)
    rows = [dataset[i]["row"] for i in range(len(dataset))]
    return sorted(dataset.cache.manifest.key(row) for row in rows)


def test_the_same_line_takes_what_can_be_read_now(tmp_path: Path, extract: Extract) -> None:
    """A file that comes back is a new row, one that does not stays rejected."""
    data, store = make_photos(tmp_path / "data", count=12), tmp_path / "t.zarr"
    whole = damaged(data, 2, 9)
    back, away = whole
    extract(data, max_bad="2")
    known, before, notes = TargetCache(store).digest, tree(store), Notes()
    assert extract(data, max_bad="2", progress=notes)["images_per_second"] is None
    assert notes.line("tried again").endswith("0 of 2 rejected images can be read now; still "
                                              "rejected: 2 truncated")  # fmt: skip
    assert tree(store) == before

    back.write_bytes(whole[back])
    notes = Notes()
    summary = extract(data, max_bad="2", progress=notes)
    assert (summary["images"], summary["bad"]) == (12, {"truncated": 1})
    assert "1 of 2 rejected images can be read now and become new rows" in notes.line("tried again")
    now = tree(store)
    assert {name: now[name] for name in committed(store) if name in before} == {
        name: data for name, data in before.items() if name in committed(store)
    }
    cache = TargetCache(store)
    names = [path.relative_to(data).as_posix() for path in (back, away)]
    assert cache.manifest.key(12) == names[0]
    assert [cache.manifest.key(row) for row in cache.superseded] == names[:1]
    assert len(set(trained(store))) == len(trained(store)) == 11
    assert names[1] in (store / "bad-images.csv").read_text()
    assert names[0] not in (store / "bad-images.csv").read_text()
    assert dict(describe(store)["teacher0/int8"])["images"] == "12, 1 of them without targets"
    assert verify(store, deep=True).code == GOOD

    assert TargetCache(store, pinned=1).digest == known  # what a run from before goes on with

    # More views, another teacher's layer: no row of the image but the last has targets.
    notes = Notes()
    extract(data, max_bad="1", views=2, progress=notes)
    extract(data, max_bad="1", views=2, codec="float16", extend=True)
    for layer in TargetCache(store).layers:
        seen = trained(store, layer=layer)
        assert len(seen) == 2 * len(set(seen)) == 22
    with pytest.raises(DataError, match=r"1 of 12 images are rejected"):
        extract(data, views=2)
    away.write_bytes(whole[away])
    assert extract(data, views=2)["bad"] == {}
    assert not (store / "bad-images.csv").exists()
    assert len(set(trained(store))) == 12
    away.unlink()  # both rows of an image that is gone are gone, and it may come back
    with pytest.raises(CacheError, match="1 of the 12 images"):
        extract(data, views=2)
    extract(data, views=2, drop_missing=True)
    assert len(set(trained(store))) == 11
    away.write_bytes(whole[away])
    extract(data, views=2)
    assert len(set(trained(store))) == 12


def test_a_growth_of_restored_images_that_was_stopped(
    tmp_path: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the images that it began with, and takes others in the next call."""
    data, store = make_photos(tmp_path / "data", count=9), tmp_path / "t.zarr"
    whole = damaged(data, 1, 3, 5)
    first, second, gone = whole
    extract(data, max_bad="3")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    first.write_bytes(whole[first])
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.extraction.run.write_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(data, max_bad="3")
    second.write_bytes(whole[second])
    gone.unlink()  # nothing is lost with an image that had no targets
    assert extract(data, max_bad="3")["bad"] == {"truncated": 2}
    assert extract(data, max_bad="3")["bad"] == {"truncated": 1}
    assert len(set(trained(store))) == 8
    assert [entry.rows for entry in Index.read(store).generations] == [(0, 9), (9, 10), (10, 11)]


def test_restored_images_in_tars_and_parquet(tmp_path: Path, extract: Extract) -> None:
    """A row of Parquet that had no bytes, a member of a tar that was damaged in its place."""
    picture = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(picture, "png")
    good, bad = picture.getvalue(), bytes(len(picture.getvalue()))

    def parquet(path: Path, second: bytes | None) -> None:
        images = [{"bytes": good, "path": None}, {"bytes": second, "path": None}]
        pq.write_table(pa.table({"image": images}), path)

    def tar(path: Path, second: bytes | None) -> None:
        with tarfile.open(path, "w") as archive:
            for name, content in (("0.png", good), ("1.png", second or bad)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    for write in (parquet, tar):
        file = tmp_path / f"m.{write.__name__}"
        write(file, None)
        extract(file, max_bad="1")
        write(file, good)
        assert extract(file, max_bad="1")["bad"] == {}
        assert TargetCache(tmp_path / "t.zarr").good_rows().tolist() == [0, 2] or (
            TargetCache(tmp_path / "t.zarr").good_rows().tolist() == [1, 2]
        )
        shutil.rmtree(tmp_path / "t.zarr")


# --- the views of a block are of one reading ------------------------------------------------------


def edited(path: Path) -> None:
    Image.new("RGB", (50, 60), "red").save(path)


def broken(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("change", [edited, broken])
def test_a_file_that_changes_while_its_block_is_written(
    change: Callable[[Path], None], tmp_path: Path, extract: Extract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed between two views of a block: both are of the image as it is now, or of none."""
    data, store = make_photos(tmp_path / "data", count=4), tmp_path / "t.zarr"

    def killed(writer: Writer, *arguments: Any) -> None:
        commit(writer, *arguments)
        raise KeyboardInterrupt

    commit = Writer.commit
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(data, views=2)
    change(sorted(data.rglob("*.jpg"))[1])
    extract(data, views=2, max_bad="1")
    assert verify(store, deep=True).code == GOOD
    assert len(trained(store)) == (8 if change is edited else 6)


@pytest.mark.parametrize(
    ("by", "change", "views"),
    [
        ("repair", edited, 1), ("repair", Path.unlink, 2), ("repair", None, 2),
        ("extract", broken, 2), ("extract", None, 1),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_written_again_as_it_was(
    change: Callable[[Path], None] | None, views: int, by: str, tmp_path: Path, extract: Extract
) -> None:
    """Of images that are others by now nothing is written; rejected ones stay rejected."""
    data, store = make_photos(tmp_path / "data", count=4), tmp_path / "t.zarr"
    whole = damaged(data, 1) if change is None else {}
    extract(data, views=views, max_bad="1")
    before = tree(store)
    if by == "repair":
        shard = store / f"generations/000/features/c/0/{views - 1}/0/0"
        content = shard.read_bytes()
        shard.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    else:
        (store / f"generations/000/attention/c/0/{views - 1}/0").unlink()
    path = sorted(data.rglob("*.jpg"))[1]
    if change is None:
        path.write_bytes(whole[path])
        notes = Notes()
        if by == "repair":
            repair(store, progress=notes)
            assert not any("differ" in line for line in notes.lines)
            assert tree(store) == before
        else:
            extract(data, views=views, max_bad="1")
            now = tree(store)
            assert {n: now[n] for n in before if "000/" in n} == {
                n: d for n, d in before.items() if "000/" in n
            }
            assert len(trained(store)) == 4 * views
        return
    kept = path.read_bytes()
    change(path)
    hurt = tree(store)
    again = (lambda: repair(store)) if by == "repair" else (lambda: extract(data, views=views))
    with pytest.raises(CacheError, match=r"1 images of|1 of the 4 images") as error:
        again()
    assert "the first is 'class 0/bild 03 ü.jpg'" in error.value.found
    assert tree(store) == hurt
    path.write_bytes(kept)
    again()
    assert tree(store) == before


def test_a_growth_is_published_as_a_whole(
    tmp_path: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More views of all rows count at once; an older store that has those of some goes on."""
    data, store = make_photos(tmp_path / "data", count=4), tmp_path / "t.zarr"
    extract(data)
    make_photos(tmp_path / "more", count=2, classes=1, seed=5)
    shutil.move(tmp_path / "more/class 0", data / "new")
    extract(data)
    indexes: list[Index] = []
    publish = Store.publish

    def one_by_one(self: Store, *entries: Any) -> None:
        for entry in entries[:3]:
            publish(self, entry)
        indexes.append(Index.read(self.path))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", one_by_one)
        with pytest.raises(KeyboardInterrupt):
            extract(data, views=2)
    with pytest.raises(CacheError, match="holds 10 targets"):
        TargetCache(store)
    assert extract(data, views=2)["images_per_second"] is None  # only the index was missing
    assert TargetCache(store).views == 2
    seen: list[int] = []

    def noted(self: Store, *entries: Any) -> None:
        seen.append(len(entries))
        publish(self, *entries)

    monkeypatch.setattr(Store, "publish", noted)
    extract(data, views=3)
    assert seen == [6]
