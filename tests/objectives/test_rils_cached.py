"""Frozen-teacher RILS: its loss by hand, training on a store with texts, and what it says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, Notes, log_of, run_here, tree, weights
from torch.nn import functional as F

import milan
from milan.config import PretrainConfig
from milan.errors import MilanError
from milan.objectives.rils_cached import CachedOutput, CachedSentences
from milan.store.cache import TargetCache
from milan.store.similarity import similarities
from pipeline.extract import extract_targets

DEMO = ROOT / "demo" / "teacher"
RUN: dict[str, Any] = {
    "objective": "rils-cached", "epochs": 2, "batch_size": 8, "num_workers": 0, "lr": 1e-3,
    "micro_batch": 4, "log_every": 1, "held_out": 0.34, "picture_every": 9, "report_to": "none",
    "model_args": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "objective_args": {"milan": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images with captions and classes, as the demo's CLIP sees them; not to be changed."""
    folder = tmp_path_factory.mktemp("told")
    table = pq.read_table(ROOT / "demo/data/test.parquet").slice(0, 24)
    pq.write_table(table, folder / "pairs.parquet")
    extract_targets(
        str(folder / "pairs.parquet"), out=str(folder / "t.zarr"), views=2, shard_size=8,
        executor="local", texts=True, teacher=str(DEMO / "config.json"),
        pretrained=str(DEMO / "model.safetensors"),
    )  # fmt: skip
    return folder / "t.zarr"


def objective(store: Path, **arguments: Any) -> CachedSentences:
    config = PretrainConfig(objective="rils-cached", objective_args=arguments)
    CachedSentences.check(config)
    return CachedSentences(TargetCache(store), masking="random", mask_ratio=0.75, config=config)


def said(count: int = 6, seed: int = 0) -> CachedOutput:
    """Outputs of six images; the last two have the same caption."""
    draw = torch.Generator().manual_seed(seed)
    predicted, target = (torch.randn(count, 3, 64, generator=draw) for _ in range(2))
    whole, texts = (torch.randn(count, 64, generator=draw) for _ in range(2))
    texts[-1] = texts[-2]
    numbers = torch.arange(1, count + 1)
    numbers[-1] = numbers[-2]
    texts = F.normalize(texts, dim=1)
    return CachedOutput(
        predicted.requires_grad_(), target, whole, texts, numbers, torch.ones(count)
    )


@pytest.mark.parametrize("gate", ["none", "class"])
def test_the_loss_is_the_equation(told: Path, gate: str) -> None:
    """Mean KL over the rows of accepted images; sentences are the batch's and the bank's, once."""
    joint = said()
    ours = objective(told, teacher_tau=0.05, student_tau=0.1, gate=gate, draws=5, milan=2)
    loss, parts = ours.joint_loss(joint)
    bank = ours.bank[0]
    sentences = torch.cat([bank, joint.texts[:-1]])
    assert parts["sentences"] == len(sentences) == len(bank) + 5
    units = [F.normalize(x.detach(), dim=-1) for x in (joint.target, joint.predicted)]
    log_t, log_p = (
        F.log_softmax(x @ sentences.T / tau, -1) for x, tau in zip(units, (0.05, 0.1), strict=True)
    )
    kl = (log_t.exp() * (log_t - log_p)).sum(-1)
    accepted = torch.ones(6)
    if gate == "class":
        nearest = (F.normalize(joint.whole, dim=1) @ sentences.T).argmax(1) - len(bank)
        own = torch.tensor([0, 1, 2, 3, 4, 4])
        accepted = (nearest == own).float()
    expected = (kl * accepted[:, None]).sum() / (3 * accepted.sum()).clamp_min(1)
    assert float(parts["recon"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(expected) + 2, rel=1e-5)
    (grad,) = torch.autograd.grad(loss, joint.predicted)
    assert [bool(rows.any()) for rows in grad] == accepted.bool().tolist()


def test_it_trains_and_resumes(told: Path, tmp_path: Path) -> None:
    """Parts in the log; stopped in between, and with other micro-batches, it is the same."""
    notes = Notes()
    milan.pretrain(str(told), out=str(tmp_path / "run"), progress=notes, **RUN)
    for line in log_of(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["recon"] + 0.5 * line["milan"], rel=1e-5)
    assert notes.line("sentences: ")
    assert log_of(tmp_path / "run")[-1]["val_accepted"] == 1
    for steps in (1, None):
        milan.pretrain(str(told), out=str(tmp_path / "parts"), stop_after=steps, **RUN)
    assert weights(tmp_path / "parts") == weights(tmp_path / "run")
    whole = RUN | {"micro_batch": 8}
    milan.pretrain(str(told), out=str(tmp_path / "whole"), **whole)
    one, other = (log_of(tmp_path / name)[-1]["val_loss"] for name in ("run", "whole"))
    assert one == pytest.approx(other, rel=1e-3)
    shutil.rmtree(tmp_path)


@pytest.mark.soak
def test_ranks_train_the_same(told: Path, tmp_path: Path, forked_ranks: None) -> None:
    """Two processes: the figures of one device in micro-batches, with MILAN's loss added, by gate;
    the same sentences are drawn on each."""
    given = RUN | {"epochs": 1, "objective_args": {"milan": 0.5, "gate": "class", "draws": 7}}
    for name, devices in (("one", 1), ("two", 2)):
        milan.pretrain(str(told), out=str(tmp_path / name), devices=devices, **given)
    for one, two in zip(*(log_of(tmp_path / name) for name in ("one", "two")), strict=True):
        for key in one.keys() - {"images_per_second", "wait_share"}:
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), key


