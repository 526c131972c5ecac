"""Predictions for a folder: the classifier's own, images that cannot be read, bad input."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers import Notes, make_photos, run_here
from PIL import Image

import milan
from milan.core.device import normalise
from milan.core.signals import Stop
from milan.errors import MilanError
from milan.evaluation.coco import mask_functions
from milan.images.decode import decode_pixels
from milan.images.views import centre_view, render
from milan.inference.predict import predict
from milan.inference.tables import replaced
from milan.models.classifier import CLASSIFIER, load_classifier, seeded_classifier
from milan.models.detector import (
    DETECTOR,
    Detector,
    DetectorSpec,
    detector_encoder,
    find_boxes,
    load_detector,
)
from milan.models.export import save_encoder

NAMES = [f"class {n}" for n in (2, 0, 1, 5, 6, 7)]
VIT = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fine-tuning of six classes, with drawn weights."""
    folder = tmp_path_factory.mktemp("tuned")
    vit = seeded_classifier(0, "vit_tiny_patch16_224", VIT, size=32, classes=6, pooling="mean")
    vit.head.weight.data *= 60  # else all classes are about as probable
    about = {
        "model": "vit_tiny_patch16_224", "model_args": VIT, "mean": (0.5,) * 3, "std": (0.2,) * 3,
        "input_size": 32, "classes": NAMES, "pooling": "mean", "crop_share": 0.8,
    }  # fmt: skip
    save_encoder(folder / CLASSIFIER, vit.state_dict(), about)
    return folder


def by_hand(trained: Path, folder: Path) -> dict[str, list[tuple[str, float]]]:
    """key -> the classes of each image, the most probable first, one image at a time."""
    vit = load_classifier(trained)
    data = timm.data.resolve_model_data_config(vit)
    found = {}
    for path in folder.rglob("*.jpg"):
        pixels = decode_pixels(path.read_bytes())
        view = render(pixels, centre_view(*pixels.shape[:2], crop_share=0.8), size=32)
        images = normalise(torch.from_numpy(view)[None], data["mean"], data["std"])
        with torch.no_grad():
            scores = vit(images).softmax(dim=1)[0]
        best = scores.argsort(descending=True).tolist()
        found[path.relative_to(folder).as_posix()] = [(NAMES[i], float(scores[i])) for i in best]
    return found


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_and_a_sheet(ending: str, trained: Path, tmp_path: Path) -> None:
    """Five classes of each image with their scores, as the classifier alone gives them; what cannot
    be read is counted and named, and stops nothing."""
    data = make_photos(tmp_path / "data", count=9)
    expected = by_hand(trained, data)
    (data / "class 1" / "cut.jpg").write_bytes(next(data.rglob("*.jpg")).read_bytes()[:400])
    (data / "class 1" / "none.jpg").write_bytes(b"")
    out, notes = tmp_path / "out" / f"p{ending}", Notes()
    metrics = predict(
        str(trained), data=str(data), out=str(out), batch_size=4, pictures=5, progress=notes
    )
    assert (metrics["images"], metrics["rejected_images"]) == (9, 2)
    assert "rejected files: 2, the first is class 1/" in notes.line("rejected files")
    rejected = (out.with_suffix(".bad-images.csv")).read_text()
    assert rejected.count("\n") == 3
    assert all(text in rejected for text in ("cut.jpg", "none.jpg", "truncated", "empty"))
    rows = (pyarrow.csv.read_csv if ending == ".csv" else pq.read_table)(out).to_pylist()
    assert {row["key"] for row in rows} == expected.keys()
    for row in rows:
        assert row["label"] == row["key"].split("/")[0]
        for i, (name, score) in enumerate(expected[row["key"]][:5], 1):
            assert row[f"class{i}"] == name
            assert row[f"score{i}"] == pytest.approx(score, abs=1e-5)
    right = np.mean([found[0][0] == key.split("/")[0] for key, found in expected.items()])
    assert metrics["top1"] == pytest.approx(100 * right, abs=0.01)
    assert json.loads(out.with_suffix(".json").read_text()) == {
        **metrics, "top1_interval": list(metrics["top1_interval"])
    }  # fmt: skip
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.width > 3 * 160
        assert np.asarray(sheet).std() > 30


def test_ranks_give_the_same_table(trained: Path, tmp_path: Path, forked_ranks: None) -> None:
    """Two ranks predict for a share each: rows in the same order, all that cannot be read named."""
    data = make_photos(tmp_path / "data", count=7)
    for name in ("class 0/cut.jpg", "class 2/none.jpg"):
        (data / name).write_bytes(b"no picture")
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks) / "p.csv"
        metrics = predict(
            str(trained), data=str(data), out=str(out), batch_size=1, device="cpu", devices=ranks
        )
        assert (metrics["images"], metrics["rejected_images"]) == (7, 2)
        files = sorted(out.parent.iterdir())
        assert [file.name for file in files] == ["p.bad-images.csv", "p.csv", "p.json", "p.png"]
        pixels = np.asarray(Image.open(out.with_suffix(".png")))[40:]  # without the title
        texts = [file.read_text() for file in files[:2]]
        found.append((texts, metrics["top1"], metrics["labelled_images"], pixels.tobytes()))
    assert found[0] == found[1]


