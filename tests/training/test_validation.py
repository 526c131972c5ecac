"""Validation of a run: rows that it never trains on, the k-NN probe, the norm of gradients."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    WATCHED,
    Notes,
    in_raster,
    log_of,
    make_photos,
    rows_seen,
    weights,
)
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import milan
from milan import PretrainConfig
from milan.core.device import MEAN, STD, normalise
from milan.core.distributed import Ranks
from milan.core.rng import mask_noise
from milan.data.dataset import CachedDataset
from milan.data.order import draw_validation_rows, order_of
from milan.data.sampler import Address, Kind
from milan.errors import ConfigError
from milan.evaluation.knn import nearest_neighbours
from milan.models.masking import importance_mask
from milan.store.cache import TargetCache
from milan.training.build import resolve_defaults, student_of
from milan.training.validation import Validation, check_labels
from pipeline.extract import extract_targets


def figures(run: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "wait_share")}
        for line in log_of(run)
    ]


def student_at_the_end(run: Path, store: Path) -> torch.nn.Module:
    """The student of a run's newest checkpoint, in eval mode."""
    config = PretrainConfig(**json.loads((run / "run.json").read_text())["config"])
    settings = resolve_defaults(config, torch.device("cpu"))
    student = student_of(settings, TargetCache(store))
    newest = max((run / "checkpoints").iterdir())
    student.load_state_dict(load_file(newest / "model.safetensors"))
    return student.eval()


@pytest.fixture(scope="module")
def watched(finished_run: Callable[..., Path]) -> Path:
    """An uninterrupted run of WATCHED; not to be changed."""
    return finished_run(**WATCHED)


# --- rows held out --------------------------------------------------------------------------------


