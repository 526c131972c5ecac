"""Growth from data that changed: classes, folders, files; what was deleted leaves the plan."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, SMALL, Notes, make_photos, tree
from PIL import Image

from milan.data.dataset import open_cache
from milan.data.order import order_of
from milan.errors import CacheError, DataError
from milan.images.manifest import Manifest, build_manifest
from milan.store.cache import TargetCache
from milan.store.format import Index
from milan.training.pretrain import pretrain
from milan.training.run import read_run
from pipeline.extract import extract_targets
from pipeline.extraction.growth import _Stored
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.verify import GOOD, verify

CASES = Path(__file__).parent.parent / "cases"
DEMO = {
    "teacher": str(ROOT / "demo/teacher/config.json"),
    "pretrained": str(ROOT / "demo/teacher/model.safetensors"),
}


@pytest.fixture
def grow(teacher_files: dict[str, str], tmp_path: Path) -> Callable[..., dict]:
    """Extract one view into the test's own store; each call is the same line, changed a little."""

    def run(data: Path, **changes: Any) -> dict:
        settings = {"views": 1, "shard_size": 8, **teacher_files, **changes}
        return extract_targets(
            str(data), out=str(tmp_path / "t.zarr"), executor="local", **settings
        )

    return run


def committed(store: Path) -> dict[str, bytes]:
    """All but the index, the one file that is replaced."""
    return {name: data for name, data in tree(store).items() if name != "index.json"}


def keys(store: Path) -> list[str]:
    return TargetCache(store).manifest.table["key"].to_pylist()


def picture(seed: int) -> bytes:
    """A PNG of 8 x 8 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def parquet(path: Path, labels: list[int], names: list[str] | None, *, first: int = 0) -> Path:
    """Images `first`, first + 1, ... with these labels; no paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(first + i), "path": None} for i in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path)
    return path


def tar(path: Path, labels: list[int], *, first: int = 0) -> Path:
    """Samples `first`, first + 1, ... with class numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, label in enumerate(labels, first):
            for name, data in ((f"{i}.png", picture(i)), (f"{i}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


# --- classes --------------------------------------------------------------------------------------


def test_a_class_that_sorts_first(tmp_path: Path, grow: Callable[..., dict]) -> None:
    """Old numbers stay; open_cache, sheet, prototypes and another layer agree on all of them."""
    data, store = tmp_path / "data", tmp_path / "t.zarr"
    shutil.copytree(CASES / "01-growth-new-class/before", data)
    grow(data, **DEMO, texts=True)
    shutil.copytree(CASES / "01-growth-new-class/after", data, dirs_exist_ok=True)
    grow(data, **DEMO, texts=True)
    make_photos(tmp_path / "more", count=1)
    shutil.move(tmp_path / "more/class 0", data / "bee")
    grow(data, **DEMO, texts=True, codec="float16", extend=True)
    spec = TeacherSpec(DEMO["teacher"], DEMO["pretrained"], texts=True)
    tower = load_teacher(spec, device="cpu").texts
    assert tower is not None
    plain, other = TargetCache(store), TargetCache(store, layer="teacher/float16")
    for cache in (plain, other):
        table = cache.manifest.table
        classes = cache.manifest.classes or []
        assert classes[:3] == ["cat", "dog", "ant"]
        for key, label in zip(table["key"].to_pylist(), cache.manifest.labels(), strict=True):
            assert classes[label] == key.split("/")[0]
        assert cache.prototypes is not None
        assert cache.prototypes.classes == classes
        expected = tower.prototypes(classes)["prototypes/features"]
        np.testing.assert_allclose(cache.prototypes.features, expected, atol=1e-6)
    assert (plain.manifest.classes, other.manifest.classes) == (
        ["cat", "dog", "ant"], ["cat", "dog", "ant", "bee"]
    )  # fmt: skip
    tables = [g.manifest().classes or [] for g in (*plain.generations, *other.generations)]
    assert all(table == ["cat", "dog", "ant", "bee"][: len(table)] for table in tables)
    assert [open_cache(store)[i]["label"] for i in range(3)] == plain.manifest.labels().tolist()


@pytest.mark.parametrize(
    "kind", ["more names", "as before", "shifted numbers", "names come", "names go"]
)
def test_numbers_of_another_listing(
    kind: str, tmp_path: Path, grow: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growth by files whose numbers mean something else: renumbered by name, or refused.

    Each generation of a store from before numbered by itself: such a store is read by name.
    """
    data, store = tmp_path / "data", tmp_path / "t.zarr"
    cat_dog = ["cat", "dog"]
    if kind == "shifted numbers":  # a class that sorts first, in a set that only has numbers
        tar(data / "b.tar", [0, 1, 0])
        grow(data)
        tar(data / "b.tar", [1, 2, 1])
        tar(data / "a.tar", [0], first=3)
        with pytest.raises(CacheError, match=r"3 images have another label .*: class [12], was"):
            grow(data)
        tar(data / "b.tar", [0, 1, 0])
        tar(data / "a.tar", [2], first=3)
        grow(data)
        assert TargetCache(store).manifest.labels().tolist()[3:] == [2]
        return
    parquet(data / "b.parquet", [0, 1, 0], None if kind == "names come" else cat_dog)
    grow(data)
    before = committed(store)
    if kind in ("more names", "as before"):
        other = grow(data, codec="float16", extend=True)["layer"]
        parquet(data / "a.parquet", [0, 1, 2], ["ant", "cat", "dog"], first=3)
        if kind == "as before":

            def added(stored: _Stored, *_: Any) -> Manifest:
                listing = stored.data.manifest
                new = [i for i, key in enumerate(stored.listed) if not key.startswith("b.")]
                return Manifest(listing.table.take(pa.array(new)), listing.classes)

            monkeypatch.setattr(_Stored, "added", added)
        grow(data)
        manifest = TargetCache(store).manifest
        assert manifest.classes == ["cat", "dog", "ant"]
        labels = dict(zip(keys(store), manifest.labels().tolist(), strict=True))
        assert [labels[f"a.parquet/0.{i}"] for i in range(3)] == [2, 0, 1]
        assert [labels[f"b.parquet/0.{i}"] for i in range(3)] == [0, 1, 0]
        (data / "a.parquet").unlink()  # a layer that does not have it gets a class of its own
        parquet(data / "c.parquet", [0], ["bee"], first=6)
        grow(data, codec="float16")
        manifest = TargetCache(store, layer=other).manifest
        assert manifest.classes == ["cat", "dog", "ant", "bee"]
        assert manifest.labels().tolist()[3:] == [3]
        return
    names = cat_dog if kind == "names come" else None
    parquet(data / "b.parquet", [0, 1, 0], names)
    parquet(data / "a.parquet", [1], names, first=3)
    with pytest.raises(DataError, match="has class numbers alone"):
        grow(data)
    assert committed(store) == before


