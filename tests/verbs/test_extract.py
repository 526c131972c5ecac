"""Tests of pipeline/extract.py: what a store holds is what the teacher said of the stated views."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import Notes, make_photos, tree
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from milan.core import waiting
from milan.core.paths import LFS_POINTER
from milan.core.progress import NoProgress
from milan.data.dataset import open_cache
from milan.errors import CacheError, ConfigError, DataError, MachineError, TeacherError
from milan.images.decode import content_digest
from milan.images.manifest import build_manifest
from milan.images.source import ImageSource
from milan.images.views import View, checksum, render, view_of
from milan.store.cache import TargetCache
from milan.store.codecs import codec_of
from milan.store.format import GENERATION, record_name
from pipeline.config import ExtractConfig, allowed_bad
from pipeline.extract import extract_targets
from pipeline.extraction import run
from pipeline.extraction.hardware import Workers
from pipeline.extraction.plan import plan
from pipeline.extraction.worker import Extractor
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec


@pytest.fixture(scope="module")
def teacher(teacher_files: dict[str, str]) -> Teacher:
    return load_teacher(
        TeacherSpec(teacher_files["teacher"], teacher_files["pretrained"]), device="cpu"
    )


@pytest.fixture
def extract(teacher_files: dict[str, str], tmp_path: Path) -> Any:
    """extract(data, name, **settings) -> the summary; the store is tmp_path / name."""

    def run(data: Path, name: str = "t.zarr", **settings: Any) -> dict:
        own = {"views": 2, "shard_size": 8, "batch_size": 7, "executor": "local", **teacher_files}
        return extract_targets(str(data), out=str(tmp_path / name), **{**own, **settings})

    return run


@pytest.fixture(scope="module")
def halves(finished_store: Callable[..., Path]) -> TargetCache:
    """As the shared store, in float16 and with 3 views."""
    return TargetCache(finished_store(views=3, codec="float16"))


def file_of(cache: TargetCache, root: Path, row: int) -> Path:
    return root / cache.manifest.table["path"][row].as_py()


def record_of(cache: TargetCache, row: int, view: int) -> dict:
    """The commit record of a shard of a store of one generation."""
    return cache.generations[0].record(row // cache.spec.shard_size, view)


def everything(cache: TargetCache) -> tuple[np.ndarray, np.ndarray]:
    """(rows, views) of all good rows."""
    good = cache.good_rows()
    return np.repeat(good, cache.views), np.tile(np.arange(cache.views), len(good))


# --- what is stored -------------------------------------------------------------------------------


def test_records_reconcile(cache: TargetCache, photos: Path) -> None:
    """Each number a record states is taken from the disk again: bytes, digests, sizes, pixels."""
    covered, files = [], {}
    for block in range(3):
        for view in range(2):
            record = record_of(cache, block * 8, view)
            start, stop = record["rows"]
            covered += [(row, view) for row in range(start, stop)]
            assert (record["block"], record["view"], record["bad"]) == (block, view, {})
            names = [file["path"].split("/")[0] for file in record["files"]]
            assert names == ["attention", "crop", "features", "scale"]
            for file in record["files"]:
                data = (cache.root / file["path"]).read_bytes()
                assert len(data) == file["bytes"]
                assert hashlib.sha256(data).hexdigest() == file["sha256"]
                files[file["path"]] = file["bytes"]
            for at, row in enumerate(range(start, stop)):
                path = file_of(cache, photos, row)
                assert record["digests"][at] == content_digest(path.read_bytes())
                with Image.open(path) as image:
                    size = (record["widths"][at], record["heights"][at])
                    assert image.size == size
                    view_law = cache.view_spec
                    expected = view_of(view_law, row, view=view, height=size[1], width=size[0])
                    assert View.of(cache.crops([row], [view])[0]) == expected
                    pixels = render(image.convert("RGB"), expected, size=32)
                assert record["pixels"][at] == checksum(pixels)
            assert set(record) == {
                "block", "view", "rows", "files", "bad", "digests", "heights", "widths", "pixels",
                "crc32c",
            }  # fmt: skip
    assert sorted(covered) == [(row, view) for row in range(24) for view in range(2)]
    # The index counts the same files, and no other array file lies in the store.
    on_disk = {
        p.relative_to(cache.root).as_posix(): p.stat().st_size
        for name in cache.spec.arrays()
        for p in (cache.root / name / "c").rglob("*")
        if p.is_file()
    }
    assert on_disk == files
    assert sum(files.values()) <= cache.spec.total_bytes() * 1.02
    assert sum(files.values()) >= cache.spec.total_bytes() * 0.98


def said(cache: TargetCache, teacher: Teacher, root: Path, *, batch: int) -> dict[str, np.ndarray]:
    """What the teacher says of every view, rendered anew, in the extraction's own batches."""
    features = np.empty((cache.rows, cache.views, 17, 24), np.float32)
    attention = np.empty((cache.rows, cache.views, 16), np.float32)
    for start in range(0, cache.rows, cache.spec.shard_size):
        rows = range(start, min(cache.rows, start + cache.spec.shard_size))
        stream = [(row, view) for row in rows for view in range(cache.views)]
        for first in range(0, len(stream), batch):
            part = stream[first : first + batch]
            pixels = []
            for row, view in part:
                with Image.open(file_of(cache, root, row)) as image:
                    image = image.convert("RGB")
                law = cache.view_spec
                box = view_of(law, row, view=view, height=image.height, width=image.width)
                pixels.append(render(image, box, size=32))
            tokens, weights = teacher.targets(np.stack(pixels))
            for (row, view), token, weight in zip(part, tokens, weights, strict=True):
                features[row, view], attention[row, view] = token.numpy(), weight.numpy()
    return {"features": features, "attention": attention}