def test_held_out_rows_are_judged_and_never_trained_on(
    store: Path, cache: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the student is shown in training, and after every epoch, is told apart by its mode."""
    trained, judged = rows_seen(monkeypatch)
    notes = Notes()
    run = {**WATCHED, "epochs": 3, "probe_every": None, "picture_every": 99}
    milan.pretrain(str(store), out=str(tmp_path), progress=notes, **run)
    held = draw_validation_rows(cache, np.arange(24), seed=0, share=0.34).tolist()
    assert len(held) == 8
    pictured = held + held[:4]  # the first epoch and the last have a sheet
    assert judged == pictured + held + pictured
    assert sorted(trained) == sorted([row for row in range(24) if row not in held] * 3)
    assert notes.line("validation images: ") == "validation images: 8 of 24"


def test_none_held_out(store: Path, tmp_path: Path) -> None:
    """`held_out=0` trains on all and judges by none; a share too small to draw from is told."""
    for share, said in ((0.0, "0 of 24"), (0.01, "none (1.0% of 24 images is fewer")):
        notes = Notes()
        run = {**SMALL, "out": str(tmp_path / str(share)), "held_out": share, "epochs": 1}
        milan.pretrain(str(store), progress=notes, **run)
        assert said in notes.line("validation images: ")
        assert not any("val_loss" in line for line in log_of(tmp_path / str(share)))


def fake_parts(*sizes: int) -> Any:
    """A store of generations that hold so many rows each."""
    ends = np.cumsum(sizes)
    parts = [
        SimpleNamespace(
            spec=SimpleNamespace(first_view=0, first_row=int(end - size)),
            holds_rows=lambda rows, first=end - size, end=end: (rows >= first) & (rows < end),
        )
        for size, end in zip(sizes, ends, strict=True)
    ]
    return SimpleNamespace(generations=parts)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_the_share_is_honoured(share: float) -> None:
    """Up to a multiple of eight; other seeds draw other rows; none twice."""
    good = np.arange(10_000)
    held = draw_validation_rows(fake_parts(10_000), good, seed=0, share=share)
    assert len(held) == int(share * 10_000) // 8 * 8
    assert len(np.unique(held)) == len(held)
    assert np.array_equal(held, draw_validation_rows(fake_parts(10_000), good, seed=0, share=share))
    other = draw_validation_rows(fake_parts(10_000), good, seed=1, share=share)
    assert not np.array_equal(held, other)
    # Drawn from everywhere: a store may lie sorted by class.
    assert abs(held.mean() - 5000) < 4 * 2900 / math.sqrt(len(held))


def test_a_row_keeps_its_role_when_the_store_grows(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Of what is added a share is held out besides; nothing changes sides."""
    path, data = tmp_path / "t.zarr", make_photos(tmp_path / "data", count=40, seed=3)
    settings = {"views": 1, "shard_size": 8, "executor": "local", **teacher_files}
    held = []
    for limit, views in ((20, 1), (40, 1), (40, 2)):
        extract_targets(str(data), out=str(path), limit=limit, **settings | {"views": views})
        order = order_of(TargetCache(path), seed=0, batch_size=8, held_out=0.4)
        assert not set(order.validation_rows) & set(order.train_rows)
        assert len(order.validation_rows) + len(order.train_rows) == limit
        held.append(set(order.validation_rows.tolist()))
    assert [len(rows) for rows in held] == [8, 16, 16]
    assert held[1] & set(range(20)) == held[0]
    assert held[2] == held[1]


def test_validation_is_what_it_says(watched: Path, store: Path, cache: TargetCache) -> None:
    """The last line's loss and cosine, computed here from the last checkpoint, image by image."""
    student = student_at_the_end(watched, store)
    dataset = CachedDataset(cache)
    held = draw_validation_rows(cache, np.arange(24), seed=0, share=0.34)
    losses, cosines = [], []
    for row in held:
        rows, views = np.array([row]), np.array([0])
        targets = cache.read(rows, views)
        scale = torch.from_numpy(targets.scale)
        features = cache.codec.decode(torch.from_numpy(targets.codes), scale)
        noise = mask_noise(0, np.array([1 << 32]), rows, views, 16)
        attention = torch.from_numpy(targets.attention)
        mask = importance_mask(attention, torch.from_numpy(noise), visible=4)
        images = normalise(torch.from_numpy(dataset.pixels(rows, views)), MEAN, STD)
        with torch.no_grad():
            said = in_raster(student(images, mask), mask)
        cosine = F.cosine_similarity(said, features, dim=-1)[0]
        losses.append(float((2 - 2 * cosine).mean()))
        cosines.append(float(cosine[1:][mask.masked[0]].mean()))
    last = log_of(watched)[-1]
    assert last["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert last["val_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    metrics = json.loads((watched / "metrics.json").read_text())
    assert metrics["val_loss"] == last["val_loss"]


def test_figures_are_read_at_the_end() -> None:
    """Reading one waits for a GPU: no batch is asked for later because of it."""
    seen: list[str] = []

    class Value:
        def __float__(self) -> float:
            seen.append("read")
            return 0.5

    def batches() -> Iterator[Any]:
        while True:
            seen.append("batch")
            yield None

    rows = np.arange(2)
    address = Address(Kind.VALIDATION, 0, rows, np.zeros_like(rows))
    plan: Any = SimpleNamespace(
        addresses=lambda epoch: 3 * [address],
        config=SimpleNamespace(probe_every=None),
        compared=None,
        ranks=Ranks(),
    )
    objective: Any = SimpleNamespace(
        predict=lambda student, batch: None, metrics=lambda prediction: {"loss": Value()}
    )
    nothing: Any = None
    validation = Validation(plan, nothing, objective, nothing, torch.device("cpu"), "fp32")
    assert validation(0, batches()) == ({"val_loss": 0.5}, {})
    assert seen == 3 * ["batch"] + 3 * ["read"]


def test_validation_falls(watched: Path) -> None:
    """On rows never trained on: a tenth at least in 8 epochs, once each, and the cosine rises."""
    judged = [line for line in log_of(watched) if "val_loss" in line]
    assert [line["step"] for line in judged] == list(range(2, 17, 2))
    assert judged[-1]["val_loss"] < 0.9 * judged[0]["val_loss"]
    assert judged[-1]["val_cosine"] > judged[0]["val_cosine"]


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (7, 1)])
def test_resumed_it_is_judged_alike(
    stop: int, workers: int, watched: Path, store: Path, tmp_path: Path
) -> None:
    """Cut at the end of an epoch, and within one: the same lines, weights, pictures."""
    again = {**WATCHED, "out": str(tmp_path), "num_workers": workers}
    milan.pretrain(str(store), stop_after=stop, **again)
    milan.pretrain(str(store), **again)
    lines, cut = figures(tmp_path), [line for line in figures(tmp_path) if line["step"] == stop]
    expected = figures(watched)
    if stop % 2:  # a call's end speaks, where an epoch's did anyway
        lines.remove(cut[0])
        after = next(i for i, line in enumerate(lines) if line["step"] > stop)
        assert lines.pop(after).keys() == expected.pop(after).keys()
    assert lines == expected
    assert weights(tmp_path) == weights(watched)
    assert (tmp_path / "sheet.png").read_bytes() == (watched / "sheet.png").read_bytes()


