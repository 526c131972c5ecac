"""Zero-shot: predicted features against the texts of classes, as each is alone; bad input."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, STUDENT, Notes, make_photos, published, run_here
from helpers import TEACHER as OTHER
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from milan.core.device import MEAN, STD, normalise
from milan.errors import MilanError
from milan.evaluation.evaluate import evaluate
from milan.images.decode import decode_pixels
from milan.models.masking import Mask
from milan.models.student import build_student
from milan.store.cache import TargetCache
from milan.training.pretrain import pretrain
from milan.training.trained import load_student
from pipeline.extract import extract_targets
from pipeline.zero_shot import zero_shot

DEMO = ROOT / "demo" / "teacher"
TEACHER = {"teacher": str(DEMO / "config.json"), "pretrained": str(DEMO / "model.safetensors")}
SMALL: dict[str, Any] = {
    "model_args": {"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2}, "num_workers": 0, "batch_size": 8,
    "epochs": 1, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 clothes (clothes.parquet), its store with texts, and a run of one epoch."""
    folder = tmp_path_factory.mktemp("clothes")
    pq.write_table(pq.read_table(ROOT / "demo/data/test.parquet")[:24], folder / "clothes.parquet")
    extract_targets(str(folder / "clothes.parquet"), out=str(folder / "t.zarr"), views=1,
                    shard_size=8, executor="local", texts=True, **TEACHER)  # fmt: skip
    pretrain(str(folder / "t.zarr"), out=str(folder / "run"), **SMALL)
    return folder


def images_and_labels() -> tuple[torch.Tensor, list[str]]:
    """The 24 clothes, uint8 [24, 28, 28, 3], and the names of their classes."""
    table = pq.read_table(ROOT / "demo/data/test.parquet")[:24]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    names = features["label"]["names"]
    pixels = [decode_pixels(row["bytes"]) for row in table["image"].to_pylist()]
    labels = [names[label] for label in table["label"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)), labels


def share(vectors: torch.Tensor, cache: TargetCache, labels: list[str]) -> float:
    """Percent of images [24, C] whose nearest class text is their own."""
    assert cache.prototypes is not None
    texts = torch.from_numpy(cache.prototypes.features)
    named = (F.normalize(vectors, dim=1) @ texts.T).argmax(dim=1).tolist()
    return 100 * float(np.mean([cache.prototypes.classes[n] == label
                                for n, label in zip(named, labels, strict=True)]))  # fmt: skip


