"""Texts in a store: what the teacher's text tower says of captions and classes, proven by row."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, run_here, tree
from safetensors.torch import load_file, save_file

from milan.core.progress import NoProgress
from milan.errors import CacheError, DataError, TeacherError
from milan.images.manifest import SCHEMA, Manifest
from milan.store.cache import TargetCache
from milan.store.format import GENERATION
from pipeline.config import ExtractConfig
from pipeline.estimate.size import size_of_store
from pipeline.extract import extract_targets
from pipeline.extraction.plan import plan
from pipeline.repair import repair
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.text_tower import TEMPLATES, TextTower
from pipeline.verify import CORRUPT, GOOD, Audit, verify

DEMO = ROOT / "demo" / "teacher"
TEACHER = {
    "teacher": str(DEMO / "config.json"), "pretrained": str(DEMO / "model.safetensors")
}  # fmt: skip
BARE = ("1", "7", "13")  # the keys without a caption
BAD = "4"  # the key whose image is broken, and has a caption


def write_pairs(path: Path, count: int = 24) -> Path:
    """Images with captions in Parquet: three without a text, one broken, classes named."""
    table = pq.read_table(ROOT / "demo/data/test.parquet").slice(0, count)
    images = table["image"].to_pylist()
    captions: list[str | None] = table["caption"].to_pylist()
    for i, image in enumerate(images):
        image["path"] = str(i)
    captions[1], captions[7], captions[13] = None, "", " \t\n"
    images[int(BAD)]["bytes"] = b"no image"
    captions[5] = "very long, " * 40
    columns = {"image": images, "label": table["label"], "caption": captions}
    schema = table.schema.remove_metadata()
    kept = pa.table(columns, schema=schema).replace_schema_metadata(table.schema.metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(kept, path)
    return path


def extract(data: Path, out: Path, **settings: Any) -> TargetCache:
    """A store with texts, opened."""
    fixed = {"views": 2, "shard_size": 8, "executor": "local", "texts": True, "max_bad": "1"}
    extract_targets(str(data), out=str(out), **{**fixed, **TEACHER, **settings})
    return TargetCache(out)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def told(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> TargetCache:
    """24 rows, 21 captions, 2 views, shards of 8 rows; not to be changed."""
    return extract(pairs, tmp_path_factory.mktemp("texts") / "t.zarr")


@pytest.fixture
def copy(told: TargetCache, tmp_path: Path) -> Path:
    shutil.copytree(told.path, tmp_path / "t.zarr")
    return tmp_path / "t.zarr"


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    """The same teacher by open_clip alone: (model, tokenizer)."""
    config = json.loads((DEMO / "config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config)
    weights = load_file(DEMO / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    length = config["text_cfg"]["context_length"]
    return model.eval(), open_clip.SimpleTokenizer(context_length=length)


# --- what is stored -------------------------------------------------------------------------------


@torch.inference_mode()
def test_captions_are_what_open_clip_says(told: TargetCache, clip: tuple[Any, Any]) -> None:
    """Ids to the bit, vectors to rounding, each at the row of its image; a long one keeps its end.

    The broken image's caption is there too: texts are of rows.
    """
    model, tokenizer = clip
    rows = told.captioned
    captions = [told.manifest.table["caption"][row].as_py() for row in rows.tolist()]
    ids = tokenizer(captions)
    got = told.texts(rows)
    assert len(rows) == 21
    np.testing.assert_array_equal(got.ids, ids.numpy())
    expected = model.encode_text(ids, normalize=True).numpy()
    np.testing.assert_allclose(got.features, expected, atol=1e-6)
    assert got.features.dtype == np.float32
    long = captions.index("very long, " * 40)
    assert got.ids[long, -1] == tokenizer.eot_token_id
    assert [told.manifest.key(row).rsplit("/")[-1] for row in told.bad] == [BAD]
    assert set(told.bad) <= set(rows.tolist())
    again = told.texts(rows[::-1].repeat(2))
    np.testing.assert_array_equal(again.features, got.features[::-1].repeat(2, axis=0))


@torch.inference_mode()
def test_classes_are_the_mean_of_their_sentences(told: TargetCache, clip: tuple[Any, Any]) -> None:
    """Sentences of length 1, their mean made of length 1 again; ids kept for each template."""
    model, tokenizer = clip
    found = told.prototypes
    assert found is not None
    assert found.classes == told.manifest.classes
    for i, name in enumerate(found.classes):
        ids = tokenizer([template.format(name) for template in TEMPLATES])
        mean = model.encode_text(ids, normalize=True).mean(dim=0)
        np.testing.assert_array_equal(found.ids[i], ids.numpy())
        np.testing.assert_allclose(found.features[i], (mean / mean.norm()).numpy(), atol=1e-6)


def test_a_row_without_a_caption_is_refused(told: TargetCache) -> None:
    """Never a vector of nothing: not given, not stored, not counted."""
    keys = [told.manifest.key(row).rsplit("/")[-1] for row in range(told.rows)]
    bare = sorted(keys.index(key) for key in BARE)
    assert sorted(set(range(told.rows)) - set(told.captioned.tolist())) == bare
    for row in bare:
        with pytest.raises(CacheError, match=f"row {row} of .* has no caption"):
            told.texts(np.array([0 if row else 1, row]))
    with pytest.raises(IndexError):
        told.texts(np.array([told.rows]))


def test_images_are_what_they_are_without_texts(
    told: TargetCache, pairs: Path, tmp_path: Path
) -> None:
    """Targets to the bit; and a store without texts says that it has none."""
    plain = extract(pairs, tmp_path / "plain.zarr", texts=False)
    rows, views = np.repeat(plain.good_rows(), 2), np.tile([0, 1], len(plain.good_rows()))
    mine, theirs = told.read(rows, views), plain.read(rows, views)
    np.testing.assert_array_equal(mine.codes, theirs.codes)
    np.testing.assert_array_equal(mine.attention, theirs.attention)
    assert (len(plain.captioned), plain.prototypes) == (0, None)
    with pytest.raises(CacheError, match=r"has no texts.*--texts"):
        plain.texts(np.array([0]))
    with pytest.raises(CacheError, match=r"other settings \(texts: without != with\)"):
        extract(pairs, plain.path)


def test_captions_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nulls and blanks of any kind are none; pieces and ranges change nothing."""
    texts = ["a", None, "", "b c", " \t\n", "\u2003", "d"] * 3
    nulls = dict.fromkeys(SCHEMA.names, [None] * len(texts))
    manifest = Manifest(pa.table({**nulls, "caption": texts}, schema=SCHEMA))
    expected = np.array([True, False, False, True, False, False, True] * 3)
    monkeypatch.setattr("milan.images.manifest._PIECE", 4)
    np.testing.assert_array_equal(manifest.captioned(), expected)
    np.testing.assert_array_equal(manifest.captioned(slice(3, 12)), expected[3:12])
    assert manifest.captions(2, 7) == [[], ["b c"], [], [], ["d"]]
    assert manifest.captioned(slice(5, 5)).shape == (0,)