FSDP = {
    "parallel": "fsdp", "checkpoint_activations": True, "clip_grad": 0.5, "on_nonfinite": "skip",
}  # fmt: skip


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"micro_batch": 1}, id="ddp"),
        pytest.param(FSDP, id="fsdp"),
    ],
)
@pytest.mark.soak
def test_three_ranks_judge_as_one(more: dict[str, Any], store: Path, tmp_path: Path) -> None:
    """Eight held-out rows over three ranks, of which one repeats a row: the figures of one."""
    run = {**WATCHED, "epochs": 8, "batch_size": 6, "clip_grad": more.get("clip_grad")}
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    milan.pretrain(str(store), stop_after=6, out=str(alone), **run)
    milan.pretrain(str(store), stop_after=6, out=str(ranks), devices=3, **run | more)
    ours, theirs = log_of(ranks), log_of(alone)
    assert len(ours) == len(theirs) > 2
    for line, expected in zip(ours, theirs, strict=True):
        assert line["step"] == expected["step"]
        for name in ("loss", "val_loss", "val_cosine", "grad_norm"):
            assert line.get(name) == pytest.approx(expected.get(name), rel=1e-4), name
        assert line.get("knn_top1") == expected.get("knn_top1")
    assert "knn_top1" in ours[-1]
    pictures = (np.asarray(Image.open(run / "sheet.png"), float) for run in (ranks, alone))
    assert np.abs(np.subtract(*pictures)).mean() < 1


# --- the k-NN probe -------------------------------------------------------------------------------


