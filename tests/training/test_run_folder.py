"""A run's folder: its lock, when it is saved, how it goes on, and what may harm it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, At, Notes, json_changes, log_of, same_as, tree

import milan
from milan.core import atomic
from milan.errors import ConfigError, TrainError
from milan.reporting.log import read_log
from milan.reporting.run_files import read_metrics, read_run
from milan.training import checkpoint
from milan.training import run as run_folder
from milan.training.optim import learning_rate

RUN: dict[str, Any] = {
    **SMALL, "epochs": 3, "log_every": 1, "save_every": 1, "report_to": "none", "picture_every": 99,
}  # fmt: skip
"""9 steps, with a checkpoint after each."""


@pytest.fixture(scope="module")
def alone(finished_run: Callable[..., Path]) -> Path:
    """A run of RUN left alone; not to be changed."""
    return finished_run(**RUN)


# --- decided under the lock -----------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 3])
def test_a_call_that_waited_looks_again(
    before: int, alone: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for the folder, another call trains there up to step 5: it goes on from 5."""
    run = tmp_path / "run"
    if before:
        milan.pretrain(str(store), out=str(run), stop_after=before, **RUN)
    lock, others = run_folder.lock_folder, [5 - before]

    def busy(folder: Path) -> Any:
        if others:
            milan.pretrain(str(store), out=str(run), stop_after=others.pop(), **RUN)
            raise BlockingIOError("pid 1")
        return lock(folder)

    with monkeypatch.context() as patch:
        # The other call is made at the first try, and has the lock to itself.
        patch.setattr(run_folder, "lock_folder", busy)
        notes = Notes()
        milan.pretrain(str(store), out=str(run), progress=notes, **RUN)
    assert notes.line("resuming") == f"resuming: {run} at step 5"
    same_as(alone, run)


def test_a_refused_call_changes_nothing(store: Path, tmp_path: Path) -> None:
    """Not even a folder is left of one that was made for it; one that was there stays."""
    run = tmp_path / "runs" / "run"
    with pytest.raises(ConfigError, match="report_to 'visdom'"):
        milan.pretrain(str(store), out=str(run), **RUN | {"report_to": "visdom"})
    assert not list(tmp_path.iterdir())
    run.mkdir(parents=True)
    with pytest.raises(ConfigError, match="report_to 'visdom'"):
        milan.pretrain(str(store), out=str(run), **RUN | {"report_to": "visdom"})
    assert run.exists()


def test_a_lock_of_a_folder_that_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner removed the folder while another call had opened the lock's file."""
    flock, times = atomic.fcntl.flock, [1]

    def late(file: Any, how: int) -> None:
        if times:
            times.pop()
            os.unlink(tmp_path / ".lock")
        flock(file, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with atomic.lock_folder(tmp_path), pytest.raises(BlockingIOError, match=f"pid {os.getpid()}"):
        atomic.lock_folder(tmp_path)


@pytest.mark.parametrize("fault", ["load", "fits"])
def test_nothing_is_cut_before_the_checkpoint_is_loaded(
    fault: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be loaded leaves the log, the curves and run.json as they are."""
    run = {**RUN, "out": str(tmp_path), "report_to": "tensorboard"}
    milan.pretrain(str(store), stop_after=5, **run)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n')  # a line beyond the checkpoint
    before = tree(tmp_path)

    def refuses(*_: Any, **__: Any) -> None:
        raise TrainError("no")

    monkeypatch.setattr(checkpoint, "load" if fault == "load" else "check_fits", refuses)
    with pytest.raises(TrainError, match="no"):
        milan.pretrain(str(store), **run)
    assert tree(tmp_path) == before


class Saved:
    """A run's folder with checkpoints of a one-parameter model."""

    def __init__(self, run: Path) -> None:
        self.run, self.model = run, torch.nn.Linear(1, 1)
        self.optimiser = torch.optim.AdamW(self.model.parameters())

    def save(self, step: int, keep: int = 2) -> None:
        writer = checkpoint.Writer(self.run, self.model, self.optimiser, keep=keep)
        writer.save(step, {"scaler": {}, "losses": [0.0, 0]})
        writer.wait()


def test_nothing_newer_is_deleted(tmp_path: Path) -> None:
    """A newer whole checkpoint is another call's: this one stops. A torn one is set aside until a
    newer one is whole."""
    saved = Saved(tmp_path)
    for step in (3, 5):
        saved.save(step)
    for step in (4, 5):
        with pytest.raises(TrainError, match=r"has a checkpoint of step 5, .* another call trains"):
            saved.save(step)
        assert checkpoint.newest(tmp_path, note=print) == 5
    (tmp_path / "checkpoints/step-00000005/model.safetensors").write_bytes(b"torn")
    saved.save(4)
    assert (tmp_path / "checkpoints/step-00000005.torn/model.safetensors").read_bytes() == b"torn"
    saved.save(5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004", "step-00000005"
    ]  # fmt: skip


def test_a_disk_that_does_not_answer_tears_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not passed over: the next save would take its place."""
    saved = Saved(tmp_path)
    for step in (3, 5):
        saved.save(step)

    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.hashlib, "file_digest", stale)
        with pytest.raises(
            TrainError, match=r"step-00000005 cannot be read: .*\(ESTALE\)"
        ) as error:
            checkpoint.newest(tmp_path, note=print)
    assert error.value.fix == "the same line again"
    assert checkpoint.newest(tmp_path, note=print) == 5


# --- what a kill may cost -------------------------------------------------------------------------


def test_a_start_from_nothing_says_so(store: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint; replaced on demand; never in an empty folder."""
    run = {**RUN, "out": str(tmp_path / "run"), "stop_after": 2}
    notes = Notes()
    milan.pretrain(str(store), progress=notes, **run)
    assert not any(line.startswith("begins anew") for line in notes.lines)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"resume": "never"}, "--resume never replaces the run of step 2"),
        ({"overwrite": True, "seed": 3}, "--overwrite replaces the run of step 2"),
        ({"seed": 3}, "its log speaks of step 2, and no checkpoint was written"),
    ]
    for more, why in cases:
        if "seed" in more and "overwrite" not in more:
            for name in ("encoder.safetensors", "metrics.json"):
                (tmp_path / "run" / name).unlink()
            shutil.rmtree(tmp_path / "run/checkpoints")
        notes = Notes()
        milan.pretrain(str(store), progress=notes, **run | more)
        assert notes.line("begins anew") == f"begins anew: {tmp_path / 'run'} ({why})"
        assert notes.begun == [(9, 0)]


