"""A RILS run, frozen: zero-shot by its own text tower, the pooling that it trained, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, run_here
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from milan.core.device import MEAN, STD, normalise
from milan.errors import MilanError
from milan.evaluation.evaluate import evaluate
from milan.images.decode import decode_pixels
from milan.models.encoder import encode
from milan.models.rils import load_rils
from milan.objectives.rils import WEIGHTS
from milan.training.pretrain import pretrain
from pipeline.embed import embed
from pipeline.extract import extract_targets
from pipeline.teachers.text_tower import TEMPLATES
from pipeline.zero_shot import zero_shot

DEMO = ROOT / "demo" / "teacher"
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
         "Bag", "Ankle boot")  # fmt: skip
RUN: dict[str, Any] = {
    "objective": "rils", "epochs": 1, "batch_size": 8, "num_workers": 0, "report_to": "none",
    "model_args": {"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clothes with captions (clothes.parquet), a store of token ids (t.zarr), and a run."""
    folder = tmp_path_factory.mktemp("clothes")
    pq.write_table(pq.read_table(ROOT / "demo/data/test.parquet")[:24], folder / "clothes.parquet")
    extract_targets(str(folder / "clothes.parquet"), out=str(folder / "t.zarr"), targets="none",
                    teacher=str(DEMO / "config.json"), executor="local", shard_size=8)  # fmt: skip
    pretrain(str(folder / "t.zarr"), out=str(folder / "run"), **RUN)
    return folder


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """The 24 clothes, normalised, and the numbers of their classes."""
    table = pq.read_table(ROOT / "demo/data/test.parquet")[:24]
    pixels = np.stack([decode_pixels(row["bytes"]) for row in table["image"].to_pylist()])
    return normalise(torch.from_numpy(pixels), MEAN, STD), torch.tensor(table["label"].to_pylist())


@pytest.mark.parametrize("templates", ["stored", pytest.param("openai", marks=pytest.mark.soak)])
def test_as_the_towers_are_alone(place: Path, templates: str) -> None:
    """Mean of patches, projected, against the mean of each class's sentences; from the loaded file
    with the heads that it was trained with, which weights do not tell."""
    found = zero_shot(str(place / "run"), data=str(place / "clothes.parquet"), crop_share=1.0,
                      templates=templates, pictures=0)  # fmt: skip
    student = load_rils(place / "run" / WEIGHTS)
    assert student.encoder.blocks[0].attn.num_heads == 4
    assert (student.text.shape.heads, student.text.shape.width) == (4, 40)
    assert not student.text.shape.quick_gelu
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    asked = TEMPLATES
    if templates == "openai":
        asked = tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES)
    images, labels = images_and_labels()
    with torch.inference_mode():
        texts = torch.stack([
            F.normalize(student.text(tokenizer([t.format(name) for t in asked])), dim=1).mean(dim=0)
            for name in NAMES
        ])  # fmt: skip
        mean = encode(student.encoder, images)[:, 1:].mean(dim=1) @ student.image_projection
    right = (F.normalize(mean, dim=1) @ F.normalize(texts, dim=1).T).argmax(dim=1) == labels
    assert found["mean_top1"] == pytest.approx(100 * right.double().mean().item(), abs=0.01)
    assert found["token_top1"] is None
    assert "baseline" not in found


def test_the_command_draws_maps(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and a picture in the run's folder; a file by itself, with a tokenizer that is named."""
    monkeypatch.chdir(place)
    ran = run_here("zero-shot", "--checkpoint", "run", "--data", "clothes.parquet", "--pictures", 2)
    assert ran.code == 0, ran.err
    assert (place / "run/zero_shot.png").stat().st_size > 1000
    shutil.copy(place / "run" / WEIGHTS, place / "alone.safetensors")
    given = {"data": "clothes.parquet", "pictures": 0}
    alone = zero_shot("alone.safetensors", teacher=str(DEMO / "config.json"), **given)
    assert alone["mean_top1"] == zero_shot("run", **given)["mean_top1"]


def test_what_its_objective_trained_stands_for_an_image(place: Path) -> None:
    """The mean of patches, unless both are asked for; embeddings still have the class token."""
    given: dict[str, Any] = {"data": str(place / "clothes.parquet"), "features": "none",
                             "baseline": "none"}  # fmt: skip
    run = str(place / "run")
    own = evaluate("knn", run, **given)
    assert (own["features"], own["features_are"]) == (32, "mean of patches")
    both = evaluate("knn", run, pooling="both", **given)
    assert (both["features"], both["features_are"]) == (64, "class token and mean of patches")
    assert evaluate("knn", "random", like=run, **given)["features"] == 32
    found = {}
    for pooling in ("token", "mean"):
        out = place / f"{pooling}.npy"
        embed(run, data=given["data"], out=str(out), pooling=pooling, crop_share=1.0)
        found[pooling] = np.load(out)
    student, (images, _) = load_rils(place / "run" / WEIGHTS), images_and_labels()
    with torch.inference_mode():
        tokens = encode(student.encoder, images).numpy()
    for pooling, wanted in (("token", tokens[:, 0]), ("mean", tokens[:, 1:].mean(axis=1))):
        ordered, expected = (x[np.lexsort(x.T)] for x in (found[pooling], wanted))
        np.testing.assert_allclose(ordered, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpoint", "changes", "expected"),
    [
        ("begun", {}, f"no {WEIGHTS} in begun; expected: a run that has ended"),
        ("old", {}, "does not say how many heads its towers have.*writes it anew"),
        ("run", {"cache": "words.zarr"}, "is not the one that run was trained with"),
        ("small.safetensors", {"teacher": str(DEMO / "config.json")},
         "texts of 24 tokens with ids up to 49,407, and small.safetensors reads 24 of up to 8"),
        ("mixed.safetensors", {}, "not in RILS's published layout"),
        ("random", {"like": "run"}, "does not predict the teacher's features .objective rils."),
        ("run", {"templates": "mine"}, "templates 'mine'; expected: one of stored, openai"),
    ],
)  # fmt: skip
def test_bad_input(
    checkpoint: str, changes: dict[str, Any], expected: str, bad: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line."""
    monkeypatch.chdir(bad)
    with pytest.raises(MilanError, match=expected) as error:
        zero_shot(checkpoint, **{"data": "clothes.parquet", "pictures": 0, **changes})
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bad(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `place` has, and runs, files and a store that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("run", "t.zarr", "clothes.parquet"):
        (folder / name).symlink_to(place / name)
    for name in ("begun", "old"):
        shutil.copytree(place / "run", folder / name)
    (folder / "begun" / WEIGHTS).unlink()
    state = load_file(place / "run" / WEIGHTS)
    save_file(state, folder / "old" / WEIGHTS)
    small = {"token_embedding.weight": state["token_embedding.weight"][:9].clone()}
    save_file(state | small, folder / "small.safetensors")
    wide = torch.zeros(32, 48)  # images in one space, texts in another
    save_file(state | {"image_projection": wide}, folder / "mixed.safetensors")
    # Another vocabulary: ids of its own for the same words.
    config = json.loads((DEMO / "config.json").read_text())
    config["model_cfg"]["text_cfg"]["context_length"] = 16
    (folder / "short.json").write_text(json.dumps(config))
    extract_targets(str(folder / "clothes.parquet"), out=str(folder / "words.zarr"),
                    targets="none", teacher=str(folder / "short.json"),
                    executor="local")  # fmt: skip
    return folder
