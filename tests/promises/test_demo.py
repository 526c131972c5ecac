"""The embedded data and teacher: what they are said to be, and good enough for the demo."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from demo.train_clip import Options, load, normalise, predict, train
from milan.images.decode import decode
from milan.images.manifest import build_manifest
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec

DEMO = ROOT / "demo"
CONFIG, WEIGHTS = DEMO / "teacher/config.json", DEMO / "teacher/model.safetensors"
COUNTS = {"train": 8000, "test": 2000}


@pytest.fixture(scope="module")
def zero_shot() -> ModuleType:
    """demo/zero_shot.py, whose neighbours are plain modules beside it."""
    sys.path.insert(0, str(DEMO))
    try:
        import zero_shot
    finally:
        sys.path.remove(str(DEMO))
    return zero_shot


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """The embedded teacher, by the path that every teacher takes."""
    torch.set_num_threads(1)
    return load_teacher(TeacherSpec(str(CONFIG), str(WEIGHTS), "imagenet"), device="cpu")


def test_its_own_normalisation_is_the_one_it_was_trained_with(teacher: Teacher) -> None:
    """`auto` in params.yaml takes it from the config; a store made with --teacher-norm goes on."""
    own = load_teacher(TeacherSpec(str(CONFIG), str(WEIGHTS)), device="cpu")
    assert own.identity == teacher.identity
    assert own.about["normalisation"] == "own"


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", COUNTS)
def test_the_schema_is_the_hubs(split: str) -> None:
    """image{bytes, path}, label, caption, and class names where Hugging Face puts them."""
    table = pq.read_table(DEMO / "data" / f"{split}.parquet")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("image").type == image
    assert table.schema.field("label").type == pa.int64()
    assert table.schema.field("caption").type == pa.string()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert len(features["label"]["names"]) == 10
    assert table.num_rows == COUNTS[split]
    assert np.bincount(table["label"].to_numpy()).tolist() == [COUNTS[split] // 10] * 10
    paths = table["image"].combine_chunks().field("path").to_pylist()
    assert len(set(paths)) == len(paths)
    assert all(re.fullmatch(rf"{split}/\d{{5}}\.png", path) for path in paths)
    captions = table["caption"].to_pylist()
    assert all(captions)
    assert len(set(captions)) > 300
    assert sum(c.null_count for c in table.columns) == 0


def test_images_decode() -> None:
    """Every hundredth, by the decoder of extraction: 28 x 28, not blank."""
    table = pq.read_table(DEMO / "data/train.parquet", columns=["image"])
    for i in range(0, len(table), 100):
        data = table["image"][i]["bytes"].as_py()
        assert Image.open(io.BytesIO(data)).format == "PNG"
        image = decode(data)
        assert (image.size, image.mode) == ((28, 28), "RGB")
        assert np.asarray(image).std() > 5


def test_the_manifest_knows_classes_and_captions() -> None:
    """The demo goes through the same listing as anyone's Parquet file."""
    manifest = build_manifest(DEMO / "data/train.parquet", seed=0)
    assert len(manifest) == 8000
    assert manifest.classes is not None
    assert "Trouser" in manifest.classes
    assert set(manifest.labels().tolist()) == set(range(10))
    # A shard must not be one class.
    assert len(set(manifest.labels()[:1024].tolist())) == 10


def test_train_and_test_share_no_image() -> None:
    """Or the probe would measure what it was fitted on."""
    seen = {}
    for split in COUNTS:
        table = pq.read_table(DEMO / "data" / f"{split}.parquet", columns=["image"])
        seen[split] = {row["bytes"] for row in table["image"].to_pylist()}
    assert not seen["train"] & seen["test"]


def test_sizes_of_what_is_embedded() -> None:
    """A clone stays small: at most 6 MB of data and 9 MB of weights."""
    data = sum(p.stat().st_size for p in (DEMO / "data").iterdir())
    assert data <= 6_000_000
    assert sum(p.stat().st_size for p in (DEMO / "teacher").iterdir()) <= 9_000_000


# --- teacher --------------------------------------------------------------------------------------


