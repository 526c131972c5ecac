"""RILS end to end: a store of token ids, training on it, and what it cannot train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from counting import waits_of_a_step
from helpers import ROOT, Notes, log_of, run_here, tree, weights
from safetensors.torch import load_file

import milan
from milan.config import PretrainConfig
from milan.errors import MilanError
from milan.inference.neighbours import neighbours
from milan.models.rils import load_rils, published_state
from milan.objectives.rils import SentenceReconstruction
from milan.reporting.contact_sheet import contact_sheet
from milan.reporting.run_files import read_run
from milan.store.cache import TargetCache
from milan.store.sentences import Sentences
from milan.training.build import resolve_defaults, run_order, student_of, uncaptioned_rows
from milan.training.estimate import estimate_run
from pipeline.extract import extract_targets
from pipeline.verify import GOOD, Audit, verify
from pipeline.zero_shot import zero_shot

DEMO = ROOT / "demo" / "teacher"
CONTEXT = 24
TOKENS: dict[str, Any] = {
    "targets": "none", "teacher": str(DEMO / "config.json"), "views": 2, "scale": (0.5, 1.0),
    "hflip": 0.0, "shard_size": 8, "executor": "local",
}  # fmt: skip
RUN: dict[str, Any] = {
    "objective": "rils", "epochs": 2, "batch_size": 8, "num_workers": 0, "lr": 1e-3,
    "micro_batch": 4,
    "log_every": 1, "held_out": 0.34, "picture_every": 9, "report_to": "none",
    "model_args": {"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 2},
}  # fmt: skip
BARE, LONG, SINGLE = 2, 5, 7
"""Images without a caption, with one that is too long, and with one alone."""


def write_captions(path: Path, change: Callable[[list[Any]], Any] | None = None) -> Path:
    """24 images with two or three captions each, classes named."""
    table = pq.read_table(ROOT / "demo/data/test.parquet").slice(0, 24)
    images = table["image"].to_pylist()
    told: list[Any] = []
    for i, caption in enumerate(table["caption"].to_pylist()):
        images[i]["path"] = str(i)
        told.append([caption, f"number {i}", f"{caption} again"][: 2 + i % 2])
    told[BARE], told[LONG], told[SINGLE] = [" ", None], ["very long, " * 40], ["alone\n"]
    if change:
        change(told)
    columns = {"image": images, "label": table["label"], "caption": told}
    kept = pa.table(columns).replace_schema_metadata(table.schema.metadata)
    pq.write_table(kept, path)
    return path


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions") / "pairs.parquet")


@pytest.fixture(scope="module")
def tokens(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without targets: 24 rows, 2 views; not to be changed."""
    out = tmp_path_factory.mktemp("tokens") / "t.zarr"
    extract_targets(str(captions), out=str(out), **TOKENS)
    return out


def row_of(cache: TargetCache, image: int) -> int:
    return next(r for r in range(cache.rows) if cache.manifest.key(r).endswith(f"/{image}"))


# --- the store ------------------------------------------------------------------------------------


def test_tokens_are_the_tokenizers(tokens: Path, captions: Path) -> None:
    """Of every caption of an image, in its order; a long one keeps its end; verified by row."""
    cache = TargetCache(tokens)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    told = pq.read_table(captions)["caption"].to_pylist()
    found = cache.token_ids(cache.captioned)
    assert found.shape == (23, 3, CONTEXT)
    for row, ids in zip(cache.captioned.tolist(), found, strict=True):
        texts = told[int(cache.manifest.key(row).rsplit("/")[-1])]
        np.testing.assert_array_equal(ids[: len(texts)], tokenizer(texts).numpy())
        assert (ids[len(texts) :] == -1).all()
    long = cache.token_ids(np.array([row_of(cache, LONG)]))[0, 0]
    assert long[-1] == tokenizer.eot_token_id
    assert row_of(cache, BARE) not in cache.captioned
    assert cache.prototypes is not None
    assert cache.prototypes.ids.shape == (10, 7, CONTEXT)
    assert not [name for name in tree(tokens) if "features" in name or "attention" in name]
    assert verify(tokens, deep=True).code == GOOD


