"""Pretraining: resumed is uninterrupted, what a run leaves, what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    STUDENT,
    Forked,
    Notes,
    Ran,
    log_of,
    make_photos,
    pretrain_line,
    rows_seen,
    run_here,
    tree,
    wait_for_step,
    weights,
)
from safetensors.torch import load_file

import milan
from milan.errors import TrainError
from milan.models.decoder import PUBLISHED
from milan.objectives import base as objective_module
from milan.objectives import features as features_module
from milan.objectives.base import Objective
from milan.store.cache import TargetCache
from milan.training.optim import learning_rate
from pipeline.extract import extract_targets


@pytest.fixture(scope="module")
def whole(finished_run: Callable[..., Path]) -> Path:
    """An uninterrupted run of SMALL; not to be changed."""
    return finished_run()


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_and_eleven_steps_are_twenty_one(
    workers: int, whole: Path, store: Path, tmp_path: Path
) -> None:
    """A run in two calls, in the middle of an epoch, gives the same bits; so do loader workers."""
    again = {**SMALL, "out": str(tmp_path), "num_workers": workers}
    first = milan.pretrain(str(store), stop_after=10, **again)
    assert (first["step"], first["steps"], first["finished"]) == (10, 21, False)
    assert weights(tmp_path)["model"] != weights(whole)["model"]
    second = milan.pretrain(str(store), **again)
    assert (second["step"], second["finished"]) == (21, True)
    assert weights(tmp_path) == weights(whole)
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 21


def test_dropped_paths_are_drawn_by_address(store: Path, tmp_path: Path) -> None:
    """A student that draws for itself resumes to the same bits, too."""
    drops = {**SMALL, "epochs": 2, "model_args": {**STUDENT["model_args"], "drop_path_rate": 0.5}}
    milan.pretrain(str(store), out=str(tmp_path / "whole"), **drops)
    milan.pretrain(str(store), out=str(tmp_path / "two"), stop_after=2, **drops)
    torch.rand(7)
    milan.pretrain(str(store), out=str(tmp_path / "two"), **drops)
    assert weights(tmp_path / "two") == weights(tmp_path / "whole")


def test_another_seed_gives_other_weights(whole: Path, store: Path, tmp_path: Path) -> None:
    """The comparison above can fail."""
    milan.pretrain(str(store), **{**SMALL, "out": str(tmp_path), "seed": 1})
    assert weights(tmp_path)["encoder"] != weights(whole)["encoder"]


@pytest.mark.soak
def test_a_killed_command_goes_on_to_the_same_bits(store: Path, tmp_path: Path) -> None:
    """SIGKILL at a random step, then the same line: the bits of a run left alone.

    The killed process has a hash seed of its own: no order of a set can be in the result.
    """
    line = pretrain_line(store, Path("left-alone"), "--epochs", 14, "--set", "save_every=7")
    assert run_here(*line[1:], cwd=tmp_path).code == 0
    again = pretrain_line(store, tmp_path / "killed", *line[-4:])
    process = Forked(again, tmp_path / "output")
    wait_for_step(process, tmp_path / "killed", random.Random(5).randint(8, 30))
    process.send_signal(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    assert not (tmp_path / "killed/encoder.safetensors").exists()
    done = run_here(*again[1:])
    assert (done.code, done.err) == (0, "")
    assert re.search(r"resuming: \S*killed at step ", done.out)
    assert weights(tmp_path / "killed") == weights(tmp_path / "left-alone")
    lines = log_of(tmp_path / "killed")
    assert [line["step"] for line in lines] == list(range(1, 43))
    unhurried = log_of(tmp_path / "left-alone")
    assert [line["loss"] for line in lines] == [line["loss"] for line in unhurried]
    left = [p.name for p in (tmp_path / "killed/checkpoints").iterdir() if p.name[0] != "."]
    assert sorted(left) == ["step-00000035", "step-00000042"]


def test_a_torn_checkpoint_is_passed_over(whole: Path, store: Path, tmp_path: Path) -> None:
    """A machine that crashed may leave the newest checkpoint torn; the one before is whole."""
    again = {**SMALL, "out": str(tmp_path), "save_every": 6}
    milan.pretrain(str(store), stop_after=13, **again)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-00000012", "step-00000013"]
    torn = saved[1] / "optimiser.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    milan.pretrain(str(store), **again)
    assert weights(tmp_path) == weights(whole)


def test_overwrite_restarts_only_other_settings(store: Path, tmp_path: Path) -> None:
    """--overwrite of the same settings goes on (a killed stage of a pipeline); of others it
    starts anew; --resume never starts anew in any case."""
    short = {**SMALL, "out": str(tmp_path), "epochs": 2}
    milan.pretrain(str(store), stop_after=4, **short)
    notes = Notes()
    milan.pretrain(str(store), overwrite=True, stop_after=1, progress=notes, **short)
    assert notes.begun == [(6, 4)]
    other = {**short, "lr": 2e-3}
    with pytest.raises(TrainError, match=r"other settings \(lr: 0.001 != 0.002\)") as refused:
        milan.pretrain(str(store), **other)
    assert "--overwrite" in refused.value.fix
    notes = Notes()
    milan.pretrain(str(store), overwrite=True, progress=notes, **other)
    assert notes.begun == [(6, 0)]
    assert [line["step"] for line in log_of(tmp_path)] == [3, 4, 6]
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["lr"] == 2e-3
    notes = Notes()
    milan.pretrain(str(store), resume="never", stop_after=2, progress=notes, **other)
    assert notes.begun == [(6, 0)]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_asked_to_stop_in_the_last_step(store: Path, tmp_path: Path) -> None:
    """It is finished, and says so ever after: a scheduler that requeues on 75 would for ever."""

    class Late(Notes):
        def advance(self, done: int, figures: str = "") -> None:
            if done == 20:
                os.kill(os.getpid(), signal.SIGTERM)

    run = {**SMALL, "out": str(tmp_path)}
    figures = milan.pretrain(str(store), progress=Late(), **run)
    assert (figures["step"], figures["finished"]) == (21, True)
    assert "stopped_by" not in figures
    figures = milan.pretrain(str(store), stop_after=1, **run)
    assert figures["finished"]
    assert "stopped_by" not in figures


def test_figures_come_from_the_log_again(whole: Path, store: Path, tmp_path: Path) -> None:
    """Killed between its last checkpoint and its last file, or after one of those was lost."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "encoder.safetensors").unlink()
    told = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(told | {"step": 9, "loss": 3.0}))
    figures = milan.pretrain(str(store), **{**SMALL, "out": str(run)})
    assert (figures["step"], figures["finished"]) == (21, True)
    assert figures["loss"] == told["loss"]
    assert json.loads((run / "metrics.json").read_text())["loss"] == told["loss"]
    assert weights(run) == weights(whole)


