"""Segmentation: what is trained, what is measured, what is left, and the run's promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHARED, VOID, At, Notes, draw_masks, log_of, run_here
from PIL import Image
from safetensors.torch import load_file

import milan
from milan.core import rng
from milan.core.device import MEAN, STD, normalise
from milan.core.signals import Stop
from milan.data.sampler import Address, Kind
from milan.errors import CacheError, ConfigError, DataError
from milan.evaluation.config import SegmentConfig
from milan.evaluation.masked import open_masked
from milan.images.masks import IGNORED
from milan.models.encoder import build_encoder
from milan.models.export import ENCODER, read_about, save_encoder
from milan.models.segmenter import SEGMENTER, load_segmenter, predict_masks
from milan.training.finetune_data import seeded
from milan.training.segment import segment
from milan.training.segmentation_data import MaskedBatches, WindowAugmentation
from pipeline.teachers.dense import DenseTeacher
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "model_args": VIT, "epochs": 2, "batch_size": 4, "size": 32,
    "num_workers": 0, "report_to": "none", "log_every": 1, "ignore": VOID, "lr": 1e-2,
}  # fmt: skip


class AtStep(At):
    """Progress that does something once so many steps of training are done."""

    what = ""

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        self.what = what

    def advance(self, done: int, figures: str = "") -> None:
        if self.what == "train":
            super().advance(done, figures)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Scenes to train on and to measure on."""
    folder = tmp_path_factory.mktemp("scenes")
    train, val = draw_masks(folder / "a", count=8), draw_masks(folder / "b", count=3, seed=1)
    return {"data": str(train), "val_data": str(val)}


def run(scenes: dict[str, str], folder: Path, name: str = "a", **changes: Any) -> dict[str, Any]:
    return segment("random", out=str(folder / f"{name}.json"), **SMALL | scenes | changes)


