"""Faults in the middle of a run: each is one clear error, and the same line goes on to the bits
of a run left alone."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers import (
    SMALL,
    STUDENT,
    TEACHER,
    At,
    Forked,
    Notes,
    log_of,
    pretrain_line,
    same_as,
    tree,
    weights,
)
from safetensors.torch import load_file, save_file

import milan
from milan.config import PretrainConfig
from milan.core import waiting
from milan.core.launch import launch
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.data import loader
from milan.data.sampler import StepSampler
from milan.errors import CacheError, ConfigError, DataError, MilanError, TrainError
from milan.objectives import features as features_module
from milan.objectives.base import Objective
from milan.store.cache import TargetCache
from milan.training import checkpoint
from milan.training.build import run_order
from pipeline.extract import extract_targets

RUN: dict[str, Any] = {**SMALL, "micro_batch": 2, "log_every": 1, "save_every": 2}
"""21 steps of four micro-batches, so that little is read ahead."""


@pytest.fixture(scope="module")
def alone(finished_run: Callable[..., Path]) -> Path:
    """A run of RUN left alone; not to be changed."""
    return finished_run(**RUN)


# --- a loss or a gradient that is not finite ------------------------------------------------------


def spoilt(monkeypatch: pytest.MonkeyPatch, calls: set[int], how: str = "loss") -> None:
    """Micro-batches, counted from 1, whose loss or whose gradient alone is not finite."""
    count, regression = 0, features_module.feature_regression

    def breaks(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = regression(prediction, features)
        if count not in calls:
            return loss
        if how == "loss":
            return loss * math.inf
        return loss + (prediction.sum() * 0).sqrt()  # 0, with a slope of 0 * inf

    monkeypatch.setattr(features_module, "feature_regression", breaks)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_skipped_step_did_nothing(
    how: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and their count are those of a run whose optimiser did nothing then."""
    run = {**SMALL, "log_every": 1, "on_nonfinite": "skip"}
    notes = Notes()
    with monkeypatch.context() as patch:
        spoilt(patch, {6, 7}, how)
        milan.pretrain(str(store), progress=notes, **{**run, "out": str(tmp_path / "skipped")})
    told = [line for line in notes.lines if line.startswith("skipped: ")]
    what = "loss of step {} is inf" if how == "loss" else "gradient's norm of step {} is nan"
    assert [what.format(step) in line for step, line in zip((5, 6), told, strict=True)] == [1, 1]
    lines = {line["step"]: line for line in log_of(tmp_path / "skipped")}
    assert [step for step, line in lines.items() if "loss" not in line] == [6, 7]
    assert "NaN" not in (tmp_path / "skipped/log.jsonl").read_text()

    count, step = 0, torch.optim.AdamW.step

    def idle(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        return None if count in (6, 7) else step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", idle)
    milan.pretrain(str(store), **{**run, "out": str(tmp_path / "idle")})
    assert weights(tmp_path / "skipped") == weights(tmp_path / "idle")


def test_ten_skipped_steps_in_a_row_stop(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine and one more elsewhere do not."""
    spoilt(monkeypatch, {1, *range(5, 14)})
    run = {**SMALL, "out": str(tmp_path), "on_nonfinite": "skip"}
    milan.pretrain(str(store), **run)
    monkeypatch.undo()
    spoilt(monkeypatch, set(range(5, 15)))
    notes = Notes()
    with pytest.raises(TrainError, match="loss of step 13 is inf"):
        milan.pretrain(str(store), resume="never", progress=notes, **run)
    assert len([line for line in notes.lines if line.startswith("skipped: ")]) == 9


def test_skipping_in_half_precision(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gradient scaler, which wants to be told."""
    spoilt(monkeypatch, {6, 7})
    run = {**SMALL, "out": str(tmp_path), "on_nonfinite": "skip", "precision": "fp16"}
    notes = Notes()
    assert milan.pretrain(str(store), progress=notes, **run)["finished"]
    assert sum(line.startswith("skipped: ") for line in notes.lines) == 2
    newest = max((tmp_path / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    assert state["scaler"]["scale"] <= 65536 / 4  # halved twice
    kept = load_file(newest / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def spoilt_rank(cache: str, calls: set[int], **settings: Any) -> dict[str, Any]:
    """A rank's pretraining; rank 1 meets losses that are not finite."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            spoilt(patch, calls)
        return milan.pretrain(cache, **settings)


def two_ranks(store: Path, calls: set[int], progress: Progress, **settings: Any) -> dict[str, Any]:
    arguments = {"cache": str(store), "calls": calls, **settings}
    return launch(
        spoilt_rank, arguments, ranks=2, restarts=0, restart_arguments=dict, progress=progress
    )


def rows_of(store: Path, run: dict[str, Any], step: int, rank: int) -> str:
    """The rows and views that a rank of two is given at a step."""
    order = run_order(PretrainConfig(cache=str(store), **run), TargetCache(store))
    sampler = StepSampler(order, start=step, stop=step + 1, micro=4, rank=rank, ranks=2)
    (address,) = sampler
    pairs = zip(address.rows, address.views, strict=True)
    return ", ".join(f"{row}.{view}" for row, view in pairs)


@pytest.mark.soak
@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_whose_loss_is_not_finite(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank takes the step; the images that are named are those of the rank whose loss it was."""
    run = {**SMALL, "num_workers": 0, "log_every": 1, "on_nonfinite": "skip"}
    notes = Notes()
    two_ranks(store, {6, 7}, notes, out=str(tmp_path / "two"), **run)
    told = [line for line in notes.lines if line.startswith("skipped: ")]
    assert len(told) == 2
    for step, line in zip((5, 6), told, strict=True):
        share = rows_of(store, run, step, 1)
        assert f"the loss of step {step} is inf" in line
        assert line.endswith(f"rows and views of rank 1's share: {share}")
    spoilt(monkeypatch, {6, 7})
    milan.pretrain(str(store), out=str(tmp_path / "one"), **run)
    ours, theirs = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert [line["step"] for line in ours if "loss" not in line] == [6, 7]
    losses = [[line.get("loss", 0) for line in lines] for lines in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.soak
@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_whose_loss_is_not_finite_stops(store: Path, tmp_path: Path) -> None:
    """The images that are named are those of the rank whose loss it was."""
    run = {**SMALL, "num_workers": 0, "log_every": 1, "on_nonfinite": "stop"}
    with pytest.raises(TrainError, match=r"loss of step 5 is inf; .* of rank 1's share") as stopped:
        two_ranks(store, {6}, Notes(), out=str(tmp_path), **run)
    assert stopped.value.found.endswith(rows_of(store, run, 5, 1))


def test_a_gradient_that_is_not_finite_stops(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a checkpoint is written that could never be gone on from."""
    spoilt(monkeypatch, {6}, "gradient")
    run = {**SMALL, "out": str(tmp_path), "save_every": 1, "keep": 9}
    with pytest.raises(TrainError, match="the gradient's norm of step 5 is nan") as stopped:
        milan.pretrain(str(store), **run)
    assert "the last checkpoint is step 5" in stopped.value.found
    for saved in (tmp_path / "checkpoints").iterdir():
        assert all(w.isfinite().all() for w in load_file(saved / "model.safetensors").values())


# --- data that changes under a run ----------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_is_damaged_in_the_middle_of_an_epoch(
    workers: int, alone: Path, store: Path, tmp_path: Path
) -> None:
    """Bits flip on the disk while it is read: the row and the repair are named; mended, the same
    line goes on."""
    copy = tmp_path / "t.zarr"
    shutil.copytree(store, copy)
    (copy / "data").symlink_to(store.parent)

    def flip() -> None:
        for shard in (copy / "generations/000/features/c").rglob("*"):
            if shard.is_file():
                with open(shard, "r+b") as file:
                    data = bytearray(file.read())
                    data[: len(data) // 2] = bytes(b ^ 0x10 for b in data[: len(data) // 2])
                    file.seek(0)
                    file.write(data)

    run = {**RUN, "out": str(tmp_path / "run"), "num_workers": workers}
    with pytest.raises(CacheError, match="row") as error:
        milan.pretrain(str(copy), progress=At(2, flip), **run)
    assert "milan repair" in error.value.fix
    assert "Traceback" not in str(error.value)
    assert 2 <= log_of(tmp_path / "run")[-1]["step"] < 8
    shutil.copytree(store, copy, dirs_exist_ok=True)
    milan.pretrain(str(copy), **run)
    same_as(alone, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_is_gone_in_the_middle_of_an_epoch(
    workers: int, alone: Path, store: Path, photos: Path, tmp_path: Path
) -> None:
    """Named; brought back, the same line goes on."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    run = {**RUN, "out": str(tmp_path / "run"), "num_workers": workers, "data_root": str(data)}

    def lose() -> None:
        for path in data.rglob("*.jpg"):
            path.unlink()

    with pytest.raises(DataError, match="has changed since extraction") as error:
        milan.pretrain(str(store), progress=At(2, lose), **run)
    assert "restore the image" in error.value.fix
    assert 2 <= log_of(tmp_path / "run")[-1]["step"] < 8
    shutil.copytree(photos, data, dirs_exist_ok=True)
    milan.pretrain(str(store), **run)
    same_as(alone, tmp_path / "run")


# --- disk, memory, processes ----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for one checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here; the file limit is tested")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_disk_is_full_at_a_checkpoint(alone: Path, store: Path, small_disk: Path) -> None:
    """A real one: the checkpoint before stays whole; with room again the same line goes on."""
    run = small_disk / "run"
    again = {**RUN, "out": str(run), "report_to": "none"}

    def fill() -> None:
        usage = shutil.disk_usage(small_disk)
        (small_disk / "others").write_bytes(bytes(max(0, usage.free - 65536)))

    with pytest.raises(TrainError, match="cannot be written") as error:
        milan.pretrain(str(store), progress=At(9, fill), **again)
    assert "No space left on device" in error.value.found
    assert "the same line goes on" in error.value.fix
    assert "that of step 8 stays" in error.value.expected
    assert checkpoint.newest(run, note=print) == 8
    assert not list((run / "checkpoints").glob(".*"))
    (small_disk / "others").unlink()
    milan.pretrain(str(store), **again)
    same_as(alone, run)


def test_the_log_cannot_be_written(alone: Path, store: Path, tmp_path: Path) -> None:
    """Between two checkpoints: said in the same words, and gone on from all the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = {**RUN, "out": str(tmp_path), "save_every": 5, "report_to": "none"}

    def limit() -> None:
        size = (tmp_path / "log.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))

    try:
        with pytest.raises(TrainError, match="cannot be written: File too large") as error:
            milan.pretrain(str(store), progress=At(7, limit), **again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the same line goes on" in error.value.fix
    notes = Notes()
    milan.pretrain(str(store), progress=notes, **again)
    assert notes.begun == [(21, 5)]
    same_as(alone, tmp_path)


def test_a_file_may_not_grow_so_large(alone: Path, store: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands in for a full disk, where none can be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = {**RUN, "out": str(tmp_path / "run"), "report_to": "none"}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with pytest.raises(TrainError, match="checkpoint of step 10 cannot be written"):
            milan.pretrain(str(store), progress=At(9, limit), **again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.newest(tmp_path / "run", note=print) == 8
    milan.pretrain(str(store), **again)
    same_as(alone, tmp_path / "run")


def test_a_full_disk_is_one_line(store: Path, tmp_path: Path) -> None:
    """Of the command with all its files, those included that TensorBoard writes in a thread."""
    # A checkpoint's files are smaller than so many pictures, which are flushed after it.
    sets = ["--epochs", 16, "--set", "save_every=1000", "--set", "picture_every=1"]
    line = pretrain_line(store, tmp_path / "run", *sets)
    process = Forked(line, tmp_path / "output")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (350 << 10, 350 << 10))
    code, output = process.end()
    assert code == 1, output
    assert "Traceback" not in output
    (error,) = (line for line in output.splitlines() if line.startswith("milan: "))
    assert "File too large" in error
    assert output.rstrip().endswith(error)


def signal_worker(number: signal.Signals) -> Callable[[], None]:
    """What sends a signal to the loader workers that are started from now on."""
    others = multiprocessing.active_children()

    def send() -> None:
        for worker in multiprocessing.active_children():
            if worker not in others:
                os.kill(worker.pid or 0, number)

    return send


def test_a_loader_worker_hangs(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer: it is said, and a signal ends the run."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(loader, "_POLL", 0.1)
    monkeypatch.setattr(loader, "_GRACE", 0.3)
    monkeypatch.setattr(waiting, "_FIRST_WORD", 0.1)
    run = {**RUN, "out": str(tmp_path), "num_workers": 1, "epochs": 40, "save_every": 1}

    freeze, stop = signal_worker(signal.SIGSTOP), Stop()

    def hang() -> None:
        freeze()
        Timer(0.5, stop.request, (signal.SIGTERM,)).start()

    notes = At(5, hang)
    figures = milan.pretrain(str(store), progress=notes, stop=stop, **run)
    assert figures["stopped_by"] == "SIGTERM"
    (word, *_) = (line for line in notes.lines if line.startswith("waiting for"))
    assert "the next batch of the loader workers" in word
    assert "--num-workers 0" in word


def test_a_loader_worker_is_killed(
    alone: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does for want of memory."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    run = {**RUN, "out": str(tmp_path), "num_workers": 1}

    kill = signal_worker(signal.SIGKILL)
    with pytest.raises(TrainError, match=r"a loader worker crashed \(SIGKILL\).* memory ") as error:
        milan.pretrain(str(store), progress=At(5, kill), **run)
    assert "the same line goes on" in error.value.fix
    milan.pretrain(str(store), **run)
    same_as(alone, tmp_path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
    ],
)
def test_memory_runs_out(
    kind: type[RuntimeError], text: str, store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What to make smaller is named, and is smaller than what was."""

    def full(*_: Any) -> None:
        raise kind(text)

    monkeypatch.setattr(Objective, "predict", full)
    with pytest.raises(TrainError, match="memory is full") as error:
        milan.pretrain(str(store), **{**RUN, "out": str(tmp_path), "micro_batch": 4})
    assert text.splitlines()[0] in error.value.found
    assert "--set micro_batch=2" in error.value.fix
    assert "checkpoint_activations" in error.value.fix


def test_other_errors_are_left_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the code is no fault of the machine."""

    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Objective, "predict", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        milan.pretrain(str(store), **{**RUN, "out": str(tmp_path)})


# --- what does not belong together ----------------------------------------------------------------


def test_a_checkpoint_of_another_model(store: Path, tmp_path: Path) -> None:
    """Carried over by hand: refused by the parameter's name, and left as it is."""
    run = {**SMALL, "epochs": 2}
    shallow = {**run, "model_args": {**STUDENT["model_args"], "depth": 1}}
    milan.pretrain(str(store), stop_after=3, **{**run, "out": str(tmp_path / "ours")})
    milan.pretrain(str(store), stop_after=4, **{**shallow, "out": str(tmp_path / "theirs")})
    name = "checkpoints/step-00000004"
    shutil.copytree(tmp_path / "theirs" / name, tmp_path / "ours" / name)
    before = tree(tmp_path / "ours")
    with pytest.raises(TrainError, match=r"step-00000004 is of another model: encoder\.blocks\.1"):
        milan.pretrain(str(store), **{**run, "out": str(tmp_path / "ours")})
    after = tree(tmp_path / "ours")
    assert {k: v for k, v in after.items() if "tensorboard" not in k} == {
        k: v for k, v in before.items() if "tensorboard" not in k
    }


def test_a_cache_of_another_image_size(store: Path, photos: Path, tmp_path: Path) -> None:
    """Put in the place of the run's own: refused, and nothing is trained on it."""
    config = {**TEACHER, "vision_cfg": {**TEACHER["vision_cfg"], "image_size": 48}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    state = open_clip.CLIP(**config).state_dict()
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "w.safetensors")
    files = {
        "teacher": str(tmp_path / "config.json"),
        "pretrained": str(tmp_path / "w.safetensors"),
    }
    place, run = tmp_path / "t.zarr", {**SMALL, "out": str(tmp_path / "run")}
    shutil.copytree(store, place)
    milan.pretrain(str(place), stop_after=2, data_root=str(photos), **run)
    shutil.rmtree(place)
    extract_targets(str(photos), out=str(place), views=2, shard_size=8, executor="local", **files)
    before = tree(tmp_path / "run")
    with pytest.raises(MilanError, match="cache: ") as error:
        milan.pretrain(str(place), data_root=str(photos), **run)
    assert "image_size: 32 != 48, grid: 4 != 6" in error.value.found
    assert tree(tmp_path / "run") == before


def test_more_than_there_is(store: Path, tmp_path: Path) -> None:
    """A batch larger than the images that are not held out; more ranks than images."""
    run = {**SMALL, "out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="batch size 20 with 16 usable images"):
        milan.pretrain(str(store), **{**run, "batch_size": 20, "held_out": 0.34})
    with pytest.raises(ConfigError, match="batch size 8 over 32 ranks") as error:
        milan.pretrain(str(store), **{**run, "devices": 32})
    assert error.value.fix == "--batch-size 32, or at most 8 ranks (--devices)"
    assert not (tmp_path / "run").exists()
