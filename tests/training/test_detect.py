"""Detection: what it learns from, that it learns, resumes to the bit, and what it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import At, Notes, draw_scenes, log_of, run_here
from PIL import Image
from safetensors.torch import load_file

import milan
from milan.core.progress import NoProgress
from milan.core.signals import Stop
from milan.data.sampler import Address, Kind
from milan.errors import CacheError, ConfigError, DataError, TrainError
from milan.evaluation.average_precision import AveragePrecision
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.coco import read_coco
from milan.evaluation.config import DetectConfig
from milan.models.detector import DETECTOR, find_boxes, load_detector
from milan.training.detect import detect
from milan.training.detect_data import BoxImages

VIT = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "model_args": VIT, "size": 64, "epochs": 2, "batch_size": 4,
    "num_workers": 0, "report_to": "none", "log_every": 1, "width": 16, "proposals": 40,
    "samples": 32, "anchor_scale": 2.0, "window": 5, "lr": 1e-3, "drop_path": 0.2,
}  # fmt: skip
"""3 steps an epoch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Scenes to train on and to measure on, with masks."""
    train = draw_scenes(tmp_path_factory.mktemp("train"))
    val = draw_scenes(tmp_path_factory.mktemp("val"), count=5, seed=1)
    return {"data": str(train), "val_data": str(val)}


def run(images: dict[str, str], folder: Path, name: str = "a", **changes: Any) -> dict[str, Any]:
    return detect("random", out=str(folder / f"{name}.json"), **SMALL | images | changes)


# --- what it learns from --------------------------------------------------------------------------


def test_boxes_and_masks_follow_the_pixels(data: dict[str, str]) -> None:
    """However an image is scaled, cropped and mirrored, each box and mask lies on its shape."""
    train, val = open_boxes(DetectConfig(**data), NoProgress())
    source = BoxImages(train, val, size=128, scale=(0.5, 2.0), hflip=0.5, seed=0)
    colours, rows = np.array([(230, 40, 40), (40, 200, 60), (50, 60, 230)]), np.arange(6)
    smallest, whole = 128, 0
    for epoch in range(6):
        batch = source.load(Address(Kind.TRAIN, epoch, rows, rows * 0))
        for pixels, size, target in zip(
            batch.pixels.numpy(), batch.sizes.tolist(), batch.targets(), strict=True
        ):
            smallest = min(smallest, *size)
            whole += size == [96, 128]
            assert not pixels[size[0] :].any()
            assert not pixels[:, size[1] :].any()
            parts = (target[name].numpy() for name in ("boxes", "labels", "masks"))
            for box, label, mask in zip(*parts, strict=True):
                left, top, right, bottom = box.round().astype(int)
                part = pixels[top:bottom, left:right].astype(int)
                if min(part.shape[:2]) < 8:
                    continue  # the rest of a shape at the edge
                inside = np.abs(part - colours[label - 1]).max(axis=-1) < 60
                drawn = np.zeros(mask.shape, bool)
                drawn[top:bottom, left:right] = inside
                assert (drawn & (mask > 0)).sum() / (drawn | (mask > 0)).sum() > 0.7
    assert smallest < 96
    assert whole < 6  # few are as they were
    alone = source.load(Address(Kind.TRAIN, 5, rows[3:4], rows[:1]))
    assert torch.equal(alone.pixels[0], batch.pixels[3])
    assert torch.equal(alone.boxes, batch.boxes.split(batch.counts.tolist())[3])


def test_a_crowd_is_not_learnt_from(tmp_path: Path) -> None:
    folder = draw_scenes(tmp_path / "crowd", count=2)
    content = json.loads((folder / "annotations.json").read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = int(entry["image_id"] == 1)
    (folder / "annotations.json").write_text(json.dumps(content))
    boxes = read_coco(folder / "annotations.json", folder, NoProgress())
    source = BoxImages(boxes, boxes, size=128, scale=(1.0, 1.0), hflip=0.0, seed=0)
    batch = source.load(Address(Kind.TRAIN, 0, np.arange(2), np.zeros(2, np.int64)))
    assert batch.counts[0] == 0
    assert batch.counts[1] > 0


# --- promises -------------------------------------------------------------------------------------


def test_it_leaves_a_detector(data: dict[str, str], tmp_path: Path) -> None:
    """The loss goes down; tables, a sheet; the detector finds the same by each of its two calls."""
    figures = run(data, tmp_path, epochs=4, lr=4e-3, layer_decay=1.0, scale=(0.9, 1.1))
    losses = [line["loss"] for line in log_of(tmp_path / "a")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    parts = {name for name in log_of(tmp_path / "a")[-1] if name.startswith("val_loss_")}
    assert len(parts) == 5
    low, high = figures["box_ap_interval"]
    assert low <= figures["box_ap"] <= high
    assert figures["mask_ap"] is not None
    assert Image.open(tmp_path / "a/sheet.png").size[0] > 800
    table = (tmp_path / "a/classes.csv").read_text().splitlines()
    assert table[0] == "class,boxes,box_ap,mask_ap"
    assert sum(int(line.split(",")[1]) for line in table[1:]) == figures["val_boxes"]
    assert (tmp_path / "a/confusion.csv").read_text().startswith("is,taken for,boxes\n")
    detector = load_detector(tmp_path / "a")
    assert detector.class_names == ["square", "disc", "triangle"]
    detector.roi_heads.score_thresh = 0.0
    image = Image.open(Path(data["val_data"]) / "scene 00.png").convert("RGB")
    (found,) = find_boxes(detector, [image], score=0.0)
    assert found["masks"].shape[1:] == (96, 128)
    with torch.no_grad():
        (same,) = detector([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255])
    assert len(found["boxes"]) > 10
    # Pillow rounds the pixels that it scales, so the order of equal scores may differ.
    assert abs(found["scores"][:5] - same["scores"][:5].numpy()).max() < 0.01
    middle = found["boxes"][0, :2] - same["boxes"][:3, :2].numpy()
    assert abs(middle).max(axis=1).min() < 2


@pytest.mark.soak
def test_it_learns_shapes(data: dict[str, str], tmp_path: Path) -> None:
    """It finds what it was trained on, and names it right; metrics are those of its detections."""
    copy = shutil.copytree(data["data"], tmp_path / "copy")
    figures = run(
        data | {"val_data": str(copy)}, tmp_path, epochs=70, lr=3e-3, layer_decay=1.0,
        scale=(0.9, 1.1), drop_path=0.0, schedule="cosine",
    )  # fmt: skip
    assert figures["box_ap50"] > 60
    assert figures["mask_ap50"] > 50
    detector = load_detector(tmp_path / "a")
    boxes = read_coco(copy / "annotations.json", copy, NoProgress())
    metric = AveragePrecision(boxes)
    pictures = [Image.open(boxes.root / name).convert("RGB") for name in boxes.names]
    for position, found in enumerate(find_boxes(detector, pictures)):
        tensors = {name: torch.from_numpy(value) for name, value in found.items()}
        metric.add(position, tensors | {"masks": tensors["masks"][:, None].float()})
    for name in ("box_ap", "box_ap50", "mask_ap"):
        assert metric.figures()[name] == pytest.approx(figures[name], abs=0.5)


@pytest.mark.soak
def test_resumed_it_is_the_same_run(data: dict[str, str], tmp_path: Path) -> None:
    """Stopped in an epoch and called again: the same bits, whatever torchvision samples."""
    run(data, tmp_path, "whole")
    stop = Stop()
    half = run(data, tmp_path, "half", stop=stop, progress=At(4, lambda: stop.request(15)))
    assert half == {"stopped_by": "SIGTERM"}
    notes = Notes()
    run(data, tmp_path, "half", progress=notes)
    assert "resuming: " in str(notes.lines)
    whole, parts = (load_file(tmp_path / name / DETECTOR) for name in ("whole", "half"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [log_of(tmp_path / name)[-1] for name in ("whole", "half")]
    for name in ("loss", "val_loss", "val_box_ap"):
        assert lines[0][name] == lines[1][name]


@pytest.mark.soak
def test_two_ranks_are_one(data: dict[str, str], tmp_path: Path, forked_ranks: None) -> None:
    """Both learn and measure as one does; what is sampled differs with the micro-batches."""
    same: dict[str, Any] = {"drop_path": 0.0, "micro_batch": 2, "epochs": 1}
    one = run(data, tmp_path, "one", **same)
    two = run(data, tmp_path, "two", devices=2, device="cpu", **same)
    losses = ([line["loss"] for line in log_of(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(*losses, rtol=0.1)
    assert {k: one[k] for k in ("val_images", "val_boxes")} == {
        k: two[k] for k in ("val_images", "val_boxes")
    }


@pytest.mark.soak
def test_loader_workers(data: dict[str, str], tmp_path: Path) -> None:
    """The same as without, also of images without a box."""
    folder = draw_scenes(tmp_path / "empty", count=4)
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"] = [e for e in content["annotations"] if e["image_id"] != 1]
    (folder / "annotations.json").write_text(json.dumps(content))
    few = {"data": str(folder), "val_data": str(draw_scenes(tmp_path / "val", count=2))}
    same: dict[str, Any] = {"batch_size": 1, "epochs": 1}
    figures = [run(few, tmp_path, f"w{n}", num_workers=n, **same) for n in (0, 1)]
    assert figures[0]["box_ap"] == figures[1]["box_ap"]


def test_blood_cells(shared_data: Path, tmp_path: Path) -> None:
    """Real pictures, boxes without masks."""
    if not (shared_data / "bccd").exists():
        pytest.skip("../shared/data/bccd is absent: blood cells are not detected")
    train, val = open_boxes(DetectConfig(data=str(shared_data / "bccd")), NoProgress())
    assert (len(train), len(train.labels), len(val), len(val.labels)) == (120, 1537, 40, 523)
    assert train.classes == ("RBC", "WBC", "Platelets")
    bccd = {"data": str(shared_data / "bccd")}
    figures = run(bccd, tmp_path, epochs=1, limit=4, batch_size=2)
    assert figures["mask_ap"] is None
    assert figures["val_images"] == 4
    assert load_detector(tmp_path / "a").roi_heads.mask_head is None


# --- bad input ------------------------------------------------------------------------------------


def test_what_is_refused(
    data: dict[str, str], tmp_path: Path, finished_run: Callable[..., Path]
) -> None:
    """One line each, before a folder is made."""
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch_size": 13}, ConfigError, "batch size 13 with 12 images"),
        ({"size": 100}, ConfigError, "size 100; expected: a multiple of 64"),
        ({"scale": (2.0, 0.5)}, ConfigError, "scale 2 0.5"),
        ({"crop_share": 0.5}, ConfigError, "crop_share 0.5; expected: none"),
        ({"masks": "some"}, ConfigError, "masks 'some'"),
        ({"annotations": "x.json"}, DataError, "no annotations at x.json"),
        ({"data": str(tmp_path / "no")}, DataError, "no data found"),
    ]
    for changes, kind, said in cases:
        with pytest.raises(kind, match=said):
            run(data, tmp_path, **changes)
        assert not (tmp_path / "a").exists(), said
    with pytest.raises(ConfigError, match="checkpoint teacher"):
        detect("teacher", **data, batch_size=8, out=str(tmp_path / "a.json"))
    with pytest.raises(ConfigError, match="no run at"):
        detect(str(tmp_path / "no run"), **data, batch_size=8, out=str(tmp_path / "a.json"))


def test_an_encoder_of_a_run(
    data: dict[str, str], tmp_path: Path, finished_run: Callable[..., Path]
) -> None:
    """Its weights are where training starts; a run of another encoder is refused beside it."""
    settings = SMALL | data | {"epochs": 1, "masks": "none", "out": str(tmp_path / "a.json")}
    figures = detect(str(finished_run()), **settings | {"lr": 1e-9})
    assert figures["finished"]
    encoder, found = milan.load_encoder(finished_run()), load_detector(tmp_path / "a")
    theirs = dict(encoder.named_parameters())
    for name, parameter in found.backbone.encoder.named_parameters():
        name = name.replace("attn.attention.", "attn.")
        if name != "pos_embed":
            assert torch.allclose(parameter, theirs[name], atol=1e-6), name
    with pytest.raises(TrainError, match="holds a run of other settings"):
        detect("random", **settings)
    with pytest.raises(CacheError, match=r"without a head|no detector"):
        load_detector(finished_run() / "encoder.safetensors")


def test_images_that_are_not_as_annotated(data: dict[str, str], tmp_path: Path) -> None:
    """Of another size: refused, for its boxes would be elsewhere. Unreadable: another stands in."""
    folder = draw_scenes(tmp_path / "broken")
    victim = folder / "scene 03.png"
    victim.write_bytes(victim.read_bytes()[:300])
    notes = Notes()
    figures = run(data | {"data": str(folder)}, tmp_path, epochs=1, masks="none", progress=notes)
    assert figures["rejected_images"] == 1
    assert "the first is scene 03.png" in str(notes.lines)
    # In a batch of one, to train on and to measure on, another of the split does.
    shutil.copytree(data["val_data"], tmp_path / "val")
    last = sorted((tmp_path / "val").glob("*.png"))[-1]
    last.write_bytes(b"no image")
    places = {"data": str(folder), "val_data": str(tmp_path / "val")}
    figures = run(places, tmp_path, "one", epochs=1, micro_batch=1, masks="none")
    assert (figures["rejected_images"], figures["val_images"]) == (2, 4)
    Image.new("RGB", (96, 128)).save(victim)
    with pytest.raises(DataError, match=r"scene 03\.png is 96 x 128 pixels, and 128 x 96 in"):
        run(data | {"data": str(folder)}, tmp_path, "b", epochs=1)


def test_the_command(data: dict[str, str], tmp_path: Path) -> None:
    """Metrics beside the encoder, a table, and the same line once more."""
    line = ["detect", "--checkpoint", "random", "--model", SMALL["model"], "--epochs", "1"]
    line += [word for key, value in VIT.items() for word in ("--set", f"model.{key}={value}")]
    line += ["--data", data["data"], "--val-data", data["val_data"], "--batch-size", "4"]
    line += ["--size", "64", "--width", "8", "--proposals", "20", "--num-workers", "0"]
    done = run_here(*line, cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done.err
    assert "Detection" in done.out
    metrics = json.loads((tmp_path / "runs/random/detect.json").read_text())
    assert metrics["run"] == "runs/random/detect"
    assert (tmp_path / "runs/random/detect" / DETECTOR).is_file()
    again = run_here(*line, cwd=tmp_path)
    assert "nothing is left to do" in again.out
