"""Embeddings: the encoder's own features in three formats, resumed, in bounded pieces."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import zarr
from helpers import FORK, Notes, make_photos, run_here, until

import milan
from milan.core.device import normalise
from milan.core.signals import Stop
from milan.errors import MilanError
from milan.evaluation import features
from milan.evaluation.evaluate import evaluate
from milan.images.decode import decode_pixels
from milan.images.source import ImageSource
from milan.images.views import centre_view, render
from milan.inference.embeddings import Embeddings
from milan.inference.neighbours import neighbours
from milan.models.encoder import encode
from pipeline import embed as module
from pipeline.embed import embed


@pytest.fixture(scope="module")
def run(finished_run: Callable[..., Path]) -> Path:
    return finished_run(epochs=2)


def tokens_of(run: Path, path: Path) -> np.ndarray:
    """[T, E] of one image, computed alone."""
    encoder = milan.load_encoder(run)
    data = timm.data.resolve_model_data_config(encoder)
    pixels = decode_pixels(path.read_bytes())
    view = render(pixels, centre_view(*pixels.shape[:2]), size=data["input_size"][1])
    with torch.no_grad():
        images = normalise(torch.from_numpy(view)[None], data["mean"], data["std"])
        return encode(encoder, images)[0].numpy()


def opened(path: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    """(keys, labels and classes; embeddings) as other tools read them."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return table.drop(["embedding"]).to_pylist(), np.array(table["embedding"].to_pylist())
    if path.suffix == ".npy":
        return pq.read_table(path.with_suffix(".rows.parquet")).to_pylist(), np.load(path)
    rows = pq.read_table(path / "rows.parquet").to_pylist()
    return rows, zarr.open_group(path, mode="r")["embedding"][:]


