"""Segmentation, detection, prediction and zero-shot of encoders of other channels than RGB."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from helpers import ROOT, VOID, Notes, draw_masks, draw_scenes, run_here
from PIL import Image
from torch.nn import functional as F

from milan.core.progress import NoProgress
from milan.data.sampler import Address, Kind
from milan.errors import ConfigError, DataError
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.config import DetectConfig
from milan.images.channels import Channels
from milan.images.decode import decode_pixels
from milan.inference.predict import predict
from milan.models.detector import find_boxes, load_detector
from milan.models.encoder import create_vit
from milan.models.export import CHANNELS, ENCODER, read_about, save_encoder
from milan.models.masking import Mask
from milan.models.segmenter import load_segmenter, predict_masks
from milan.store.cache import TargetCache
from milan.training.detect import detect
from milan.training.detect_data import BoxImages
from milan.training.pretrain import pretrain
from milan.training.segment import segment
from milan.training.trained import load_student
from pipeline.extract import extract_targets
from pipeline.zero_shot import zero_shot

VIT = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
RUN: dict[str, Any] = {
    "epochs": 1, "batch_size": 4, "num_workers": 0, "report_to": "none", "log_every": 1,
    "baseline": "none",
}  # fmt: skip
PAIRED = Channels("rgb,1", paired=True, mean=(124.0, 116.0, 104.0, 9000.0),
                  std=(58.0, 57.0, 57.0, 5000.0))  # fmt: skip
OWN = Channels("2,1,3", mean=(9000.0,) * 3, std=(5000.0,) * 3)


def encoder(folder: Path, law: Channels) -> str:
    """A run's folder with an encoder of these channels, as drawn."""
    folder.mkdir()
    args = VIT | {"in_chans": law.count}
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", img_size=32, args=args, any_channels=True)
    save_encoder(folder / ENCODER, vit.state_dict(), {
        "model": "vit_tiny_patch16_224", "model_args": args, "mean": law.mean, "std": law.std,
        "input_size": 32, CHANNELS: law.about(),
    })  # fmt: skip
    return str(folder)


def beside(images: Path, folder: Path) -> str:
    """Beside each image an array of its brightness, 16 bits."""
    for path in [*images.rglob("*.png"), *images.rglob("*.jpg")]:
        grey = decode_pixels(path.read_bytes()).mean(axis=2)
        out = folder / path.relative_to(images).with_suffix(".npy")
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, (70 * grey).astype(np.uint16))
    return str(folder)


