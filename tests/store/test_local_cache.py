"""Shards on a local disk: checked on arrival, within the limit, shared, whatever is killed."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STUDENT

import milan
from milan.data.dataset import open_cache
from milan.data.loader import _windows, training_loader
from milan.data.order import order_of
from milan.data.prefetch import Prefetcher
from milan.data.sampler import StepSampler
from milan.errors import CacheError, ConfigError
from milan.store import local_cache as local_cache_module
from milan.store.cache import TargetCache
from milan.store.generation import Generation
from milan.store.local_cache import LocalCopies

ROWS, VIEWS = np.repeat(np.arange(24), 2), np.tile(np.arange(2), 24)
"""Everything of the store: 3 blocks x 2 views."""


@pytest.fixture
def copied(store: Path, photos: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may damage."""
    return Path(shutil.copytree(store, tmp_path / "slow" / "targets.zarr"))


def shard_bytes(cache: TargetCache) -> int:
    return int(cache.generations[0].sizes().sum(axis=1).max())


def local_cache(store: Path, folder: Path, shards: float = 6) -> TargetCache:
    cache = TargetCache(store)
    cache.use_local(folder, int(shards * shard_bytes(cache)))
    return cache


def held(folder: Path) -> int:
    """Bytes of all shard files below a local folder, those being copied included."""
    sizes = {}  # by inode: a file that gets its name while we look is one
    for path in folder.glob("*/*/c/**/*"):
        with suppress(FileNotFoundError):
            sizes[path.stat().st_ino] = path.stat().st_size if path.is_file() else 0
    return sum(sizes.values())