@pytest.mark.parametrize("text", ["", '{"id": "a', "[]", "3"])
def test_a_damaged_run_json(text: str, whole: Path, store: Path, tmp_path: Path) -> None:
    """One line; --overwrite replaces the run."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "run.json").write_text(text)
    again = {**SMALL, "out": str(run), "stop_after": 1}
    with pytest.raises(TrainError, match=r"run\.json is damaged") as error:
        milan.pretrain(str(store), **again)
    assert "--overwrite" in error.value.fix
    assert milan.pretrain(str(store), overwrite=True, **again)["step"] == 1


def test_a_run_json_without_its_parts(whole: Path, store: Path, tmp_path: Path) -> None:
    """Its folder is refused in one line, and --overwrite replaces it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    told = json.loads((run / "run.json").read_text())
    kept = {k: v for k, v in told.items() if k not in ("id", "stretches", "targets")}
    (run / "run.json").write_text(json.dumps(kept | {"generations": 1}))
    again = {**SMALL, "out": str(run)}
    with pytest.raises(TrainError, match=r"run\.json is damaged") as error:
        milan.pretrain(str(store), **again)
    assert "--overwrite" in error.value.fix
    notes = Notes()
    milan.pretrain(str(store), overwrite=True, stop_after=1, progress=notes, **again)
    assert notes.begun == [(21, 0)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 6),
        ("init", "runs/other"),
        ("batch_size", 6),
        ("lr", 5e-4),
        ("seed", 3),
        ("mask_ratio", 0.5),
        ("objective", "pixels"),
        ("weight_decay", 0.1),
        ("decoder", {"embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("model_args", {**STUDENT["model_args"], "depth": 1}),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    field: str, value: Any, whole: Path, store: Path
) -> None:
    """Going on with other settings would be a run that no settings describe."""
    before = tree(whole)
    with pytest.raises(TrainError, match=rf"other settings .*\b{field}: "):
        milan.pretrain(str(store), **{**SMALL, "out": str(whole), field: value})
    assert tree(whole) == before


def test_what_changes_no_step_may_change(store: Path, tmp_path: Path) -> None:
    """Loader workers, how often a run saves or speaks, and a moved store change no step."""
    milan.pretrain(str(store), stop_after=3, **{**SMALL, "out": str(tmp_path)})
    shutil.copytree(store, tmp_path / "moved.zarr")
    free = {"num_workers": 1, "log_every": 1, "save_every": 5, "keep": 1, "device": "cpu"}
    notes = Notes()
    milan.pretrain(
        str(tmp_path / "moved.zarr"), stop_after=1, progress=notes,
        **{**SMALL, "out": str(tmp_path), **free},
    )  # fmt: skip
    assert notes.begun == [(21, 3)]


def test_another_store_is_refused(
    store: Path, finished_store: Callable[..., Path], tmp_path: Path
) -> None:
    """A run goes on with the targets it began with: the digest over all records decides."""
    other = finished_store(seed=4)
    run = {**SMALL, "out": str(tmp_path / "run"), "epochs": 1}
    milan.pretrain(str(store), stop_after=1, **run)
    digests = TargetCache(store).digest, TargetCache(other).digest
    with pytest.raises(TrainError, match=f"cache: {digests[0]} != {digests[1]}"):
        milan.pretrain(str(other), **run)


# --- what a run leaves ----------------------------------------------------------------------------


def test_the_log_and_the_curves(whole: Path) -> None:
    """A line every 4 steps, at each epoch's end and at the last; the CSV says the same."""
    lines = log_of(whole)
    expected = sorted({*range(4, 22, 4), *range(3, 22, 3)})
    assert [line["step"] for line in lines] == expected
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] / 3, abs=1e-4)
        rate = learning_rate((line["step"] - 1) / 3, peak=1e-3, warmup=0.7, epochs=7)
        assert line["lr"] == rate
        assert line["images_per_second"] > 0
        assert 0 <= line["wait_share"] <= 1
    with open(whole / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in line.items()} for line in lines]


