"""Students of other inputs than the teacher's: channels of the images' own files, or of others."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from helpers import EXTRACTION, SMALL
from PIL import Image

from milan import load_encoder
from milan.config import PretrainConfig
from milan.core.progress import NoProgress
from milan.data.dataset import open_cache
from milan.data.loader import CachedBatches
from milan.data.sampler import Address, Kind
from milan.errors import ConfigError, DataError, MilanError
from milan.evaluation.config import FinetuneConfig
from milan.evaluation.evaluate import evaluate
from milan.evaluation.splits import open_splits
from milan.exchange.export import export
from milan.images.channels import Channels
from milan.images.decode import decode_pixels
from milan.images.views import View, render
from milan.inference.predict import predict
from milan.models.classifier import CLASSIFIER, load_classifier
from milan.models.export import read_about
from milan.reporting.run_files import read_run
from milan.store.cache import TargetCache
from milan.training.channels import kept_channels
from milan.training.estimate import estimate_run
from milan.training.finetune import finetune
from milan.training.finetune_data import Augmentation, LabelledImages
from milan.training.pretrain import pretrain
from pipeline.embed import embed
from pipeline.extract import extract_targets

BANDS, RANGE = (3, 2, 1), (0.0, 9435.0)
ALL = {"student_channels": "1-5", "epochs": 2, "held_out": 0.34, "report_to": "none"}


@pytest.fixture(scope="module")
def scenes(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as TIFFs of five bands of 16 bits: blue, green, red, and two others."""
    folder = tmp_path_factory.mktemp("scenes")
    for path in sorted(photos.rglob("*.jpg")):
        image = decode_pixels(path.read_bytes()).astype(np.float32)
        edges = np.abs(np.gradient(image.mean(axis=2))[0])
        bands = [37 * image[..., 2], 37 * image[..., 1], 37 * image[..., 0], 90 * edges,
                 65_000 - 200 * image[..., 1]]  # fmt: skip
        out = folder / path.relative_to(photos).with_suffix(".tif")
        out.parent.mkdir(exist_ok=True)
        tifffile.imwrite(
            out, np.stack(bands, -1).astype(np.uint16), photometric="minisblack",
            planarconfig="contig", compression="zlib",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def scene_store(
    scenes: Path, teacher_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("scene store") / "s.zarr"
    extract_targets(
        data=str(scenes), out=str(out), bands=BANDS, band_range=RANGE, **teacher_files, **EXTRACTION
    )
    return out


@pytest.fixture(scope="module")
def scene_run(scene_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of all five bands, with loader workers' code in this process."""
    out = tmp_path_factory.mktemp("scene run") / "r"
    pretrain(str(scene_store), out=str(out), **{**SMALL, **ALL})
    return out


@pytest.fixture(scope="module")
def depths(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside each photograph its depth: a float array, or a PNG of 16 bits."""
    folder = tmp_path_factory.mktemp("depths")
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        image = decode_pixels(path.read_bytes())
        out = folder / path.relative_to(photos)
        out.parent.mkdir(exist_ok=True)
        if i % 2:
            np.save(out.with_suffix(".npy"), image[..., 0] * np.float32(100))
        else:
            Image.fromarray(image[..., 0] * np.uint16(100)).save(out.with_suffix(".png"))
    return folder


def test_bands_are_the_teachers_colours(scene_store: Path, scenes: Path) -> None:
    """The store's law says which; its pixels are theirs, by the stated formula; the photograph's
    colours come out again."""
    cache = TargetCache(scene_store)
    law = cache.view_spec
    assert (law.bands, law.band_range, cache.bad) == (BANDS, RANGE, {})
    dataset = open_cache(scene_store)
    rows, views = np.array([0, 5]), np.array([0, 1])
    for row, view, pixels in zip(rows, views, dataset.pixels(rows, views), strict=True):
        samples = tifffile.imread(scenes / cache.manifest.key(row))[..., [2, 1, 0]].astype(float)
        image = (255 * (samples - RANGE[0]) / (RANGE[1] - RANGE[0])).clip(0, 255).round()
        crop = View.of(cache.crops(np.array([row]), np.array([view]))[0])
        assert np.abs(render(image.astype(np.uint8), crop, size=32).astype(int) - pixels).max() < 2


def test_bands_without_a_range_are_told_one(
    scenes: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Nothing is scaled in silence; multi-band files without --bands are rejected as before."""
    one = {"data": str(scenes), "out": str(tmp_path / "x"), **teacher_files, **EXTRACTION}
    with pytest.raises(ConfigError, match=r"--band-range \S+ \S+ \(percentiles 2 and 98 of 24"):
        extract_targets(**one, bands=BANDS)
    with pytest.raises(ConfigError, match="without --bands"):
        extract_targets(**one, band_range=RANGE)
    with pytest.raises(MilanError, match="unsupported"):
        extract_targets(**one)


def test_a_student_of_five_bands(scene_run: Path, scenes: Path, scene_store: Path) -> None:
    """Its file says channels, mean and deviation, as numpy finds them in the files; timm loads it;
    a batch has the teacher's box of every band, in their own units."""
    about = read_about(scene_run)
    whole = np.concatenate([tifffile.imread(p).reshape(-1, 5) for p in scenes.rglob("*.tif")])
    assert np.allclose(about["mean"], whole.mean(axis=0))
    assert np.allclose(about["std"], whole.std(axis=0))
    assert about["channels"]["spelled"] == "1-5"
    assert about["channels"]["bands"] == {"numbers": [3, 2, 1], "low": 0, "high": 9435}
    encoder = load_encoder(scene_run)
    assert timm.data.resolve_model_data_config(encoder)["input_size"] == (5, 32, 32)
    dataset = open_cache(scene_store)
    channels = kept_channels(scene_run, dataset)
    assert channels
    rows, views = np.array([3, 7]), np.array([1, 0])
    pixels, seen = channels.load(rows, views)
    assert np.array_equal(pixels, dataset.pixels(rows, views))
    again = (
        seen * np.float32(about["std"])[:, None, None] + np.float32(about["mean"])[:, None, None]
    )
    red = (255 * (again[:, 2] - RANGE[0]) / (RANGE[1] - RANGE[0])).clip(0, 255)
    assert np.abs(red - pixels[..., 0]).max() < 2  # the same box, not mirrored otherwise
    assert np.abs(red - pixels[:, :, ::-1, 0]).max() > 9
    assert again[:, 4].max() > 40_000


def test_an_interrupted_run_of_channels_ends_as_one(
    scene_run: Path, scene_store: Path, tmp_path: Path
) -> None:
    """Resumed, measured once: the same bytes. What loader workers get loads the same."""
    out = tmp_path / "r"
    for stop_after in (1, None):
        settings = {**SMALL, **ALL, "save_every": 1, "stop_after": stop_after}
        pretrain(str(scene_store), out=str(out), **settings)
    written = [(folder / "encoder.safetensors").read_bytes() for folder in (scene_run, out)]
    assert written[0] == written[1]
    assert read_run(out)["channels"] == read_run(scene_run)["channels"]
    dataset = open_cache(scene_store)
    dataset.channels = kept_channels(out, dataset)
    batches = CachedBatches(dataset, 0, True, None)
    address = Address(Kind.TRAIN, 0, np.array([2, 9]), np.array([0, 1]))
    here, there = (b.load(address) for b in (batches, pickle.loads(pickle.dumps(batches))))
    assert torch.equal(here.images, there.images)
    assert here.images.shape == (2, 5, 32, 32)


def test_evaluations_read_channels_or_refuse(scene_run: Path, scenes: Path, tmp_path: Path) -> None:
    """k-NN reads the same bands; what is of pictures says what to type."""
    data = {"data": str(scenes), "device": "cpu", "out": str(tmp_path / "m.json")}
    found = evaluate("knn", str(scene_run), features="none", **data)
    assert found["train_images"] == 20
    assert found["baseline"]["checkpoint"] == "random"
    with pytest.raises(ConfigError, match=r"sees channels 1-5 of files.*--distortion 0"):
        evaluate("segment", str(scene_run), epochs=1, **{**data, "out": str(tmp_path / "f")})
    with pytest.raises(ConfigError, match="corruptions are of 8-bit pictures"):
        evaluate("linear_probe", str(scene_run), corruptions=True, features="none", **data)


def test_exports_say_what_the_channels_are(scene_run: Path, tmp_path: Path) -> None:
    """timm's folder opens with five channels and gives the same; others refuse in one line."""
    folder = tmp_path / "timm"
    export(str(scene_run), out=str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [5, 32, 32]
    assert config["pretrained_cfg"]["mean"] == read_about(scene_run)["mean"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.randn(1, 5, 32, 32)
    assert torch.equal(
        model.forward_features(image), load_encoder(scene_run).forward_features(image)
    )
    card = (folder / "README.md").read_text()
    assert "mean of channels 1-5" in card
    assert "channels [3, 2, 1] of the file, of which 0 becomes 0 and 9435 255" in card
    for other in ("transformers", "mmpretrain", "detectron2", "torchvision"):
        with pytest.raises(ConfigError, match="channels 1-5 in place of RGB"):
            export(str(scene_run), format=other, out=str(tmp_path / other))


def test_a_student_of_colours_from_bands_is_told_apart(scene_store: Path, tmp_path: Path) -> None:
    """RGB, but of bands: evaluations read the bands, not what Pillow makes of the file."""
    out = tmp_path / "r"
    pretrain(str(scene_store), out=str(out), **{**SMALL, "epochs": 1, "report_to": "none"})
    about = read_about(out)
    assert (about["channels"]["spelled"], round(about["mean"][0], 3)) == ("rgb", 0.485)
    data = {"data": str(open_cache(scene_store).source.root), "out": str(tmp_path / "m.json")}
    assert evaluate("knn", str(out), features="none", **data)["train_images"] == 20


TUNING: dict[str, Any] = {
    "epochs": 2, "batch_size": 8, "num_workers": 0, "report_to": "none", "auto_augment": "none",
}  # fmt: skip


def test_fine_tuning_sees_the_same_channels(scene_run: Path, scenes: Path, tmp_path: Path) -> None:
    """Crops of all five bands by address; central squares as evaluations have them; the file says
    which, and predictions read them."""
    out, run = tmp_path / "f.json", tmp_path / "f"
    config = FinetuneConfig(checkpoint=str(scene_run), data=str(scenes), out=str(out), **TUNING)
    figures = evaluate("finetune", str(scene_run), data=str(scenes), out=str(out), **TUNING)
    about = read_about(run / CLASSIFIER)
    assert about["channels"] == read_about(scene_run)["channels"]
    vit = load_classifier(run)
    assert timm.data.resolve_model_data_config(vit)["input_size"] == (5, 32, 32)
    law = Channels.from_about(about["channels"])
    train, val = open_splits(config)
    with torch.inference_mode():
        seen = [
            law.centre_crop(val.of.images.read(row), b"", share=0.875, size=32)
            for row in val.rows.tolist()
        ]
        named = vit(torch.from_numpy(np.stack(seen))).argmax(dim=1).numpy()
    numbers = np.unique(train.labels)
    assert figures["top1"] == pytest.approx(100 * (numbers[named] == val.labels).mean(), abs=0.01)
    images = LabelledImages(
        train, val, Augmentation(32, (0.1, 0.5), 0.5, "none", ()), crop_share=0.875, seed=0,
        channels=law,
    )  # fmt: skip
    rows = np.arange(6)
    first, again, next_ = (
        images.load(Address(Kind.TRAIN, epoch, rows, rows * 0)).pixels.numpy()
        for epoch in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert np.abs(first - next_).mean() > 0.1
    raw = first * np.float32(law.std)[:, None, None] + np.float32(law.mean)[:, None, None]
    assert np.abs(raw[:, 4] - (65_000 - 200 / 37 * raw[:, 1])).max() < 40  # one box for all bands
    for more, words in (
        ({"auto_augment": "rand-m9"}, "sees channels 1-5 of files.*--auto-augment none"),
        ({"corruptions": True}, "corruptions True for .* sees channels 1-5"),
    ):
        with pytest.raises(ConfigError, match=words):
            finetune(replace(config, **more))  # type: ignore[arg-type]
    predicted = predict(str(run), data=str(scenes), out=str(tmp_path / "p.csv"))
    assert (predicted["images"], predicted["rejected_images"]) == (24, 0)
    with open(tmp_path / "p.csv", newline="") as file:
        said = {row["key"]: row["class1"] for row in csv.DictReader(file)}
    assert [said[val.key(i)] for i in range(len(named))] == [vit.class_names[n] for n in named]
    export(str(run), out=str(tmp_path / "timm"))
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert torch.allclose(
        model(torch.from_numpy(np.stack(seen))).argmax(1), torch.from_numpy(named)
    )


@pytest.mark.parametrize("objective", ["milan", "pixels"])
def test_a_student_of_colours_and_depth(
    objective: str,
    store: Path,
    depths: Path,
    photos: Path,
    finished_run: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Of files beside the images; RGB weights adapt by timm's rule; pixels are predicted of all
    channels; k-NN needs the folder and says so."""
    init = finished_run(epochs=1)
    out, notes = tmp_path / "r", Notes()
    channels = {"student_channels": "rgb,1", "student_data": str(depths), "objective": objective}
    settings = {**SMALL, **channels, "epochs": 2, "held_out": 0.34, "report_to": "none"}
    if objective == "pixels":
        estimate_run(PretrainConfig(cache=str(store), out=str(out), **settings))
    pretrain(str(store), out=str(out), init=str(init), progress=notes, **settings)
    assert any("made ones of 4 channels by timm's rule" in note for note in notes.lines)
    assert any("rgb,1, of files in" in note for note in notes.lines)
    about = read_about(out)
    assert np.allclose(about["mean"][:3], np.array([0.485, 0.456, 0.406]) * 255)
    assert (about["input_size"], about["model_args"]["in_chans"]) == (32, 4)
    metrics = {"data": str(photos), "features": "none", "out": str(tmp_path / "m.json")}
    with pytest.raises(ConfigError, match="--student-data FOLDER"):
        evaluate("knn", str(out), **metrics)
    val = shutil.copytree(photos, tmp_path / "val")
    with pytest.raises(ConfigError, match="--val-student-data FOLDER"):
        evaluate("knn", str(out), val_data=str(val), student_data=str(depths), **metrics)
    assert evaluate("knn", str(out), student_data=str(depths), **metrics)["val_images"] == 4
    assert (out / "sheet.png").exists()
    if objective == "milan":
        tuning = {"data": str(photos), "out": str(tmp_path / "f.json"), **TUNING, "epochs": 1}
        with pytest.raises(ConfigError, match="--student-data FOLDER"):
            finetune(str(out), **tuning)
        assert finetune(str(out), student_data=str(depths), **tuning)["val_images"] == 4
        with pytest.raises(ConfigError, match="the encoder does not see"):
            finetune(str(init), student_data=str(depths), **tuning)


def test_a_student_of_wide_views_and_depth(
    depths: Path, photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Views that are not square: a batch has the teacher's box of the file beside the image, and
    the whole of it is read by what measures and what embeds."""
    store, out = tmp_path / "s.zarr", tmp_path / "r"
    wide = {"img_size": 32, "img_width": 64}
    extract_targets(data=str(photos), out=str(store), **wide, **teacher_files, **EXTRACTION)
    channels = {"student_channels": "rgb,1", "student_data": str(depths), "report_to": "none"}
    pretrain(str(store), out=str(out), **{**SMALL, **channels, "epochs": 2, "held_out": 0.34})
    about, dataset = read_about(out), open_cache(store)
    assert about["input_size"] == (32, 64)
    law = kept_channels(out, dataset)
    assert law
    pixels, seen = law.load(np.array([2, 9]), np.array([0, 1]))
    assert (pixels.shape, seen.shape) == ((2, 32, 64, 3), (2, 4, 32, 64))
    depth = seen[:, 3] * about["std"][3] + about["mean"][3]
    assert np.abs(depth / 100 - pixels[..., 0]).max() < 3  # it is a hundred times its red
    data = {"data": str(photos), "student_data": str(depths)}
    metrics = {"features": "none", "out": str(tmp_path / "m.json")}
    assert evaluate("knn", str(out), **metrics, **data)["val_images"] == 4
    assert embed(str(out), out=str(tmp_path / "e.npy"), **data)["images"] == 24


def test_files_that_no_encoder_sees_are_refused(
    depths: Path, photos: Path, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever names them expects that they are looked at."""
    run, data = str(finished_run(epochs=1)), {"data": str(photos), "student_data": str(depths)}
    unseen = "files beside the images in .*, which the encoder does not see"
    with pytest.raises(ConfigError, match=unseen):
        evaluate("knn", run, features="none", out=str(tmp_path / "m.json"), **data)
    with pytest.raises(ConfigError, match=unseen):
        embed(run, out=str(tmp_path / "e.npy"), **data)


class Notes(NoProgress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def remove(file: Path) -> None:
    file.unlink()


def other_size(file: Path) -> None:
    np.save(file, np.zeros((5, 6), np.float32))


def not_finite(file: Path) -> None:
    samples = np.load(file)
    samples[0, 0] = np.inf
    np.save(file, samples)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def constant(file: Path) -> None:
    for path in file.parent.parent.rglob("*.*"):
        samples = read(path)
        path.unlink()
        np.save(path.with_suffix(".npy"), np.full(samples.shape, 7.0, np.float32))


def read(path: Path) -> Any:
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))


FAULTS: dict[Callable[[Path], None], str] = {
    remove: r"1 of 24 images have no usable channels 1, .* missing",
    other_size: r"other-size: 5 x 6 \(height x width\), its image is",
    not_finite: "not-finite: 1 of",
    cut: "truncated",
    constant: "channel 1 is 7 everywhere",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_of_channels_are_one_line(
    fault: Callable[[Path], None], store: Path, depths: Path, tmp_path: Path
) -> None:
    """Before the first step, and without a folder left; --on-changed drop leaves the image out."""
    folder, out = tmp_path / "depths", tmp_path / "r"
    shutil.copytree(depths, folder)
    fault(min(folder.rglob("*.npy")))
    channels = {"student_channels": "1", "student_data": str(folder), "report_to": "none"}
    settings = {**SMALL, **channels, "epochs": 1}
    with pytest.raises((ConfigError, DataError), match=FAULTS[fault]):
        pretrain(str(store), out=str(out), **settings)
    assert not out.exists()
    if fault is not_finite:  # of each kind alike
        pretrain(str(store), out=str(out), on_changed="drop", **settings)
        assert len((out / "changed-images.csv").read_text().splitlines()) == 2


def test_files_that_change_under_a_run(store: Path, depths: Path, tmp_path: Path) -> None:
    """Resuming never mixes: another file of the same size is found by its digest, and dropped on
    request; other channels, or none beside, are another run."""
    folder, out = tmp_path / "depths", tmp_path / "r"
    shutil.copytree(depths, folder)
    channels = {"student_channels": "1", "student_data": str(folder), "report_to": "none"}
    settings = {**SMALL, **channels, "epochs": 2, "save_every": 1}
    pretrain(str(store), out=str(out), stop_after=1, **settings)
    for path in folder.rglob("*.npy"):
        np.save(path, np.load(path)[::-1])
    with pytest.raises(DataError, match="changed: other bytes than when the run began"):
        pretrain(str(store), out=str(out), **settings)
    with pytest.raises(MilanError, match="student_channels"):
        pretrain(str(store), out=str(out), **{**settings, "student_channels": "rgb,1"})
    with pytest.raises(ConfigError, match="--student-data"):
        pretrain(str(store), out=str(out), **{**settings, "student_data": None})
    pretrain(str(store), out=str(out), on_changed="drop", **settings)
    assert len((out / "changed-images.csv").read_text().splitlines()) == 13


def test_settings_that_mean_nothing_are_refused(store: Path, tmp_path: Path) -> None:
    """One line each, before anything is made."""
    for settings, words in (
        ({"student_data": "x"}, "student_data without student_channels"),
        ({"student_channels": "1", "student_data": str(tmp_path / "no")}, "no folder at"),
        ({"student_channels": "1", "objective": "rils"}, "an objective without texts"),
        ({"student_channels": "4"}, "3 channels, no number 4"),
        ({"model_args": {"in_chans": 4}}, "which channels these are"),
        ({"student_channels": "1", "shown_channels": (1, 2, 3)}, "shown_channels 1 2 3"),
    ):
        with pytest.raises(MilanError, match=words):
            pretrain(str(store), out=str(tmp_path / "r"), **{**SMALL, **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "r").exists()
