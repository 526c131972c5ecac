"""What this process may use of its machine: cores, memory, open files."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_DECODING = 16  # threads that decode, at most
_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_count() -> int:
    """CPU cores that this process may use: its affinity mask, and its container's quota."""
    cores = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for text in _limits("cpu", "cpu.max"):  # version 2: "400000 100000", or "max 100000"
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    quotas, periods = _limits("cpu", "cpu.cfs_quota_us"), _limits("cpu", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):  # version 1: -1 is no limit
        if int(quota) > 0:
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def decoding_threads(cores: int) -> int:
    """How many threads decode images where a process has so many cores."""
    return max(1, min(_DECODING, cores))


def free_memory() -> int:
    """Bytes that processes may still take: what the system has, within the container's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):  # macOS has no such file
        free = 1024 * int(_text(Path("/proc/meminfo")).split("MemAvailable:")[1].split()[0])
    for name in ("memory.max", "memory.limit_in_bytes"):  # of versions 2 and 1
        for text in _limits("memory", name):
            free = min(free, int(text)) if text.strip() != "max" else free
    return free


def open_files() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def _limits(controller: str, name: str) -> Iterator[str]:
    """The files `name` of this process's control group and of those above it."""
    with suppress(OSError):
        for line in _text(_OWN).splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _CGROUPS / controller if controllers else _CGROUPS
            folder = root / group.strip("/")
            for above in (folder, *folder.parents):
                with suppress(OSError):
                    yield _text(above / name)
                if above == root:
                    break


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