@pytest.mark.parametrize("protocol", ["linear", "upernet"])
def test_it_learns_and_leaves_a_segmenter(
    protocol: str, data: dict[str, str], tmp_path: Path
) -> None:
    """The loss goes down; what the file predicts is what the metrics say; tables and a sheet."""
    figures = run(data, tmp_path, protocol=protocol, epochs=5, width=40)
    losses = [line["loss"] for line in log_of(tmp_path / "a")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    low, high = figures["miou_interval"]
    assert low <= figures["miou"] <= high
    segmenter = load_segmenter(tmp_path / "a")
    assert (segmenter.window, segmenter.class_names) == ((32, 40), ["0", "1", "2"])
    _, val = (split for split in _splits(data))
    right = total = 0
    shown = [val.pixels(i) for i in range(3)]
    for position, named in enumerate(predict_masks(segmenter, shown)):
        truth = val.mask(position)
        right += int((named == truth)[truth != IGNORED].sum())
        total += int((truth != IGNORED).sum())
    assert round(100 * right / total, 2) == figures["pixel_accuracy"]
    lines = (tmp_path / "a/classes.csv").read_text().splitlines()
    assert lines[0] == "class,iou,accuracy,pixels,train_pixels"
    shares = [float(line.split(",")[1]) for line in lines[1:]]
    assert np.mean(shares) == pytest.approx(figures["miou"], abs=0.02)
    assert sum(int(line.split(",")[3]) for line in lines[1:]) == total
    sheet = np.asarray(Image.open(tmp_path / "a/sheet.png"))
    assert sheet.shape[1] > 800
    checkpoint = next((tmp_path / "a/checkpoints").glob("*/model.safetensors"))
    frozen = protocol == "linear"
    assert all(name.startswith("head.") for name in load_file(checkpoint)) == frozen
    file, old = tmp_path / "a" / SEGMENTER, tmp_path / "of-version-1.0.safetensors"
    about = read_about(file)
    about["channels"] = about.pop("decoder_width")
    save_encoder(old, load_file(file), about)
    assert next(predict_masks(load_segmenter(old), shown[:1])).shape == shown[0].shape[:2]


def _splits(data: dict[str, str]) -> tuple[Any, Any]:
    masked = open_masked(SegmentConfig("random", **data, ignore=VOID))
    return masked.train, masked.val


def test_the_encoder_is_the_checkpoints(data: dict[str, str], tmp_path: Path) -> None:
    """Linear: frozen, positions for the window; beside it the same network without training."""
    encoder, out = tmp_path / "run", tmp_path / "s.json"
    encoder.mkdir()
    args = {name: value for name, value in VIT.items() if name != "img_size"}
    vit = build_encoder(SMALL["model"], img_size=32, args=args)
    about = {"model": SMALL["model"], "model_args": args, "mean": MEAN, "std": STD}
    save_encoder(encoder / ENCODER, vit.state_dict(), about | {"input_size": 32})
    figures = segment(str(encoder), out=str(out), **SMALL | data | {"size": 48, "epochs": 1})
    assert figures["baseline"]["checkpoint"] == "random"
    assert figures["baseline"]["miou"] != figures["miou"]
    ours, theirs = load_segmenter(tmp_path / "s").encoder, milan.load_encoder(encoder)
    for name, weight in theirs.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(weight, ours.state_dict()[name]), name
    assert ours.pos_embed.shape[1] == 1 + 6 * 6
    again = segment(str(encoder), out=str(out), **SMALL | data | {"size": 48, "epochs": 1})
    assert again == figures


def test_the_teacher(teacher_files: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    """Its patches as a map, at its size or at another; only the head is kept."""
    loaded = load_teacher(
        TeacherSpec(
            **{"name": teacher_files["teacher"], "pretrained": teacher_files["pretrained"]}
        ),
        device="cpu",
    )
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    norm = loaded.identity["normalisation"]
    (found,) = DenseTeacher(loaded).forward_intermediates(
        normalise(pixels, norm["mean"], norm["std"])
    )
    tokens, _ = loaded.targets(pixels)
    assert (found.flatten(2).transpose(1, 2) - tokens[:, 1:]).abs().max() < 1e-5
    line = ["segment", "--checkpoint", "teacher", "--out", tmp_path / "t.json", "--size", 64]
    line += [
        w
        for name, value in (teacher_files | data).items()
        for w in (f"--{name.replace('_', '-')}", value)
    ]
    line += ["--ignore", VOID, "--epochs", 1, "--batch-size", 4, "--num-workers", 0]
    done = run_here(*line)
    assert (done.code, done.err) == (0, ""), done.err
    assert json.loads((tmp_path / "t.json").read_text())["miou"] > 5
    with pytest.raises(CacheError, match="is a head, and its encoder the teacher"):
        load_segmenter(tmp_path / "t")
    wide = [value if value != tmp_path / "t.json" else tmp_path / "w.json" for value in line]
    done = run_here(*wide, "--width", 96)
    assert (done.code, done.err) == (0, ""), done.err
    assert read_about(tmp_path / "w" / SEGMENTER)["window"] == [64, 96]
    assert "its network is not trained here" in run_here(*line, "--protocol", "upernet").err


@pytest.mark.parametrize("protocol", [pytest.param("linear", marks=pytest.mark.soak), "upernet"])
def test_resumed_it_is_the_same_run(protocol: str, data: dict[str, str], tmp_path: Path) -> None:
    """Stopped at a step and called again: the same weights to the bit, running statistics too."""
    run(data, tmp_path, "whole", protocol=protocol)
    stop = Stop()
    half = run(
        data, tmp_path, "half", protocol=protocol, stop=stop,
        progress=AtStep(2, lambda: stop.request(15)),
    )  # fmt: skip
    assert half == {"stopped_by": "SIGTERM"}
    notes = Notes()
    run(data, tmp_path, "half", protocol=protocol, progress=notes)
    assert "resuming: " in str(notes.lines)
    whole, parts = (load_file(tmp_path / name / SEGMENTER) for name in ("whole", "half"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.soak
def test_two_ranks_measure_as_one(data: dict[str, str], tmp_path: Path, forked_ranks: None) -> None:
    """Without steps that count (learning rate 0) two ranks say what one says."""
    same: dict[str, Any] = {"epochs": 1, "lr": 1e-30, "protocol": "upernet", "batch_size": 4}
    one = run(data, tmp_path, "one", **same)
    two = run(data, tmp_path, "two", devices=2, device="cpu", **same)
    assert one["val_images"] == two["val_images"] == 3
    run(data, tmp_path, "three", devices=2, device="cpu", **same | {"protocol": "linear"})


# --- augmentation ---------------------------------------------------------------------------------


def _source(data: dict[str, str], **changes: Any) -> MaskedBatches:
    how: dict[str, Any] = {
        "window": (32, 48), "scale": (0.5, 2.0), "hflip": 0.5, "distortion": 0.5,
        "fill": (1, 2, 3),
    }  # fmt: skip
    return MaskedBatches(*_splits(data), WindowAugmentation(**how | changes), seed=0)


def test_augmentation_is_addressed(data: dict[str, str]) -> None:
    """The same in any process and order; another in the next epoch; global draws undisturbed."""
    rows, state = np.array([3, 4]), torch.get_rng_state()
    both = _source(data).load(Address(Kind.TRAIN, 0, rows, rows * 0))
    alone = _source(data).load(Address(Kind.TRAIN, 0, rows[1:], rows[1:] * 0))
    assert torch.equal(both.pixels[1], alone.pixels[0])
    assert torch.equal(both.masks[1], alone.masks[0])
    later = _source(data).load(Address(Kind.TRAIN, 1, rows[1:], rows[1:] * 0))
    assert not torch.equal(later.pixels, alone.pixels)
    assert torch.equal(state, torch.get_rng_state())


def test_image_and_mask_stay_together() -> None:
    """A pixel and its class are cut, scaled, mirrored alike; what is missing does not count."""
    ids = np.zeros((90, 60), np.int16)
    ids[20:60, 10:40] = 1
    table = np.array([(40, 40, 40), (220, 220, 220)], np.uint8)
    missing = mirrored = 0
    for draw in range(40):
        augment = WindowAugmentation((32, 48), (0.5, 2.0), 0.5, 0.0, (9, 9, 9))
        with seeded(0, rng.AUGMENTED, (0, draw)):
            pixels, mask = augment(table[ids], ids)
        assert (pixels.shape, mask.shape) == ((32, 48, 3), (32, 48))
        grey = pixels[..., 0].astype(int)
        assert (grey[mask == IGNORED] == 9).all()
        light = np.abs(grey - 220) < np.abs(grey - 40)
        counted = mask != IGNORED
        assert (light[counted] == (mask[counted] == 1)).mean() > 0.93
        missing += bool((~counted).any())
        mirrored += bool(mask[:, 0].max() == IGNORED and mask[:, -1].max() != IGNORED)
    assert 5 < missing < 35
    assert mirrored > 1


def test_no_class_fills_a_window() -> None:
    """Ten tries for a window in which no class has more than three quarters."""
    ids = np.zeros((64, 256), np.int16)
    ids[:, ::20] = ids[:, :64:2] = 1  # everywhere a little, and half of it at the left
    full = 0
    for draw in range(50):
        augment = WindowAugmentation((32, 32), (2.0, 2.0), 0.0, 0.0, (0, 0, 0))
        with seeded(0, rng.AUGMENTED, (1, draw)):
            _, mask = augment(np.zeros((64, 256, 3), np.uint8), ids)
        full += bool(np.bincount(mask.ravel()).max() > 0.75 * mask.size)
    assert full < 20  # a single try would find three quarters and more 40 times


# --- bad input, and the command -------------------------------------------------------------------


def test_what_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    """One line each, before a folder is made."""
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"size": 30}, ConfigError, r"windows of 30 x 30 pixels, and patches of 8 x 8.*--size 32"),
        ({"protocol": "linea"}, ConfigError, "protocol 'linea'"),
        ({"protocol": "upernet", "batch_size": 1}, ConfigError, "batch size 1"),
        ({"scale": (2.0, 0.5)}, ConfigError, "scale 2 0.5"),
        ({"model": "resnet18", "model_args": {}}, ConfigError, "resnet18"),
        ({"classes": "no file"}, DataError, "no file cannot be read"),
        ({"recipe": "vit_bas"}, ConfigError, "unknown recipe"),
    ]
    for changes, kind, said in cases:
        with pytest.raises(kind, match=said):
            run(data, tmp_path, **changes)
        assert not (tmp_path / "a").exists(), said


def test_an_image_that_cannot_be_read(data: dict[str, str], tmp_path: Path) -> None:
    """To train on another stands in for it; to measure on it is left out. Counted and said."""
    broken = {kind: str(draw_masks(tmp_path / kind, count=5)) for kind in ("data", "val_data")}
    for place in broken.values():
        victim = Path(place) / "images/scene 03.jpg"
        victim.write_bytes(victim.read_bytes()[:900])  # its header is whole
    notes = Notes()
    figures = run(broken, tmp_path, epochs=1, progress=notes)
    assert figures["rejected_images"] >= 1
    assert figures["val_images"] == 4
    assert "the first is scene 03.jpg" in str(notes.lines)


@pytest.mark.parametrize("protocol", ["linear", "upernet"])
def test_a_strip_is_left_out(protocol: str, tmp_path: Path) -> None:
    """Of 3 x 200 pixels a window of 32 would make 32 x 2,133: counted and said, for training and
    for measuring. What is ten windows long is used."""
    places = {kind: draw_masks(tmp_path / kind, count=5) for kind in ("data", "val_data")}
    for place in places.values():
        for name, size in (("scene 03", (3, 200)), ("scene 04", (200, 20))):
            Image.new("RGB", size).save(place / f"images/{name}.jpg")
            (mask,) = place.glob(f"*/{name}.png")
            Image.new("L", size).save(mask)
    notes, names = Notes(), {kind: str(place) for kind, place in places.items()}
    figures = run(names, tmp_path, epochs=1, protocol=protocol, progress=notes)
    assert (figures["rejected_images"], figures["train_images"], figures["val_images"]) == (2, 4, 4)
    said = "scene 03.jpg: strip: 3 x 200 pixels would be scaled to 32 x 2,133 for windows of 32 x "
    assert said + "32, and a side may have 10 of them; cut the image into parts" in str(notes.lines)


def test_the_command(data: dict[str, str], tmp_path: Path) -> None:
    """Metrics beside the encoder, a table, and the same line once more."""
    line = ["segment", "--checkpoint", "random", "--model", SMALL["model"]]
    line += [word for key, value in VIT.items() for word in ("--set", f"model.{key}={value}")]
    line += ["--data", data["data"], "--val-data", data["val_data"], "--epochs", "1"]
    line += ["--batch-size", "4", "--num-workers", "0", "--size", "32", "--ignore", str(VOID)]
    done = run_here(*line, cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done.err
    assert "Segmentation" in done.out
    assert "differs from the published recipe vit_base: batch_size 4, size 32, epochs 1" in done.out
    metrics = json.loads((tmp_path / "runs/random/segment.json").read_text())
    assert metrics["run"] == "runs/random/segment/linear"
    assert (tmp_path / metrics["run"] / SEGMENTER).is_file()
    assert "nothing is left to do" in run_here(*line, cwd=tmp_path).out
    refused = run_here(*line, "--reduce-zero-label", cwd=tmp_path)
    assert refused.code == 1
    assert "holds a run of other settings" in refused.err
    longer = run_here(*line, "--lr", "0.1", cwd=tmp_path)  # of 1.2 / 32 epochs, and 1e-3 * 4 / 16
    assert "(lr: 0.00025 != 0.1)" in longer.err


def test_camvid(tmp_path: Path) -> None:
    """Eleven classes of road scenes in ADE20K's folders, 4:3 pictures as whole windows."""
    folder = SHARED / "camvid"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    road = {"data": str(folder), "val_data": str(folder)}
    notes = Notes()
    figures = run(road, tmp_path, ignore=11, size=48, width=64, epochs=1, limit=12, progress=notes)
    assert notes.line("split: train")
    assert notes.line("split: validation")
    assert notes.lines.count("matched: 120 images, each with a mask, of 120 masks found") == 1
    assert (figures["val_images"], figures["classes"]) == (12, 11)
    assert 0 < figures["miou"] < 60
