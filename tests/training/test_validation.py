"""How a run is watched: held-out rows, the k-NN probe, the log and those it reports to."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, Notes, log_of, make_photos, pretrain_line, rows_seen, tree, weights
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import milan
from milan import PretrainConfig
from milan.core.device import MEAN, STD, denormalise, normalise
from milan.core.rng import mask_noise
from milan.data.dataset import CachedDataset
from milan.data.order import draw_validation_rows, order_of
from milan.errors import ConfigError
from milan.evaluation.knn import nearest_neighbours
from milan.models.masking import importance_mask
from milan.objectives.pixels import patchify, pixel_regression, unpatchify_prediction
from milan.reporting import panels, trackers
from milan.reporting.panels import SheetInputs
from milan.store.cache import TargetCache
from milan.training import checkpoint
from milan.training.build import resolve_defaults, student_of
from pipeline.extract import extract_targets

WATCHED: dict[str, Any] = {
    **SMALL, "epochs": 8, "lr": 3e-3, "held_out": 0.34, "probe_every": 3, "picture_every": 4,
}  # fmt: skip
"""8 of the 24 images are held out: 2 steps an epoch, 16 in all."""


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
            said = student(images, mask)
        cosine = F.cosine_similarity(said, features, dim=-1)[0]
        losses.append(float((2 - 2 * cosine).mean()))
        cosines.append(float(cosine[1:][mask.masked[0]].mean()))
    last = log_of(watched)[-1]
    assert last["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert last["val_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    metrics = json.loads((watched / "metrics.json").read_text())
    assert metrics["val_loss"] == last["val_loss"]


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
        pytest.param({"micro_batch": 1}, id="ddp", marks=pytest.mark.soak),
        pytest.param(FSDP, id="fsdp"),
    ],
)
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
    assert nearest_neighbours(*tensors) == pytest.approx(100 * right / 40)
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


# --- files ----------------------------------------------------------------------------------------


def curves_of(run: Path) -> list[dict[str, str]]:
    with open(run / "curves.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_alone_gives_the_curves(watched: Path, store: Path, tmp_path: Path) -> None:
    """Deleted curves come back, of a run that goes on and of one that is finished."""
    run = tmp_path / "run"
    milan.pretrain(str(store), stop_after=9, **{**WATCHED, "out": str(run)})
    (run / "curves.csv").unlink()
    milan.pretrain(str(store), stop_after=1, **{**WATCHED, "out": str(run)})
    lines = log_of(run)
    rows = curves_of(run)
    assert [{k: str(v) for k, v in line.items()} for line in lines] == [
        {k: v for k, v in row.items() if v} for row in rows
    ]
    assert {"val_loss", "val_cosine", "knn_top1"} <= rows[0].keys()
    done = tmp_path / "done"
    shutil.copytree(watched, done)
    (done / "curves.csv").unlink()
    milan.pretrain(str(store), **{**WATCHED, "out": str(done)})
    assert (done / "curves.csv").read_bytes() == (watched / "curves.csv").read_bytes()


def test_a_checkpoint_by_the_clock(store: Path, tmp_path: Path) -> None:
    """`save_minutes` besides `save_every`."""
    run = {**SMALL, "out": str(tmp_path), "epochs": 1, "save_every": 1000, "keep": 9}
    milan.pretrain(str(store), save_minutes=1e-6, **run)
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (1, 2, 3)]


# --- pictures -------------------------------------------------------------------------------------


def board_of(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), {"images": 0})
    board.Reload()
    return board


def test_a_sheet_every_so_often(watched: Path) -> None:
    """After the first epoch, every fourth, and the last; the newest lies in the run's folder."""
    events = board_of(watched).Images("sheet")
    assert [event.step for event in events] == [2, 10, 16]
    shown = [np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events]
    assert np.array_equal(shown[-1], np.asarray(Image.open(watched / "sheet.png")))
    assert not np.array_equal(shown[0], shown[-1])
    assert not panels_of(shown[0])[0].std() < 10