# --- how it grows and goes on ---------------------------------------------------------------------


def test_growth_keeps_texts_with_their_rows(pairs: Path, told: TargetCache, tmp_path: Path) -> None:
    """More views add no text, more rows their own; nothing that was there changes."""
    out = tmp_path / "t.zarr"
    extract(pairs, out, views=1, limit=10)
    before = tree(out)
    grown = extract(pairs, out, views=2, limit=24)
    after = tree(out)
    assert {n: after[n] for n in before if n != "index.json" and not n.endswith(".csv")} == {
        n: data for n, data in before.items() if n != "index.json" and not n.endswith(".csv")
    }
    assert [(g.entry.rows, g.entry.views) for g in grown.generations] == [
        ((0, 10), (0, 1)), ((0, 10), (1, 2)), ((10, 24), (0, 2))
    ]  # fmt: skip
    assert [(g.root / "text").exists() for g in grown.generations] == [True, False, True]
    np.testing.assert_array_equal(grown.captioned, told.captioned)
    mine, theirs = grown.texts(grown.captioned), told.texts(told.captioned)
    np.testing.assert_array_equal(mine.ids, theirs.ids)
    np.testing.assert_allclose(mine.features, theirs.features, atol=1e-6)
    verdict = verify(out, deep=True, audit=Audit(5))
    assert (verdict.code, verdict.checked["texts"], verdict.checked["audited texts"]) == (
        GOOD, 21, 5
    )  # fmt: skip


