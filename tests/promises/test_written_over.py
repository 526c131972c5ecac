"""What a command reads, and what others put there, is not written over: one line, and every byte
stays. Pipes in place of files are not waited for."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import EXTRACTION, SMALL, draw_masks, run_here

from milan.core.progress import NoProgress
from milan.errors import MilanError
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.config import DetectConfig, LinearProbeConfig, SegmentConfig
from milan.evaluation.masked import open_masked
from milan.evaluation.splits import open_draws
from milan.inference.neighbours import neighbours
from milan.inference.predict import predict
from milan.models.classifier import CLASSIFIER, seeded_classifier
from milan.models.export import save_encoder
from milan.reporting.contact_sheet import contact_sheet
from milan.training.finetune import finetune
from milan.training.pretrain import pretrain
from pipeline.embed import embed
from pipeline.extract import extract_targets

VIT = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
TUNED: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "model_args": {**VIT, "img_size": 32}, "epochs": 1,
    "batch_size": 8, "num_workers": 0, "report_to": "none",
}  # fmt: skip
RUN = {**SMALL, "epochs": 1}


@pytest.fixture(scope="module")
def place(
    photos: Path, store: Path, finished_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """Images in a folder and in one file, a store, embeddings, a classifier, somebody's own files;
    each beside the others."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(photos, folder / "photos")
    shutil.copytree(store, folder / "t.zarr")
    some = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[:4]]
    rows = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(some)]
    pq.write_table(pa.table({"image": rows}), folder / "one.parquet")
    embed(str(finished_run(epochs=1)), data=str(folder / "photos"), out=str(folder / "e.parquet"),
          features=str(folder / "kept"))  # fmt: skip
    vit = seeded_classifier(0, "vit_tiny_patch16_224", VIT, size=32, classes=3, pooling="mean")
    about = {
        "model": "vit_tiny_patch16_224", "model_args": VIT, "mean": (0.5,) * 3, "std": (0.2,) * 3,
        "input_size": 32, "classes": ["a", "b", "c"], "pooling": "mean", "crop_share": 0.8,
    }  # fmt: skip
    save_encoder(folder / CLASSIFIER, vit.state_dict(), about)
    (folder / "notes.txt").write_text("mine")
    (folder / "own").mkdir()
    for name in ("classes.csv", "sheet.png"):
        (folder / "own" / name).write_text("mine")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "a table over the data": (
        lambda: predict(CLASSIFIER, data="one.parquet", out="one.parquet"),
        "one.parquet is what is read.*--out one-2.parquet",
    ),
    "a sheet among the data": (
        lambda: predict(CLASSIFIER, data="photos", out="photos/a.csv"), "lies in the folder of"
    ),
    "pairs over embeddings": (
        lambda: neighbours("e.parquet", duplicates=True, out="e.parquet"), "is what is read"
    ),
    "a sheet over an image": (
        lambda: neighbours("e.parquet", query="0", out="photos/class 0/bild 00 ü.jpg"),
        "lies in the folder of",
    ),
    "pairs in a store": (
        lambda: neighbours("t.zarr", duplicates=True, out="t.zarr/a.csv"), "lies in the folder of"
    ),
    "a sheet over a text": (
        lambda: contact_sheet("t.zarr", out="notes.txt"), "unknown file extension: .txt"
    ),
    "a run in its store": (lambda: pretrain("t.zarr", out="t.zarr/run", **RUN), "in what the run"),
    "a run as its store": (
        lambda: pretrain("t.zarr", out="t.zarr", **RUN), "t.zarr is what the run reads"
    ),
    "a run as its images": (
        lambda: pretrain("t.zarr", out="photos", data_root="photos", **RUN), "is what the run reads"
    ),
    "a run over others' files": (
        lambda: pretrain("t.zarr", out="own", **RUN), "own holds sheet.png, classes.csv, and no run"
    ),
    "a training over others' files": (
        lambda: finetune("random", data="photos", out="own.json", **TUNED), "own holds sheet.png"
    ),
    "a training as its images": (
        lambda: finetune("random", data="photos", out="photos.json", **TUNED),
        "photos is what the run reads",
    ),
    "a run in a folder of other files": (
        lambda: finetune("random", data="photos", out="own", **TUNED),
        "own holds .* no run that can be resumed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_written_over(case: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    do, said = CASES[case]
    before = files_of(place)
    with pytest.raises(MilanError, match=said) as error:
        do()
    assert "\n" not in str(error.value)
    assert files_of(place) == before


def test_a_sheet_beside_a_file_of_images(
    place: Path, teacher_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data are that file, not the folder it lies in."""
    monkeypatch.chdir(place)
    extract_targets("one.parquet", out="one.zarr", **{**EXTRACTION, **teacher_files, "views": 1})
    ran = run_here("visualise", "one.zarr")
    assert ran.code == 0, ran.err
    with pytest.raises(MilanError, match="is what is read"):
        contact_sheet("one.zarr", out="one.parquet")


# --- pipes ----------------------------------------------------------------------------------------


@pytest.fixture
def within_seconds() -> Iterator[None]:
    """Whatever still waits then fails."""
    signal.alarm(20)
    yield
    signal.alarm(0)


PIPES: dict[str, Callable[[str, dict[str, str]], Any]] = {
    "palette": lambda pipe, data: open_masked(SegmentConfig("random", **data, palette=pipe)),
    "classes": lambda pipe, data: open_masked(SegmentConfig("random", **data, classes=pipe)),
    "annotations": lambda pipe, data: open_boxes(
        DetectConfig(data=data["data"], annotations=pipe), NoProgress()
    ),
    "annotations in the data": lambda pipe, data: open_boxes(
        DetectConfig(data=str(Path(pipe).parent)), NoProgress()
    ),
    "list": lambda pipe, data: open_draws(
        LinearProbeConfig("random", data=str(Path(data["data"]) / "photos"), train_list=pipe)
    ),
    "embeddings": lambda pipe, _: neighbours(pipe, query="0"),
}


@pytest.mark.parametrize("case", PIPES)
def test_pipes_are_not_waited_for(
    case: str, photos: Path, tmp_path: Path, within_seconds: None
) -> None:
    """Files that are named by a setting, as images that are found in a folder."""
    data = draw_masks(tmp_path / "data", count=2)
    (data / "photos").symlink_to(photos)
    pipe = tmp_path / "pipes" / ("a.parquet" if case == "embeddings" else "a.json")
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    with pytest.raises(MilanError) as error:
        PIPES[case](str(pipe), {"data": str(data)})
    assert "\n" not in str(error.value)
    assert pipe.name in str(error.value)