def test_float16_is_the_teacher_rounded_once(
    halves: TargetCache, teacher: Teacher, photos: Path
) -> None:
    """To the bit: another row, view, normalisation or a second rounding would show."""
    expected = said(halves, teacher, photos, batch=7)
    rows, views = everything(halves)
    got = halves.read(rows, views)
    assert got.codes is not None
    assert got.scale is None
    assert got.codes.dtype == np.float16
    assert np.array_equal(got.codes, expected["features"][rows, views].astype(np.float16))
    assert np.array_equal(got.attention, expected["attention"][rows, views])
    assert got.attention.dtype == np.float32


def test_int8_is_within_half_a_step(cache: TargetCache, teacher: Teacher, photos: Path) -> None:
    """The largest channel of each token is 127 steps, and no channel is off by more than half."""
    expected = said(cache, teacher, photos, batch=7)
    rows, views = everything(cache)
    got = cache.read(rows, views)
    assert got.codes is not None
    assert got.scale is not None
    features = expected["features"][rows, views]
    channel = cache.codec.tables["channel"].astype(np.float64)
    off = np.abs(got.codes * got.scale[..., None] * channel - features)
    assert (off <= got.scale[..., None] * channel * 0.50001).all()
    assert (np.abs(got.codes).max(axis=-1) == 127).all()
    assert np.array_equal(got.attention, expected["attention"][rows, views])


def test_a_view_does_not_depend_on_how_many_there_are(
    cache: TargetCache, halves: TargetCache
) -> None:
    """Views 0 and 1 of a store of 2 are views 0 and 1 of a store of 3: stores can grow."""
    rows, views = everything(cache)
    assert np.array_equal(cache.crops(rows, views), halves.crops(rows, views))
    two, three = cache.read(rows, views), halves.read(rows, views)
    assert np.abs(two.attention - three.attention).max() <= 1e-5
    decoded = [
        c.codec.decode(
            torch.from_numpy(t.codes), None if t.scale is None else torch.tensor(t.scale)
        )
        for c, t in ((cache, two), (halves, three))
    ]
    assert two.scale is not None
    step = torch.tensor(two.scale)[..., None] * cache.codec.tables["channel"]
    assert ((decoded[0] - decoded[1]).abs() <= step * 0.6).all()
    # The third view is another one.
    assert not np.array_equal(halves.crops(rows, views * 0 + 2), halves.crops(rows, views))
    same = [cache.checksum(r, v) == halves.checksum(r, v) for r, v in zip(rows, views, strict=True)]
    assert all(same)