def test_what_was_lost_is_made_again(copy: Path, pairs: Path) -> None:
    """A run stopped between two shards goes on to the same bytes, texts included."""
    before = tree(copy)
    (copy / "index.json").unlink()
    for name in ("00001.00", "00002.01"):
        (copy / GENERATION / f"records/{name}.json").unlink()
    shutil.rmtree(copy / GENERATION / "text/c/1")
    extract(pairs, copy)
    assert tree(copy) == before


@pytest.mark.parametrize(
    ("name", "said", "shard"),
    [
        ("text/c/1/0", "shard 00001.00: text ", True),
        ("text_ids/c/2/0", "shard 00002.00: text_ids ", True),
        ("prototypes/features/c/0/0", "prototypes/features/c/0/0 is damaged", False),
    ],
)
def test_a_damaged_text_is_never_read(copy: Path, name: str, said: str, shard: bool) -> None:
    """A bit: verify names it, the reader refuses, repair brings the same bytes back."""
    before = tree(copy)
    path = copy / GENERATION / name
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    verdict = verify(copy, deep=True)
    assert verdict.code == CORRUPT
    assert any(said in line for line in verdict.corrupt), verdict.corrupt
    cache = TargetCache(copy)
    with pytest.raises(CacheError):
        _ = cache.texts(cache.captioned) if shard else cache.prototypes
    if shard:
        assert repair(copy).code == GOOD
        assert tree(copy) == before


def test_a_text_that_is_gone_is_missed(copy: Path, pairs: Path) -> None:
    """By the look at files before training, and by the next extraction, which makes it again."""
    TargetCache(copy).check_files()
    before = tree(copy)
    (copy / GENERATION / "text_ids/c/1/0").unlink()
    with pytest.raises(CacheError, match=r"1 files missing .*text_ids/c/1/0"):
        TargetCache(copy).check_files()
    extract(pairs, copy)
    assert tree(copy) == before


def test_texts_of_other_rows_are_refused(copy: Path) -> None:
    """Two rows of a shard exchanged under valid checksums: each row knows its text."""
    path = copy / GENERATION / "text/c/0/0"
    data = path.read_bytes()
    size = 16 * 8 + 4
    table = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2).copy()
    one, two = np.flatnonzero(table[:, 1] != np.uint64(2**64 - 1))[:2]
    table[[one, two]] = table[[two, one]]
    checksum = struct.pack("<I", google_crc32c.value(table.tobytes()))
    path.write_bytes(data[:-size] + table.tobytes() + checksum)
    assert verify(copy, deep=True).code == CORRUPT
    cache = TargetCache(copy)
    with pytest.raises(CacheError, match=f"row {one} differs from the checksum of its record"):
        cache.texts(cache.captioned)