def test_the_log_after_a_resume_has_no_line_twice(store: Path, tmp_path: Path) -> None:
    """What a killed run logged beyond its checkpoint is logged once; a torn line is dropped."""
    again = {**SMALL, "out": str(tmp_path), "log_every": 1}
    milan.pretrain(str(store), stop_after=5, **again)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "epoch": 2.0, "loss": 9}\n{"step": 7, "epo')
    milan.pretrain(str(store), **again)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 22))
    assert lines[5]["loss"] < 9


def test_metrics(whole: Path) -> None:
    """What DVC shows: figures of the call that trained."""
    metrics = json.loads((whole / "metrics.json").read_text())
    assert (metrics["step"], metrics["steps"], metrics["finished"]) == (21, 21, True)
    assert metrics["loss"] == log_of(whole)[-1]["loss"]
    assert metrics["images_per_second"] > 0
    assert 0 <= metrics["wait_share"] <= 1
    assert metrics["loader_images_per_core_second"] > 10
    assert metrics["loader_cores_needed"] > 0
    assert metrics["loader_workers"] == 0


def test_run_json_tells_how_the_run_was_made(whole: Path, store: Path) -> None:
    """Resolved settings, what differs from the recipe, the store, versions."""
    told = json.loads((whole / "run.json").read_text())
    assert told["config"]["decoder_kind"] == "prompt"
    assert told["config"]["warmup_epochs"] == 0.7
    assert told["differs"]["epochs"] == [7, 400]
    assert "beta2" not in told["differs"]
    assert told["identity"]["cache"] == TargetCache(store).digest
    assert told["fingerprint"] == TargetCache(store).spec.fingerprint()
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]


