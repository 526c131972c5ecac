"""What lies among images and is none: pipes and devices, milan's own files, others' metadata."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import run_here

from milan.core.paths import as_path, read_file
from milan.errors import DataError, ImageFault
from milan.images.manifest import Manifest, build_manifest, describe_source
from milan.images.source import ImageSource
from milan.reporting.contact_sheet import contact_sheet

CASES = Path(__file__).parent.parent / "cases"


@pytest.fixture
def patience() -> Iterator[None]:
    """A test that waits for a pipe fails."""

    def too_long(*_: object) -> None:
        signal.alarm(5)
        pytest.fail("waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def keys(manifest: Manifest) -> list[str]:
    return sorted(manifest.table["key"].to_pylist())


def found(manifest: Manifest) -> str:
    return next(line for line in describe_source(manifest) if line.startswith("found: "))


# --- what is no file ------------------------------------------------------------------------------


@pytest.mark.usefixtures("patience")
def test_pipes_sockets_and_devices_are_left_out(tmp_path: Path) -> None:
    """Whatever they are called: opening one could wait for ever, or never end."""
    put(tmp_path, "c/1.jpg", "c/file.jpg")
    for name in ("c/pipe.jpg", "c/pipe.parquet", "c/pipe.tar", "c/run.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "c" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "c" / "linked.jpg").symlink_to(tmp_path / "c" / "pipe.jpg")
    listening = socket.socket(socket.AF_UNIX)
    cwd = os.getcwd()
    os.chdir(tmp_path / "c")  # a socket's path may have 108 bytes
    listening.bind("socket.jpg")
    os.chdir(cwd)
    manifest = build_manifest(tmp_path, seed=0)
    assert keys(manifest) == ["c/1.jpg", "c/file.jpg"]
    assert found(manifest) == (
        "found: 9 files: 2 images; left out: 7 no files but pipes, sockets or devices"
    )
    listening.close()
    for name in ("c/pipe.jpg", "c/pipe.parquet", "c/socket.jpg", "c/zero.png"):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            build_manifest(tmp_path / name, seed=0)


@pytest.mark.usefixtures("patience")
def test_files_that_became_pipes(tmp_path: Path) -> None:
    """Since the listing: a reason, as for any file that cannot be read."""
    put(tmp_path / "f", "1.jpg")
    pq.write_table(pa.table({"image": [{"bytes": b"1", "path": "x"}]}), tmp_path / "x.parquet")
    for source, file in ((tmp_path / "f", "f/1.jpg"), (tmp_path / "x.parquet", "x.parquet")):
        manifest = build_manifest(source, seed=0)
        (tmp_path / file).unlink()
        os.mkfifo(tmp_path / file)
        with pytest.raises(ImageFault, match="unreadable"):
            ImageSource(manifest, manifest.root).read(0)
    with pytest.raises(OSError, match="not a file"):
        read_file(Path("/dev/zero"))


# --- what milan has made --------------------------------------------------------------------------


def test_stores_runs_and_reports_are_no_images(
    tmp_path: Path, photos: Path, store: Path, finished_run: Callable[..., Path]
) -> None:
    """In the folder of the images, at any depth: the data stay what they were."""
    root = tmp_path / "data"
    shutil.copytree(photos, root)
    before = build_manifest(root, seed=0)
    shutil.copytree(store, root / "targets.zarr")
    run = finished_run()
    shutil.copytree(run, root / "runs" / "mine")
    assert (root / "runs/mine/sheet.png").exists()
    put(root / "report", "metrics.json", "sheet.png", "curves.png", "evaluation/linear_probe.png")
    put(root / "report", "photo.jpg")  # somebody's own
    put(root, "runs/mlflow.db", "runs/mlartifacts/1/sheet.png")
    put(root, "mlruns/0/1/meta.yaml", "mlruns/0/1/artifacts/sheet.png")
    manifest = build_manifest(root, seed=0)
    assert keys(manifest) == sorted([*keys(before), "report/photo.jpg"])
    line = found(manifest)
    for folder in ("a store, targets.zarr", "a run, runs/mine", "mlflow, runs/mlartifacts"):
        assert f" in {folder}" in line
    assert "1 in a report, report/sheet.png" in line
    assert manifest.listing is not None
    for counts in (manifest.listing.used, manifest.listing.ignored):
        assert all(n > 0 for n in counts.values())
    for inside in ("targets.zarr", "targets.zarr/generations/000", "runs/mine"):
        with pytest.raises(DataError, match=r"is a (store|run): it holds no images"):
            build_manifest(root / inside, seed=0)


def test_extraction_into_the_folder_of_the_images(
    tmp_path: Path, photos: Path, teacher_files: dict[str, str]
) -> None:
    """The same line again finds the same images, and a picture beside them is refused."""
    shutil.copytree(photos, tmp_path / "photos")
    flags = [part for name, value in teacher_files.items() for part in (f"--{name}", value)]
    line = ["extract-targets", "--data", ".", "--views", 1, "--executor", "local", *flags]
    for said in ("found: 24 files: 24 images", "nothing to do: the store is complete"):
        ran = run_here(*line, cwd=tmp_path / "photos")
        assert (ran.code, ran.err) == (0, "")
        assert said in ran.out
        assert "manifest: 24 images, 3 classes" in ran.out.splitlines()
    cache = tmp_path / "photos/targets.zarr"
    with pytest.raises(DataError, match="lies in the folder of the images") as error:
        contact_sheet(cache, out=tmp_path / "photos/sub/sheet.png", images=1)
    assert error.value.fix == f"--out {tmp_path}/sheet.png"
    assert contact_sheet(cache, out=tmp_path / "sheet.png", images=1).exists()


# --- what others have left ------------------------------------------------------------------------


def test_metadata_beside_tars_and_images(tmp_path: Path) -> None:
    """Parquet files without images describe the others; alone they are refused, by columns."""
    manifest = build_manifest(CASES / "08-img2dataset", seed=0)
    assert keys(manifest) == [f"00000.tar/00000000{i}.jpg" for i in range(4)]
    assert found(manifest) == (
        "found: 15 files: 8 labels and captions, 4 images, 1 .tar; left out: 1 .json, "
        "1 .parquet without images"
    )
    put(tmp_path / "g", "00000/1.jpg", "00000.parquet", "00001.tar", "00001.parquet")
    line = "found: 4 files: 1 images; left out: 2 damaged .parquet beside its images, 1 .tar"
    assert found(build_manifest(tmp_path / "g", seed=0)) == line
    put(tmp_path / "g", "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
        build_manifest(tmp_path / "g", seed=0)
    put(tmp_path / "f", "cat/1.jpg", "dog/2.jpg")
    for name, column in (("metadata.parquet", "file_name"), ("cat/more.parquet", "image")):
        pq.write_table(pa.table({column: ["cat/1.jpg"]}), tmp_path / "f" / name)
    manifest = build_manifest(tmp_path / "f", seed=0)
    assert (keys(manifest), manifest.classes) == (["cat/1.jpg", "dog/2.jpg"], ["cat", "dog"])
    assert found(manifest) == "found: 4 files: 2 images; left out: 2 .parquet without images"
    pq.write_table(
        pa.table({"image": [{"bytes": b"1", "path": "x"}]}), tmp_path / "f" / "x.parquet"
    )
    manifest = build_manifest(tmp_path / "f", seed=0)
    assert keys(manifest) == ["x.parquet/x"]
    assert found(manifest) == (
        "found: 5 files: 1 .parquet; left out: 2 .jpg, 2 .parquet without images"
    )
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / "f" / name).unlink()
    assert keys(build_manifest(tmp_path / "f", seed=0)) == ["x.parquet/x"]
    (tmp_path / "f" / "x.parquet").unlink()
    with pytest.raises(DataError, match="has columns image string"):
        build_manifest(tmp_path / "f", seed=0)


def test_folders_of_a_download_are_no_classes(tmp_path: Path) -> None:
    """img2dataset numbers the folders that it fills; beside each lies what it says of it."""
    names = [f"0000{i}{end}" for i in (0, 1) for end in ("/1.jpg", "/1.txt", "_stats.json")]
    manifest = build_manifest(put(tmp_path / "a", *names), seed=0)
    assert manifest.classes is None
    assert found(manifest) == "found: 6 files: 2 images; left out: 2 .json, 2 .txt"
    put(tmp_path / "b", *[f"train/{name}" for name in names], "val/x.jpg")
    assert build_manifest(tmp_path / "b", seed=0).classes is None


# --- names that are not Unicode -------------------------------------------------------------------


def test_places_that_are_not_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is JSON and tables, which could not hold them: one line, before anything is done."""
    bad = os.fsdecode(b"\xff")
    put(tmp_path / bad, "photos/c/1.jpg")
    put(tmp_path / "photos", "c/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / bad / "photos")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / bad / "photos")
    line = ["extract-targets", "--out", tmp_path / "t.zarr"]
    photos = ["--data", tmp_path / "photos"]
    for arguments, cwd in (
        ([*line, "--data", tmp_path / bad / "photos"], tmp_path),
        ([*line, "--data", tmp_path / "link"], tmp_path),
        ([*line, "--data", tmp_path / "set"], tmp_path),
        ([*line, "--data", "photos"], tmp_path / bad),
        ([*line, *photos, "--data-root", bad], tmp_path),
        ([*line, *photos, "--split", bad], tmp_path),
        (["extract-targets", *photos, "--out", bad], tmp_path),
        (["extract-targets", *photos, "--out", "t.zarr"], tmp_path / bad),
        (["pretrain", "--cache", "t.zarr", "--out", bad], tmp_path),
        (["pretrain", "--cache", bad], tmp_path),
        (["pretrain", "--cache", "t.zarr", "--local", bad], tmp_path),
        (["linear-probe", *photos, "--checkpoint", "random", "--out", bad], tmp_path),
        (["linear-probe", "--checkpoint", "random", "--data", bad], tmp_path),
        (["inspect", bad], tmp_path),
        (["verify", bad], tmp_path),
        (["repair", bad], tmp_path),
        (["visualise", bad], tmp_path),
    ):
        ran = run_here(*arguments, cwd=cwd)
        assert ran.code == 1, arguments
        (said,) = ran.err.splitlines()
        assert "\\udcff" in said and "is not UTF-8" in said, said  # noqa: PT018
    assert not list(tmp_path.glob("*.zarr"))
    for text in ("", "a\0b"):
        with pytest.raises(DataError, match="the path"):
            as_path(text)