@pytest.mark.parametrize(("batch", "threads"), [(1000, 1), (1, 3), (5, 2)])
def test_batches_and_threads_do_not_matter(
    cache: TargetCache, photos: Path, extract: Any, tmp_path: Path, batch: int, threads: int
) -> None:
    """A batch larger than everything, of one, and one that cuts the views of an image apart."""
    extract(photos, batch_size=batch, num_workers=threads)
    other = TargetCache(tmp_path / "t.zarr")
    assert other.spec == cache.spec
    rows, views = everything(cache)
    assert np.array_equal(other.crops(rows, views), cache.crops(rows, views))
    a, b = cache.read(rows, views), other.read(rows, views)
    assert np.abs(a.attention - b.attention).max() <= 1e-5
    assert a.codes is not None
    assert b.codes is not None
    assert np.abs(a.codes.astype(int) - b.codes).max() <= 1
    assert [cache.checksum(r, v) for r, v in zip(rows, views, strict=True)] == [
        other.checksum(r, v) for r, v in zip(rows, views, strict=True)
    ]


def test_one_image_and_many_views(extract: Any, tmp_path: Path) -> None:
    """The smallest data set; more views than a batch holds."""
    photos = make_photos(tmp_path / "one", count=1)
    summary = extract(photos, views=5, batch_size=2, shard_size=1024)
    assert (summary["images"], summary["views"], summary["shards"]) == (1, 5, 5)
    cache = TargetCache(tmp_path / "t.zarr")
    crops = cache.crops(np.zeros(5, int), np.arange(5))
    assert len({tuple(c) for c in crops.tolist()}) > 1
    assert cache.read(np.zeros(5, int), np.arange(5)).attention.shape == (5, 16)


def test_the_views_are_spread_as_the_law_says(extract: Any, tmp_path: Path) -> None:
    """--scale, --ratio and --hflip reach the crops: here whole squares, all flipped."""
    photos = make_photos(tmp_path / "few", count=3)
    extract(photos, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0)
    cache = TargetCache(tmp_path / "t.zarr")
    crops = cache.crops(*everything(cache))
    assert (crops[:, 4] == 1).all()
    assert (crops[:, 2] == crops[:, 3]).all()