def whole(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*/shards/*") if p.suffix != ".part")


def same(cache: TargetCache, other: TargetCache, rows: np.ndarray, views: np.ndarray) -> bool:
    a, b = cache.read(rows, views), other.read(rows, views)
    assert a.codes is not None
    assert a.scale is not None
    return (
        np.array_equal(a.codes, b.codes)
        and np.array_equal(a.scale, b.scale)
        and np.array_equal(a.attention, b.attention)
        and np.array_equal(cache.crops(rows, views), other.crops(rows, views))
    )


def test_reads_come_from_the_local_disk(copied: Path, cache: TargetCache, tmp_path: Path) -> None:
    """The same values, and still there when the slow disk's arrays are gone."""
    near = local_cache(copied, tmp_path / "fast")
    assert whole(tmp_path / "fast") == []
    assert same(near, cache, ROWS[:2], VIEWS[:2])
    assert whole(tmp_path / "fast") == ["0.0", "0.1"]
    assert same(near, cache, ROWS, VIEWS)
    assert len(whole(tmp_path / "fast")) == 6
    assert held(tmp_path / "fast") == near.generations[0].entry.bytes
    for name in near.spec.arrays():
        shutil.rmtree(copied / "generations/000" / name / "c")
    assert same(near, cache, ROWS, VIEWS)


def test_a_later_run_finds_them(
    copied: Path, cache: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied twice; another store has a folder of its own."""
    local_cache(copied, tmp_path / "fast").read(ROWS, VIEWS)
    monkeypatch.setattr(LocalCopies, "_copy", None)
    assert same(local_cache(copied, tmp_path / "fast"), cache, ROWS, VIEWS)
    (folder,) = (p for p in (tmp_path / "fast").iterdir() if p.is_dir())
    assert cache.generations[0].entry.digest.startswith(folder.name)


def test_the_limit_holds(
    copied: Path, cache: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment of copying; what was not used for longest goes first."""
    fast = tmp_path / "fast"
    near = local_cache(copied, fast, 2.5)
    limit, most, copy = int(2.5 * shard_bytes(cache)), [0], LocalCopies._copy

    def watched(self: LocalCopies, file: Any) -> None:
        copy(self, file)
        most[0] = max(most[0], held(fast))

    monkeypatch.setattr(LocalCopies, "_copy", watched)
    for at in np.random.default_rng(0).integers(0, 48, 30):
        assert same(near, cache, ROWS[[at]], VIEWS[[at]])
    assert shard_bytes(cache) < most[0] <= limit
    for row in (0, 8, 0, 16):
        near.read(np.array([row]), np.array([0]))
        time.sleep(0.02)  # a file system's clock
    assert whole(fast) == ["0.0", "2.0"]


def test_a_batch_wider_than_the_limit(copied: Path, tmp_path: Path) -> None:
    """Six shards through room for two cannot be: said, not tried for ever."""
    near = local_cache(copied, tmp_path / "fast", 2.5)
    with pytest.raises(CacheError, match="6 shards of a batch do not fit"):
        near.read(ROWS, VIEWS)
    tiny = local_cache(copied, tmp_path / "tiny", 0.5)
    with pytest.raises(CacheError, match="does not fit a cache limit") as error:
        tiny.read(ROWS[:1], VIEWS[:1])
    assert "--cache-limit" in error.value.fix


@pytest.mark.parametrize("size", ["same", "shorter"])
def test_damage_is_found_on_arrival(
    copied: Path, cache: TargetCache, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit, or a file cut while it is read; nothing of it stays."""
    near = local_cache(copied, tmp_path / "fast")
    path = copied / "generations/000/features/c/1/0/0/0"
    data = path.read_bytes()
    flipped = data[:100] + bytes([data[100] ^ 4]) + data[101:]
    near.generations[0].checksums(1, 0)  # its sizes were right when it was first touched
    path.write_bytes(flipped if size == "same" else data[:-5])
    with pytest.raises(CacheError, match="features/c/1/0/0/0 is damaged") as error:
        near.read(np.array([9]), np.array([0]))
    assert error.value.fix == f"milan repair {copied}"
    assert whole(tmp_path / "fast") == []
    assert not list((tmp_path / "fast").glob("**/*.part"))
    path.write_bytes(data)
    assert same(near, cache, np.array([9]), np.array([0]))


def test_damage_on_the_local_disk_is_found_too(copied: Path, tmp_path: Path) -> None:
    """Rows are checked whenever they are read; the message says which copy to delete."""
    near = local_cache(copied, tmp_path / "fast")
    near.read(np.array([9]), np.array([0]))
    local = near.generations[0].local
    assert local is not None
    path = local.root / "attention/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[40:44] = b"oops"
    path.write_bytes(data)
    again = local_cache(copied, tmp_path / "fast")
    with pytest.raises(CacheError, match="cannot be used") as error:
        again.read(np.arange(8, 16), np.zeros(8, int))
    assert f"delete {local.root}" in error.value.fix


def test_a_killed_copy_is_taken_up(copied: Path, cache: TargetCache, tmp_path: Path) -> None:
    """What it left takes no room and is no obstacle, for its own shard and for others."""
    near = local_cache(copied, tmp_path / "fast", 1.5)
    local = near.generations[0].local
    assert local is not None
    for block, row in ((1, 9), (2, 3)):  # asked for again, and never asked for again
        part = local.marker(block, 0).with_suffix(".0.part")
        part.touch()
        os.truncate(part, shard_bytes(cache))
        stray = local.root / f"features/c/{block}/0/0/0.part"
        stray.parent.mkdir(parents=True)
        stray.write_bytes(b"cut short")
        assert same(near, cache, np.array([row]), np.array([0]))
        assert not part.exists()
        assert not stray.exists()


def test_an_eviction_under_a_reader(
    copied: Path, cache: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run takes the shard between looking for it and reading it: it is fetched again."""
    fast = tmp_path / "fast"
    near, fetch, evicted = local_cache(copied, fast), Generation.fetch, []

    def robbed(self: Generation, block: int, view: int, **rest: Any) -> bool:
        done = fetch(self, block, view, **rest)
        if len(evicted) < 2:
            evicted.append((block, view))
            (local,) = (g.local for g in near.generations)
            assert local is not None
            local.marker(block, view).unlink()
            for name in self.spec.arrays():
                shutil.rmtree(local.root / name / "c" / str(block) / str(view))
        return done

    monkeypatch.setattr(Generation, "fetch", robbed)
    assert same(near, cache, ROWS[:1], VIEWS[:1])
    assert evicted == [(0, 0), (0, 0)]


def test_one_copies_and_the_others_wait(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file once, however many ask."""
    near, copy, copies = local_cache(copied, tmp_path / "fast"), LocalCopies._copy, []

    def slow(self: LocalCopies, file: Any) -> None:
        copies.append(file.path)
        time.sleep(0.02)
        copy(self, file)

    monkeypatch.setattr(LocalCopies, "_copy", slow)
    (generation,) = near.generations
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: generation.fetch(1, 1), range(8)))
    assert len(copies) == len(set(copies)) == 4


