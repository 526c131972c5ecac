"""Bad input: each kind ends with one clear line and the right exit code, and nothing is lost."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import struct
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import STUDENT, Ran, last_wins, make_photos, run_here, tree
from PIL import Image


def said(ran: Ran, *words: str, code: int = 1) -> str:
    """The one line of an error: its exit code, its form, and what it must name."""
    assert ran.code == code, ran
    (line,) = ran.err.splitlines()
    assert line.startswith("milan: ")
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
    return line


@pytest.fixture
def extract(teacher_files: dict[str, str], tmp_path: Path) -> Callable[..., Ran]:
    """Extraction into `t.zarr` of an empty working folder; later flags win over earlier ones."""

    def run(*arguments: object) -> Ran:
        own: list[object] = ["--out", "t.zarr", "--executor", "local", "--views", 1]
        for flag, value in teacher_files.items():
            own += [] if f"--{flag}" in arguments else [f"--{flag}", value]
        return run_here(*last_wins("extract-targets", *own, *arguments), cwd=tmp_path)

    return run


@pytest.fixture
def train(store: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Pretraining of a small student from the shared store into `run` of the working folder."""

    def run(*arguments: object) -> Ran:
        sets = [f"model.{k}={v}" for k, v in STUDENT["model_args"].items()]
        sets += [f"decoder.{k}={v}" for k, v in STUDENT["decoder"].items()]
        own = ["--cache", store, "--out", "run", "--epochs", 1, "--batch-size", 8]
        own += ["--num-workers", 0, *(part for s in sets for part in ("--set", s))]
        return run_here(*last_wins("pretrain", *own, *arguments), cwd=tmp_path)

    return run


# --- data that is not there, or is no images ------------------------------------------------------