def test_tensorboard(whole: Path) -> None:
    """TensorBoard shows the log's own figures, and the settings beside the losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {
        "train/epoch", "train/loss", "train/lr", "train/grad_norm", "train/images_per_second",
        "train/wait_share",
    }  # fmt: skip
    lines = log_of(whole)
    shown = board.Scalars("train/loss")
    assert [event.step for event in shown] == [line["step"] for line in lines]
    np.testing.assert_allclose([e.value for e in shown], [x["loss"] for x in lines], rtol=1e-6)
    pages = board.PluginTagToContent("hparams")
    begun = HParamsPluginData.FromString(pages["_hparams_/session_start_info"]).session_start_info
    assert begun.hparams["lr"].number_value == 1e-3
    assert begun.hparams["objective"].string_value == "milan"
    assert begun.hparams["model_args.embed_dim"].number_value == 32
    assert begun.hparams["decoder.mlp_ratio"].number_value == 4
    about = HParamsPluginData.FromString(pages["_hparams_/experiment"]).experiment
    assert {metric.name.tag for metric in about.metric_infos} == {"train/loss", "val/loss"}
    assert not [path for path in (whole / "tensorboard").rglob("*") if path.is_dir()]


def test_only_the_newest_checkpoints_are_kept(store: Path, tmp_path: Path) -> None:
    """`keep` of them, each whole, no temporary file beside them."""
    milan.pretrain(str(store), **{**SMALL, "out": str(tmp_path), "save_every": 2, "keep": 3})
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000018", "step-00000020", "step-00000021"]
    for folder in (tmp_path / "checkpoints").iterdir():
        assert sorted(p.name for p in folder.iterdir()) == [
            "model.safetensors", "optimiser.safetensors", "state.json"
        ]  # fmt: skip
    assert [p.name for p in tmp_path.glob(".*")] == [".lock"]


def test_a_checkpoint_by_the_clock(store: Path, tmp_path: Path) -> None:
    """`save_minutes` besides `save_every`."""
    run = {**SMALL, "out": str(tmp_path), "epochs": 1, "save_every": 1000, "keep": 9}
    milan.pretrain(str(store), save_minutes=1e-6, **run)
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (1, 2, 3)]


def test_nothing_is_left_to_do(whole: Path, store: Path, tmp_path: Path) -> None:
    """A finished run run again: told so, same files; a lost encoder is written again."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    notes = Notes()
    figures = milan.pretrain(str(store), progress=notes, **{**SMALL, "out": str(run)})
    assert notes.line("nothing is left to do")
    assert figures["step"] == 21
    assert tree(run) == tree(whole)
    (run / "encoder.safetensors").unlink()
    milan.pretrain(str(store), **{**SMALL, "out": str(run)})
    assert tree(run) == tree(whole)


# --- the objective --------------------------------------------------------------------------------


def test_the_loss_goes_down(store: Path, tmp_path: Path) -> None:
    """It learns: in 40 epochs of 24 images the loss falls by a tenth at least."""
    milan.pretrain(str(store), **{**SMALL, "out": str(tmp_path), "epochs": 40, "lr": 3e-3})
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert 1.0 < losses[0] < 3.0


def test_accumulation_is_the_large_batch(store: Path, tmp_path: Path) -> None:
    """Four micro-batches of 4 are one batch of 16, up to the order of sums."""
    once = {**SMALL, "batch_size": 16, "epochs": 3}
    for name, micro in (("one", 16), ("four", 4)):
        milan.pretrain(str(store), **{**once, "out": str(tmp_path / name), "micro_batch": micro})
    one, four = (load_file(tmp_path / n / "encoder.safetensors") for n in ("one", "four"))
    assert max((one[key] - four[key]).abs().max() for key in one) < 2e-5
    first = [log_of(tmp_path / n)[0]["loss"] for n in ("one", "four")]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_reads_no_features(workers: int, store: Path, tmp_path: Path) -> None:
    """The baseline needs images, crops and attention: features may even be absent."""
    bare = tmp_path / "bare.zarr"
    shutil.copytree(store, bare)
    for name in ("features", "scale"):
        for shard in (bare / "generations/000" / name / "c").rglob("*"):
            if shard.is_file():
                shard.write_bytes(b"\xff" * shard.stat().st_size)
    run = {**SMALL, "out": str(tmp_path / "run"), "epochs": 1, "num_workers": workers}
    figures = milan.pretrain(str(bare), objective="pixels", **run)
    assert 0.5 < figures["loss"] < 3
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert (config["decoder_kind"], config["masking"]) == ("mae", "random")
    if not workers:
        with pytest.raises(milan.MilanError, match="features of row"):
            milan.pretrain(str(bare), **{**run, "out": str(tmp_path / "milan")})