@pytest.mark.parametrize(
    ("ending", "pooling", "dtype"),
    [
        (".parquet", "mean", "float32"), (".parquet", "patches", "float16"),
        (".npy", "token", "float16"), (".npy", "patches", "float32"),
        (".zarr", "mean", "float16"), (".zarr", "patches", "float32"),
    ],
)  # fmt: skip
def test_the_encoders_features(
    ending: str, pooling: str, dtype: str, run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With keys and classes; an image that cannot be read is left out and named. Small pieces and
    shards of other sizes change nothing, and what is kept on the way is removed."""
    data = make_photos(tmp_path / "data", count=11)
    (data / "class 1" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    monkeypatch.setattr(module, "_FILE_BYTES", 20_000)
    monkeypatch.setattr(features, "FILE_ROWS", 5)
    monkeypatch.setattr("pipeline.writing.shards._SHARD_BYTES", 4_500)
    monkeypatch.setattr("pipeline.writing.shards._CHUNK_BYTES", 1_500)
    monkeypatch.setattr("milan.inference.embeddings._PIECE", 3)
    out, notes = tmp_path / f"e{ending}", Notes()
    kept = "none" if pooling != "patches" else None
    figures = embed(
        str(run), data=str(data), out=str(out), pooling=pooling, dtype=dtype, batch_size=3,
        features=kept, progress=notes,
    )  # fmt: skip
    assert "rejected files: 1, the first is class 1/cut.jpg: " in notes.line("rejected files")
    assert figures["images"] == 11
    rows, values = opened(out)
    assert len(rows) == len(values) == 11
    if ending != ".parquet":
        assert values.dtype == dtype
    for row, value in zip(rows, values, strict=True):
        tokens = tokens_of(run, data / row["key"])
        own = {"token": tokens[0], "mean": tokens[1:].mean(axis=0), "patches": tokens[1:]}[pooling]
        assert value.shape == own.shape
        assert np.abs(value - own).max() < (1e-4 if dtype == "float32" else 5e-3)
        assert row["class"] == row["key"].split("/")[0]
        assert row["label"] == int(row["class"].split()[1])
    ours = np.concatenate(list(Embeddings(out).pieces()))
    assert np.array_equal(ours, values.astype(np.float32))
    assert np.array_equal(Embeddings(out).vector(7), ours[7])
    assert {p.name for p in tmp_path.iterdir()} == {"data", out.name} | (
        {"e.rows.parquet"} if ending == ".npy" else set()
    )


def test_it_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed before a stop is not computed again; the file is the same; once it is
    there nothing is done. Pooled features are those that evaluations keep."""
    data = make_photos(tmp_path / "data", count=12)
    monkeypatch.setattr(module, "_FILE_BYTES", 1)  # an image a file
    reads, read = [0], ImageSource.read

    def counted(source: ImageSource, row: int) -> bytes:
        reads[0] += 1
        return read(source, row)

    monkeypatch.setattr(ImageSource, "read", counted)
    given: dict[str, Any] = {"data": str(data), "pooling": "patches", "batch_size": 1}
    embed(str(run), out=str(tmp_path / "alone.npy"), **given)
    stop = Stop()

    class At(Notes):
        def advance(self, done: int, figures: str = "") -> None:
            if done >= 6:
                stop.request(15)

    stopped = embed(str(run), out=str(tmp_path / "e.npy"), stop=stop, progress=At(), **given)
    assert stopped == {"stopped_by": "SIGTERM"}
    assert not (tmp_path / "e.npy").exists()
    reads[0], notes = 0, Notes()
    embed(str(run), out=str(tmp_path / "e.npy"), progress=notes, **given)
    assert 0 < reads[0] <= 7
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    reads[0] = 0
    again = Notes()
    embed(str(run), out=str(tmp_path / "e.npy"), progress=again, **given)
    assert reads[0] == 0
    assert "nothing is left to do" in again.line("nothing")
    (tmp_path / "e.npy").write_bytes((tmp_path / "alone.npy").read_bytes()[:-9])  # cut
    with pytest.raises(MilanError, match=r"e\.npy is damaged.*it writes it anew"):
        neighbours(str(tmp_path / "e.npy"), duplicates=True)
    embed(str(run), out=str(tmp_path / "e.npy"), **given)
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()

    kept = str(tmp_path / "kept")
    evaluate("knn", str(run), data=str(data), features=kept, baseline="none")
    reads[0] = 0
    for pooling in ("mean", "token"):
        embed(str(run), data=str(data), out=str(tmp_path / f"{pooling}.npy"), pooling=pooling,
              features=kept)  # fmt: skip
    assert reads[0] == 0


def test_another_call_removed_what_it_was_done_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two calls for one file the second waits; then the folder of its lock is gone."""
    data, lock, tried = make_photos(tmp_path / "data", count=2), features.lock_folder, list[Path]()

    def locked(folder: Path) -> Any:
        tried.append(folder)
        if len(tried) == 1:
            shutil.rmtree(folder.parent)
        return lock(folder)

    monkeypatch.setattr(features, "lock_folder", locked)
    embed(str(run), data=str(data), out=str(tmp_path / "e.npy"), pooling="patches")
    assert len(tried) == 2
    assert len(np.load(tmp_path / "e.npy")) == 2


def test_ranks_give_the_same_file(
    run: Path, photos: Path, tmp_path: Path, forked_ranks: None
) -> None:
    """Two ranks compute a share each; labels are not needed."""
    for ranks in (1, 2):
        embed(str(run), data=str(photos), out=str(tmp_path / f"{ranks}.npy"), devices=ranks,
              device="cpu", features=str(tmp_path / f"kept {ranks}"), batch_size=5)  # fmt: skip
    one, two = (opened(tmp_path / f"{ranks}.npy") for ranks in (1, 2))
    assert one[0] == two[0]
    assert np.array_equal(one[1], two[1])


def test_the_command(run: Path, photos: Path, tmp_path: Path) -> None:
    """Images without labels; then other embeddings do not replace them."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:4]):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    line = ("embed", "--checkpoint", run, "--data", flat, "--features", "none")
    ran = run_here(*line, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "4 x 32" in ran.out
    rows, _ = opened(tmp_path / "embeddings.parquet")
    assert [row["label"] for row in rows] == [None] * 4
    ran = run_here(*line, "--pooling", "token", cwd=tmp_path)
    assert ran.code == 1
    assert "is there already, with other embeddings (pooling)" in ran.err


def test_the_teachers_features(photos: Path, teacher_files: dict[str, str], tmp_path: Path) -> None:
    """Of any network that evaluations take."""
    figures = embed("teacher", data=str(photos), out=str(tmp_path / "t.npy"), pooling="patches",
                    **teacher_files)  # fmt: skip
    assert figures["shape"] == "24 x 16 x 24"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"out": "e.txt"}, "unknown ending '.txt'; expected: one of .parquet, .npy, .zarr"),
        ({"data": "empty"}, "no images in empty"),
        ({"checkpoint": "empty"}, "no encoder.safetensors at empty"),
        ({"pooling": "both"}, "pooling 'both'; expected: one of mean, token, patches"),
        ({"out": "there.npy"}, "there.npy is there already; expected: a name that is free"),
        ({"out": "data/e.npy"}, "lies in the folder of the images"),
        ({"checkpoint": "random", "pooling": "token", "model": "vit_wee_patch16_reg1_gap_256"},
         "has no class token.*--pooling mean"),
    ],
)  # fmt: skip
def test_bad_input(
    changes: dict[str, Any], expected: str, run: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").symlink_to(photos)
    (tmp_path / "there.npy").write_bytes(b"mine")
    given = {"checkpoint": str(run), "data": "data", "features": "none", **changes}
    with pytest.raises(MilanError, match=expected) as error:
        embed(**given)
    assert "\n" not in str(error.value)
    assert (tmp_path / "there.npy").read_bytes() == b"mine"
    assert not list(tmp_path.glob("e*.*"))


@pytest.mark.parametrize("out", ["a file/e.npy", "a folder.npy", f"{'e' * 300}.zarr"])
def test_a_place_that_cannot_be_written(
    out: str, run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before an image is looked at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_bytes(b"mine")
    (tmp_path / "a folder.npy").mkdir()
    notes, given = Notes(), {"data": str(photos), "features": str(tmp_path / "kept")}
    with pytest.raises(MilanError, match=r"cannot be written|there already|too long"):
        embed(str(run), out=out, progress=notes, **given)
    assert not any("features of" in line for line in notes.lines)
    assert not (tmp_path / "kept").exists()


def embed_slowly(given: dict[str, Any]) -> None:
    """embed in a process of its own, an image a file, in no haste."""

    class Slow(Notes):
        def advance(self, done: int, figures: str = "") -> None:
            time.sleep(0.05)

    module._FILE_BYTES = 1
    torch.set_num_threads(1)
    embed(**given, progress=Slow())


@pytest.mark.soak
@pytest.mark.parametrize("ending", [".parquet", ".npy", ".zarr"])
def test_killed_at_any_moment_it_goes_on(ending: str, run: Path, tmp_path: Path) -> None:
    """By SIGKILL, again and again: each call goes on, and the file is that of a call left alone."""
    given: dict[str, Any] = {
        "checkpoint": str(run), "data": str(make_photos(tmp_path / "data", count=24)),
        "pooling": "patches", "batch_size": 1,
    }  # fmt: skip
    alone, out = tmp_path / f"alone{ending}", tmp_path / f"killed{ending}"
    embed(**given, out=str(alone))
    parts, kills, there = Path(f"{out}.parts"), 0, 0
    for _ in range(20):
        process = FORK.Process(target=embed_slowly, args=(given | {"out": str(out)},))
        process.start()
        aim = there + 1 + kills % 5
        until(lambda: process.exitcode is not None or _count(parts) >= aim)  # noqa: B023
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        assert not out.exists()
        kills, now = kills + 1, _count(parts)
        assert now >= there, "what was kept is gone"
        there = now
    assert process.exitcode == 0
    assert kills >= 4
    assert not parts.exists()
    ours, theirs = opened(out), opened(alone)
    assert ours[0] == theirs[0]
    assert np.array_equal(ours[1], theirs[1])


def _count(folder: Path) -> int:
    """Files of features; 0 where the folder is gone, or goes meanwhile."""
    names = (name for _, _, inside in os.walk(folder) for name in inside)
    return sum(name.endswith(".safetensors") for name in names)