def test_every_kind_of_picture_flows_through(extract: Any, tmp_path: Path) -> None:
    """Grey, CMYK, palette, alpha, 16 bits, EXIF: crops lie in oriented pixels, as Pillow turns."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    coarse = np.random.default_rng(5).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((90, 50), Image.Resampling.BICUBIC)
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.quantize(16).save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    grey = np.asarray(picture.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 16).save(folder / "twelve bits.png")
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(folder / f"turned {orientation}.jpg", exif=exif)
    summary = extract(folder, views=3)
    assert summary["bad"] == {}
    cache = TargetCache(tmp_path / "t.zarr")
    for row in range(cache.rows):
        path = file_of(cache, folder, row)
        record = record_of(cache, row, 0)
        size = record["heights"][row], record["widths"][row]
        assert size == ((90, 50) if path.stem in ("turned 6", "turned 8") else (50, 90))
        crops = cache.crops(np.full(3, row), np.arange(3))
        assert (crops[:, :2] >= 0).all()
        assert (crops[:, 0] + crops[:, 2] <= size[0]).all()
        assert (crops[:, 1] + crops[:, 3] <= size[1]).all()
        if path.stem != "twelve bits":
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels = render(upright, View.of(crops[1]), size=32)
            assert checksum(pixels) == cache.checksum(row, 1), path.stem
    # Training replays the same pixels from the same files.
    open_cache(tmp_path / "t.zarr").pixels(*everything(cache))


def test_parquet_gives_what_files_give(
    cache: TargetCache, photos: Path, extract: Any, tmp_path: Path
) -> None:
    """The same bytes in a Parquet file: digests, sizes and labels arrive."""
    paths = [file_of(cache, photos, row) for row in range(24)]
    images = [{"bytes": p.read_bytes(), "path": p.name} for p in paths]
    table = pa.table({"image": images, "label": list(range(24))})
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=10)
    extract(tmp_path / "photos.parquet")
    other = TargetCache(tmp_path / "t.zarr")
    for row in range(24):
        source = other.manifest.labels()[row]
        record = record_of(other, row, 1)
        assert record["digests"][row - record["rows"][0]] == content_digest(images[source]["bytes"])
        assert other.manifest.key(row) == f"photos.parquet/{images[source]['path']}"
    open_cache(tmp_path / "t.zarr").pixels(*everything(other))


# --- bad images -----------------------------------------------------------------------------------

REASONS = {
    "half.jpg": "truncated",
    "nothing.jpg": "empty",
    "text.jpg": "not-an-image",
    "gone.jpg": "missing",
}


def make_bad(folder: Path) -> None:
    """One file of each reason; `gone` is listed, and then it is not there."""
    whole = next(folder.rglob("*.jpg")).read_bytes()
    (folder / "class 0" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "class 1" / "nothing.jpg").touch()
    (folder / "class 2" / "text.jpg").write_text("<html>404</html>")
    (folder / "class 2" / "gone.jpg").symlink_to(folder / "away.jpg")


def times(root: Path) -> dict[str, int]:
    return {p.as_posix(): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_bad_images_do_not_stop_a_shard(
    extract: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are done, the index is withheld; a larger --max-bad then only writes the index."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    make_bad(data)
    with pytest.raises(DataError) as error:
        extract(data)
    for part in ("4 of 28 images are rejected", "1 truncated", "1 empty", "1 not-an-image"):
        assert part in str(error.value)
    assert "1 missing" in str(error.value)
    assert "at most 0 (--max-bad 0)" in str(error.value)
    path = tmp_path / "t.zarr"
    assert not (path / "index.json").exists()
    with open(path / "bad-images.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert {Path(line["key"]).name: line["reason"].split(":")[0] for line in listed} == REASONS
    assert [int(line["row"]) for line in listed] == sorted(int(line["row"]) for line in listed)
    with pytest.raises(CacheError, match="is incomplete: 8 of 8 shards"):
        TargetCache(path)

    before = times(path / GENERATION)
    monkeypatch.setattr(Extractor, "run", lambda *_: pytest.fail("the teacher ran again"))
    for few in ("3", "14%"):
        with pytest.raises(DataError, match=f"at most 3 .--max-bad {few}.*--max-bad 4"):
            extract(data, max_bad=few)
    summary = extract(data, max_bad="4")
    assert summary["bad"] == dict.fromkeys(REASONS.values(), 1)
    assert summary["images_per_second"] is None
    after = times(path / GENERATION)
    assert {file: when for file, when in after.items() if file in before} == before
    assert {Path(file).name for file in after} - {Path(file).name for file in before} == {
        "shards.parquet"
    }

    cache = TargetCache(path)
    rows = {int(line["row"]): line["reason"] for line in listed}
    assert cache.bad == rows
    assert len(cache.good_rows()) == 24
    assert not set(cache.good_rows().tolist()) & set(rows)
    for row in range(28):
        record = record_of(cache, row, 1)
        at = row - record["rows"][0]
        assert (str(row) in record["bad"]) == (row in rows)
        assert (record["heights"][at] == 0) == (row in rows)
    cache.read(*everything(cache))
    # Bytes that were read have a digest, though they are no image.
    (text,) = (row for row, why in rows.items() if why.startswith("not-an-image"))
    record = record_of(cache, text, 0)
    assert record["digests"][text - record["rows"][0]] == content_digest(b"<html>404</html>")
    # The list is told again, and goes when nothing is bad any more.
    extract(data, max_bad="15%")
    assert (path / "bad-images.csv").exists()


def test_the_same_line_tries_rejected_images_again(
    extract: Any, photos: Path, tmp_path: Path
) -> None:
    """Restored files get their targets, as if they had never been away; nothing else changes."""
    data, away = tmp_path / "data", tmp_path / "away"
    shutil.copytree(photos, data)
    names = sorted(path.relative_to(data) for path in data.rglob("*.jpg"))[3:22:9]
    gone, cut, link = names
    extract(data, "whole.zarr")
    away.mkdir()
    (data / gone).rename(away / "gone")
    (data / gone).symlink_to(tmp_path / "nowhere")
    whole_cut, whole_link = (data / cut).read_bytes(), (data / link).read_bytes()
    (data / cut).write_bytes(whole_cut[:300])
    (data / link).write_bytes(LFS_POINTER + b"v1\n")
    with pytest.raises(DataError, match="3 of 24 images are rejected"):
        extract(data)

    notes = Notes()
    (data / gone).unlink()
    (away / "gone").rename(data / gone)
    (data / link).write_bytes(whole_link)
    with pytest.raises(DataError, match=r"1 of 24 images are rejected \(1 truncated\)"):
        extract(data, progress=notes)
    assert any(line.startswith("2 of 3 rejected images can be read now") for line in notes.lines)

    (data / cut).write_bytes(whole_cut)
    assert extract(data)["bad"] == {}
    assert not (tmp_path / "t.zarr/bad-images.csv").exists()
    cache, whole = TargetCache(tmp_path / "t.zarr"), TargetCache(tmp_path / "whole.zarr")
    assert cache.bad == {}
    rows, views = everything(cache)
    assert np.array_equal(cache.crops(rows, views), whole.crops(rows, views))
    assert np.array_equal(cache.read(rows, views).attention, whole.read(rows, views).attention)
    open_cache(tmp_path / "t.zarr").pixels(rows, views)


def test_good_rows_are_as_if_there_were_no_bad_ones(
    extract: Any, photos: Path, tmp_path: Path
) -> None:
    """A bad image shifts no neighbour: its row stays empty, all others keep their own targets."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    extract(data, "whole.zarr")
    whole = TargetCache(tmp_path / "whole.zarr")
    for row in (3, 8):
        os.truncate(file_of(whole, data, row), 200)
    extract(data, "holes.zarr", max_bad="2")
    holes = TargetCache(tmp_path / "holes.zarr")
    assert sorted(holes.bad) == [3, 8]
    rows, views = everything(holes)
    assert np.array_equal(whole.crops(rows, views), holes.crops(rows, views))
    a, b = whole.read(rows, views), holes.read(rows, views)
    assert np.abs(a.attention - b.attention).max() <= 1e-5