def test_random_masks_are_other_masks(whole: Path, store: Path, tmp_path: Path) -> None:
    """The same seed with random masks trains on other patches."""
    milan.pretrain(str(store), masking="random", **{**SMALL, "out": str(tmp_path)})
    assert log_of(tmp_path)[0]["loss"] != log_of(whole)[0]["loss"]


def test_bf16_runs(whole: Path, store: Path, tmp_path: Path) -> None:
    """Autocast: nearly the same loss, weights kept in float32."""
    milan.pretrain(str(store), precision="bf16", **{**SMALL, "out": str(tmp_path)})
    ours, theirs = log_of(tmp_path)[-1]["loss"], log_of(whole)[-1]["loss"]
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.05)
    assert {w.dtype for w in load_file(tmp_path / "encoder.safetensors").values()} == {
        torch.float32
    }


def test_a_run_goes_on_in_another_precision(store: Path, tmp_path: Path) -> None:
    """Begun on a GPU in bf16 or fp16, resumed on a CPU in fp32, and back."""
    run, notes = {**SMALL, "out": str(tmp_path)}, Notes()
    for precision in ("bf16", "fp16", "fp32", "fp16"):
        milan.pretrain(str(store), precision=precision, stop_after=3, progress=notes, **run)
    assert [line["step"] for line in log_of(tmp_path)][-1] == 12
    kinds = [line.split(", ")[2] for line in notes.lines if line.startswith("steps: ")]
    assert kinds == ["bf16 on cpu", "fp16 on cpu", "fp32 on cpu", "fp16 on cpu"]