def panels_of(page: np.ndarray, size: int = 32, columns: int = 5, rows: int = 4) -> np.ndarray:
    """[columns, rows, size, size, 3] of a sheet."""
    zoom = panels.zoom_of(size)
    edge, top = size * zoom, panels.MARGIN + 3 * panels.LINE
    step = edge + panels.GAP
    body = page[top:, panels.MARGIN :]
    found = [
        [body[y * (panels.LINE + step) :, x * step :][:edge:zoom, :edge:zoom] for y in range(rows)]
        for x in range(columns)
    ]
    return np.array(found)


def test_what_a_sheet_shows() -> None:
    """The view, heat where attention is, grey where nothing is seen, and what is the same in the
    same colours."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    attention = np.full((3, 16), 0.01)
    attention[:, 6] = 0.9
    hidden = draw.random((3, 16)) < 0.75
    features = draw.normal(size=(3, 16, 12))
    said = features * draw.uniform(0.5, 2, (3, 16, 1))  # only directions count
    said[2, 15] *= -1
    shown = SheetInputs(np.arange(3), pixels, attention, hidden, features, said)
    columns = panels.sheet_of_run(shown, None)
    page = panels.draw_page("", columns, ["a", "b", "c"])
    view, heat, seen, theirs, ours = panels_of(page, rows=3)
    assert [column.name for column in columns] == [
        "view", "attention", "visible patches", "features", "prediction"
    ]  # fmt: skip
    assert np.array_equal(view, pixels)
    patches = heat.reshape(3, 4, 8, 4, 8, 3).mean(axis=(2, 4, 5)).reshape(3, 16)
    assert (patches.argmax(axis=1) == 6).all()
    grey = hidden.reshape(3, 4, 4).repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(seen[~grey], pixels[~grey])
    assert (seen[grey] == 128).all()
    differ = (theirs != ours).any(axis=-1)
    assert np.argwhere(differ.any(axis=(1, 2))).tolist() == [[2]]
    assert differ[2, 24:, 24:].all()
    assert not differ[2, :24].any()


def test_pixels_are_painted(store: Path, tmp_path: Path) -> None:
    """A student of pixels is shown by what it paints: a perfect one paints the image."""
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    images = normalise(pixels, MEAN, STD)
    patches = patchify(images, 8)
    deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    perfect = (patches - patches.mean(dim=-1, keepdim=True)) / deviation
    perfect = torch.cat([torch.zeros(2, 1, 192), perfect], dim=1)
    hidden = torch.ones(2, 16, dtype=torch.bool)
    assert float(pixel_regression(perfect, images, hidden, patch=8)) < 1e-10
    again = denormalise(unpatchify_prediction(perfect, images, patch=8), MEAN, STD)
    assert torch.equal(again, pixels)
    run = {**SMALL, "out": str(tmp_path), "epochs": 1, "objective": "pixels"}
    milan.pretrain(str(store), **run)  # nothing is held out: training rows are shown
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    view, _, _, said = panels_of(page, columns=4)
    rows = np.arange(4)
    expected = CachedDataset(TargetCache(store)).pixels(rows, np.zeros_like(rows))
    assert np.array_equal(view, expected)
    assert said.std() > 5


# --- reporters ------------------------------------------------------------------------------------


def reported(store: Path, run: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """WATCHED cut twice, and once killed behind its checkpoint: its log speaks of more steps."""
    settings = {**WATCHED, "out": str(run), "report_to": to, "log_every": 1}
    milan.pretrain(str(store), stop_after=5, **settings)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            milan.pretrain(str(store), stop_after=4, **settings)
    assert log_of(run)[-1]["step"] == 9
    milan.pretrain(str(store), **settings)
    assert [line["step"] for line in log_of(run)] == list(range(1, 17))


def test_tensorboard_catches_up(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step once after a kill; a deleted folder is made of the log."""
    reported(store, tmp_path, "tensorboard", monkeypatch)
    lines = log_of(tmp_path)
    events = board_of(tmp_path).Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 17))
    run = tmp_path / "again"
    settings = {**WATCHED, "out": str(run)}
    milan.pretrain(str(store), stop_after=9, **settings)
    shutil.rmtree(run / "tensorboard")
    milan.pretrain(str(store), stop_after=1, **settings)
    lines = log_of(run)
    events = board_of(run).Scalars("val/loss")
    assert [event.step for event in events] == [x["step"] for x in lines if "val_loss" in x]
    tags = board_of(run).Tags()["scalars"]
    assert {t for t in tags if "val" in t} == {"val/loss", "val/cosine", "val/knn_top1"} & {*tags}
    assert not [tag for tag in tags if tag.startswith(("train/val", "train/knn"))]