def test_as_each_is_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher as open_clip has it, the student as its decoder predicts; JSON and a picture."""
    monkeypatch.chdir(place)
    pixels, labels = images_and_labels()
    cache = TargetCache("t.zarr")
    ran = run_here("zero-shot", "--checkpoint", "run", "--data", "clothes.parquet", "--crop-share",
                   1, "--batch-size", 7, "--pictures", 3)  # fmt: skip
    assert ran.code == 0, ran.err
    metrics = json.loads((place / "run/zero_shot.json").read_text())
    teacher = metrics["baseline"]

    config = json.loads((DEMO / "config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"]).eval()
    model.load_state_dict(load_file(DEMO / "model.safetensors"))
    own = config["preprocess_cfg"]
    with torch.inference_mode():
        clip = model.encode_image(normalise(pixels, own["mean"], own["std"]))
    assert teacher["token_top1"] == pytest.approx(share(clip, cache, labels), abs=0.01)
    assert teacher["token_top1"] > 60

    student = load_student("run").student
    whole = torch.arange(16).expand(24, -1)
    with torch.inference_mode():
        found = student(normalise(pixels, MEAN, STD), Mask(whole, whole[:, :0]))
    mean = F.normalize(found[:, 1:], dim=2).mean(dim=1)
    assert metrics["token_top1"] == pytest.approx(share(found[:, 0], cache, labels), abs=0.01)
    assert metrics["mean_top1"] == pytest.approx(share(mean, cache, labels), abs=0.01)
    low, high = metrics["mean_top1_interval"]
    assert low <= metrics["mean_top1"] <= high
    assert (metrics["images"], metrics["classes"], metrics["chance"]) == (24, 10, 10.0)
    with open(place / "run/zero_shot/classes.csv", newline="") as file:
        counted = [(int(line["images"]), int(line["correct"])) for line in csv.DictReader(file)]
    images, right = (sum(column) for column in zip(*counted, strict=True))
    assert (images, 100 * right / images) == (24, pytest.approx(metrics["token_top1"], abs=0.01))
    with open(place / "run/zero_shot/confusion.csv", newline="") as file:
        assert sum(int(line["images"]) for line in csv.DictReader(file)) == 24 - right
    with Image.open(place / "run/zero_shot.png") as sheet:
        assert np.asarray(sheet).std() > 30


def test_ranks_measure_the_same(place: Path, tmp_path: Path, forked_ranks: None) -> None:
    """Two ranks see a share each: figures, counts and dense maps are those of one."""
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        figures = zero_shot(str(place / "run"), data=str(place / "clothes.parquet"), pictures=3,
                            crop_share=1.0, devices=ranks, device="cpu", out=str(out))  # fmt: skip
        pixels = np.asarray(Image.open(figures.pop("picture")))
        tables = [(tmp_path / f"{ranks}/{n}.csv").read_text() for n in ("classes", "confusion")]
        found.append((figures | {"seconds": 0}, pixels.tobytes(), tables))
    assert found[0][0]["images"] == 24
    assert found[0] == found[1]


def test_several_in_one_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random, student and teacher; the teacher beside the first two is the one asked for."""
    monkeypatch.chdir(place)
    ran = run_here(
        "zero-shot", "--checkpoint", "random,run,teacher", "--like", "run", "--cache", "t.zarr",
        "--data", "clothes.parquet", "--crop-share", 1, "--pictures", 0, "--out", "all.csv",
        *(part for name, file in TEACHER.items() for part in (f"--{name}", file)),
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    lines = (place / "all.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["checkpoint", "random", "run", "teacher"]
    for folder in ("runs/random", "run", "runs/teacher"):
        assert 0 <= json.loads((place / folder / "zero_shot.json").read_text())["token_top1"] <= 100


def test_students_share_the_teacher(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one row beside two students, and like none of them."""
    monkeypatch.chdir(place)
    ran = run_here(
        "zero-shot", "--checkpoint", "random,run", "--like", "run", "--cache", "t.zarr",
        "--data", "clothes.parquet", "--crop-share", 1, "--pictures", 0, "--out", "two.csv",
        *(part for name, file in TEACHER.items() for part in (f"--{name}", file)),
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    lines = (place / "two.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "checkpoint",
        "teacher teacher",
        "random",
        "run",
    ]
    assert "like" not in json.loads((place / "run/zero_shot.json").read_text())["baseline"]


def test_the_text_tower_gives_what_the_store_lacks(place: Path, tmp_path: Path) -> None:
    """Of a store without texts, and of classes that it does not have; the same as stored ones."""
    store, data = tmp_path / "plain.zarr", str(place / "clothes.parquet")
    extract_targets(data, out=str(store), views=1, executor="local", **TEACHER)
    given: dict[str, Any] = {"data": data, "crop_share": 1.0, "pictures": 0}
    stored = zero_shot(
        "teacher", cache=str(place / "t.zarr"), out=str(tmp_path / "a.json"), **given
    )
    made = evaluate("zero_shot", "teacher", cache=str(store), **given)
    assert [made[k] for k in ("token_top1", "mean_top1")] == [
        stored[k] for k in ("token_top1", "mean_top1")
    ]
    photos = make_photos(tmp_path / "photos", count=6)
    found = zero_shot(str(place / "run"), data=str(photos), pictures=0, **TEACHER)
    assert found["classes"] == 3
    assert found["token_top5"] is None


@pytest.mark.parametrize(
    ("checkpoint", "changes", "expected"),
    [
        ("encoder", {}, "the decoder of encoder is not there.*cannot predict the teacher's"),
        ("timm:vit_tiny_patch16_224", {}, "is an encoder: its features are in no language space"),
        ("pixels", {}, r"does not predict the teacher's features \(objective pixels\)"),
        ("random", {}, "checkpoint random without like"),
        ("run", {"data": "numbers.parquet"}, "has class numbers; expected: class names"),
        ("run", {"data": "flat"}, "has no labels; expected: class names"),
        ("run", {"data": "photos", "cache": "gone.zarr"},
         "gone.zarr has no text of 3 classes, such as 'class 0', and its teacher gives none"),
        ("published:narrow.safetensors", {}, "comes without texts of classes"),
        ("run", {"cache": "other.zarr"}, "has targets of .*, and run predicts those of"),
        ("run", {"cache": "nowhere.zarr"}, "nowhere.zarr"),
        ("run", {"teacher": "other.json", "pretrained": "none"}, "is not the one whose targets"),
        ("published:narrow.safetensors", {"cache": "t.zarr"},
         "gives features of 8 channels, and texts have"),
    ],
)  # fmt: skip
def test_bad_input(
    checkpoint: str, changes: dict[str, Any], expected: str, bad: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line."""
    monkeypatch.chdir(bad)
    with pytest.raises(MilanError, match=expected) as error:
        zero_shot(checkpoint, **{"data": "clothes.parquet", **changes})
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bad(
    place: Path, finished_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `place` has, and runs, stores and data that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("run", "t.zarr", "clothes.parquet"):
        (folder / name).symlink_to(place / name)
    (folder / "encoder").mkdir()
    shutil.copy(place / "run/encoder.safetensors", folder / "encoder")
    (folder / "other.zarr").symlink_to(finished_store())
    shutil.copytree(place / "run", folder / "pixels")
    shutil.copytree(place / "t.zarr", folder / "gone.zarr")
    without_teacher(folder / "gone.zarr")
    pretrain(str(place / "t.zarr"), out=str(folder / "pixels"), objective="pixels",
             **SMALL, overwrite=True)  # fmt: skip
    make_photos(folder / "photos", count=6)
    (folder / "flat").mkdir()
    shutil.copy(next((folder / "photos").rglob("*.jpg")), folder / "flat/a.jpg")
    table = pq.read_table(place / "clothes.parquet")
    pq.write_table(table.replace_schema_metadata(None), folder / "numbers.parquet")
    (folder / "other.json").write_text(json.dumps(OTHER))
    narrow = build_student("vit_tiny_patch16_224", img_size=32, target_width=8, **STUDENT)
    save_file({k: v.contiguous() for k, v in published(narrow).items()},
              folder / "narrow.safetensors")  # fmt: skip
    return folder


def without_teacher(store: Path) -> None:
    """As where its teacher's weights are not."""
    origin = next(store.rglob("origin.json"))
    origin.write_text(origin.read_text().replace("model.safetensors", "gone.safetensors"))


def test_a_teacher_that_is_not_at_hand(bad: Path) -> None:
    """The store's texts are enough: a note says why it is not measured beside."""
    notes = Notes()
    found = zero_shot(str(bad / "run"), cache=str(bad / "gone.zarr"), pictures=0, progress=notes,
                      data=str(bad / "clothes.parquet"))  # fmt: skip
    assert "baseline" not in found
    assert "gone.safetensors" in notes.line("the teacher is not measured beside")