# --- files and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [parquet, tar])
def test_a_file_that_became_two(
    write: Callable[..., Path], tmp_path: Path, grow: Callable[..., dict]
) -> None:
    """Rows keep their names when a file comes beside the first, named or in its folder."""
    kind = "parquet" if write is parquet else "tar"
    more = [None] if write is parquet else []
    data, store = tmp_path / "data", tmp_path / "t.zarr"
    file = write(data / f"m.{kind}", [0, 1, 0], *more)
    grow(file)
    old = keys(store)
    write(data / f"a.{kind}", [1, 1], *more, first=3)
    summary = grow(data)
    assert summary["images"] == 5
    assert keys(store)[:3] == old
    assert {key.split("/")[0] for key in keys(store)[3:]} == {f"a.{kind}"}
    assert len(open_cache(store)) == 5
    assert grow(data)["images_per_second"] is None  # the same line again does nothing


def test_a_store_whose_keys_lack_the_file(
    tmp_path: Path, grow: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores of a lone Parquet file had bare keys: they resume, repeat and grow as they are."""
    from pipeline.extraction import plan

    data, store = tmp_path / "data", tmp_path / "t.zarr"
    file = parquet(data / "m.parquet", [0, 1, 0], None)

    def before(*arguments: Any, **settings: Any) -> Manifest:
        return build_manifest(*arguments, **settings).without_file_name()

    with monkeypatch.context() as patched:
        patched.setattr(plan, "build_manifest", before)
        grow(file)
    assert sorted(keys(store)) == ["0.0", "0.1", "0.2"]
    whole = tree(store)
    (store / "index.json").unlink()
    (store / "generations/000/records/00000.00.json").unlink()
    grow(file)  # killed before the keys had a file's name, and resumed after
    assert tree(store) == whole
    assert grow(file)["images_per_second"] is None
    parquet(data / "a.parquet", [1, 1], None, first=3)
    assert grow(data)["images"] == 5
    assert {key.split("/")[0] for key in keys(store)[3:]} == {"a.parquet"}
    assert len(open_cache(store)) == 5


def test_each_generation_remembers_its_root(
    tmp_path: Path, grow: Callable[..., dict], photos: Path
) -> None:
    """Grown from a copy with more images: each row is read where it is; of moved data, there."""
    first, second, store = tmp_path / "a", tmp_path / "b", tmp_path / "t.zarr"
    shutil.copytree(photos, first)
    shutil.copytree(photos, second)
    grow(first, limit=8)
    make_photos(tmp_path / "more", count=4, classes=1, seed=5)
    shutil.move(tmp_path / "more/class 0", second / "new")
    grow(second, limit=20)
    dataset = open_cache(store)
    assert dataset.roots == [(0, first), (8, second)]
    everything = [dataset[i]["image"] for i in range(20)]
    for gone, given in ((first, None), (first, second)):
        shutil.move(gone, tmp_path / "elsewhere")
        moved = open_cache(store, data_root=given and str(given))
        assert moved.roots == [(0, second)]
        assert all(torch.equal(moved[i]["image"], everything[i]) for i in range(20))
        shutil.move(tmp_path / "elsewhere", gone)
    with pytest.raises(DataError, match=f"not below {tmp_path / 'none'}"):
        open_cache(store, data_root=str(tmp_path / "none"))


def other_sizes(data: Path) -> None:
    for path in data.rglob("*.png"):
        path.write_bytes(picture(90) + b"\0" * 9)


def other_bytes(data: Path) -> None:
    for path in data.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")


def other_names(data: Path) -> None:
    for path in list(data.rglob("*.png")):
        path.rename(path.with_name(f"renamed {path.name}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_sizes, "4 images of .* have another size below"),
        (other_bytes, "4 images of .* have other bytes below"),
        (other_names, "4 of the 4 images of .* are not in the data"),
    ],
)
def test_another_folder_with_other_images(
    change: Callable[[Path], None], message: str, tmp_path: Path, grow: Callable[..., dict]
) -> None:
    """The same names are no proof: other images are refused, and nothing is written."""
    for i in range(4):
        (tmp_path / "a/x").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"a/x/{i}.png").write_bytes(picture(i))
    grow(tmp_path / "a")
    before = tree(tmp_path / "t.zarr")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    change(tmp_path / "b")
    (tmp_path / "b/x/new.png").write_bytes(picture(9))
    for more in ({}, {"drop_missing": True}):
        with pytest.raises(CacheError, match=message) as error:
            grow(tmp_path / "b", **more)
    assert "--out another.zarr" in error.value.fix
    assert tree(tmp_path / "t.zarr") == before


@pytest.mark.parametrize("write", [parquet, tar])
def test_a_file_that_was_written_again(
    write: Callable[..., Path], tmp_path: Path, grow: Callable[..., dict]
) -> None:
    """Rows are places in files: if others are there now, nothing is added to them."""
    kind = "parquet" if write is parquet else "tar"
    more = [None] if write is parquet else []
    data = tmp_path / "data"
    write(data / f"m.{kind}", [0, 1], *more, first=1)
    grow(data)
    write(data / f"m.{kind}", [1, 0, 1], *more)
    with pytest.raises(CacheError, match=r"lie elsewhere in their files|have other bytes"):
        grow(data)


def test_views_of_an_image_that_changed(tmp_path: Path, grow: Callable[..., dict]) -> None:
    """Views of one row are views of one image: another one is a rejected image."""
    data, store = make_photos(tmp_path / "data", count=6), tmp_path / "t.zarr"
    grow(data)
    path = data / TargetCache(store).manifest.key(2)
    kept = path.read_bytes()
    make_photos(tmp_path / "other", count=1, seed=8)
    shutil.copy(next((tmp_path / "other").rglob("*.jpg")), path)
    notes = Notes()
    with pytest.raises(DataError, match=r"1 of 6 images are rejected \(1 changed\)"):
        grow(data, views=2, progress=notes)
    assert notes.line("changed since extraction: 1 images have another size")
    assert ",changed: other bytes" in (store / "bad-images.csv").read_text()
    assert grow(data, views=2, max_bad="1")["bad"] == {"changed": 1}
    assert TargetCache(store).good_rows().tolist() == [0, 1, 3, 4, 5]
    path.write_bytes(kept)
    assert len(open_cache(store)[9]["image"]) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_data_that_changed_before_the_end(
    whole: bool, tmp_path: Path, grow: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun is finished with its images, and those that came since follow in the same
    call; with some of them gone it is refused, and a whole store is not given up.
    """
    data, store = make_photos(tmp_path / "data", count=6), tmp_path / "t.zarr"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    if whole:
        grow(data)
        make_photos(tmp_path / "more", count=2, classes=1, seed=3)
        shutil.move(tmp_path / "more/class 0", data / "first")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.extraction.run.write_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            grow(data)
    begun = 8 if whole else 6
    gone = sorted((data / ("first" if whole else "class 0")).iterdir())[0]
    shutil.move(gone, tmp_path / "gone.jpg")
    with pytest.raises(CacheError, match=r"was begun with other images .*is not fin") as error:
        grow(data)
    assert error.value.fix.endswith("stays") == whole
    shutil.move(tmp_path / "gone.jpg", gone)
    (data / "class 0/more.jpg").write_bytes(gone.read_bytes())
    notes = Notes()
    summary = grow(data, progress=notes)
    said = notes.line("goes on with")
    assert said.startswith(
        f"goes on with the {2 if whole else 6} images that an earlier call began"
    )
    assert summary["images"] == len(TargetCache(store).good_rows()) == begun + 1
    assert keys(store)[-1] == "class 0/more.jpg"
    assert grow(data)["images_per_second"] is None


# --- deleted photographs --------------------------------------------------------------------------


def test_deleted_photographs_leave_the_plan(tmp_path: Path, grow: Callable[..., dict]) -> None:
    """Refused unless asked; then nothing is rewritten, and no reader meets the rows again."""
    data, store = make_photos(tmp_path / "data"), tmp_path / "t.zarr"
    grow(data)
    before = committed(store)
    gone = sorted(data.rglob("*.jpg"))[:3]
    for path in gone:
        shutil.move(path, tmp_path)
    make_photos(tmp_path / "more", count=2, classes=1, seed=5)
    shutil.move(tmp_path / "more/class 0", data / "new")
    with pytest.raises(CacheError, match=r"3 of the 24 images of .* are not in the data") as error:
        grow(data)
    assert "--drop-missing" in error.value.fix
    grow(data, drop_missing=True)
    assert len(TargetCache(store).dropped) == 3
    assert len(open_cache(store)) == 26 - 3
    shutil.move(tmp_path / gone[2].name, gone[2])
    progress = Notes()
    grow(data, views=2, progress=progress)  # one is back; the others have no second view
    assert "1 are back" in progress.line("dropped: 2 images")
    gone, now = gone[:2], committed(store)
    assert {name: now[name] for name in before} == before
    assert verify(store, deep=True).code == GOOD
    cache = TargetCache(store)
    names = [path.relative_to(data).as_posix() for path in gone]
    rows = [row for row, key in enumerate(keys(store)) if key in names]
    assert cache.dropped.tolist() == rows
    assert len(cache.manifest) == 26
    dataset = open_cache(store)
    assert {dataset[i]["row"] for i in range(len(dataset))} == set(range(26)) - set(rows)
    shutil.move(tmp_path / gone[1].name, gone[1])
    grow(data, views=2)  # too late: its second view was missed
    assert TargetCache(store).dropped.tolist() == rows
    assert set(Index.read(store).dropped) == {cache.layer}


def test_a_run_goes_on_when_photographs_were_deleted(
    tmp_path: Path, grow: Callable[..., dict]
) -> None:
    """A new run has an order without them; a resumed one keeps the places of all others."""
    data, store = make_photos(tmp_path / "data"), tmp_path / "t.zarr"
    grow(data)
    settings = {**SMALL, "cache": str(store), "epochs": 2, "held_out": 0.0}
    pretrain(out=str(tmp_path / "run"), stop_after=1, **settings)
    path = sorted(data.rglob("*.jpg"))[0]
    path.unlink()
    grow(data, drop_missing=True)
    (row,) = TargetCache(store).dropped.tolist()
    assert row in order_of(TargetCache(store), seed=0, batch_size=8).train_rows
    progress = Notes()
    figures = pretrain(out=str(tmp_path / "run"), progress=progress, **settings)
    assert figures["step"] == 6
    assert read_run(tmp_path / "run")["dropped"] == {str(row): [1, "dropped from the store"]}
    assert "1 images changed or deleted" in progress.line("dropped: ")
    fresh = pretrain(out=str(tmp_path / "fresh"), **settings)
    assert fresh["step"] == 4  # 23 images: two steps an epoch