def test_captions_are_drawn_by_address(tokens: Path) -> None:
    """Each of an image's captions comes; none that is absent; a bare image has its class's."""
    cache = TargetCache(tokens)
    sentences = Sentences(cache)
    rows = np.arange(24)
    drawn = np.stack([sentences.draw(rows, rows % 2, epoch, seed=3) for epoch in range(30)])
    again = sentences.draw(rows[::-1], rows[::-1] % 2, 7, seed=3)
    np.testing.assert_array_equal(again[::-1], drawn[7])
    assert (drawn.max(axis=2) == 49_407).all()
    for row in rows.tolist():
        if row == row_of(cache, BARE):
            assert cache.prototypes is not None
            known = cache.prototypes.ids[cache.manifest.labels()[row]]
        else:
            known = cache.token_ids(np.array([row]))[0]
        known = {tuple(ids) for ids in known.tolist() if ids[0] >= 0}
        assert {tuple(ids) for ids in drawn[:, row].tolist()} == known
    assert not len(sentences.missing())


def test_tokens_beside_a_teachers_targets(captions: Path, tokens: Path, tmp_path: Path) -> None:
    """--extend adds them as a layer: no stored byte changes, and --layer picks them."""
    out = tmp_path / "t.zarr"
    teacher = {
        "pretrained": str(DEMO / "model.safetensors"), "targets": "teacher", "captions": None
    }  # fmt: skip
    extract_targets(str(captions), out=str(out), **TOKENS | teacher)
    before = tree(out)
    with pytest.raises(MilanError, match="has no texts") as error:
        milan.pretrain(str(out), out=str(tmp_path / "run"), **RUN)
    assert "--targets none --extend" in str(error.value)
    extract_targets(str(captions), out=str(out), extend=True, **TOKENS)
    after = tree(out)
    assert all(after[name] == before[name] for name in before if name != "index.json")
    with pytest.raises(MilanError, match="--layer teacher/none") as error:
        milan.pretrain(str(out), out=str(tmp_path / "run"), **RUN)
    cache = TargetCache(out, layer="teacher/none")
    np.testing.assert_array_equal(
        cache.token_ids(cache.captioned), TargetCache(tokens).token_ids(cache.captioned)
    )
    assert TargetCache(out).read(np.array([0]), np.array([0])).codes is not None


def test_images_without_a_sentence_are_left_out(captions: Path, tmp_path: Path) -> None:
    """Neither captions nor a class: not trained on, not validated, and counted."""
    table = pq.read_table(captions).drop_columns("label").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "pairs.parquet")
    extract_targets(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "t.zarr"), **TOKENS)
    cache = TargetCache(tmp_path / "t.zarr")
    config = PretrainConfig(objective="rils", batch_size=8)
    order, bare = run_order(config, cache), row_of(cache, BARE)
    assert uncaptioned_rows(config, cache).tolist() == [bare]
    assert sorted([*order.train_rows, *order.validation_rows]) == [
        row for row in range(24) if row != bare
    ]
    store = str(tmp_path / "t.zarr")
    for do in (
        lambda: contact_sheet(store, out=tmp_path / "elsewhere.png", among_images=True),
        lambda: neighbours(store, query="0", out=str(tmp_path / "n.png")),
        lambda: verify(store, audit=Audit(2)),
        lambda: zero_shot("teacher", cache=store, data=str(captions)),
    ):
        with pytest.raises(MilanError, match="no targets of a teacher") as error:
            do()
        assert "rils" not in str(error.value)
    bare_data = table.set_column(1, "caption", pa.nulls(24, pa.string()))
    pq.write_table(bare_data, tmp_path / "pairs.parquet")
    with pytest.raises(MilanError, match="neither captions nor class names"):
        extract_targets(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "u.zarr"), **TOKENS)