def test_a_shard_and_a_store_of_nothing_but_bad_images(extract: Any, tmp_path: Path) -> None:
    """No file is written for them, yet they are recorded; the store stays what it says it is."""
    data = make_photos(tmp_path / "data", count=3)
    make_bad(data)
    extract(data, shard_size=1, max_bad="4")
    cache = TargetCache(tmp_path / "t.zarr")
    assert all(record_of(cache, row, 1)["files"] == [] for row in cache.bad)
    cache.read(*everything(cache))
    for path in sorted(data.rglob("*.jpg")):
        if path.name not in REASONS:
            path.unlink()
    summary = extract(data, "bad.zarr", max_bad="100%")
    assert sum(summary["bad"].values()) == summary["images"] == 4
    empty = TargetCache(tmp_path / "bad.zarr")
    with pytest.raises(DataError, match="targets of no image: all 4 are bad"):
        empty.good_rows()
    with pytest.raises(DataError, match="targets of no image"):
        open_cache(tmp_path / "bad.zarr")


def test_how_many_may_be_bad() -> None:
    """A number, or a share rounded down."""
    assert allowed_bad("0", 1000) == 0
    assert allowed_bad("12", 5) == 12
    assert allowed_bad("0.1%", 1999) == 1
    assert allowed_bad("100%", 7) == 7
    assert allowed_bad(" 5 ", 7) == 5
    for wrong in ("-1", "1.5", "101%", "-1%", "many", "", "%", "nan%"):
        with pytest.raises(ConfigError, match="--max-bad"):
            allowed_bad(wrong, 10)