def test_a_missing_path_lists_where_it_was_looked_for(
    extract: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place: the path itself, then the name below --data-root, $MILAN_DATA or ./data."""
    monkeypatch.delenv("MILAN_DATA", raising=False)
    said(extract("--data", "imagenet"), "looked at: imagenet, data/imagenet", "--data-root")
    said(extract("--data", "imagenet", "--data-root", "/roots"), "/roots/imagenet")
    monkeypatch.setenv("MILAN_DATA", "/elsewhere")
    said(extract("--data", "imagenet"), "/elsewhere/imagenet")
    said(extract("--data", tmp_path / "no such ü"), "no such ü")
    assert not list(tmp_path.iterdir())


def test_folders_without_images(extract: Callable[..., Ran], tmp_path: Path) -> None:
    """What the folder does hold is told: a wrong level of a tree shows itself."""
    empty = tmp_path / "empty"
    empty.mkdir()
    said(extract("--data", empty), "no images in", "it holds nothing", "expected: files ending in")
    (empty / "notes.txt").write_text("no")
    (empty / "archive.zip").write_text("no")
    said(extract("--data", empty), "1 .txt", "1 .zip", ".jpg")
    said(extract("--data", empty / "notes.txt"), "is a file", "expected: a folder of images")
    assert not (tmp_path / "t.zarr").exists()


def test_parquet_of_another_schema(extract: Callable[..., Ran], tmp_path: Path) -> None:
    """The columns found are named beside those expected; a torn file is told as one."""
    pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    said(extract("--data", tmp_path / "a.parquet"), "picture", "label", "image{bytes, path}")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 torn")
    said(extract("--data", tmp_path / "b.parquet"), "b.parquet cannot be read")


def test_duplicate_keys(extract: Callable[..., Ran], tmp_path: Path, photos: Path) -> None:
    """Two images of one name could not be told apart in a record."""
    data = next(photos.rglob("*.jpg")).read_bytes()
    images = [{"bytes": data, "path": name} for name in ("a.jpg", "b.jpg", "a.jpg")]
    pq.write_table(pa.table({"image": images}), tmp_path / "twice.parquet")
    said(extract("--data", tmp_path / "twice.parquet"), "1 keys", "twice.parquet/a.jpg'", "unique")
    assert not (tmp_path / "t.zarr").exists()


def test_names_with_spaces_and_unicode(
    extract: Callable[..., Ran], train: Callable[..., Ran], tmp_path: Path
) -> None:
    """Such names are no bad input at all: through extraction, training, probe and picture."""
    photos = make_photos(tmp_path / "my photos 写真 é", count=8, classes=2)
    assert extract("--data", photos, "--out", "my targets ü.zarr").code == 0
    assert train("--cache", "my targets ü.zarr", "--out", "läufe/a b").code == 0
    assert run_here("linear-probe", "--checkpoint", "läufe/a b", "--data", photos,
                    cwd=tmp_path).code == 0  # fmt: skip
    shown = run_here("visualise", "my targets ü.zarr", "--out", "ü b.png", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert (tmp_path / "ü b.png").exists()


# --- images that cannot be read -------------------------------------------------------------------


def bomb(path: Path, edge: int) -> None:
    """A PNG of a few bytes that says it holds edge x edge pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def test_bad_images_are_told_and_all_others_done(
    extract: Callable[..., Ran], tmp_path: Path, photos: Path
) -> None:
    """Exit 1 without an index, a list with reasons; with --max-bad the same line only finishes."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    whole = next(photos.rglob("*.jpg")).read_bytes()
    (data / "class 0" / "a truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "class 0" / "zero bytes.jpg").write_bytes(b"")
    (data / "class 1" / "text, not image.jpg").write_text("<html>404</html>")
    bomb(data / "class 1" / "bomb.png", 30_000)
    bomb(data / "class 1" / "smaller bomb.png", 14_000)
    pages = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    pages[0].save(data / "class 2" / "film.gif", save_all=True, append_images=pages[1:])
    reasons = {
        "class 0/a truncated.jpg": "truncated",
        "class 0/zero bytes.jpg": "empty",
        "class 1/text, not image.jpg": "not-an-image",
        "class 1/bomb.png": "too-large",
        "class 1/smaller bomb.png": "too-large",
        "class 2/film.gif": "multi-page",
    }
    line = said(
        extract("--data", data),
        "6 of 30 images are rejected", "2 too-large", "all others are done", "bad-images.csv",
        "expected: at most 0", "--max-bad 6",
    )  # fmt: skip
    assert "t.zarr/bad-images.csv" in line
    assert not (tmp_path / "t.zarr/index.json").exists()
    with open(tmp_path / "t.zarr/bad-images.csv", newline="") as file:
        listed = {entry["key"]: entry["reason"].split(":")[0] for entry in csv.DictReader(file)}
    assert listed == reasons

    said(extract("--data", data, "--max-bad", 5), "6 of 30")
    said(extract("--data", data, "--max-bad", "10%"), "at most 3")
    before = tree(tmp_path / "t.zarr/generations")
    done = extract("--data", data, "--max-bad", "20%")
    assert (done.code, done.err) == (0, "")
    assert "6 of" not in done.out
    assert "nothing to do" in done.out
    after = tree(tmp_path / "t.zarr/generations")
    del after["000/shards.parquet"]  # written with the index
    assert after == before
    index = json.loads((tmp_path / "t.zarr/index.json").read_bytes())
    assert index["generations"][0]["bad"] == 6


def test_no_image_can_be_read(extract: Callable[..., Ran], tmp_path: Path) -> None:
    """Even then one line, and a store that training refuses."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"{i}.jpg").write_text("no image")
    said(extract("--data", tmp_path / "data"), "3 of 3 images are rejected (3 not-an-image)")
    assert extract("--data", tmp_path / "data", "--max-bad", "100%").code == 0
    said(run_here("pretrain", "--cache", "t.zarr", cwd=tmp_path), "t.zarr", "no image")
    said(run_here("visualise", "t.zarr", cwd=tmp_path), "t.zarr", "no image")


# --- names and values that do not exist or do not fit ---------------------------------------------


EXTRACT_CASES = {
    "teacher": (("--teacher", "ViT-B-61"), ("unknown teacher 'ViT-B-61'", "try: ", "ViT-B-16")),
    "teacher file": (
        ("--teacher", "none.json", "--pretrained", "none"),
        ("no model config at none.json",),
    ),
    "teacher folder": (
        ("--teacher", "local-dir:none", "--pretrained", "none"),
        ("local-dir:none", "open_clip_config.json"),
    ),
    "weights tag": (
        ("--teacher", "ViT-B-32", "--pretrained", "opnai"),
        ("opnai is neither a file nor a tag", "try: --pretrained openai"),
    ),
    "weights file": (("--pretrained", "none.pt"), ("none.pt is neither a file",)),
    "weights missing": (
        ("--teacher", "ViT-B-32", "--pretrained", ""),
        ("without --pretrained", "openai"),
    ),
    "a ResNet": (
        ("--teacher", "RN50", "--pretrained", "none"),
        ("RN50 cannot give targets", "ViT"),
    ),
    "image size": (
        ("--img-size", "33"),
        ("--img-size 33", "8-pixel patches", "--img-size 32 or 40"),
    ),
    "image size 0": (("--img-size", "0"), ("img_size 0", "at least 1")),
    "image size below 0": (("--img-size", "-32"), ("img_size -32", "at least 1")),
    "norm": (("--teacher-norm", "imagnet"), ("--teacher-norm imagnet", "imagenet or own")),
    "precision": (("--precision", "fp8"), ("--precision fp8", "fp32, bf16 or fp16")),
    "device": (("--device", "gpu"), ("--device gpu", "--device auto")),
    "absent device": (("--device", "cuda:7"), ("--device cuda:7", "--device auto")),
    "codec": (("--codec", "int4"), ("unknown codec 'int4'", "int8")),
    "executor": (("--executor", "dask"), ("executor 'dask'", "one of auto, ray, local")),
    "replicas": (("--replicas", "2"), ("--replicas 2", "--executor ray")),
    "max-bad": (("--max-bad", "few"), ("--max-bad few", "0.1%")),
    "max-bad share": (("--max-bad", "200%"), ("--max-bad 200%",)),
    "max-bad below 0": (("--max-bad", "-1"), ("--max-bad -1",)),
    "views": (("--views", "0"), ("views 0", "at least 1")),
    "batch": (("--batch-size", "0"), ("batch_size 0", "at least 1")),
    "limit": (("--limit", "0"), ("limit 0", "at least 1")),
    "scale": (("--scale", "0.5", "0.2"), ("--scale", "least <= greatest")),
    "scale of 0": (("--scale", "0", "1"), ("scale (0.0, 1.0)", "greater than 0, at most 1")),
    "ratio": (("--ratio", "-1", "1"), ("ratio (-1.0, 1.0)", "greater than 0")),
    "hflip": (("--hflip", "50"), ("hflip 50", "at least 0, at most 1")),
    "a set without value": (("--set", "views"), ("--set views", "key=value")),
    "a value of another type": (("--set", "views=two"), ("views = 'two'", "type int")),
    "params file": (("--params", "none.yaml"), ("no parameter file at none.yaml",)),
}


@pytest.mark.parametrize("case", EXTRACT_CASES)
def test_extraction_refuses(
    case: str, extract: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    """Before the first image: what was given, what is expected, and no store made."""
    arguments, words = EXTRACT_CASES[case]
    said(extract("--data", photos, *arguments), *words)
    assert not list(tmp_path.iterdir())


TRAIN_CASES = {
    "model": (("--model", "vit_bse_patch16_224"), ("unknown model", "vit_base_patch16_224")),
    "a model of another kind": (
        ("--model", "resnet18"),
        ("resnet18 is no plain ViT", "--model vit_base_patch16_224"),
    ),
    "model argument": (("--set", "model.embed=64"), ("unknown model argument", "embed_dim")),
    "heads": (("--set", "model.num_heads=5"), ("vit_base_patch16_224", "num_heads")),
    "model value": (("--set", "model.depth=deep"), ("vit_base_patch16_224", "depth")),
    "patch": (
        ("--set", "model.patch_size=12"),
        ("patches of 12 px, which do not tile 32 px",),
    ),
    "patch value": (("--set", "model.patch_size=big"), ("patch_size", "big")),
    "decoder argument": (("--set", "decoder.width=8"), ("unknown decoder argument", "embed_dim")),
    "decoder heads": (("--set", "decoder.num_heads=3"), ("16 with 3 heads", "decoder.num_heads")),
    "decoder heads 0": (("--set", "decoder.num_heads=0"), ("num_heads",)),
    "decoder value": (("--set", "decoder.embed_dim=wide"), ("embed_dim", "wide")),
    "decoder kind": (("--set", "decoder_kind=unet"), ("'unet'", "prompt or mae")),
    "objective": (("--objective", "pixel"), ("objective 'pixel'", "milan, pixels")),
    "masking": (("--masking", "blocks"), ("masking 'blocks'", "semantic, random")),
    "mask ratio": (("--set", "mask_ratio=0.99"), ("mask ratio 0.99", "at least one visible")),
    "precision": (("--precision", "tf32"), ("precision 'tf32'", "bf16")),
    "device": (("--device", "tpu9"), ("--device tpu9", "--device auto")),
    "resume": (("--resume", "always"), ("resume 'always'", "auto, never")),
    "batch": (
        ("--batch-size", "25"),
        ("batch size 25 with 24 usable images", "--batch-size 24"),
    ),
    "published batch": (("--batch-size", "4096"), ("--batch-size 24",)),
    "batch 0": (("--batch-size", "0"), ("batch_size 0", "at least 1")),
    "micro-batch": (("--set", "micro_batch=0"), ("micro_batch 0", "at least 1")),
    "a run in a bucket": (("--out", "s3://b/run"), ("out 's3://b/run'", "a folder")),
    "epochs": (("--epochs", "0"), ("epochs 0", "at least 1")),
    "warm-up": (("--warmup-epochs", "1"), ("warmup_epochs 1", "less than the epochs")),
    "rate": (("--lr", "-1"), ("lr -1", "greater than 0")),
    "rate 0": (("--lr", "0"), ("lr 0", "greater than 0")),
    "decay": (("--set", "weight_decay=-1"), ("weight_decay -1",)),
    "beta2": (("--set", "beta2=1"), ("beta2 1",)),
    "loader workers": (("--num-workers", "-1"), ("num_workers -1",)),
    "max steps": (("--max-steps", "0"), ("max_steps 0", "at least 1")),
    "data root": (("--data-root", "/none"), ("are not below /none", "--data-root FOLDER")),
}


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_pretraining_refuses(case: str, train: Callable[..., Ran], tmp_path: Path) -> None:
    """Before the first step, and no run's folder made."""
    arguments, words = TRAIN_CASES[case]
    said(train(*arguments), *words)
    assert not list(tmp_path.iterdir())


PROBE_CASES = {
    "no run": (("--checkpoint", "runs/none"), ("runs/none", "encoder.safetensors")),
    "timm name": (("--checkpoint", "timm:vit_bse_patch16_224"), ("unknown timm", "vit_base")),
    "like": (("--checkpoint", "random", "--like", "none"), ("encoder.safetensors at none",)),
    "model": (("--checkpoint", "random", "--model", "vit_bse"), ("unknown model 'vit_bse'",)),
    "device": (("--checkpoint", "random", "--device", "x"), ("--device x",)),
    "batch": (("--checkpoint", "random", "--batch-size", "0"), ("batch_size 0",)),
    "workers": (("--checkpoint", "random", "--num-workers", "-1"), ("num_workers -1",)),
    "crop share": (("--checkpoint", "random", "--crop-share", "2"), ("crop_share 2",)),
    "crop share 0": (("--checkpoint", "random", "--crop-share", "0"), ("crop_share 0",)),
}


@pytest.mark.parametrize("case", PROBE_CASES)
def test_a_probe_refuses(case: str, photos: Path, tmp_path: Path) -> None:
    """Before the first image."""
    arguments, words = PROBE_CASES[case]
    said(run_here("linear-probe", "--data", photos, *arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


# --- stores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--seed", 1), "view_law.seed: 0 != 1"),
        (("--codec", "float16"), 'codec: "int8" != "float16"'),
        (("--scale", 0.3, 1), "view_law.scale"),
        (("--teacher-norm", "imagenet"), "teacher.normalisation.mean"),
        (("--pretrained", "none"), "teacher.weights"),
        (("--shard-size", 16), "shard_size: 8 != 16"),
    ],
)
def test_a_store_of_other_settings_is_not_mixed(
    arguments: tuple, field: str, extract: Callable[..., Ran], store: Path, photos: Path
) -> None:
    """The field that differs is named, the store stays as it is."""
    before = tree(store)
    same = ("--data", photos, "--out", store, "--views", 2, "--shard-size", 8)
    said(extract(*same, *arguments), "other settings", field, "--out another.zarr", "delete")
    assert tree(store) == before


def test_an_incomplete_store_is_not_trained_on(
    train: Callable[..., Ran], store: Path, tmp_path: Path
) -> None:
    """Without its index a store does not count, and the line that completes it is named."""
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    (copy / "index.json").unlink()
    (copy / "generations/000/records/00001.01.json").unlink()
    said(train("--cache", copy), "is incomplete: 5 of 6 shards", "the same extract-targets line")
    shutil.rmtree(copy / "generations/000/attention/c/1")
    shutil.copyfile(store / "index.json", copy / "index.json")
    said(train("--cache", copy), "is damaged", "2 files missing", "attention/c/1")
    (copy / "generations/000/zarr.json").unlink()
    said(train("--cache", copy), "zarr.json")
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_not_trained_on(
    train: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    """Folders of images, files, another's index: each is told for what it is."""
    said(train("--cache", photos), "is not a target cache", "index.json")
    (tmp_path / "file").write_text("x")
    said(train("--cache", tmp_path / "file"), "is not a target cache")
    other = tmp_path / "other"
    other.mkdir()
    for text in ("{}", "[]", "null", '{"format": "other"}', "{torn"):
        (other / "index.json").write_text(text)
        said(train("--cache", other), "index.json")
    (other / "index.json").write_text('{"format": "milan-targets", "version": 99}')
    said(train("--cache", other), "version 99", "pip install --upgrade milan-pretrain")
    assert not (tmp_path / "run").exists()


def test_extraction_into_a_foreign_folder(
    extract: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    """Someone's folder is not taken for a store, and nothing is put into it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    said(extract("--data", photos, "--out", "home"), "other content", "--out another.zarr")
    said(extract("--data", photos, "--out", "home/thesis.tex"), "is a file", "--out")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_run_into_a_foreign_folder(train: Callable[..., Ran], tmp_path: Path) -> None:
    """Files that a run would write are not replaced where there is no run to go on with."""
    home = tmp_path / "home"
    for name in ("metrics.json", "encoder.safetensors", "curves.csv", "log.jsonl"):
        home.mkdir(exist_ok=True)
        (home / name).write_text("precious")
        said(train("--out", "home"), f"home holds {name}", "--out another folder", "--overwrite")
        assert [p.name for p in home.iterdir()] == [name]
        assert (home / name).read_text() == "precious"
        shutil.rmtree(home)


def test_a_finished_run_without_its_checkpoints_is_not_trained_over(
    train: Callable[..., Ran], tmp_path: Path
) -> None:
    """Checkpoints are what people delete to save space; the encoder must outlive it."""
    run = tmp_path / "run"
    assert train().code == 0
    shutil.rmtree(run / "checkpoints")
    before = tree(run)
    said(train(), "holds encoder.safetensors, metrics.json", "--overwrite")
    assert tree(run) == before
    assert train("--overwrite").code == 0


# --- images that changed after extraction ---------------------------------------------------------


@pytest.fixture
def moved(store: Path, photos: Path, tmp_path: Path) -> Path:
    """A copy of the photographs, to be changed; the store is read with it by --data-root."""
    return Path(shutil.copytree(photos, tmp_path / "moved"))


@pytest.mark.parametrize(
    ("change", "workers"),
    [
        ("gone", 0), ("replaced", 0), ("turned", 0), ("torn", 0),
        pytest.param("replaced", 1, marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_changed_images_stop_training(
    change: str, workers: int, moved: Path, train: Callable[..., Ran], photos: Path
) -> None:
    """A student never sees pixels that its targets were not made of; the image is named."""
    image = sorted(moved.rglob("*.jpg"))[5]
    if change == "gone":
        image.unlink()
    elif change == "replaced":
        shutil.copyfile(sorted(moved.rglob("*.jpg"))[6], image)
    elif change == "turned":
        Image.open(image).transpose(Image.Transpose.ROTATE_90).save(image, quality=90)
    else:
        image.write_bytes(image.read_bytes()[:200])
    key = image.relative_to(moved).as_posix()
    line = said(
        train("--data-root", moved, "--num-workers", workers),
        f"image {key!r}", "has changed since extraction", "restore the image",
    )  # fmt: skip
    assert str(moved) in line
    assert "Traceback" not in line


def test_all_images_gone(moved: Path, train: Callable[..., Ran], tmp_path: Path) -> None:
    """A wrong data root is told at the start, with the places looked at."""
    shutil.rmtree(moved)
    said(train("--data-root", moved), "are not below", str(moved), "--data-root FOLDER")
    assert not (tmp_path / "run").exists()


# --- places that cannot be written ----------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_is_refused_before_the_run(
    extract: Callable[..., Ran], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needed and free bytes are named; a smaller plan into the same folder then works."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 9_000, 9_000))
    few = ("--shard-size", 8)
    for dry in ((), ("--dry-run",)):
        said(
            extract("--data", photos, *few, *dry),
            "the store needs",
            "9 KB free",
            "fewer --views",
        )
        assert not (tmp_path / "t.zarr").exists()
    assert extract("--data", photos, *few, "--limit", 3).code == 0


def test_a_store_that_cannot_be_written(
    extract: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    """A read-only place, and a path below a file."""
    (tmp_path / "file").write_text("x")
    for out in ("/proc/t.zarr", "file/t.zarr"):
        said(extract("--data", photos, "--out", out), f"{out} cannot be written", "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("out", ["/proc/run", "/proc/sys", "file/run", "file"])
def test_a_run_that_cannot_be_written(out: str, train: Callable[..., Ran], tmp_path: Path) -> None:
    """Said before the first step, not after the first epoch."""
    (tmp_path / "file").write_text("x")
    said(train("--out", out), f"{out} cannot be written", "--out another folder")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("out", ["/proc/probe.json", "file/probe.json"])
def test_a_probe_that_cannot_be_written(out: str, photos: Path, tmp_path: Path) -> None:
    """Said before hours of features, not after them."""
    (tmp_path / "file").write_text("x")
    model = ("--model", "vit_tiny_patch16_224", "--set", "model.img_size=32")
    ran = run_here(
        "linear-probe", "--checkpoint", "random", *model, "--data", photos, "--out", out,
        cwd=tmp_path,
    )  # fmt: skip
    said(ran, f"{out} cannot be written")
    assert ran.out == ""


def test_a_probe_of_a_run_that_cannot_be_written(
    photos: Path, finished_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metrics would go into the run's folder: that is asked first, too."""
    run = finished_run(epochs=1)

    def refuse(folder: Path) -> None:
        assert folder == run
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("milan.core.atomic.ensure_writable", refuse)
    ran = run_here("knn", "--checkpoint", run, "--data", photos)
    said(ran, "knn.json cannot be written: Read-only", "--out FILE.json elsewhere")
    assert ran.out == ""


def test_a_picture_that_cannot_be_written(store: Path, tmp_path: Path) -> None:
    """Read-only places, and a suffix that no picture has."""
    for out in ("/proc/a.png", "a.nonsense"):
        said(run_here("visualise", store, "--out", out, cwd=tmp_path), out, "cannot be written")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_training(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while a checkpoint is written: one line, the one before stays whole."""
    from milan.training import checkpoint

    assert train("--max-steps", 2).code == 0
    before = tree(tmp_path / "run/checkpoints")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint, "save_file", full)
    said(train(), "No space left on device")
    assert tree(tmp_path / "run/checkpoints") == before
    monkeypatch.undo()
    assert train().code == 0


@pytest.fixture(autouse=True)
def _no_files_in_the_repository() -> Iterator[None]:
    """A refused command must not leave things where the tests were started."""
    before = set(os.listdir())
    yield
    assert set(os.listdir()) == before
