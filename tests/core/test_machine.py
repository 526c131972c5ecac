"""What a process may use: of its machine, or of its container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from milan.core import machine

V1 = "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n"
V2 = "0::/jobs/7\n"


@pytest.mark.parametrize(
    ("own", "files", "cores", "memory"),
    [
        ("", {}, 64, None),
        (V2, {"jobs/7/cpu.max": "max 100000", "jobs/7/memory.max": "max"}, 64, None),
        (V2, {"jobs/7/cpu.max": "400000 100000", "jobs/7/memory.max": "1000000"}, 4, 1_000_000),
        (V2, {"jobs/cpu.max": "250000 100000", "jobs/memory.max": "2000000"}, 2, 2_000_000),
        (V2, {"cpu.max": "50000 100000"}, 1, None),  # half a core
        (V2, {"jobs/7/cpu.max": "900000 10000"}, 64, None),
        (
            V1,
            {
                "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "3000000",
            },
            3, 3_000_000,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64, None),
    ],
)  # fmt: skip
def test_a_containers_limits(
    own: str, files: dict[str, str], cores: int, memory: int | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Quotas of both versions of control groups, of the process's own group and those above."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert machine.cpu_count() == cores
    assert machine.free_memory() == memory or (memory is None and machine.free_memory() > 1e8)