def test_one_call_writes_a_table(trained: Path, photos: Path, tmp_path: Path) -> None:
    """A second call to its place is refused while the first one writes; what was killed is not in
    the way. A call that is stopped leaves nothing."""
    out = tmp_path / "p.csv"
    given: dict[str, Any] = {"data": str(photos), "out": str(out), "limit": 4, "pictures": 0}
    with replaced(out) as part:
        part.write_text("half")
        with pytest.raises(MilanError, match=f"p.csv is being written by pid {os.getpid()}"):
            predict(str(trained), **given)
        assert part.read_text() == "half"
    assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]
    out.unlink()
    stop = Stop()
    stop.request(signal.SIGTERM)
    assert predict(str(trained), **given, stop=stop) == {"stopped_by": "SIGTERM"}
    assert not list(tmp_path.iterdir())
    for left in (".p.csv.part", ".p.csv.lock"):
        (tmp_path / left).write_text("of a killed call")
    predict(str(trained), **given)
    assert {file.name for file in tmp_path.iterdir()} == {"p.csv", "p.json"}


def test_boxes(photos: Path, tmp_path: Path) -> None:
    """A row for each box of a detector, in pixels of the image, as it finds them alone."""
    args = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    spec = DetectorSpec("vit_tiny_patch16_224", ("a", "b"), True, 64, args, 0, 8, proposals=9)
    torch.manual_seed(0)
    detector = Detector(detector_encoder(spec), spec)
    about = vars(spec) | {"input_size": spec.size}
    save_encoder(tmp_path / DETECTOR, detector.state_dict(), about)
    out = tmp_path / "boxes.parquet"
    metrics = predict(str(tmp_path), data=str(photos), limit=5, out=str(out), score=0.2, pictures=2)
    rows = pq.read_table(out).to_pylist()
    assert metrics["boxes"] == len(rows) > 5
    keys = set()
    for path in sorted(photos.rglob("*.jpg")):
        key = path.relative_to(photos).as_posix()
        if mine := [row for row in rows if row["key"] == key]:
            keys.add(key)
            found = find_boxes(
                load_detector(tmp_path), [Image.fromarray(decode_pixels(path.read_bytes()))],
                score=0.2,
            )[0]  # fmt: skip
            sides = [[row[side] for side in ("left", "top", "right", "bottom")] for row in mine]
            np.testing.assert_allclose(sides, found["boxes"], atol=1e-2)
            masks = [mask_functions().decode(json.loads(row["mask"])) for row in mine]
            assert (np.array(masks) == found["masks"]).all()
            assert [row["class"] for row in mine] == ["ab"[n - 1] for n in found["labels"]]
    assert len(keys) == 5 - metrics["images_without_boxes"]
    assert (tmp_path / "boxes.png").exists()


def test_the_command(trained: Path, photos: Path, tmp_path: Path) -> None:
    """Prints what was written; a folder of images without classes has no top-1."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:3]):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    ran = run_here("predict", trained, flat, "--pictures", 0, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "predictions.csv" in ran.out
    assert "top1" not in ran.out
    assert not (tmp_path / "predictions.png").exists()
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"out": "p.xlsx"}, r"unknown ending '.xlsx'; expected: one of .csv, .parquet"),
        ({"data": "empty"}, "no images in empty"),
        ({"data": "unreadable"}, "no image of unreadable can be read: a.jpg"),
        ({"checkpoint": "nowhere"}, "no network that predicts at nowhere"),
        ({"checkpoint": "encoder"}, "is an encoder, which names no classes.*milan finetune"),
        ({"checkpoint": "above"}, "itself holds none of .*try: milan predict above/tuned"),
        ({"out": "data/p.csv"}, "lies in the folder of the images"),
        ({"out": "unreadable/a.jpg/p.csv"}, "p.csv cannot be written: .*; try: --out elsewhere"),
        ({"out": "sheet.csv"}, "sheet.png cannot be written: Is a directory"),
        ({"device": "cuda:99"}, "cuda"),
    ],
)
def test_bad_input(
    changes: dict[str, Any],
    expected: str,
    trained: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "unreadable", "encoder", "above"):
        (tmp_path / name).mkdir()
    (tmp_path / "unreadable" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "encoder" / "encoder.safetensors").write_bytes(b"")
    (tmp_path / "above" / "tuned").symlink_to(trained)
    (tmp_path / "data").symlink_to(photos)
    (tmp_path / "sheet.png").mkdir()
    given = {"checkpoint": str(trained), "data": "data", **changes}
    with pytest.raises(MilanError, match=expected) as error:
        milan.predict(**given, progress=milan.NoProgress())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.csv")) + list(tmp_path.glob(".*"))
    assert not (photos / "p.csv").exists()