# --- a run and its continuation -------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [[(0, 0)], [(1, 1), (2, 0)], [(b, v) for b in range(3) for v in range(2)]]
)
def test_a_resumed_store_is_the_same_to_the_byte(
    extract: Any, photos: Path, tmp_path: Path, lost: list[tuple[int, int]]
) -> None:
    """Whichever records are gone, the same line makes their blocks again, and no others."""
    extract(photos)
    root = tmp_path / "t.zarr"
    before = tree(root)
    (root / "index.json").unlink()
    for block, view in lost:
        (root / GENERATION / "records" / record_name(block, view)).unlink()
    kept = times(root / GENERATION)
    progress = Notes()
    extract(photos, progress=progress)
    assert tree(root) == before
    blocks = {block for block, _ in lost}
    if len(blocks) < 3:
        assert f"resuming: {6 - 2 * len(blocks)} of 6 shards are there" in progress.lines
    after = times(root / GENERATION)
    redone = {record_name(block, view) for block in blocks for view in (0, 1)}
    for path, when in kept.items():
        if Path(path).name in redone:
            continue
        if "/records/" in path or "manifest" in path or path.endswith("zarr.json"):
            assert after[path] == when, f"{path} was written again"
    assert all(after[str(root / GENERATION / "records" / name)] for name in redone)
    assert not (root / ".staging").exists()


def test_a_finished_store_is_left_alone(extract: Any, photos: Path, tmp_path: Path) -> None:
    """The same line once more writes nothing but its log."""
    extract(photos)
    before = times(tmp_path / "t.zarr")
    summary = extract(photos)
    after = times(tmp_path / "t.zarr")
    assert {p for p in after if after[p] != before.get(p)} <= {
        str(tmp_path / "t.zarr" / name) for name in ("extract.log.jsonl", ".lock")
    }
    assert summary["images_per_second"] is None


