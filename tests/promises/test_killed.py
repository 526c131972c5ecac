"""Killed at any moment, resumed: the bits of a run left alone, whatever reads its data."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import EXTRACTION, FORK, SMALL, Notes, log_of, same_as, tree
from killed_run import drive

import milan
from milan.errors import TrainError
from milan.training import checkpoint
from pipeline.extract import extract_targets

KILLED: dict[str, Any] = {
    **SMALL, "held_out": 0.34, "epochs": 10, "log_every": 2, "save_every": 3, "report_to": "none",
    "picture_every": 99,
}  # fmt: skip
"""20 steps, judged after every second; every other checkpoint is in the middle of a log's line."""


def begin(store: Path, out: Path, settings: dict[str, Any]) -> Any:
    process = FORK.Process(target=drive, args=(str(store), str(out), settings))
    process.start()
    return process


def kill_when(process: Any, what: Callable[[], Any]) -> bool:
    """SIGKILL as soon as `what` is true; False if the run ended before."""
    until = time.monotonic() + 120
    while process.is_alive():
        with suppress(FileNotFoundError):  # a run at its beginning replaces what is there
            if what():
                break
        assert time.monotonic() < until
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def alone(finished_run: Callable[..., Path]) -> Path:
    """A run of KILLED left alone; not to be changed."""
    return finished_run(**KILLED)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [1, *(pytest.param(n, marks=pytest.mark.soak) for n in (0, 3))])
def test_killed_at_a_step(workers: int, alone: Path, store: Path, tmp_path: Path) -> None:
    """At steps drawn by a seed, twice if nobody reads ahead; 0, 1 or 3 loader workers do."""
    settings, moment = {**KILLED, "num_workers": workers}, random.Random(workers)
    run = tmp_path / "run"
    for low, high in ((1, 4), (6, 9))[: 1 if workers else 2]:
        step = 2 * moment.randint(low, high)
        log, said = run / "log.jsonl", f'"step": {step},'
        process = begin(store, run, settings)
        assert kill_when(process, lambda log=log, said=said: said in read(log))
    assert not (run / "encoder.safetensors").exists()
    milan.pretrain(str(store), out=str(run), **settings)
    same_as(alone, run)


def read(log: Path) -> str:
    time.sleep(0.001)
    return log.read_text()


def test_killed_while_a_checkpoint_is_written(alone: Path, store: Path, tmp_path: Path) -> None:
    """What was half written is there, counts for nothing, and is cleared away."""
    folder, torn = tmp_path / "checkpoints", 0
    settings = {**KILLED, "save_every": 1}

    def writing() -> bool:
        return any(name[0] == "." for name in os.listdir(folder))

    for _ in range(2):
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        process = begin(store, tmp_path, settings)
        if not kill_when(process, writing):
            break
        torn += writing()
    assert torn, "no kill hit a checkpoint that was being written"
    milan.pretrain(str(store), out=str(tmp_path), **settings)
    assert not writing()
    same_as(alone, tmp_path)


@pytest.mark.soak
def test_thirty_kills_at_random_moments(alone: Path, store: Path, tmp_path: Path) -> None:
    """Anywhere in a run, its start and its end included."""
    moment, kills, finished = random.Random(11), 0, 0
    settings, run = {**KILLED, "save_every": 1}, tmp_path / "run"
    began = time.monotonic()
    process = begin(store, run, settings)
    process.join()
    whole = time.monotonic() - began
    same_as(alone, run)
    while kills < 30:
        if (run / "encoder.safetensors").exists():
            finished += 1
            same_as(alone, run)
            shutil.rmtree(run)
        process = begin(store, run, settings | {"num_workers": moment.choice([0, 0, 1, 3])})
        end = time.monotonic() + moment.uniform(0, whole)
        kills += kill_when(process, lambda end=end: time.monotonic() > end)
    milan.pretrain(str(store), out=str(run), **settings)
    same_as(alone, run)
    assert finished < 30


# --- checkpoints that lie -------------------------------------------------------------------------


def test_a_flipped_bit_of_a_checkpoint(alone: Path, store: Path, tmp_path: Path) -> None:
    """The newest is told and passed over for the one before; none left whole is an error."""
    settings = {**KILLED, "out": str(tmp_path)}
    milan.pretrain(str(store), stop_after=7, **settings)
    assert checkpoint.steps(tmp_path) == [6, 7]

    def flip(step: int) -> None:
        path = tmp_path / f"checkpoints/step-{step:08d}/model.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    flip(7)
    notes = Notes()
    milan.pretrain(str(store), stop_after=1, progress=notes, **settings)
    assert "step-00000007 is torn (model.safetensors" in notes.line("passed over: ")
    assert notes.begun == [(20, 6)]
    flip(6)
    flip(7)
    with pytest.raises(TrainError, match="none of the 2 checkpoints") as error:
        milan.pretrain(str(store), **settings)
    assert "--resume never" in error.value.fix
    flip(6)
    milan.pretrain(str(store), **settings)
    same_as(alone, tmp_path)


# --- what must not matter -------------------------------------------------------------------------


def test_listings_in_any_order(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems list folders as they like: the same store, and the same run."""
    scandir, listdir, shuffle = os.scandir, os.listdir, random.Random(3).shuffle
    shuffled = 0

    @contextmanager
    def scanned(*where: Any) -> Iterator[Iterator[os.DirEntry]]:
        nonlocal shuffled
        with scandir(*where) as listing:
            entries = list(listing)
        shuffle(entries)
        shuffled += len(entries) > 1
        yield iter(entries)

    class Listing:
        def __init__(self, *where: Any) -> None:
            with scanned(*where) as self.entries:
                pass

        def __iter__(self) -> Iterator[os.DirEntry]:
            return self.entries

        def __next__(self) -> os.DirEntry:
            return next(self.entries)

        def __enter__(self) -> Listing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

    def listed(*where: Any) -> list[str]:
        names = listdir(*where)
        shuffle(names)
        return names

    def made(name: str) -> tuple[dict[str, bytes], list[float]]:
        (tmp_path / name).mkdir()
        out = tmp_path / name / "t.zarr"
        extract_targets(str(photos), out=str(out), **EXTRACTION, **teacher_files)
        run = tmp_path / name / "run"
        milan.pretrain(str(out), out=str(run), **{**KILLED, "epochs": 2})
        return tree(out), [line["loss"] for line in log_of(run)]

    expected = made("plain")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Listing)
        patch.setattr(os, "listdir", listed)
        assert made("shuffled") == expected
    assert shuffled > 3