def test_captions_of_tars_and_json(tmp_path: Path) -> None:
    """Several captions of a sample: `captions` of its .json."""
    import io
    import tarfile

    from milan.images.manifest import build_manifest

    image = pq.read_table(ROOT / "demo/data/test.parquet")["image"][0].as_py()["bytes"]
    said = {"captions": ["one", " ", "two"]}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("0.png", image), ("0.json", json.dumps(said).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    manifest = build_manifest(tmp_path / "a.tar", seed=0)
    assert manifest.captions(0, 1) == [["one", "two"]]
    assert manifest.most_captions() == 2


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one device, two micro-batches a step; not to be changed."""
    out = tmp_path_factory.mktemp("rils") / "run"
    milan.pretrain(str(tokens), out=str(out), **RUN)
    return out


def test_it_trains_and_says_how(run: Path) -> None:
    """Parts of the loss in log and metrics; the student in the published layout; a picture."""
    lines = log_of(run)
    assert len(lines) == read_run(run)["config"]["epochs"] * 2
    for line in lines:
        assert line["loss"] == pytest.approx(line["clip"] + 0.5 * line["recon"], rel=1e-5)
        assert {"accuracy", "accepted", "prototypes", "duplicates"} <= line.keys()
    last = lines[-1]
    assert last["val_loss"] == pytest.approx(last["val_clip"] + 0.5 * last["val_recon"], rel=1e-5)
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["val_loss"] == last["val_loss"]
    student, encoder = load_rils(run / "rils.safetensors"), load_file(run / "encoder.safetensors")
    theirs = student.encoder.state_dict()
    assert theirs.keys() == encoder.keys()
    np.testing.assert_array_equal(
        theirs["blocks.0.attn.proj.weight"], encoder["blocks.0.attn.proj.weight"]
    )
    assert (run / "sheet.png").stat().st_size > 1000
    # The class token is never supervised: it is not what the network says of an image.
    assert milan.load_encoder(str(run)).global_pool == "avg"


def test_resumed_it_is_the_same_run(run: Path, tokens: Path, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch: the same weights, figures and picture."""
    for steps in (3, None):
        milan.pretrain(str(tokens), out=str(tmp_path / "parts"), stop_after=steps, **RUN)
    assert weights(tmp_path / "parts") == weights(run)
    whole = [(folder / "rils.safetensors").read_bytes() for folder in (run, tmp_path / "parts")]
    assert whole[0] == whole[1]
    times = ("images_per_second", "wait_share")
    one, two = (
        [{k: v for k, v in line.items() if k not in times} for line in log_of(folder)]
        for folder in (run, tmp_path / "parts")
    )
    assert one == two


def test_nothing_waits_for_a_gpu(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are compared and told apart on the device."""
    settings = resolve_defaults(PretrainConfig(str(tokens), **RUN), torch.device("cpu"))
    assert waits_of_a_step(settings, TargetCache(tokens), monkeypatch) == {}


@pytest.mark.soak
def test_ranks_train_the_same(run: Path, tokens: Path, tmp_path: Path, forked_ranks: None) -> None:
    """Two processes that take their shares whole: the figures of one device in micro-batches."""
    milan.pretrain(str(tokens), out=str(tmp_path / "two"), devices=2, **RUN)
    for one, two in zip(log_of(run), log_of(tmp_path / "two"), strict=True):
        for name in one.keys() - {"images_per_second", "wait_share"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name


def test_without_a_reconstruction_it_is_plain_clip(tokens: Path, tmp_path: Path) -> None:
    """Contrastive loss alone: no masked pass, a decoder as it was drawn; a picture all the same."""
    given = RUN | {"epochs": 1, "picture_every": 1, "objective_args": {"weight": 0}}
    notes = Notes()
    milan.pretrain(str(tokens), out=str(tmp_path / "clip"), progress=notes, **given)
    assert "plain CLIP" in notes.line("objective.weight=0")
    for line in log_of(tmp_path / "clip"):
        assert line["loss"] == line["clip"]
        assert not {"recon", "prototypes"} & line.keys()
        assert "accuracy" in line
    config = PretrainConfig(cache=str(tokens), **given)
    cache = TargetCache(tokens)
    drawn = published_state(
        student_of(resolve_defaults(config, torch.device("cpu")), cache).state_dict()
    )
    left = load_file(tmp_path / "clip" / "rils.safetensors")
    same = {name for name in left if torch.equal(left[name], drawn[name])}
    assert {n for n in left if "decoder" in n or "mask_token" in n} <= same
    assert not {n for n in left if n.startswith("visual.blocks") and n.endswith("weight")} & same
    assert (tmp_path / "clip/sheet.png").stat().st_size > 1000


def test_the_gather_is_part_of_a_run(run: Path, tokens: Path, tmp_path: Path) -> None:
    """A run does not go on with another one."""
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(MilanError, match="gather: none != full"):
        milan.pretrain(str(tokens), out=str(tmp_path / "run"), gather="full", **RUN)


def test_a_dry_run_times_both_passes(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches are seen twice, the first time without gradient."""
    with_gradient: list[bool] = []
    predict = SentenceReconstruction.predict

    def noted(self: Any, network: Any, batch: Any) -> Any:
        with_gradient.append(torch.is_grad_enabled())
        return predict(self, network, batch)

    monkeypatch.setattr(SentenceReconstruction, "predict", noted)
    told = dict(estimate_run(PretrainConfig(cache=str(tokens), **RUN)))
    assert with_gradient[-8:] == 4 * [False, True]
    assert "forwards twice" in told["a step"]


# --- what it cannot train on ----------------------------------------------------------------------


def _equal(told: list[Any]) -> None:
    told[:] = [["the same"]] * len(told)


STORES: dict[str, tuple[Callable[[list[Any]], Any], dict[str, Any], str]] = {
    "all equal": (_equal, {}, "the captions of .* are all equal"),
}


@pytest.mark.parametrize("case", STORES)
def test_captions_that_teach_nothing(tmp_path: Path, case: str) -> None:
    """Said before a run's folder is made."""
    change, settings, message = STORES[case]
    data = write_captions(tmp_path / "pairs.parquet", change)
    extract_targets(str(data), out=str(tmp_path / "t.zarr"), **TOKENS | {"views": 1})
    with pytest.raises(MilanError, match=message) as error:
        milan.pretrain(str(tmp_path / "t.zarr"), out=str(tmp_path / "run"), **RUN | settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, "at least two captions in a step"),
        ({"batch_size": 2, "devices": 3}, "batch size 2 over 3 ranks"),
        ({"parallel": "fsdp"}, "--parallel ddp"),
        ({"gather": "all"}, "gather 'all'.*one of detached, full"),
        ({"objective_args": {"wieght": 1}}, "unknown argument objective.wieght.*weight"),
        ({"objective_args": {"teacher_tau": 0}}, "teacher_tau 0; expected: at least 0.0001"),
        ({"objective_args": {"normaliser": "mean"}}, "global or local"),
        ({"objective": "milan", "gather": "full"}, "gather with objective milan"),
        ({"objective": "milan"}, "has no targets of a teacher"),
        ({"masking": "semantic"}, "has no targets of a teacher"),
        ({"text_tower": "ViT-B-16-SigLIP"}, "ids up to 49,407, and the text tower ViT-B-16-SigLIP"),
        ({"text_tower": "ViT-B"}, "unknown teacher 'ViT-B'"),
    ],
)
def test_settings_that_cannot_be(
    tokens: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """One line, before the run's folder is made."""
    with pytest.raises(MilanError, match=message) as error:
        milan.pretrain(str(tokens), out=str(tmp_path / "run"), **RUN | settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_commands(captions: Path, tmp_path: Path) -> None:
    """By their flags: a store of the first images, what it says of itself, and one step."""
    out, notes = tmp_path / "t.zarr", Notes()
    line = ["extract-targets", "--data", captions, "--out", out, "--targets", "none"]
    line += ["--teacher", DEMO / "config.json", "--views", "1", "--captions", "2"]
    made = run_here(*line, "--limit", "16", "--executor", "local")
    assert made.code == 0, made.err
    assert "targets: none; views of 28 px" in made.out
    assert "of 15 images up to 2 captions each" in " ".join(run_here("inspect", out).out.split())
    assert "none: views and token ids" in run_here("inspect", out).out
    sets = [f"model.{key}={value}" for key, value in RUN["model_args"].items()]
    trained = run_here(
        "pretrain", "--cache", out, "--out", tmp_path / "run", "--objective", "rils",
        "--gather", "full", "--set", "objective.weight=0.25", "--batch-size", "8", "--epochs", "1",
        "--num-workers", "0",
        "--report-to", "none", *(word for pair in sets for word in ("--set", pair)),
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "text tower" in trained.out
    for line in log_of(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["clip"] + 0.25 * line["recon"], rel=1e-5)
    assert TargetCache(out).token_ids(np.array([0])).shape == (1, 2, CONTEXT)
    assert not notes.lines