# --- more epochs ----------------------------------------------------------------------------------


def test_more_epochs_of_a_finished_run(store: Path, tmp_path: Path) -> None:
    """It goes on by the new schedule, says so, and resumes to the same bits."""
    short, long = RUN | {"epochs": 2}, RUN | {"epochs": 4}
    milan.pretrain(str(store), out=str(tmp_path / "a"), **short)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    notes = Notes()
    milan.pretrain(str(store), out=str(tmp_path / "a"), progress=notes, **long)
    assert notes.begun == [(12, 6)]
    told = notes.line("new schedule")
    assert "from step 6 of 12 on: epochs 2 -> 4, warmup_epochs 0.2 -> 0.4" in told
    for line in log_of(tmp_path / "a"):
        epochs = 2 if line["step"] <= 6 else 4
        at = (line["step"] - 1) / 3
        rate = learning_rate(at, peak=1e-3, warmup=epochs / 10, epochs=epochs)
        assert line["lr"] == pytest.approx(rate)
    about = read_run(tmp_path / "a")
    assert about["identity"]["epochs"] == about["config"]["epochs"] == 4
    assert about["schedules"][0]["epochs"] == 2
    assert about["schedules"][0]["until_step"] == 6
    milan.pretrain(str(store), out=str(tmp_path / "b"), stop_after=2, **long)
    milan.pretrain(str(store), out=str(tmp_path / "b"), **long)
    same_as(tmp_path / "a", tmp_path / "b")
    with pytest.raises(TrainError, match="epochs: 4 != 2"):
        milan.pretrain(str(store), out=str(tmp_path / "a"), **short)


def test_a_schedule_changes_at_the_end_alone(store: Path, tmp_path: Path) -> None:
    """Of an unfinished run, or with other settings besides, it is another run."""
    run = RUN | {"epochs": 2, "out": str(tmp_path), "save_every": 100}
    milan.pretrain(str(store), stop_after=5, **run)
    with pytest.raises(TrainError, match=r"epochs: 2 != 4") as error:
        milan.pretrain(str(store), **run | {"epochs": 4})
    assert "more --epochs once it has finished" in error.value.expected
    milan.pretrain(str(store), **run)
    with pytest.raises(TrainError, match=r"epochs: 2 != 4.*beta2"):
        milan.pretrain(str(store), **run | {"epochs": 4, "beta2": 0.9})
    with pytest.raises(TrainError, match=r"lr: 0.001 != 0.002"):
        milan.pretrain(str(store), **run | {"lr": 2e-3})
    (tmp_path / "checkpoints/step-00000006/state.json").write_text(
        json.dumps(
            {  # of a version that did not keep the steps, nor a digest
                k: v for k, v in checkpoint.read_state(tmp_path, 6).items() if k != "steps"
            }
        )
    )
    notes = Notes()
    milan.pretrain(str(store), progress=notes, **run | {"epochs": 3, "lr": 2e-3})
    assert notes.begun == [(9, 6)]
    assert "lr 0.001 -> 0.002" in notes.line("new schedule")
    notes = Notes()
    milan.pretrain(str(store), overwrite=True, progress=notes, **run | {"epochs": 4})
    assert notes.begun == [(12, 0)]