def test_neighbours_vote() -> None:
    """Against a loop: the 20 nearest by cosine, weights exp(cosine / 0.07)."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(5, 12))
    labels, truth = draw.integers(0, 5, 90), draw.integers(0, 5, 40)
    known = centres[labels] + 1.6 * draw.normal(size=(90, 12))
    asked = centres[truth] + 1.6 * draw.normal(size=(40, 12))
    right = 0
    for point, label in zip(asked, truth, strict=True):
        cosines = known @ point / np.linalg.norm(known, axis=1) / np.linalg.norm(point)
        votes = np.zeros(5)
        for i in np.argsort(-cosines)[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        right += int(votes.argmax() == label)
    tensors = [torch.from_numpy(a) for a in (known, labels, asked, truth)]
    tensors[0], tensors[2] = tensors[0].float(), tensors[2].float()
    assert nearest_neighbours(*tensors) == right
    assert 20 < right / 40 * 100 < 100
    far = [t if t.is_floating_point() else t * 400_000_000 for t in tensors]  # any class numbers
    assert nearest_neighbours(*far) == nearest_neighbours(*tensors)


def test_the_probe_is_what_it_says(
    watched: Path, store: Path, cache: TargetCache, tmp_path: Path
) -> None:
    """Every third epoch, and by labels: computed here from the student of that epoch."""
    probed = [line for line in log_of(watched) if "knn_top1" in line]
    assert [line["step"] for line in probed] == [6, 12]
    notes = Notes()
    run = {**WATCHED, "out": str(tmp_path), "progress": notes}
    milan.pretrain(str(store), stop_after=6, **run)
    assert notes.line("k-NN probe: 8 validation images of 3 classes: chance is")
    assert notes.line("k-NN probe: 20 neighbours vote of 16 images")
    student, dataset = student_at_the_end(tmp_path, store), CachedDataset(cache)
    held = draw_validation_rows(cache, np.arange(24), seed=0, share=0.34)
    rows = np.concatenate([np.setdiff1d(np.arange(24), held), held])
    with torch.no_grad():
        pixels = torch.from_numpy(dataset.pixels(rows, np.zeros_like(rows)))
        features = F.normalize(student.pooled_features(normalise(pixels, MEAN, STD)), dim=1).numpy()
    labels = np.array(cache.manifest.labels())[rows]
    cosines = features[16:] @ features[:16].T
    votes = np.stack([np.exp(cosines / 0.07)[:, labels[:16] == c].sum(1) for c in range(3)], 1)
    right = (votes.argmax(1) == labels[16:]).mean()
    assert probed[0]["knn_top1"] == pytest.approx(100 * right)


def test_copies_among_the_images_of_a_probe(
    cache: TargetCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation images that the bank holds too, by their bytes, are counted."""
    rows = np.array([20, 3, 9])
    digests = cache.content_digests(rows)
    assert digests == [cache.content_digest(row, 0) for row in rows.tolist()]
    order = order_of(cache, seed=0, batch_size=8, held_out=0.34)
    config = PretrainConfig(probe_every=1)
    assert not any(
        "same bytes" in doubt for doubt in check_labels(CachedDataset(cache), order, config)
    )
    copies = {int(row): "copy" for row in (*order.validation_rows[:2], order.train_rows[0])}
    monkeypatch.setattr(
        TargetCache,
        "content_digests",
        lambda _, rows: [copies.get(r, str(r)) for r in rows.tolist()],
    )
    found = check_labels(CachedDataset(cache), order, config)
    assert any(doubt.startswith("k-NN probe: 2 of 8 validation images are tr") for doubt in found)


def test_a_probe_wants_labels(
    photos: Path, store: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """And rows to ask for; said before anything is made, or an old run replaced."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:24]):
        shutil.copy(path, flat / f"{i}.jpg")
    settings = {"views": 1, "shard_size": 8, "executor": "local", **teacher_files}
    extract_targets(str(flat), out=str(tmp_path / "t.zarr"), **settings)
    run = {**SMALL, "out": str(tmp_path / "run"), "probe_every": 1}
    for cache, share in ((tmp_path / "t.zarr", 0.4), (store, 0.0)):
        with pytest.raises(ConfigError, match="probe_every without labels") as error:
            milan.pretrain(str(cache), held_out=share, **run)
        assert "probe_every=null" in error.value.fix
        assert not (tmp_path / "run").exists()


# --- gradients ------------------------------------------------------------------------------------


def test_the_gradients_norm(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all gradients together, as it was before clipping; what is applied is clipped."""
    applied: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *arguments: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        applied.append(float(torch.cat([g.flatten() for g in grads]).double().norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run = {**SMALL, "log_every": 1, "epochs": 2}
    milan.pretrain(str(store), **{**run, "out": str(tmp_path / "free")})
    norms = [line["grad_norm"] for line in log_of(tmp_path / "free")]
    assert norms == pytest.approx(applied, rel=1e-5)
    assert max(norms) > 0.05
    applied.clear()
    milan.pretrain(str(store), clip_grad=0.01, **{**run, "out": str(tmp_path / "clipped")})
    clipped = [line["grad_norm"] for line in log_of(tmp_path / "clipped")]
    assert clipped[0] == norms[0]
    assert applied == pytest.approx([0.01] * 6, rel=1e-3)
    assert weights(tmp_path / "free")["model"] != weights(tmp_path / "clipped")["model"]