def rows_of(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def test_a_segmenter_of_a_files_own_channels(tmp_path: Path) -> None:
    """TIFFs of three 16-bit channels, which no picture is: what is trained, measured and predicted
    sees (x - mean) / std of them; a window beyond the image is of the mean."""
    data = draw_masks(tmp_path / "a", count=9)
    for path in (data / "images").iterdir():
        samples = 70 * decode_pixels(path.read_bytes()).astype(np.uint16)
        tifffile.imwrite(path.with_suffix(".tif"), samples, photometric="minisblack",
                         planarconfig="contig")  # fmt: skip
        path.unlink()
    run = tmp_path / "s"
    settings = {**RUN, "data": str(data), "out": str(run) + ".json", "ignore": VOID, "size": 32}
    with pytest.raises(ConfigError, match=r"distortion 0.5 for .* sees channels 2,1,3 of files"):
        segment(encoder(tmp_path / "e", OWN), **settings)
    figures = segment(str(tmp_path / "e"), distortion=0.0, **settings)
    assert (figures["train_images"], figures["val_images"]) == (8, 1)
    assert read_about(run / "segmenter.safetensors")[CHANNELS]["spelled"] == "2,1,3"
    assert np.asarray(Image.open(run / "sheet.png")).shape[1] > 800
    predicted = predict(str(run), data=str(data / "images"), out=str(tmp_path / "p.csv"))
    assert (predicted["images"], predicted["rejected_images"]) == (9, 0)
    segmenter, rows = load_segmenter(run), rows_of(tmp_path / "p.csv")
    for row in rows:
        samples = tifffile.imread(data / "images" / row["key"])[..., [1, 0, 2]]
        seen = ((samples.astype(np.float32) - 9000) / 5000).astype(np.float32)
        (expected,) = predict_masks(segmenter, [seen])
        assert np.array_equal(np.asarray(Image.open(row["mask"])), expected)


def test_a_detector_of_colours_and_a_file_beside(tmp_path: Path) -> None:
    """Boxes lie on the same shapes in all channels however an image is placed; predictions are the
    detector's of the whole image; a missing file is one rejected image, a missing folder a line."""
    data, name = draw_scenes(tmp_path / "a"), encoder(tmp_path / "e", PAIRED)
    depths = beside(data, tmp_path / "depth")
    settings: dict[str, Any] = {
        **RUN, "data": str(data), "out": str(tmp_path / "d.json"), "size": 64, "width": 16,
        "proposals": 40, "samples": 32, "anchor_scale": 2.0, "window": 5,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"channels rgb,1 of files beside .*--student-data"):
        detect(name, **settings)
    notes = Notes()
    (tmp_path / "depth/scene 03.npy").rename(tmp_path / "gone.npy")
    figures = detect(name, student_data=depths, progress=notes, **settings)
    assert figures["rejected_images"] == 1
    assert any("scene 03.png" in note for note in notes.lines)
    (tmp_path / "gone.npy").rename(tmp_path / "depth/scene 03.npy")
    config = DetectConfig(data=str(data), student_data=depths)
    train, val = open_boxes(config, NoProgress(), PAIRED)
    source = BoxImages(train, val, size=128, scale=(0.5, 2.0), hflip=0.5, seed=0)
    images = source.load(Address(Kind.TRAIN, 0, np.arange(6), np.zeros(6, np.int64)))
    for pixels, (height, width) in zip(images.pixels, images.sizes.tolist(), strict=True):
        raw = pixels.numpy() * np.array(PAIRED.std) + np.array(PAIRED.mean)
        inside = raw[2 : height - 2, 2 : width - 2]
        assert np.abs(inside[..., 3] - 70 * inside[..., :3].mean(axis=2)).max() < 80
        assert not pixels[height:].any()
    for words in (
        ("predict", tmp_path / "d", data, "--score", 0, "--out", tmp_path / "p.csv"),
        ("embed", "--checkpoint", name, "--data", data, "--out", tmp_path / "e.npy"),
    ):
        ran = run_here(*words, "--student-data", depths)
        assert ran.code == 0, ran.err
    assert np.load(tmp_path / "e.npy").shape == (12, 32)
    predicted = json.loads((tmp_path / "p.json").read_text())
    rows, detector = rows_of(tmp_path / "p.csv"), load_detector(tmp_path / "d")
    assert (predicted["images"], predicted["boxes"]) == (12, len(rows))
    key = "scene 02.png"
    seen = PAIRED.whole((data / key).read_bytes(), (tmp_path / "depth/scene 02.npy").read_bytes())
    (found,) = find_boxes(detector, [seen], score=0.0)
    own = np.array([[float(row[s]) for s in ("left", "top", "right", "bottom")]
                    for row in rows if row["key"] == key])  # fmt: skip
    assert len(own)
    assert np.allclose(own, found["boxes"], atol=1e-3)
    with pytest.raises(ConfigError, match="--student-data"):
        predict(str(tmp_path / "d"), data=str(data), out=str(tmp_path / "q.csv"))


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """24 clothes in folders of their classes, and their store with texts."""
    folder = tmp_path_factory.mktemp("clothes")
    table = pq.read_table(ROOT / "demo/data/test.parquet")[:24]
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    for number, row in enumerate(table.to_pylist()):
        path = folder / "images" / names[row["label"]].replace("/", " ") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode_pixels(row["image"]["bytes"])).save(path)
    teacher = {name: str(ROOT / "demo/teacher" / file) for name, file in
               (("teacher", "config.json"), ("pretrained", "model.safetensors"))}  # fmt: skip
    extract_targets(str(folder / "images"), out=str(folder / "t.zarr"), views=1, shard_size=8,
                    executor="local", texts=True, **teacher)  # fmt: skip
    return folder / "images", folder / "t.zarr"


