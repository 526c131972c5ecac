"""Nearest images and near-duplicates: of a store before any training, and of embeddings."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_photos, run_here
from PIL import Image

import milan
from milan.errors import MilanError
from milan.inference import collection, neighbours
from milan.store.cache import TargetCache
from pipeline.embed import embed
from pipeline.extract import extract_targets


def cosines(store: Path) -> np.ndarray:
    """[m, m] between the decoded class tokens of view 0."""
    views = milan.open_cache(store)
    tokens = torch.stack([views[i]["features"][0] for i in range(0, len(views), views.cache.views)])
    unit = torch.nn.functional.normalize(tokens, dim=1)
    return (unit @ unit.T).numpy()


@pytest.mark.parametrize("codec", ["int8", "float16"])
def test_nearest_of_a_store(
    codec: str, finished_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most similar class tokens, however they are read; the image itself is not among them."""
    store = finished_store() if codec == "int8" else finished_store(codec=codec)
    monkeypatch.setattr(collection, "_ROWS", 5)
    expected, cache = cosines(store), TargetCache(store)
    key = cache.manifest.key(3)
    answers = [
        milan.neighbours(str(store), query=query, images=4, out=str(tmp_path / "n.png"),
                         progress=milan.NoProgress())
        for query in ("3", key, str(cache.find_data_roots()[0][1] / key))
    ]  # fmt: skip
    assert answers[0] == answers[1] == answers[2]
    others = [i for i in np.argsort(-expected[3]).tolist() if i != 3][:4]
    found = answers[0]["neighbours"]
    assert [row["row"] for row in found] == others
    assert [row["similarity"] for row in found] == pytest.approx(expected[3][others], abs=1e-4)
    assert [row["key"] for row in found] == [cache.manifest.key(row) for row in others]
    assert answers[0]["query"]["class"] == key.split("/")[0]
    with Image.open(tmp_path / "n.png") as sheet:
        assert np.asarray(sheet).std() > 30


def test_near_duplicates(
    teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies, and a picture saved again, are on the list; more than anybody reads is refused.
    Blocks of any size give the same pairs."""
    data = make_photos(tmp_path / "data", count=12)
    first, second = sorted(data.rglob("*.jpg"))[:2]
    shutil.copy(first, data / "class 1" / "copy.jpg")
    with Image.open(second) as image:
        image.save(data / "class 2" / "again.jpg", quality=60)
    store = str(tmp_path / "t.zarr")
    whole = {"scale": (1.0, 1.0), "hflip": 0.0}
    extract_targets(str(data), out=store, views=1, shard_size=8, executor="local", **whole,
                    **teacher_files)  # fmt: skip
    expected = cosines(Path(store))
    monkeypatch.setattr(neighbours, "_FEWEST", 0)
    monkeypatch.setattr(neighbours, "_PAIRS", 1)
    out = tmp_path / "d.csv"
    threshold = float(np.sort(expected[np.triu_indices(len(expected), 1)])[-4])
    given: dict[str, Any] = {"duplicates": True, "threshold": threshold, "out": str(out)}
    tables = []
    for block in (4096, 3):
        monkeypatch.setattr(neighbours, "_BLOCK", block)
        figures = neighbours.neighbours(store, **given)
        tables.append(list(csv.DictReader(out.open(encoding="utf-8"))))
    assert tables[0] == tables[1]
    assert figures["pairs"] == len(tables[0]) >= 4
    assert figures["pairs_of_the_same_bytes"] == 1
    pairs = [{row["key_a"], row["key_b"]} for row in tables[0]]
    names = [path.relative_to(data).as_posix() for path in (first, second)]
    assert {names[0], "class 1/copy.jpg"} in pairs
    assert {names[1], "class 2/again.jpg"} in pairs
    similarity = [float(row["similarity"]) for row in tables[0]]
    assert similarity == sorted(similarity, reverse=True)
    for row in tables[0]:
        a, b = int(row["row_a"]), int(row["row_b"])
        assert float(row["similarity"]) == pytest.approx(expected[a, b], abs=1e-4)
        assert (row["same_bytes"] == "true") == ("copy" in row["key_a"] + row["key_b"])
    with pytest.raises(MilanError, match=r"more than 14 pairs.*--threshold 0\.8"):
        neighbours.neighbours(store, **given | {"threshold": 0.3})


def test_of_embeddings(finished_run: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    """The command on a file of milan embed: by row, key and file, pictures from where data lie."""
    run, out = finished_run(epochs=2), tmp_path / "e.parquet"
    embed(str(run), data=str(photos), out=str(out), features=str(tmp_path / "kept"))
    key = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg"))[0]
    prints = set()
    for query in (key, photos / key):
        ran = run_here("neighbours", out, query, "--images", 3, cwd=tmp_path)
        assert ran.code == 0, ran.err
        prints.add(ran.out.split("Nearest images")[1])
    assert len(prints) == 1
    assert (tmp_path / "neighbours.png").exists()
    ran = run_here("neighbours", out, "--duplicates", "--threshold", 0.9999, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "duplicates.csv" in ran.out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"query": "24"}, "row 24 of .* is none; expected: a row from 0 to 23, or a key"),
        ({"query": "-1"}, "row -1 of .* is none"),
        ({"query": "no such.jpg"}, "the image 'no such.jpg' is not in .*, nor a file"),
        ({"query": "other.jpg"}, "the image 'other.jpg' is not in .*; expected: a row"),
        ({"query": None}, "no image to find the neighbours of.*neighbours .* 0$"),
        ({"query": "0", "duplicates": True}, "an image .0. and --duplicates"),
        ({"where": "nowhere.zarr"}, "nothing is at nowhere.zarr"),
        ({"where": "other.npy"}, "other.npy is no file of embeddings.*milan embed"),
        ({"where": "patches.npy"}, "patches.npy holds 16 vectors of each image.*--pooling mean"),
        ({"where": "cut.npy"}, r"cut.npy has embeddings \(23, 32\), and cut.rows.parquet says"),
        ({"out": "n.txt"}, "unknown ending '.txt'"),
        ({"query": None, "duplicates": True, "out": "n.png"}, "unknown ending '.png'"),
        ({"query": None, "duplicates": True, "threshold": 1.2}, "threshold 1.2"),
        ({"out": "other.npy/n.png"}, "n.png cannot be written: .*; try: --out elsewhere"),
        ({"out": "is a folder.png"}, "folder.png cannot be written: Is a directory"),
        ({"query": None, "duplicates": True, "out": "other.npy/n.csv"}, "n.csv cannot be written"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], expected: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(collection, "class_tokens", None)  # nothing is read before
    (files / "is a folder.png").mkdir(exist_ok=True)
    with pytest.raises(MilanError, match=expected) as error:
        neighbours.neighbours(**{"where": "store.zarr", "query": "0", **changes})
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def files(
    store: Path, finished_run: Callable[..., Path], photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A store, a picture of somewhere else, embeddings of patches, and some that were cut."""
    folder, run = tmp_path_factory.mktemp("files"), str(finished_run(epochs=2))
    (folder / "store.zarr").symlink_to(store)
    Image.new("RGB", (40, 40)).save(folder / "other.jpg")
    np.save(folder / "other.npy", np.zeros((3, 4)))
    for name, pooling in (("patches.npy", "patches"), ("cut.npy", "mean")):
        embed(run, data=str(photos), out=str(folder / name), pooling=pooling,
              features=str(folder / "kept"))  # fmt: skip
    np.save(folder / "cut.npy", np.load(folder / "cut.npy")[:-1])
    return folder