def test_temperatures_follow_from_the_store(told: Path) -> None:
    """A third of the spread, and 2.5 times that; doubts where targets would teach little."""
    found = similarities(TargetCache(told))
    ours = objective(told)
    assert ours.teacher_tau == pytest.approx(found.spread / 3, rel=0.05)
    assert ours.student_tau == pytest.approx(2.5 * ours.teacher_tau)
    assert 1 < found.effective(0.01) < found.effective(0.04) < found.effective(1) < found.texts
    assert len(ours.notes()) == 1
    assert "nearly uniform" in objective(told, teacher_tau=10).notes()[1]
    assert "nearly one-hot" in objective(told, teacher_tau=1e-4).notes()[1]
    shown = run_here("inspect", told).out
    assert "cosines to texts" in shown
    assert f"{found.effective(0.04):,.1f} at 0.04" in " ".join(shown.split())


def test_classes_may_be_the_sentences(told: Path) -> None:
    """Ten of them; an image is accepted by its class."""
    ours = objective(told, sentences="classes", gate="class")
    assert ours.by_class
    labels = ours.cache.manifest.labels()
    numbers = ours.bank[1]
    assert len(numbers) == 10
    own = ours._of_class[torch.arange(24)]
    assert [int((numbers == n).nonzero()) for n in own] == labels.tolist()
    assert np.isfinite(ours.bank[0].numpy()).all()


def test_texts_are_added_by_growth(told: Path, tmp_path: Path) -> None:
    """As the error of a store without says: a layer more, no stored byte changes, and a second
    error names the layer, which trains."""
    data, out = told.parent / "pairs.parquet", tmp_path / "t.zarr"
    line: list[Any] = ["extract-targets", "--data", data, "--views", 1, "--executor", "local"]
    line += ["--teacher", DEMO / "config.json", "--pretrained", DEMO / "model.safetensors"]
    assert run_here(*line, "--out", out).code == 0
    before = tree(out)
    with pytest.raises(MilanError, match="has no text features") as error:
        milan.pretrain(str(out), out=str(tmp_path / "run"), **RUN)
    assert f"--texts --extend --out {out}" in error.value.fix
    assert run_here(*line, "--texts", "--extend", "--out", out).code == 0
    after = tree(out)
    # The index names what is there, the lock its owner, and the log goes on.
    changing = {"index.json", ".lock", "extract.log.jsonl"}
    assert all(after[name] == before[name] for name in before.keys() - changing)
    with pytest.raises(MilanError, match="in layer teacher/int8") as error:
        milan.pretrain(str(out), out=str(tmp_path / "run"), **RUN)
    layer = error.value.fix.removeprefix("--layer ")
    milan.pretrain(str(out), out=str(tmp_path / "run"), layer=layer, **RUN | {"epochs": 1})
    assert log_of(tmp_path / "run")[-1]["recon"] > 0


def test_classes_that_are_not_there(told: Path, tmp_path: Path) -> None:
    """Captions alone, and the class prompts are asked for: one line, before the folder is made."""
    table = pq.read_table(told.parent / "pairs.parquet").select(["image", "caption"])
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "pairs.parquet")
    extract_targets(
        str(tmp_path / "pairs.parquet"), out=str(tmp_path / "t.zarr"), views=1, texts=True,
        executor="local", teacher=str(DEMO / "config.json"),
        pretrained=str(DEMO / "model.safetensors"),
    )  # fmt: skip
    given = RUN | {"objective_args": {"sentences": "classes"}}
    with pytest.raises(MilanError, match=r"have no class names.*sentences=captions") as error:
        milan.pretrain(str(tmp_path / "t.zarr"), out=str(tmp_path / "run"), **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective_args": {"row": "all"}}, "unknown argument objective.row.*try: rows"),
        ({"objective_args": {"rows": "some"}}, "objective.rows some; expected: masked or all"),
        ({"objective_args": {"teacher_tau": 0}}, "teacher_tau 0; expected: at least 0.0001"),
        ({"gather": "full"}, "gather with objective rils-cached"),
        ({"cache": "plain"}, "has no text features of a teacher; .*--texts --extend --out"),
    ],
)
def test_what_it_cannot_have(
    told: Path, store: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    """One line, before the run's folder is made."""
    where = store if arguments.get("cache") else told
    settings = RUN | {k: v for k, v in arguments.items() if k != "cache"}
    with pytest.raises(MilanError, match=message) as error:
        milan.pretrain(str(where), out=str(tmp_path / "run"), **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