def test_zero_shot_of_a_student_of_other_channels(
    clothes: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its tokens are in the teacher's space, whatever it sees; the teacher beside it sees RGB."""
    images, store = clothes
    grey = beside(images, tmp_path / "grey")
    out = tmp_path / "r"
    pretrain(
        str(store), out=str(out), student_channels="1", student_data=grey, epochs=1, batch_size=8,
        model_args={"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 2}, num_workers=0,
        decoder={"embed_dim": 16, "depth": 1, "num_heads": 2}, report_to="none",
    )  # fmt: skip
    asked: dict[str, Any] = {"data": str(images), "crop_share": 1.0, "pictures": 2}
    with pytest.raises(ConfigError, match=r"channels 1 of files beside .*--student-data"):
        zero_shot(str(out), **asked)
    found = zero_shot(str(out), student_data=grey, **asked)
    trained, cache = load_student(out), TargetCache(store)
    law, student = trained.channels, trained.student
    assert law is not None
    assert cache.prototypes is not None
    whole, vectors, names = torch.arange(16)[None], [], []
    for path in sorted(images.rglob("*.png")):
        own = (tmp_path / "grey" / path.relative_to(images)).with_suffix(".npy").read_bytes()
        seen = torch.from_numpy(law.centre_crop(path.read_bytes(), own, share=1.0, size=28))[None]
        with torch.inference_mode():
            vectors.append(student(seen, Mask(whole, whole[:, :0]))[0, 0])
        names.append(path.parent.name)
    texts = torch.from_numpy(cache.prototypes.features)
    best = (F.normalize(torch.stack(vectors), dim=1) @ texts.T).argmax(dim=1).tolist()
    right = [cache.prototypes.classes[n] == name for n, name in zip(best, names, strict=True)]
    assert found["token_top1"] == pytest.approx(100 * float(np.mean(right)), abs=0.01)
    assert found["baseline"]["token_top1"] > 60  # the teacher's, of the images' own colours
    assert Path(found["picture"]).stat().st_size > 1000


def test_zero_shot_of_bands(clothes: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a store whose colours are bands of TIFFs, student and teacher see these, not what another
    program makes of the files: figures are those of the same images as pictures."""
    images, _ = clothes
    scenes, figures = tmp_path / "scenes", {}
    for path in images.rglob("*.png"):
        pixels = decode_pixels(path.read_bytes())[..., ::-1].astype(np.uint16) * 37
        out = (scenes / path.relative_to(images)).with_suffix(".tif")
        out.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(out, pixels, photometric="minisblack", planarconfig="contig")
    teacher = {name: str(ROOT / "demo/teacher" / file) for name, file in
               (("teacher", "config.json"), ("pretrained", "model.safetensors"))}  # fmt: skip
    for place, more in ((images, {}), (scenes, {"bands": (3, 2, 1), "band_range": (0.0, 9435.0)})):
        store, run = tmp_path / f"{place.name}.zarr", tmp_path / f"{place.name}-run"
        extract_targets(str(place), out=str(store), views=1, shard_size=8, executor="local",
                        texts=True, **teacher, **more)  # fmt: skip
        pretrain(
            str(store), out=str(run), epochs=1, batch_size=8, num_workers=0, report_to="none",
            model_args={"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 2},
            decoder={"embed_dim": 16, "depth": 1, "num_heads": 2},
        )  # fmt: skip
        figures[place.name] = zero_shot(str(run), data=str(place), crop_share=1.0, pictures=1)
    ours, theirs = figures["scenes"], figures["images"]
    assert (ours["images"], ours["rejected_images"]) == (24, 0)
    assert ours["baseline"]["token_top1"] == theirs["baseline"]["token_top1"] > 60


def test_a_fault_of_a_channel_file_is_the_images(tmp_path: Path) -> None:
    """Of images with masks the pair is left out and counted before the run; when none is left, the
    first reason is told."""
    data, name = draw_masks(tmp_path / "a", count=6), encoder(tmp_path / "e", PAIRED)
    depths, notes = beside(data / "images", tmp_path / "depth"), Notes()
    np.save(tmp_path / "depth/scene 01.npy", np.zeros((5, 5), np.uint16))
    settings: dict[str, Any] = {
        **RUN, "data": str(data), "out": str(tmp_path / "s.json"), "ignore": VOID, "size": 32,
        "distortion": 0.0, "batch_size": 2,
    }  # fmt: skip
    segment(name, student_data=depths, progress=notes, **settings)
    assert any("scene 01.jpg: other-size: 5 x 5" in note for note in notes.lines)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"can be read: .*missing: no file of its name in"):
        segment(name, student_data=str(tmp_path / "none"), **settings)