def test_a_loss_that_is_not_finite_stops(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the batch are named, the last checkpoint stays, and the run can go on."""
    calls, seen = 0, []
    regression = features_module.feature_regression

    def breaks(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return regression(prediction, features) * (math.nan if calls == 6 else 1)

    again = {**SMALL, "out": str(tmp_path), "save_every": 4}
    monkeypatch.setattr(features_module, "feature_regression", breaks)
    predict = Objective.predict

    def watched(objective: Any, student: Any, batch: Any) -> Any:
        pairs = zip(batch.rows.tolist(), batch.views.tolist(), strict=True)
        seen.append([f"{row}.{view}" for row, view in pairs])
        return predict(objective, student, batch)

    monkeypatch.setattr(Objective, "predict", watched)
    with pytest.raises(TrainError, match="loss of step 5 is nan") as stopped:
        milan.pretrain(str(store), **again)
    assert "the last checkpoint is step 4" in stopped.value.found
    assert "rows and views of the batch: " + ", ".join(seen[-1]) in stopped.value.found
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    notes = Notes()
    milan.pretrain(str(store), progress=notes, **again)
    assert notes.begun == [(21, 4)]


def test_a_rate_far_too_large_is_told(store: Path, tmp_path: Path) -> None:
    """The way it really happens; by the command, in one line."""
    sets = [f"--set=model.{k}={v}" for k, v in STUDENT["model_args"].items()]
    ran: Ran = run_here(
        "pretrain", "--cache", store, "--out", tmp_path, "--objective", "pixels", "--lr", 1e30,
        "--epochs", 20, "--batch-size", 8, "--num-workers", 0, "--warmup-epochs", 0, *sets,
        "--set=decoder.depth=1", "--set=decoder.embed_dim=16",
    )  # fmt: skip
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert "a finite loss" in line
    assert "a smaller --lr" in line


# --- bad rows -------------------------------------------------------------------------------------


def test_bad_rows_are_left_out_by_plan(
    teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without targets are told, never asked for, and all others are seen once an epoch."""
    data = make_photos(tmp_path / "data", count=18)
    for name in ("bad a.jpg", "bad b.jpg"):
        (data / "class 0" / name).write_text("no image")
    extract_targets(
        str(data), out=str(tmp_path / "t.zarr"), views=2, shard_size=8, executor="local",
        max_bad="2", **teacher_files,
    )  # fmt: skip
    seen, _ = rows_seen(monkeypatch)
    notes = Notes()
    run = {**SMALL, "out": str(tmp_path / "run"), "batch_size": 6, "epochs": 2}
    milan.pretrain(str(tmp_path / "t.zarr"), progress=notes, **run)
    assert notes.line("left out") == "left out: 2 images without targets"
    bad = set(TargetCache(tmp_path / "t.zarr").bad)
    assert len(bad) == 2
    good = sorted(set(range(20)) - bad)
    assert sorted(seen[:18]) == sorted(seen[18:]) == good


def test_a_run_keeps_its_decoder(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One from when all encoders had the published one goes on with it; a new one fits."""
    settings = {**SMALL, "decoder": {"depth": 1}, "out": str(tmp_path / "run")}

    def width() -> tuple[int, int]:
        newest = max((tmp_path / "run/checkpoints").glob("step-*"))
        state = load_file(newest / "model.safetensors")
        return int(newest.name.removeprefix("step-")), state["decoder.mask_token"].shape[-1]

    with monkeypatch.context() as before:
        before.setattr(objective_module, "decoder_arguments", lambda _, given: PUBLISHED | given)
        milan.pretrain(str(store), stop_after=1, **settings)
    assert width() == (1, 512)
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert told.pop("decoder")["embed_dim"] == 512
    del told["digest"]
    (tmp_path / "run/run.json").write_text(json.dumps(told))  # as it was written then
    notes = Notes()
    assert milan.pretrain(str(store), stop_after=1, progress=notes, **settings)["step"] == 2
    assert width() == (2, 512)
    assert "1 blocks of width 512" in notes.line("student: ")
    milan.pretrain(str(store), stop_after=1, resume="never", **settings)
    milan.pretrain(str(store), stop_after=1, **settings)
    assert width() == (2, 32)


# --- what is said ---------------------------------------------------------------------------------


def test_the_first_lines(store: Path, tmp_path: Path) -> None:
    """Store, deviations from the recipe, objective, steps: before the first step."""
    notes = Notes()
    milan.pretrain(str(store), stop_after=1, progress=notes, **{**SMALL, "out": str(tmp_path)})
    digest = TargetCache(store).digest[:12]
    assert notes.line("cache: ").endswith(digest)
    assert "24 images x 2 views, int8" in notes.line("cache: ")
    differs = notes.line("differs from the published recipe vit_base: ")
    assert "epochs 7" in differs
    assert "mask_ratio" not in differs
    assert notes.line("steps: ").startswith("steps: 21 of 8 images (1 x 8), 3 an epoch")
    assert notes.lines.index(notes.line("steps: ")) < 5
    told = re.fullmatch(r"shuffle: global, (\S+) of a full .*", notes.line("shuffle: "))
    assert told is not None
    assert 0.5 < float(told[1]) < 1.5


def test_windows_are_told_and_are_another_run(store: Path, tmp_path: Path) -> None:
    """A store of three shards in windows of one; the setting is part of what a run is."""
    notes, run = Notes(), {**SMALL, "out": str(tmp_path)}
    milan.pretrain(str(store), stop_after=1, progress=notes, window_rows=8, **run)
    assert notes.line("shuffle: ").startswith("shuffle: windows of 1 of 3 shards, 0.")
    with pytest.raises(TrainError, match="window_rows: 8 != 131072"):
        milan.pretrain(str(store), **run)
    with pytest.raises(TrainError, match="shuffle: window != global"):
        milan.pretrain(str(store), **run, window_rows=8, shuffle="global")