def test_mlflow(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in a real database beside the folder; each step once, settings and pictures."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    reported(store, tmp_path / "run", "mlflow", monkeypatch)
    about = json.loads((tmp_path / "run/run.json").read_text())
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "milan"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == about["reported"]["mlflow"]
    assert found.data.tags["milan.id"] == about["id"]
    assert (found.info.status, found.data.params["lr"]) == ("FINISHED", "0.003")
    lines = log_of(tmp_path / "run")
    for name in ("loss", "val_loss", "knn_top1"):
        history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, name)}
        assert history == {line["step"]: line[name] for line in lines if name in line}
        assert len(client.get_metric_history(found.info.run_id, name)) == len(history)
    pictures = [f.path for f in client.list_artifacts(found.info.run_id)]
    assert pictures == [f"sheet-{step:08d}.png" for step in (2, 10, 16)]


@pytest.mark.parametrize(("failing", "later"), [(range(5, 9), 0.0), (range(5, 6), 60.0)])
def test_a_server_that_is_away(
    failing: range, later: float, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not end with its reporter: what was not taken is said later, or in the end."""
    tracking = pytest.importorskip("mlflow.tracking")
    from mlflow.exceptions import MlflowException

    log_batch, count = tracking.MlflowClient.log_batch, 0

    def flaky(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count in failing:
            raise MlflowException("away")
        return log_batch(self, *arguments, **more)

    monkeypatch.setattr(tracking.MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(trackers, "_LATER", later)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/own.db")
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts of a database that says nothing else
    milan.pretrain(str(store), out=str(tmp_path / "run"), report_to="mlflow", **WATCHED)
    told = json.loads((tmp_path / "run/run.json").read_text())["reported"]["mlflow"]
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/own.db")
    steps = sorted(m.step for m in client.get_metric_history(told, "loss"))
    assert steps == [line["step"] for line in log_of(tmp_path / "run")]


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block is filled up
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def test_wandb_offline(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call leaves a part, all of one id; each step is in one of them, or said alike."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    reported(store, tmp_path, "wandb", monkeypatch)
    about = json.loads((tmp_path / "run.json").read_text())
    parts = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {part.stem for part in parts} == {f"run-{about['id']}"}
    said: dict[int, dict[str, Any]] = {}
    settings = {}
    for part in parts:
        for data in records_of(part):
            record = Record()
            record.ParseFromString(data)
            for item in record.run.config.update:
                settings[item.key] = json.loads(item.value_json)
            values = {
                (i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item
            }
            if "loss" in values:
                assert said.setdefault(record.history.step.num, values)["loss"] == values["loss"]
    lines = {line["step"]: line for line in log_of(tmp_path)}
    assert said.keys() == lines.keys()
    for step, line in lines.items():
        assert said[step]["loss"] == pytest.approx(line["loss"])
    assert settings["lr"] == 0.003


def test_wandb_asks_nothing(store: Path, tmp_path: Path) -> None:
    """Without credentials, and on a terminal: one error that names the way out, no question.

    Nothing is lost either: the run that was to be replaced is what it was.
    """
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    milan.pretrain(str(store), out=str(run), stop_after=1, **SMALL)
    before = tree(run)
    left = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "COLUMNS": "500"}
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        pretrain_line(store, run, "--report-to", "wandb", "--overwrite", "--seed", 1),
        stdin=theirs, stdout=theirs, stderr=theirs, env=left | home,
    )  # fmt: skip
    os.close(theirs)
    patience = Timer(60, process.kill)  # a question would be waited for
    patience.start()
    said = b""
    with suppress(OSError):  # how a terminal ends
        while part := os.read(ours, 65536):
            said += part
    patience.cancel()
    os.close(ours)
    assert process.wait() == 1
    (line,) = [x for x in said.decode().splitlines() if x.startswith("milan: report_to wandb")]
    assert "WANDB_API_KEY" in line
    assert "try: WANDB_MODE=offline" in line
    assert tree(run) == before


def test_a_server_that_never_answers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the run that was to be replaced is."""
    pytest.importorskip("mlflow")
    run = tmp_path / "run"
    milan.pretrain(str(store), out=str(run), stop_after=1, **SMALL)
    before = tree(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    another = {**SMALL, "seed": 1, "out": str(run), "report_to": "mlflow"}
    with pytest.raises(ConfigError, match="report_to mlflow"):
        milan.pretrain(str(store), overwrite=True, **another)
    assert tree(run) == before


def test_reporters_that_are_not_here(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown, or not installed: said before anything is made."""
    run = {**WATCHED, "out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="report_to 'visdom'"):
        milan.pretrain(str(store), report_to="tensorboard,visdom", **run)
    monkeypatch.setattr("milan.reporting.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="its package is not here") as error:
        milan.pretrain(str(store), report_to="mlflow", **run)
    assert error.value.fix == "pip install 'milan-pretrain[mlflow]'"
    assert not (tmp_path / "run").exists()


# --- on a terminal, and without one ---------------------------------------------------------------


def seen_on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the console's watcher writes, to a terminal of 100 columns or to a file."""
    from rich.console import Console

    from stages import console

    shown = io.StringIO()
    out = Console(file=shown, force_terminal=terminal, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", out)
    return shown


def test_progress_fits_a_terminal(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch, step, loss, rate, images/s, waiting, time left, and the judgement, uncut."""
    from stages.console import ConsoleProgress

    shown = seen_on(True, monkeypatch)
    run = {**WATCHED, "out": str(tmp_path), "log_every": 1, "report_to": "none"}
    with ConsoleProgress() as progress:
        monkeypatch.setattr(progress, "note", lambda _: None)  # they may be longer
        milan.pretrain(str(store), progress=progress, **run)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    lines = text.replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    assert re.search(r"train ━+ 16/16 [\d.]+ steps/s \d:\d\d:\d\d [\d.]+ s left", text)
    (last,) = {line for line in lines if line.startswith("epoch 8.0, loss ")}
    assert re.search(
        r"lr \d\.\de-\d+, [\d,]+ images/s, data loading \d+%, val_loss \d\.\d{3}", last
    )
    assert shown.getvalue().rstrip().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h")


def test_an_error_leaves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar hides it, and goes with the work, however that ends."""
    from stages.console import ConsoleProgress

    shown = seen_on(True, monkeypatch)

    def fails() -> None:
        with ConsoleProgress() as progress:
            progress.begin("train", 10, "steps")
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        fails()
    assert shown.getvalue().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h") == 1


def test_a_plain_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal; the figures are those told last."""
    from stages import console

    shown, clock = seen_on(False, monkeypatch), 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    progress = console.ConsoleProgress()
    progress.begin("train", 1000, "steps", done=100)
    for done in range(101, 301):
        clock += 1.0
        progress.advance(done, f"loss {done}" if done % 50 == 0 else "")
    progress.end()
    assert shown.getvalue().splitlines() == [
        "train: 160/1,000, 1.0 steps/s, 0:14:00 left, loss 150",
        "train: 220/1,000, 1.0 steps/s, 0:13:00 left, loss 200",
        "train: 280/1,000, 1.0 steps/s, 0:12:00 left, loss 250",
        "train: 200 steps in 0:03:20, 1.0 steps/s",
    ]
