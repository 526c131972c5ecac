"""How many loader workers there are, and what is said of whether they keep up."""

from __future__ import annotations

from typing import Any

import pytest

from milan.data import feeding
from milan.data.feeding import Feeding, Loading, Workers, cores_needed, loader_workers
from milan.store.cache import TargetCache

GB = 10**9


@pytest.mark.parametrize(
    ("cores", "memory", "files", "ranks", "wanted", "expected"),
    [
        (96, 999 * GB, 65536, 1, None, (95, "cores")),  # no cap of eight
        (96, 999 * GB, 65536, 8, None, (11, "cores")),
        (2, 8 * GB, 1024, 1, None, (1, "cores")),
        (1, 8 * GB, 1024, 1, None, (1, "cores")),
        (4, 8 * GB, 1024, 8, None, (1, "cores")),
        (96, 16 * GB, 65536, 1, None, (25, "memory")),  # 315 MB each: batches are small
        (96, 16 * GB, 65536, 8, None, (3, "memory")),
        (96, 999 * GB, 256, 1, None, (32, "open files")),
        (96, 1 * GB, 64, 1, None, (1, "open files")),
        (2, 1 * GB, 64, 1, 40, (40, "--num-workers")),
        (96, 999 * GB, 65536, 1, 0, (0, "--num-workers")),
    ],
)
def test_as_many_as_there_is_room_for(
    cores: int, memory: int, files: int, ranks: int, wanted: int | None, expected: tuple[int, str],
    cache: TargetCache, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By cores, memory and open files, shared with the other ranks of the machine."""
    for name, value in (("cpu_count", cores), ("free_memory", memory), ("open_files", files)):
        monkeypatch.setattr(feeding, name, lambda value=value: value)
    got = loader_workers(wanted, cache, 256, ranks)
    assert got == Workers(*expected)
    assert str(got.count) in got.words()
    # Twice as large batches: not more of them.
    assert loader_workers(wanted, cache, 512, ranks).count <= got.count


SLOW, FAST = 165.0, 1800.0  # images/s of a core


@pytest.mark.parametrize(
    ("rate", "device", "workers", "more", "begins", "has", "lacks"),
    [
        (FAST, 212, Workers(7, "cores"), {}, "the device takes 212 images/s, a core loads 1,800",
         ("0.12 cores are needed", "7 loader workers are there"), ("try", "slower")),
        (SLOW, 5680, Workers(15, "cores"), {}, "slower than the device: ",
         ("34 cores are needed", "at 44% of", "--store-views jpeg:95", "35 cores"), ("--num-w",)),
        (SLOW, 5680, Workers(15, "cores"), {"stored_views": True}, "slower than the device: ",
         ("35 cores for each",), ("--store-views",)),
        (SLOW, 1000, Workers(2, "--num-workers"), {}, "slower than the device: ",
         ("--num-workers 7", "--store-views"), ("cores for",)),
        (SLOW, 1000, Workers(2, "memory"), {}, "slower than the device: ",
         ("more memory for 7 loader workers",), ("--num-workers",)),
        (SLOW, 1000, Workers(2, "open files"), {}, "slower than the device: ",
         ("ulimit -n 65536 for 7",), ()),
        (SLOW, 1000, Workers(15, "cores"), {"ranks_here": 8}, "slower than the device: the device ",
         ("of each rank", "at 33% of"), ()),
        (SLOW, 300, Workers(7, "cores"), {"wait_share": 0.5, "seconds": 9.0}, "waits for the disk",
         ("11% of the time", "--local"), ("slower",)),
        (SLOW, 300, Workers(7, "cores"), {"wait_share": 0.5, "seconds": 1.2}, "the device", (),
         ("try",)),
        (SLOW, 300, Workers(7, "cores"), {"wait_share": 0.0, "seconds": 9.0}, "the device", (),
         ("try",)),
        (SLOW, 100, Workers(0, "--num-workers"), {}, "slower than the device: ",
         ("--num-workers 1", "between its steps"), ()),
        (FAST, 100, Workers(0, "--num-workers"), {}, "the device takes", (), ("try",)),
        (SLOW, 160, Workers(1, "cores"), {}, "the device", ("1 loader worker is there",), ("try",)),
    ],
)  # fmt: skip
def test_what_is_said(
    rate: float, device: float, workers: Workers, more: dict[str, Any], begins: str,
    has: tuple[str, ...], lacks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is missing and what to do about it; where nothing is missing, nothing alarming."""
    monkeypatch.setattr(feeding, "cpu_count", lambda: 16)
    loading = Loading()
    loading.add(int(rate), 1.0, more.pop("seconds", 1.0))
    given = {"ranks_here": 1, "stored_views": False, "device_rate": device} | more
    told = Feeding(loading, workers, **given)
    words = told.words()
    assert words.startswith(begins), words
    assert all(part in words for part in has), words
    assert not any(part in words for part in lacks), words
    assert "\n" not in words
    assert told.figures()["loader_cores_needed"] == pytest.approx(device / rate, rel=0.01)
    assert cores_needed(device, 1 / rate) == pytest.approx(device / rate)
