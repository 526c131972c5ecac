"""Whether loader workers keep up with the device: how many there are, and how many it takes.

The one place for this law. A run and a dry run measure what a core loads and what the device takes;
`milan plan` measures the first, and is told the second or assumes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from milan.core.machine import cpu_count, free_memory, open_files
from milan.store.cache import TargetCache

_OWN_BYTES = 300 << 20  # of a loader worker: Python, torch, its part of the store's tables
_OWN_FILES = 4  # that a loader worker takes in the training process
_OTHER_FILES = 64  # of the training process
_DEEP = 8  # loader workers, up to which each has four batches ready and not two
_IDLE = 0.5  # a loader worker that uses less of a core waits for the disk
_WAITS = 0.1  # share of time: a device that waits less is kept busy


@dataclass(frozen=True)
class Workers:
    """The loader workers of a rank."""

    count: int
    limit: str
    """What allows no more of them: cores, memory, open files, or --num-workers."""

    def words(self) -> str:
        """How many, and why not more."""
        plural = "" if self.count == 1 else "s"
        return f"{self.count} loader worker{plural}, limited by {self.limit}"


def loader_workers(
    wanted: int | None,
    cache: TargetCache,
    micro_batch: int,
    ranks_here: int,
    channels: int = 0,
) -> Workers:
    """`wanted` of them; None: as many as this rank's share of the machine has room for.

    Of the cores the training process keeps one: on a GPU it queues the step's work, and on a CPU
    loader workers sleep while the step computes. Batches that are ready may take half of the
    memory that is free. `ranks_here` ranks share the machine. `channels` that a student sees beside
    the teacher's pixels are float32.
    """
    if wanted is not None:
        return Workers(wanted, "--num-workers")
    cores = loader_cores(ranks_here)
    ready = batches_ahead(cores)
    batch = micro_batch * ((3 + 4 * channels) * math.prod(cache.view_spec.shape) + cache.view_bytes)
    rooms = {
        "cores": cores,
        "memory": free_memory() // 2 // ranks_here // (_OWN_BYTES + ready * batch),
        "open files": workers_with_files(cores),
    }
    limit = min(rooms, key=lambda what: rooms[what])
    return Workers(max(1, rooms[limit]), limit)


def loader_cores(ranks_here: int = 1) -> int:
    """Cores for loader workers where so many ranks share the machine: one is kept for training."""
    return max(1, cpu_count() // ranks_here - 1)


def workers_with_files(cores: int) -> int:
    """For how many loader workers, of so many cores, this process may open files."""
    return (open_files() - _OTHER_FILES) // (_OWN_FILES + batches_ahead(cores))


def batches_ahead(workers: int) -> int:
    """Batches that each of so many loader workers keeps ready."""
    return 4 if workers <= _DEEP else 2


def cores_needed(images_per_second: float, core_seconds: float) -> float:
    """Cores that load so many images, of which each takes `core_seconds` of one."""
    return images_per_second * core_seconds


@dataclass
class Loading:
    """What loading has taken so far, the first batch of each process left out."""

    images: int = 0
    core_seconds: float = 0.0
    """Of all threads of the processes that load."""
    seconds: float = 0.0
    """From being asked for a batch to having it, added up over the processes."""

    def add(self, images: int, core_seconds: float, seconds: float) -> None:
        """Count a batch."""
        self.images += images
        self.core_seconds += core_seconds
        self.seconds += seconds

    @property
    def per_core(self) -> float:
        """Images/s that a core loads."""
        return self.images / max(self.core_seconds, 1e-9)


@dataclass(frozen=True)
class Feeding:
    """What is loaded against what the device takes, of one rank."""

    loading: Loading
    workers: Workers
    ranks_here: int
    """Ranks that share the machine."""
    stored_views: bool
    device_rate: float
    """Images/s that the rank's device takes if it need not wait."""
    wait_share: float = 0.0
    """Share of the time in which the device waited for batches."""

    @property
    def cores(self) -> float:
        """Cores of this rank that loading would keep busy."""
        return cores_needed(self.device_rate, 1 / self.loading.per_core)

    @property
    def capacity(self) -> float:
        """Images/s of a run in which the device is not the limit."""
        if self.workers.count == 0:  # one after the other
            return 1 / (1 / self.device_rate + 1 / self.loading.per_core)
        return self.loading.per_core * min(self.workers.count, self._cores_here)

    @property
    def _cores_here(self) -> float:
        return max(1, cpu_count() / self.ranks_here)

    def figures(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "loader_images_per_core_second": round(self.loading.per_core, 1),
            "loader_cores_needed": round(self.cores, 3),
            "loader_workers": self.workers.count,
        }

    def words(self) -> str:
        """One line: enough, or what is missing and what to do."""
        kind = "stored views" if self.stored_views else "originals"
        device = f"the device{' of each rank' if self.ranks_here > 1 else ''}"
        rate = f"{self.device_rate:,.0f}" if self.device_rate >= 10 else f"{self.device_rate:.2g}"
        rates = (
            f"{device} takes {rate} images/s, a core loads "
            f"{self.loading.per_core:,.0f} ({kind}): {self.cores:,.2g} cores are needed"
        )
        many = self.workers.count > 1
        there = f"{self.workers.count} loader worker{'s are' if many else ' is'} there"
        if self.workers.count == 0:
            there = "the training process loads between its steps (--num-workers 0)"
        if self.capacity < (1 - _WAITS) * self.device_rate:
            share = self.capacity / self.device_rate
            return (
                f"slower than the device: {rates}, {there}, so training runs at {share:.0%} of "
                f"its speed at most; try: {', or '.join(self._remedies())}"
            )
        if self.wait_share > _WAITS and self.loading.core_seconds < _IDLE * self.loading.seconds:
            return (
                f"waits for the disk or network: {rates}, {there}, but each is busy "
                f"for {self.loading.core_seconds / self.loading.seconds:.0%} of the time; "
                f"try: --local FOLDER --cache-limit SIZE, a faster disk for the images, or more "
                f"--num-workers"
            )
        return f"{rates}, {there}"

    def _remedies(self) -> list[str]:
        enough = int(self.cores) + 1
        remedies = []
        if self.workers.limit == "--num-workers" and self.workers.count < self._cores_here - 1:
            remedies.append(f"--num-workers {min(enough, int(self._cores_here) - 1)}")
        if self.workers.limit in ("memory", "open files"):
            more = {"memory": "more memory", "open files": "ulimit -n 65536"}
            remedies.append(f"{more[self.workers.limit]} for {enough} loader workers")
        if not self.stored_views:
            remedies.append("a store with --store-views jpeg:95, whose views load faster")
        if enough > self._cores_here - 1:
            remedies.append(f"{enough} cores for each rank's loader workers")
        return remedies or [f"--num-workers {enough}"]
