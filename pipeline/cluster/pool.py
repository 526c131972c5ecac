"""A pool of Ray actors that take blocks of rows.

Features never pass through Ray: a worker writes its shards to staging and returns their records.
A worker has several blocks at a time: it stages the shards of one while it computes the next. One
that crashes is replaced and its blocks are retried, each alone, so that a block which kills its
worker takes no other with it; only the driver commits, so a worker that was given up for lost can
harm nothing but its own staging folders. At the end, a block that hangs on a slow worker (or on one
that finds no room after its node is gone) is given to an idle one too; the first to finish counts,
and the bytes are the same either way.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from milan.core.paths import AnyPath
from milan.core.progress import Progress
from milan.core.waiting import Wait
from milan.errors import CacheError
from pipeline.cluster.connect import RemoteClass, connected, last_line, value_of

# When no block is left to begin, an idle worker gets a backup of one that has been in work for so
# many times the median, and for so many seconds at least.
_BACKUP_MEDIANS, _BACKUP_SECONDS = 3, 5.0
_LIMIT = 30 * 60.0  # seconds without an answer of any worker: loading a teacher takes minutes


@dataclass(frozen=True)
class Replicas:
    """How many workers there are, and where."""

    count: int
    gpus: float
    """Of each."""
    blocks: int
    """That each has at a time."""
    address: str | None
    """Of the cluster; None: $RAY_ADDRESS, or Ray started on this machine."""


@dataclass(frozen=True)
class BlockCallbacks:
    """What the driver does as blocks come and go."""

    folder_of: Callable[[int, int], AnyPath]
    """(block, attempt from 0) -> the staging folder of that attempt."""
    on_done: Callable[[int, AnyPath, list[dict]], None]
    """(block, its staging folder, records of its shards), once a block."""
    on_progress: Callable[[int], None]
    """Images that all workers have dealt with, crashed ones included; about once a second."""
    on_failure: Callable[[int, int, str], None]
    """(block, attempt, reason) of an attempt that failed."""


def map_blocks(
    worker: RemoteClass,
    todo: np.ndarray,
    callbacks: BlockCallbacks,
    replicas: Replicas,
    *,
    attempts: int,
    progress: Progress | None = None,
) -> dict[int, str]:
    """Run `worker` over the shards `todo` ([blocks, K] bool); returns the blocks that failed.

    A worker has `run(block, views, folder) -> records`, which as many threads call as it has blocks
    at a time, and a counter `images`. The result maps
    each block that failed `attempts` times to its last reason. A MilanError of a worker is raised
    at once, and a CacheError if no worker answers for half an hour.
    """
    need = "1 core" + (f" and {replicas.gpus:g} GPU" if replicas.gpus else "")
    wait = Wait(
        f"a worker of Ray that starts or answers (each needs {need})",
        limit=_LIMIT,
        fix="`ray status` shows what the cluster is busy with; --executor local needs no Ray",
        progress=progress,
        error=CacheError,
    )
    with connected(replicas.address):
        return _Pool(worker, callbacks, replicas, attempts).run(todo, wait)


@dataclass
class _Attempt:
    """A block in work: which actor has it, and since when."""

    actor: Any
    block: int
    number: int
    folder: AnyPath
    started: float


class _Pool:
    """Actors and their blocks. A block may have two attempts in work: the first to end counts."""

    def __init__(
        self, worker: RemoteClass, callbacks: BlockCallbacks, replicas: Replicas, attempts: int
    ) -> None:
        self.start_actor = worker.starter(
            num_cpus=1,
            num_gpus=replicas.gpus,
            max_concurrency=replicas.blocks + 1,  # and the question how far it is
        )
        self.callbacks, self.replicas, self.attempts = callbacks, replicas, attempts
        self.actors: list[Any] = []  # that live
        self.fresh: deque[int] = deque()  # blocks that were not begun
        self.running: dict[Any, _Attempt] = {}  # by Ray's task
        self.retries: deque[int] = deque()  # blocks whose attempt failed
        self.attempt_numbers: dict[int, int] = {}  # the newest, of blocks that are not done
        self.failures: dict[int, int] = {}  # how many, of blocks that are not done
        self.lost: dict[int, str] = {}  # blocks given up, with the last reason
        self.durations: deque[float] = deque(maxlen=99)  # seconds of the blocks done last

    def run(self, todo: np.ndarray, wait: Wait) -> dict[int, str]:
        """Work through `todo` ([blocks, K] bool); returns the blocks that were given up."""
        self.fresh.extend(np.flatnonzero(todo.any(axis=1)).tolist())
        self.actors = [self.start_actor() for _ in range(min(self.replicas.count, len(self.fresh)))]
        images: dict[Any, int] = {}  # by actor, crashed ones included
        while True:
            while (given := self._next()) is not None:
                actor, block = given
                self._begin(actor, block, np.flatnonzero(todo[block]).tolist())
            if not self.running:
                return self.lost
            ready, _ = ray.wait(list(self.running), timeout=1.0)
            if self._read_images(images) or ready:
                wait.restart()
            wait.check()
            self.callbacks.on_progress(sum(images.values()))
            for task in ready:
                if task in self.running:  # else the block's other attempt has just ended
                    self._finish(task)

    def _begin(self, actor: Any, block: int, views: list[int]) -> None:
        number = self.attempt_numbers[block] = self.attempt_numbers.get(block, -1) + 1
        folder = self.callbacks.folder_of(block, number)
        task = actor.call.remote("run", block, views, str(folder))
        self.running[task] = _Attempt(actor, block, number, folder, time.monotonic())

    def _finish(self, task: Any) -> None:
        """Deal with a task that has ended."""
        attempt = self.running.pop(task)
        try:
            records = value_of(ray.get(task))
        except ray.exceptions.RayActorError as error:  # the actor crashed
            if attempt.actor in self.actors:  # else another of its blocks has told already
                self.actors.remove(attempt.actor)
                self.actors.append(self.start_actor())
            self._fail(attempt, last_line(error))
            return
        except ray.exceptions.RayTaskError as error:
            self._fail(attempt, last_line(error))
            return
        self.callbacks.on_done(attempt.block, attempt.folder, records)
        self.durations.append(time.monotonic() - attempt.started)
        self._drop(attempt.block)

    def _fail(self, attempt: _Attempt, reason: str) -> None:
        block = attempt.block
        self.callbacks.on_failure(block, attempt.number, reason)
        self.failures[block] = self.failures.get(block, 0) + 1
        if self._in_work(block):
            return  # its other attempt goes on
        if self.failures[block] < self.attempts:
            self.retries.append(block)
        else:
            self.lost[block] = reason

    def _in_work(self, block: int) -> bool:
        return any(attempt.block == block for attempt in self.running.values())

    def _next(self) -> tuple[Any, int] | None:
        """(actor, block) to begin now; None while all actors have enough.

        A new block goes to the actor with the fewest. When there is none left, an idle actor gets
        a failed block, or a backup of a slow one: for itself, as no new block can follow.
        """
        blocks: defaultdict[Any, list[int]] = defaultdict(list)
        for attempt in self.running.values():
            blocks[attempt.actor].append(attempt.block)
        for actor in sorted(self.actors, key=lambda actor: len(blocks[actor])):
            if self.fresh and len(blocks[actor]) < self.replicas.blocks:
                return actor, self.fresh.popleft()
            if not blocks[actor] and (block := self._retry_or_backup()) is not None:
                return actor, block
        return None

    def _retry_or_backup(self) -> int | None:
        """A block that failed, or one that takes too long where it is."""
        if self.retries:
            return self.retries.popleft()
        if self.fresh or not self.durations:
            return None
        limit = max(_BACKUP_SECONDS, _BACKUP_MEDIANS * statistics.median(self.durations))
        attempts = Counter(attempt.block for attempt in self.running.values())
        slow = [
            attempt for attempt in self.running.values()
            if attempts[attempt.block] == 1 and time.monotonic() - attempt.started > limit
        ]  # fmt: skip
        return min(slow, key=lambda attempt: attempt.started).block if slow else None

    def _drop(self, block: int) -> None:
        """The block is done: stop a second attempt at it; nobody reads what that one staged."""
        self.attempt_numbers.pop(block, None)
        self.failures.pop(block, None)
        for actor in [a.actor for a in self.running.values() if a.block == block]:
            ray.kill(actor)
            self.actors.remove(actor)
            for task in [t for t, attempt in self.running.items() if attempt.actor is actor]:
                other = self.running.pop(task).block
                if other != block and not self._in_work(other):
                    self.retries.append(other)

    def _read_images(self, images: dict[Any, int]) -> bool:
        """Ask the workers how many images they have dealt with; whether any answered."""
        answered = False
        for actor in {attempt.actor for attempt in self.running.values()}:
            try:
                images[actor] = ray.get(actor.read.remote("images"), timeout=0.5)
                answered = True
            except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
                continue  # starting, or crashed: the task itself will tell
        return answered
