"""Soak tests of extraction: dozens of SIGKILLs, at random and at every step; the bytes stay."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORK, STORE, Command, extract_here, left_behind, make_photos, tree, until

from milan.store.format import GENERATION

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc").exists(), reason="reads processes from /proc"),
]


def drive(data: str, out: str, settings: dict[str, Any], last_step: int | None = None) -> None:
    """An extraction in this process, which kills itself before its step `last_step`.

    Steps are the changes a commit makes to the disk: renames, folders, flushes.
    """
    from pipeline.extract import extract_targets

    torch.set_num_threads(1)
    if last_step is not None:
        _die_at(last_step)
    extract_targets(data, out=out, executor="local", **settings)


def _die_at(last_step: int) -> None:
    steps = 0
    for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
        real = getattr(os, name)

        def step(*arguments: Any, real: Any = real, **more: Any) -> Any:
            nonlocal steps
            if steps == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            return real(*arguments, **more)

        setattr(os, name, step)


def check_records(store: Path) -> None:
    """Whatever was killed: what has a record is whole."""
    root = store / GENERATION
    records = sorted((root / "records").glob("*"))
    for path in records:
        for file in json.loads(path.read_bytes())["files"]:
            data = (root / file["path"]).read_bytes()
            assert len(data) == file["bytes"], path.name
            assert hashlib.sha256(data).hexdigest() == file["sha256"], path.name


def whole_blocks(store: Path) -> set[str]:
    """Blocks with both of their views: only of such nothing is written again."""
    names = (path.name for path in (store / GENERATION / "records").glob("*.json"))
    count = Counter(name.split(".")[0] for name in names)
    return {block for block, views in count.items() if views == 2}


@pytest.fixture(scope="module")
def settings(teacher_files: dict[str, str]) -> dict[str, Any]:
    return {**teacher_files, "views": 2, "shard_size": 2, "batch_size": 3, "num_workers": 1}


def test_forty_kills_at_random_moments(
    settings: dict[str, Any], teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Half of them anywhere in a run, half just after a commit has begun to be seen."""
    photos = make_photos(tmp_path / "photos", count=24, seed=7)
    expected = extract_here(photos, tmp_path / STORE, teacher_files)
    shutil.move(tmp_path / STORE, tmp_path / "clean.zarr")
    store = tmp_path / STORE
    began = time.monotonic()
    run(photos, store, settings).join()
    whole = time.monotonic() - began
    assert tree(store) == expected
    shutil.rmtree(store)

    moment, kills = random.Random(1), 0
    while kills < 40:
        had, kept = records(store), whole_blocks(store)
        process = run(photos, store, settings)
        if kills % 2:
            left = 1 - had / 24  # of the work: a run that goes on is shorter
            time.sleep(moment.uniform(0, max(0.3, whole * left)))
        else:
            wanted = had + moment.randint(1, 4)
            while process.is_alive() and records(store) < wanted:
                time.sleep(0.001)
            time.sleep(moment.uniform(0, 0.02))
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert tree(store) == expected
            shutil.rmtree(store)
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if (store / GENERATION).exists():
            check_records(store)
            assert whole_blocks(store) >= kept
    last = run(photos, store, settings)
    last.join()
    assert last.exitcode == 0
    assert tree(store) == expected
    assert not (store / ".staging").exists()


def records(store: Path) -> int:
    return len(list((store / GENERATION / "records").glob("*.json")))


def run(photos: Path, store: Path, settings: dict[str, Any], *more: Any) -> Any:
    process = FORK.Process(target=drive, args=(str(photos), str(store), settings, *more))
    process.start()
    return process


def test_a_kill_before_every_single_step(
    settings: dict[str, Any], teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Each rename, flush, folder and removal of a run, one after the other: the next run heals."""
    photos = make_photos(tmp_path / "photos", count=3, seed=8)
    expected = extract_here(photos, tmp_path / STORE, teacher_files)
    store = tmp_path / STORE
    steps = 0
    while True:
        shutil.rmtree(store)
        process = run(photos, store, settings, steps)
        process.join()
        if process.exitcode == 0:
            break  # the run has no more steps than these
        assert process.exitcode == -signal.SIGKILL, steps
        if (store / GENERATION).exists():
            check_records(store)
        again = run(photos, store, settings)
        again.join()
        assert again.exitcode == 0, steps
        assert tree(store) == expected, steps
        steps += 1
    assert steps > 60


@pytest.fixture
def begun() -> Iterator[list[Command]]:
    """Commands that a test started; nothing of them outlives it."""
    commands: list[Command] = []
    yield commands
    for command in commands:
        command.kill()


def test_kills_of_ray_workers_and_drivers(
    begun: list[Command], teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Eight kills: of a worker, of the driver, of a worker just replaced."""
    photos = make_photos(tmp_path / "photos", count=120, seed=9)
    (tmp_path / "clean").mkdir()
    expected = extract_here(photos, tmp_path / "clean" / STORE, teacher_files)
    folder, moment, kills = tmp_path / "killed", random.Random(2), 0
    folder.mkdir()
    while kills < 8:
        command = Command(photos, folder, teacher_files, "--replicas", 2)
        begun.append(command)
        before = command.records()
        until(lambda c=command, b=before: c.records() > b or c.process.poll() is not None)
        if command.process.poll() is not None:
            break
        for _ in range(2):
            victims = command.actors()
            if victims:
                os.kill(moment.choice(victims), signal.SIGKILL)
                kills += 1
            time.sleep(moment.uniform(0.2, 2))
        command.process.kill()
        command.process.communicate()
        kills += 1
        check_records(folder / STORE)
        with suppress(AssertionError):
            until(command.all_gone, seconds=60)
        assert left_behind(command.tag) == {}
    assert kills >= 4
    last = Command(photos, folder, teacher_files, "--replicas", 2)
    begun.append(last)
    code, _, err = last.end()
    assert (code, err) == (0, "")
    assert tree(folder / STORE) == expected