def test_weights_are_half_precision_with_a_text_tower() -> None:
    """A whole CLIP, as open_clip loads it; not the image tower alone."""
    with safe_open(WEIGHTS, framework="pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        keys = set(file.keys())
    assert dtypes == {torch.float16}
    assert {"visual.proj", "token_embedding.weight", "text_projection", "logit_scale"} <= keys


def test_the_teacher_loads_like_any_other(teacher: Teacher) -> None:
    """Targets of the right shape, attention > 0 that is not flat, ImageNet's normalisation."""
    table = pq.read_table(DEMO / "data/test.parquet", columns=["image"])
    images = [decode(table["image"][i]["bytes"].as_py()) for i in range(8)]
    pixels = np.stack([np.asarray(image.resize((28, 28))) for image in images])
    features, attention = teacher.targets(pixels)
    assert features.shape == (8, 50, 64)
    assert attention.shape == (8, 49)
    assert (attention > 0).all()
    assert (attention.max(dim=1).values > 3 / 49).all()
    assert teacher.about["normalisation"] == "imagenet"
    assert not teacher.about["random_weights"]
    tokens = torch.nn.functional.normalize(features, dim=-1)
    # Images differ, and so do the tokens of one image: there is something to predict.
    assert (tokens[0, 0] @ tokens[1:, 0].T).max() < 0.999
    assert (tokens[0, 1:] @ tokens[0, 1:].T).mean() < 0.99


def test_its_image_tower_is_open_clips(teacher: Teacher, zero_shot: ModuleType) -> None:
    """The class token that extraction stores is the image feature of the whole CLIP model."""
    model, _ = load(zero_shot.TEACHER)
    images, _ = zero_shot.read_embedded(DEMO / "data/test.parquet")
    grey = torch.from_numpy(images[:16])
    features, _ = teacher.targets(grey[..., None].expand(-1, -1, -1, 3).numpy())
    with torch.inference_mode():
        expected = model.encode_image(normalise(grey[:, None].float() / 255))
    assert (features[:, 0] - expected).abs().max() <= 1e-4


@pytest.mark.soak
def test_zero_shot_accuracy(zero_shot: ModuleType) -> None:
    """Worth learning from: at least 84 % of the embedded test images, by text prompts alone."""
    model, tokenizer = load(zero_shot.TEACHER)
    images, labels = zero_shot.read_embedded(DEMO / "data/test.parquet")
    found = zero_shot.accuracy(
        model, tokenizer, torch.from_numpy(images), torch.from_numpy(labels.copy())
    )
    assert found >= 0.84


@pytest.mark.soak
def test_training_learns_and_goes_on(tmp_path: Path) -> None:
    """The trainer of such teachers: dark and bright images by their words; a run that was ended
    after an epoch goes on to the same bits."""
    torch.set_num_threads(1)
    vision = {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}
    labels = torch.arange(64) % 2
    noise = torch.randint(0, 60, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (noise + 180 * labels[:, None, None, None]).to(torch.uint8)
    prompts = [["a dark thing."], ["a bright thing."]]

    def run(name: str, epochs_here: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        epochs = 0

        def accuracy(*clip: Any) -> float:
            nonlocal epochs
            if (epochs := epochs + 1) > epochs_here:
                raise KeyboardInterrupt
            return (predict(*clip, prompts, images) == labels).double().mean().item()

        train(
            folder, tmp_path / f"{name}.pt", images,
            lambda rng: [prompts[c][0] for c in labels.tolist()], accuracy,
            Options(epochs=10, whole_epochs=1, batch_size=8, lr=3e-3, threads=1),
        )  # fmt: skip
        return folder / "model.safetensors"

    alone = run("alone", 10)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 5)
    assert (tmp_path / "stopped.pt").exists()
    # Tensor by tensor: safetensors writes its header's metadata in an order that changes.
    there, again = load_file(alone), load_file(run("stopped", 5))
    assert there.keys() == again.keys()
    assert all(torch.equal(there[name], again[name]) for name in there)
    assert not (tmp_path / "stopped.pt").exists()
    assert (predict(*load(alone.parent), prompts, images) == labels).double().mean() > 0.9


# --- provenance -----------------------------------------------------------------------------------


def test_licence_and_provenance() -> None:
    """Data of others comes with its licence; every file says how it was made."""
    licence = (DEMO / "LICENSE-fashion-mnist").read_text()
    assert "Permission is hereby granted, free of charge" in licence
    assert "Zalando" in licence
    readme = (DEMO / "README.md").read_text()
    for told in (
        "dataset-fashion-mnist", "1708.07747", "MIT", "demo/make_data.py", "demo/zero_shot.py",
        "demo/train_teacher.py", "10,000",
    ):  # fmt: skip
        assert told in readme
    assert "@" not in re.sub(r"\S+@\S+\.\S+", "", readme), "a figure was never filled in"
    stated = re.search(r"full test split.*?(\d\d\.\d+)\s*%", readme)
    assert stated, "the accuracy on the full test split is not stated"
    assert float(stated[1]) >= 86
    for path in (DEMO / "data").iterdir():
        assert f"{path.stat().st_size:,}" in readme, f"{path.name} has another size than stated"
    assert f"{WEIGHTS.stat().st_size:,}" in readme


def test_the_scripts_are_there() -> None:
    """What made the files can make them again."""
    for name in (
        "make_data.py", "train_teacher.py", "train_clip.py", "zero_shot.py", "captions.py",
    ):  # fmt: skip
        assert Path(DEMO / name).is_file()