def test_wrong_texts_under_valid_checksums(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker got wrong: lengths show to `--deep`, mixed rows only to the audit."""
    plain = TextTower.features
    for name, wrong in (("long", lambda f: f * 2), ("mixed", lambda f: np.roll(f, 1, axis=0))):
        with monkeypatch.context() as patch:
            patch.setattr(TextTower, "features", lambda self, ids, w=wrong: w(plain(self, ids)))
            extract(pairs, tmp_path / name, views=1)
    verdict = verify(tmp_path / "long", deep=True)
    assert verdict.code == CORRUPT
    assert "texts that are not of length 1" in verdict.corrupt[0]
    assert verify(tmp_path / "mixed", deep=True).code == GOOD
    verdict = verify(tmp_path / "mixed", audit=Audit(24))
    assert verdict.code == CORRUPT
    assert all("the text tower's output differs" in line for line in verdict.corrupt)


def test_the_plan_counts_texts(pairs: Path, tmp_path: Path) -> None:
    """Files and folders exactly; bytes as if every row had a caption (and no image were bad)."""
    config = ExtractConfig(
        str(pairs), out=str(tmp_path / "t.zarr"), views=2, shard_size=8, executor="local",
        texts=True, max_bad="1", **TEACHER,
    )  # fmt: skip
    sizes = size_of_store(plan(config, NoProgress()))
    plain = size_of_store(plan(replace(config, texts=False), NoProgress()))
    extract_targets(config)
    found = [p for p in (tmp_path / "t.zarr").rglob("*") if p.name != "bad-images.csv"]
    files = [path for path in found if path.is_file()]
    assert (sizes.files, sizes.folders) == (len(files), len(found) - len(files))
    assert sizes.total == pytest.approx(sum(f.stat().st_size for f in files), rel=0.04)
    assert sizes.shards - plain.shards == 24 * (64 * 4 + 4 + 24 * 4 + 4) + 3 * 2 * (16 * 8 + 4)


# --- teachers without a text tower ----------------------------------------------------------------


def test_a_teacher_without_texts_is_one_error(
    pairs: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """A ViT of timm; weights or a config of the image tower alone; too small a vocabulary."""
    with pytest.raises(TeacherError, match="timm:vit_tiny_patch16_224 has no text tower"):
        load_teacher(TeacherSpec("timm:vit_tiny_patch16_224", "none", texts=True))
    weights = load_file(DEMO / "model.safetensors")
    half = tmp_path / "visual.safetensors"
    save_file({k: v for k, v in weights.items() if k.startswith("visual.")}, half)
    with pytest.raises(TeacherError, match=r"visual\.safetensors has no text tower"):
        load_teacher(TeacherSpec(TEACHER["teacher"], str(half), texts=True))
    save_file({k: v for k, v in weights.items() if k != "ln_final.bias"}, half)
    with pytest.raises(TeacherError, match=r"do not fit the text tower.*ln_final\.bias"):
        load_teacher(TeacherSpec(TEACHER["teacher"], str(half), texts=True))
    config = json.loads((DEMO / "config.json").read_text())["model_cfg"]
    del config["text_cfg"]
    (tmp_path / "one.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="has no text tower"):
        load_teacher(TeacherSpec(str(tmp_path / "one.json"), str(half), texts=True))
    small = TeacherSpec(teacher_files["teacher"], teacher_files["pretrained"], texts=True)
    with pytest.raises(TeacherError, match=r"ids up to 49,407, its text tower 64"):
        load_teacher(small)


def test_a_tower_in_a_module_of_its_own(tmp_path: Path) -> None:
    """open_clip's other layout (`custom_text`) says the same, from the same file."""
    config = json.loads((DEMO / "config.json").read_text())
    config["model_cfg"]["custom_text"] = True
    (tmp_path / "custom.json").write_text(json.dumps(config))
    one = load_teacher(TeacherSpec(TEACHER["teacher"], TEACHER["pretrained"], texts=True))
    two = load_teacher(
        TeacherSpec(str(tmp_path / "custom.json"), TEACHER["pretrained"], texts=True)
    )
    assert one.texts is not None
    assert two.texts is not None
    ids = one.texts.tokenise(["a dark bag", "two shoes"])
    np.testing.assert_array_equal(one.texts.features(ids), two.texts.features(ids))
    assert one.identity == two.identity


def test_data_without_texts_is_one_error(tmp_path: Path) -> None:
    """Neither captions nor class names: nothing that the tower could be told."""
    image = pq.read_table(ROOT / "demo/data/test.parquet")["image"][0].as_py()["bytes"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(image)
    with pytest.raises(DataError, match="neither captions nor class names"):
        extract(tmp_path / "photos", tmp_path / "t.zarr")


def test_the_command(pairs: Path, tmp_path: Path) -> None:
    """The flag makes them, inspect tells of them."""
    done = run_here(
        "extract-targets", "--data", pairs, "--out", tmp_path / "t.zarr", "--teacher",
        TEACHER["teacher"], "--pretrained", TEACHER["pretrained"], "--views", 1, "--texts",
        "--executor", "local", "--max-bad", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "texts: 21 captions, 10 classes" in done.out + done.err
    told = " ".join(run_here("inspect", tmp_path / "t.zarr").out.split())
    assert "21 captions of at most 24 ids" in told
    again = run_here(
        "extract-targets", "--data", pairs, "--out", tmp_path / "t.zarr", "--teacher",
        "timm:vit_tiny_patch16_224", "--pretrained", "none", "--texts", "--max-bad", 1,
    )  # fmt: skip
    assert again.code == 1
    assert "has no text tower" in again.err


def test_texts_are_read_beside_local_copies(told: TargetCache, tmp_path: Path) -> None:
    """Reading texts brings no shard of views to the local disk."""
    near = TargetCache(told.path)
    near.use_local(tmp_path, 10**9)
    got = near.texts(near.captioned)
    np.testing.assert_array_equal(got.features, told.texts(told.captioned).features)
    assert not list(tmp_path.rglob("c"))
    rows = near.good_rows()
    near.read(rows, rows * 0)
    assert list(tmp_path.rglob("c"))