def test_images_that_are_gone_are_refused(extract: Any, photos: Path, tmp_path: Path) -> None:
    """One renamed, or another folder altogether: the rows would no longer be the same images."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    extract(data)
    before = tree(tmp_path / "t.zarr")
    first = next(data.rglob("*.jpg"))
    first.rename(first.with_name("another name.jpg"))
    with pytest.raises(CacheError, match=r"1 of the 24 images of .*\(manifest\).*restore them"):
        extract(data)
    with pytest.raises(CacheError, match=r"has 24 images \(rows: 24 != 5\).*only grows"):
        extract(photos, limit=5)
    with pytest.raises(CacheError, match=r"has 2 views .*\(views: 2 != 1\).*only grows"):
        extract(photos, views=1)
    assert tree(tmp_path / "t.zarr") == before


def test_limit_takes_the_first_rows_of_the_same_order(
    cache: TargetCache, extract: Any, photos: Path, tmp_path: Path
) -> None:
    """A trial on a part of the data shows what the whole will hold."""
    summary = extract(photos, limit=5)
    assert summary["images"] == 5
    part = TargetCache(tmp_path / "t.zarr")
    assert [part.manifest.key(i) for i in range(5)] == [cache.manifest.key(i) for i in range(5)]
    rows, views = everything(part)
    assert np.array_equal(part.crops(rows, views), cache.crops(rows, views))
    assert [build_manifest(photos, seed=0).key(i) for i in range(5)] == [
        part.manifest.key(i) for i in range(5)
    ]


def test_a_dry_run_writes_nothing(
    cache: TargetCache, extract: Any, photos: Path, tmp_path: Path
) -> None:
    """It says what the run would take."""
    progress = Notes()
    summary = extract(photos, dry_run=True, progress=progress)
    assert list(tmp_path.iterdir()) == []
    assert summary["bytes"] == cache.spec.total_bytes()
    assert summary["bytes_per_view"] == cache.spec.view_bytes()
    assert (summary["images"], summary["views"], summary["shards"]) == (24, 2, 6)
    told = " ".join(progress.lines)
    for part in ("executor: local, 1 x teacher", "24 images, 3 classes", "licence of the weights"):
        assert part in told


def test_random_weights_are_flagged_everywhere(extract: Any, photos: Path, tmp_path: Path) -> None:
    """A store of a random teacher must never pass for a real one."""
    progress = Notes()
    extract(photos, pretrained="none", progress=progress, limit=3)
    assert any("RANDOM WEIGHTS" in note for note in progress.lines)
    about = TargetCache(tmp_path / "t.zarr").attributes["about"]
    assert about["random_weights"] is True
    assert about["licence"] == "none (random weights)"


# --- a teacher that goes wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "factor", "message"),
    [
        ("float16", 1e6, r"beyond the range of float16.*--codec int8"),
        ("int8", float("inf"), r"output for row \d+ is not finite.*--precision fp32"),
    ],
)
def test_features_that_cannot_be_stored_end_the_run(
    extract: Any, photos: Path, teacher_files: dict[str, str], tmp_path: Path,
    codec: str, factor: float, message: str,
) -> None:  # fmt: skip
    """An infinity in a store would only be met in the middle of a training run."""
    state = load_file(teacher_files["pretrained"])
    state["visual.proj"] = state["visual.proj"] * factor
    save_file(state, tmp_path / "loud.safetensors")
    loud = str(tmp_path / "loud.safetensors")
    with pytest.raises(TeacherError, match=message):
        extract(photos, codec=codec, pretrained=loud)
    assert not (tmp_path / "t.zarr" / "index.json").exists()
    if factor < float("inf"):
        extract(photos, "int8.zarr", codec="int8", pretrained=loud)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_read_that_never_answers_ends(
    interrupted: bool, extract: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word, a limit and one error, also at Ctrl-C; the same line goes on from what is there."""
    answers, read, asked = Event(), ImageSource.read, count()

    def stalls(self: ImageSource, row: int) -> bytes:
        if current_thread().name.startswith("decode") and next(asked) == 14:  # of the second block
            if interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            answers.wait()
        return read(self, row)

    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.extraction.worker.ImageSource.read", stalls)
        patch.setattr(run, "LIMIT", 100 if interrupted else 1.0)
        patch.setattr(run, "HEARD", 0.1)
        patch.setattr(waiting, "_FIRST_WORD", 0.3)
        try:
            with pytest.raises(KeyboardInterrupt if interrupted else MachineError) as raised:
                extract(photos, progress=notes)
        finally:
            answers.set()  # or the tests would not end
    wanted = "the same line goes on" if interrupted else "in vain for the next image"
    assert wanted in str(raised.value)
    assert interrupted or any("waiting for the next image" in line for line in notes.lines)
    assert extract(photos)["images"] == 24


def test_a_worker_with_another_teacher_is_refused(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """On another node the file of that name may hold other weights."""
    part = plan(ExtractConfig(str(photos), **teacher_files), NoProgress()).parts[0]
    other = TeacherSpec(teacher_files["teacher"], "none")
    with pytest.raises(TeacherError, match="another teacher than the driver"):
        Extractor(
            part=part, codec=codec_of("int8"), root=str(photos), teacher=other, device="cpu",
            batch_size=4, workers=Workers(1, 1, None),
        )  # fmt: skip