def test_a_full_disk(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NamedPatch with what to do; nothing half copied counts."""
    near = local_cache(copied, tmp_path / "fast")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="No space left") as error:
        near.read(ROWS[:1], VIEWS[:1])
    assert "smaller --cache-limit" in error.value.fix
    assert not list((tmp_path / "fast").glob("*/shards/*"))


def _read_at_random(store: Path, folder: Path, seed: int) -> None:
    near, plain = local_cache(store, folder, 2.2), TargetCache(store)
    for at in np.random.default_rng(seed).integers(0, 48, 40):
        assert same(near, plain, ROWS[[at]], VIEWS[[at]])


@pytest.mark.soak
def test_two_runs_share_a_folder(copied: Path, cache: TargetCache, tmp_path: Path) -> None:
    """Right values in both while they evict each other's shards; the limit holds for both."""
    context = multiprocessing.get_context("forkserver")
    runs = [
        context.Process(target=_read_at_random, args=(copied, tmp_path / "fast", seed))
        for seed in range(2)
    ]
    for run in runs:
        run.start()
    most = 0
    while any(run.is_alive() for run in runs):
        (tmp_path / "fast").mkdir(exist_ok=True)
        with open(tmp_path / "fast/lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # or one would be evicted, and the next seen as well
            most = max(most, held(tmp_path / "fast"))
        time.sleep(0.01)
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert 0 < most <= 2.2 * shard_bytes(cache)


# --- ahead ----------------------------------------------------------------------------------------


def until(reached: Callable[[], bool]) -> None:
    for _ in range(100):
        if reached():
            return
        time.sleep(0.05)
    raise AssertionError("not reached in 5 s")


def test_ahead_of_the_window(copied: Path, tmp_path: Path) -> None:
    """This window and the next, never at the cost of one in use; then as the run goes on."""
    fast = tmp_path / "fast"
    near = local_cache(copied, fast, 2.5)
    (generation,) = near.generations

    def windows() -> Iterator[tuple[int, list]]:
        for window in range(3):
            yield 10 * (window + 1), [(generation, window, 0)]

    ahead = Prefetcher(windows())
    ahead.start()
    try:
        until(lambda: whole(fast) == ["0.0", "1.0"])
        ahead.consumed = 9
        time.sleep(0.3)
        assert whole(fast) == ["0.0", "1.0"]
        ahead.consumed = 10
        until(lambda: whole(fast) == ["1.0", "2.0"])
        ahead.join(5)
        assert not ahead.is_alive()
    finally:
        ahead.stopped.set()


def test_ahead_with_room_for_one_window(copied: Path, tmp_path: Path) -> None:
    """It waits until the window is over, and stops when told."""
    fast = tmp_path / "fast"
    (generation,) = local_cache(copied, fast, 1.2).generations
    ahead = Prefetcher(iter([(10, [(generation, 0, 0)]), (20, [(generation, 1, 0)])]))
    ahead.start()
    until(lambda: whole(fast) == ["0.0"])
    time.sleep(0.3)
    assert whole(fast) == ["0.0"]
    assert ahead.is_alive()
    ahead.stopped.set()
    ahead.join(5)
    assert not ahead.is_alive()


def test_what_the_loader_will_read(copied: Path, tmp_path: Path) -> None:
    """A batch reads of the window that is due, and at its end of the next; from any step."""
    cache = TargetCache(copied)
    order = order_of(cache, seed=1, batch_size=4, window_rows=8)
    for start in (0, 1, 7, 13):
        sampler = StepSampler(order, start=start, stop=14, micro=2)
        windows = list(_windows(cache, sampler))
        ends = [end for end, _ in windows]
        assert ends == sorted(ends)
        assert ends[-1] >= len(sampler)
        for number, address in enumerate(sampler):
            due = [some for end, some in windows if end > number]
            read = set(cache.shards_at(address.rows, address.views))
            assert read & set(due[0])
            assert read <= {shard for some in due[:2] for shard in some}


# --- pretraining ----------------------------------------------------------------------------------

RUN: dict[str, Any] = {**STUDENT, "epochs": 2, "batch_size": 8, "lr": 1e-3, "window_rows": 8}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_training_is_the_same(store: Path, tmp_path: Path, workers: int) -> None:
    """The bits of a run that reads the store where it is."""
    cache = TargetCache(store)
    limit = str(int(2.5 * shard_bytes(cache)))
    milan.pretrain(str(store), out=str(tmp_path / "a"), num_workers=0, **RUN)
    milan.pretrain(
        str(store), out=str(tmp_path / "b"), num_workers=workers,
        local=str(tmp_path / "fast"), cache_limit=limit, **RUN,
    )  # fmt: skip
    encoders = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in "ab"]
    assert encoders[0] == encoders[1]
    assert 1 <= len(whole(tmp_path / "fast")) <= 2
    assert held(tmp_path / "fast") <= int(limit)


def test_damage_stops_training(copied: Path, photos: Path, tmp_path: Path) -> None:
    """From a loader worker, as one of ours; the thread that goes ahead leaves it to it."""
    for path in (copied / "generations/000/features/c").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
    dataset = open_cache(copied, data_root=str(photos))
    dataset.cache.use_local(tmp_path / "fast", 10**9)
    order = order_of(dataset.cache, seed=0, batch_size=8)
    sampler = StepSampler(order, start=0, stop=3, micro=8)
    with pytest.raises(CacheError, match="is damaged"):
        list(training_loader(dataset, sampler, features=True, num_workers=1))


def test_a_window_must_fit(store: Path, tmp_path: Path) -> None:
    """Refused before a run's folder is made."""
    run = {**RUN, "out": str(tmp_path / "run"), "local": str(tmp_path / "fast")}
    for window, limit in ((8, "1KB"), (24, "9KB")):
        with pytest.raises(ConfigError, match=r"a window of . shards takes") as error:
            milan.pretrain(str(store), **run | {"cache_limit": limit, "window_rows": window})
        assert "--cache-limit" in error.value.fix
    with pytest.raises(ConfigError, match="one of local and cache_limit"):
        milan.pretrain(str(store), **run)
    assert not list(tmp_path.iterdir())


def test_a_lock_is_not_waited_for_without_end(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that hangs while it copies or makes room: one error that names its lock."""
    monkeypatch.setattr(local_cache_module, "_LIMIT", 0.1)
    cache = local_cache(copied, tmp_path / "fast")
    generation = cache.generations[0]
    assert generation.local
    part = generation.local.marker(0, 0)
    for locked in (part.with_name(f"{part.name}.part"), generation.local.folder / "lock"):
        with open(locked, "ab") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(CacheError, match=f"in vain for the process that locks {locked}"):
                generation.fetch(0, 0)
    assert generation.fetch(0, 0)


def test_a_lock_is_held_by_who_copies(copied: Path, tmp_path: Path) -> None:
    """A part whose copier lives is not taken for a dead one's, and its room stays taken."""
    near = local_cache(copied, tmp_path / "fast", 1.5)
    (generation,) = near.generations
    assert generation.local is not None
    part = generation.local.marker(0, 0).with_suffix(".0.part")
    with open(part, "a") as copier:
        fcntl.flock(copier, fcntl.LOCK_EX)
        os.truncate(part, shard_bytes(near))
        assert not generation.fetch(1, 0, protected=[])
        assert part.exists()
    assert generation.fetch(1, 0, protected=[])


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_copy_that_is_completed_meanwhile_is_kept(
    when: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes room sees a part, and its owner completes it before it can be locked: it is
    no leftover, and the files of a shard that is here stay."""
    cache = local_cache(store, tmp_path)
    generation = cache.generations[0]
    assert generation.local is not None
    generation.fetch(0, 0)
    marker = generation.local.marker(0, 0)
    part = marker.with_name(marker.name + ".part")
    os.rename(marker, part)

    def completed(opened: Any, how: int = 0) -> None:
        if part.exists():
            os.rename(part, marker)

    if when == "before it is opened":
        completed(None)
    else:
        monkeypatch.setattr(local_cache_module.fcntl, "flock", completed)
    assert not local_cache_module._abandoned(part)
    monkeypatch.undo()
    assert not part.exists()
    assert marker.exists()
    assert same(cache, TargetCache(store), ROWS[:8], VIEWS[:8] * 0)