# --- disks and folders ----------------------------------------------------------------------------


def test_a_folder_that_is_deleted_in_the_middle(store: Path, tmp_path: Path) -> None:
    """One line, and no folder with half a run in its place."""
    run = tmp_path / "run"
    gone = At(4, lambda: run.rename(tmp_path / "elsewhere"))
    with pytest.raises(TrainError, match="was deleted or moved while") as error:
        milan.pretrain(str(store), out=str(run), progress=gone, **RUN)
    assert "put it back" in error.value.fix
    assert not run.exists()


def test_files_that_are_deleted_in_the_middle(alone: Path, store: Path, tmp_path: Path) -> None:
    """The log is known and written again; checkpoints come again."""

    def lose() -> None:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # nobody writes there now
                thread.join()
        (tmp_path / "log.jsonl").unlink()
        shutil.rmtree(tmp_path / "checkpoints")

    milan.pretrain(str(store), out=str(tmp_path), progress=At(4, lose), **RUN)
    same_as(alone, tmp_path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["lock", "begin", "checkpoint", "log"])
def test_a_folder_that_cannot_be_written(
    where: str, number: int, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the system's words, and what to do about it; never an errno alone."""
    run = tmp_path / "run"

    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(run / "x"))

    target = {
        "lock": (run_folder, "ensure_writable"),
        "begin": (run_folder, "write_run"),
        "checkpoint": (checkpoint, "save_file"),
        "log": (milan.reporting.log, "write_text"),
    }[where]
    monkeypatch.setattr(*target, refuses)
    with pytest.raises(TrainError, match=f"cannot be written: {os.strerror(number)}") as error:
        milan.pretrain(str(store), out=str(run), stop_after=1, **RUN)
    assert "Errno" not in str(error.value)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert ("free some space" in error.value.fix) == full
    assert full or "--out" in error.value.fix


# --- JSON without its parts -----------------------------------------------------------------------


def test_run_json_and_state_json_without_their_parts(alone: Path, tmp_path: Path) -> None:
    """Any change is noticed by the digest; without one, what is needed is asked for."""
    shutil.copytree(alone, tmp_path / "run")
    run = tmp_path / "run"
    state = run / "checkpoints/step-00000009/state.json"
    for path in (run / "run.json", state):
        whole = json.loads(path.read_text())
        for value in json_changes(whole):
            path.write_text(json.dumps(value))
            signed = isinstance(value, dict) and value.get("digest") == whole["digest"]
            if path == state:
                found = checkpoint.newest(run, note=lambda _: None)
                assert found == 8 if signed else found in (8, 9)
            elif signed:
                with pytest.raises(TrainError, match=r"run\.json is damaged"):
                    read_run(run)
            else:
                with suppress(TrainError):  # and nothing else
                    read_run(run)
            path.write_text(json.dumps(whole))
    assert checkpoint.newest(run, note=print) == 9


def test_a_run_from_before_digests_goes_on(store: Path, alone: Path, tmp_path: Path) -> None:
    """Today's runs have none."""
    milan.pretrain(str(store), out=str(tmp_path), stop_after=4, **RUN)
    for path in (tmp_path / "run.json", *(tmp_path / "checkpoints").glob("*/state.json")):
        content = json.loads(path.read_text())
        del content["digest"]
        path.write_text(json.dumps(content))
    milan.pretrain(str(store), out=str(tmp_path), **RUN)
    same_as(alone, tmp_path)


def test_lines_and_figures_that_are_none(whole_log: Path) -> None:
    """Other JSON among the lines of a log is left out; metrics without parts are gone."""
    log = whole_log / "log.jsonl"
    lines = log.read_text().splitlines()
    odd = ["3", "null", "[]", "{}", '{"step": "x"}', '{"step": 2, "loss": "x"}', '{"st', "\udcff"]
    mixed = [line for pair in zip(lines, odd * 3, strict=False) for line in pair] + lines[
        len(odd) * 3 :
    ]
    log.write_bytes("\n".join(mixed).encode(errors="surrogateescape"))
    assert [line["step"] for line in read_log(whole_log, 99)] == list(range(1, 10))
    for text in ("3", "{}", "", '{"step": null, "steps": 3}'):
        (whole_log / "metrics.json").write_text(text)
        assert read_metrics(whole_log) == {}


@pytest.fixture
def whole_log(alone: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(alone, tmp_path / "run")
    return tmp_path / "run"
