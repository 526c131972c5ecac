"""Where work runs: a pool of Ray actors that take blocks, or training ranks that work together.

The only module that imports ray.

Features never pass through Ray: a worker writes its shards to staging and returns their records.
A worker that dies is replaced and its block tried again; only the driver commits, so a zombie can
harm nothing but its own staging folder. At the end, a block that hangs on a slow worker (or on one
that finds no place after its node is gone) is tried on an idle one too; the first to end counts,
and the bytes are the same either way.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milan.core.launch import persistently
from milan.core.paths import AnyPath
from milan.core.progress import Progress, replay
from milan.core.signals import Stop, on_stop_signals
from milan.errors import MilanError

# Said before ray is imported: milan sends nothing anywhere.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

# When nothing is left to begin, an idle worker tries a block again that has been in work for so
# many times the median, and so many seconds at least.
_PATIENCE, _PATIENCE_SECONDS = 3, 5.0
_ROOT = str(Path(__file__).resolve().parents[2])
_PLACED = 60.0  # seconds in which a cluster that is large enough has room for ranks
_GRACE = 5.0  # seconds in which ranks may say what they died of


def map_blocks(
    worker: tuple[str, str],
    init: dict[str, Any],
    todo: np.ndarray,
    *,
    folder_of: Callable[[int, int], AnyPath],
    on_done: Callable[[int, AnyPath, list[dict]], None],
    on_progress: Callable[[int], None],
    on_failure: Callable[[int, int, str], None],
    replicas: int,
    gpus: float,
    address: str | None,
    attempts: int,
) -> dict[int, str]:
    """Run `worker` (module, class) over the shards `todo` ([blocks, K] bool) on `replicas` actors.

    The worker is built with `init` on its node and has `run(block, views, folder) -> records` and
    a counter `images`. Returns the blocks that failed `attempts` times with the last reason;
    MilanErrors of a worker end the run at once.
    """
    ours = _connect(address)
    try:
        return _Pool(worker, init, replicas, gpus, attempts).run(
            todo, folder_of, on_done, on_progress, on_failure
        )
    finally:
        if ours:
            ray.shutdown()


def run_ranks(
    rank: tuple[str, str],
    init: dict[str, Any],
    *,
    nodes: int,
    per_node: int | None,
    gpu: bool | None,
    address: str | None,
    restarts: int,
    again: Callable[[], dict[str, Any]],
    progress: Progress,
) -> Any:
    """What rank 0's `run(environment)` returns, of `rank` (module, class) on `nodes` machines.

    Each machine gets `per_node` ranks (default: one a GPU of the smallest that has any), each with
    its GPU if `gpu`; None: if the cluster has any. A rank has `hear() -> list` of what its watcher
    was told and `ask(signal)`. If one dies, all are started again with the arguments `again()`
    added, at most `restarts` times. Raises MilanError: that of a rank, a cluster that is too small,
    one death too many.
    """
    ours = _connect(address)
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = any(r.get("GPU") for r in alive) if gpu is None else gpu
        counts = sorted(int(r.get("GPU" if gpu else "CPU", 0)) for r in alive)[::-1]
        usable = [count for count in counts if count >= (per_node or 1)]
        if len(usable) < nodes:
            kind = "GPUs" if gpu else "cores"
            raise MilanError(
                f"{nodes} nodes with {per_node or 1} {kind} each, of a cluster with {counts}",
                fix=f"--num-nodes {max(1, len(usable))}, or fewer --devices",
            )
        each = per_node or (usable[nodes - 1] if gpu else 1)

        stop = Stop()

        def live(given: dict[str, Any]) -> tuple[str | None, Any]:
            ranks = _Ranks(rank, given, nodes, each, gpu)
            try:
                return ranks.run(stop, progress)
            finally:
                ranks.end()

        return persistently(
            live,
            init,
            again=again,
            restarts=restarts,
            ranks=nodes * each,
            stop=stop,
            progress=progress,
        )
    finally:
        if ours:
            ray.shutdown()


class _Ranks:
    """One life of all ranks of a run."""

    def __init__(
        self, rank: tuple[str, str], init: dict[str, Any], nodes: int, each: int, gpu: bool
    ) -> None:
        self.each = each
        bundle = {"CPU": float(each)} | ({"GPU": float(each)} if gpu else {})
        self.group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
        if not self.group.wait(_PLACED):
            remove_placement_group(self.group)
            raise MilanError(
                f"no room for {each} ranks on each of {nodes} nodes within {_PLACED:.0f} s",
                expected="a cluster that is not busy with something else",
            )
        host: Any = ray.remote(_host_class())
        # Three calls at a time: the run, what it says, and the request to stop.
        self.actors: list[Any] = [
            host.options(
                num_cpus=1, num_gpus=int(gpu), max_restarts=0, max_concurrency=3,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=number // each
                ),
            ).remote(_ROOT, *rank, pickle.dumps(init))
            for number in range(nodes * each)
        ]  # fmt: skip

    def run(self, stop: Stop, progress: Progress) -> tuple[str | None, Any]:
        """(how a rank died, None), or (None, what rank 0 returned)."""
        first, size = self.actors[0], len(self.actors)
        try:
            host, (_, port) = ray.get([first.node.remote(), first.call.remote("port")])
        except ray.exceptions.RayError as error:
            return f"rank 0 did not start ({_last_line(error)})", None
        meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        # Ray shows each process its own GPU alone: it is number 0 there.
        meeting |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(self.each)}
        tasks = {
            actor.call.remote("run", meeting | {"RANK": str(rank)}): rank
            for rank, actor in enumerate(self.actors)
        }
        died, result, until = None, None, float("inf")

        def ask(number: int) -> None:
            for actor in self.actors:
                actor.call.remote("ask", number)
            stop.request(number)

        with on_stop_signals(ask):
            while tasks and time.monotonic() < until:
                ready, _ = ray.wait(list(tasks), timeout=0.5)
                self._hear(progress)
                for task in ready:
                    rank = tasks.pop(task)
                    try:
                        kind, value = ray.get(task)
                    except ray.exceptions.RayError as error:
                        died = died or f"rank {rank} died ({_last_line(error)})"
                        # The others fall with it; one of them may say why.
                        until = min(until, time.monotonic() + _GRACE)
                        continue
                    if kind == "error":
                        raise pickle.loads(value)
                    result = value if rank == 0 else result
        return died, result

    def _hear(self, progress: Progress) -> None:
        try:
            _, heard = ray.get(self.actors[0].call.remote("hear"), timeout=5.0)
        except ray.exceptions.RayError:
            return
        for passed in heard:
            replay(progress, passed)

    def end(self) -> None:
        """Let the machines go."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200]


def cluster_gpus(address: str | None) -> int:
    """GPUs of the cluster at `address` or $RAY_ADDRESS."""
    ours = _connect(address)
    count = int(ray.cluster_resources().get("GPU", 0))
    if ours:
        ray.shutdown()
    return count


def _connect(address: str | None) -> bool:
    """Join the cluster at `address` or $RAY_ADDRESS, or start Ray here. True: ours to stop."""
    if ray.is_initialized():
        return False
    target = address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        if target:
            _knock(target)
        ray.init(
            address=target or "local",  # not a cluster that happens to run on this machine
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if target else local),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {target}" if target else "Ray on this machine"
        raise MilanError(
            f"{where} cannot be reached: {str(error).splitlines()[0]}",
            fix="without Ray: --executor local for extraction, torchrun for pretraining",
        ) from None
    return True


def _knock(address: str) -> None:
    """Raise OSError if nobody answers at host:port; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _host_class() -> type:
    """The actor's class. Defined here, so that it travels by value and imports nothing of ours."""

    class Host:
        def __init__(self, root: str, module: str, name: str, payload: bytes) -> None:
            import importlib
            import os
            import pickle
            import sys

            # A worker's path begins with the driver's folder, which may hold other packages called
            # `pipeline`, `stages` or `milan`: put ours first, and forget what came from elsewhere.
            # On another node `root` may not exist; there the installed package is found, once the
            # driver's folder is out of the way.
            installed = os.path.isdir(os.path.join(root, "pipeline"))
            here = os.path.realpath(os.getcwd())
            sys.path[:] = [p for p in sys.path if p and os.path.realpath(p) != here]
            if installed:
                sys.path.insert(0, root)
            for loaded in list(sys.modules):
                if loaded.split(".")[0] in ("milan", "pipeline", "stages"):
                    del sys.modules[loaded]
            self.worker = getattr(importlib.import_module(module), name)(**pickle.loads(payload))

        def call(self, method: str, *arguments: Any) -> tuple[str, Any]:
            import pickle

            from milan.errors import MilanError

            try:
                return "result", getattr(self.worker, method)(*arguments)
            except MilanError as error:
                return "error", pickle.dumps(error)

        def read(self, name: str) -> Any:
            return getattr(self.worker, name)

        def node(self) -> str:
            import ray

            return ray.util.get_node_ip_address()

    return Host


@dataclass
class _Try:
    """A block in work: who does it, and since when."""

    actor: Any
    block: int
    attempt: int
    folder: AnyPath
    started: float


class _Pool:
    """Actors and the blocks they work on. A block may be in work twice: the first to end counts."""

    def __init__(
        self, worker: tuple[str, str], init: dict, replicas: int, gpus: float, attempts: int
    ) -> None:
        # Two calls at a time: a block's work, and the question how far it is.
        self.host: Any = ray.remote(_host_class()).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=2
        )
        self.arguments = (_ROOT, *worker, pickle.dumps(init))
        self.replicas, self.attempts = replicas, attempts
        self.running: dict[Any, _Try] = {}
        self.again: deque[int] = deque()  # blocks to be tried again
        self.begun: dict[int, int] = {}  # tries of the blocks that are not done
        self.failed: dict[int, int] = {}
        self.seconds: deque[float] = deque(maxlen=99)  # of the blocks done last

    def run(
        self,
        todo: np.ndarray,
        folder_of: Callable[[int, int], AnyPath],
        on_done: Callable[[int, AnyPath, list[dict]], None],
        on_progress: Callable[[int], None],
        on_failure: Callable[[int, int, str], None],
    ) -> dict[int, str]:
        blocks = np.flatnonzero(todo.any(axis=1))
        fresh = iter(blocks)
        lost: dict[int, str] = {}
        idle = [self.host.remote(*self.arguments) for _ in range(min(self.replicas, len(blocks)))]
        seen: dict[Any, int] = {}  # images by actor, the dead ones included
        while True:
            while idle:
                block = self._next(fresh)
                if block is None:
                    break
                attempt = self.begun[block] = self.begun.get(block, -1) + 1
                actor, folder = idle.pop(), folder_of(block, attempt)
                views = np.flatnonzero(todo[block]).tolist()
                task = actor.call.remote("run", block, views, str(folder))
                self.running[task] = _Try(actor, block, attempt, folder, time.monotonic())
            if not self.running:
                return lost
            ready, _ = ray.wait(list(self.running), timeout=1.0)
            self._ask(seen)
            on_progress(sum(seen.values()))
            for task in ready:
                if task not in self.running:
                    continue  # the other of two tries has just ended
                ended = self.running.pop(task)
                block = ended.block
                try:
                    kind, value = ray.get(task)
                except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                    dead = isinstance(error, ray.exceptions.RayActorError)
                    idle.append(self.host.remote(*self.arguments) if dead else ended.actor)
                    why = _last_line(error)
                    on_failure(block, ended.attempt, why)
                    self.failed[block] = self.failed.get(block, 0) + 1
                    if any(other.block == block for other in self.running.values()):
                        continue  # its other try goes on
                    if self.failed[block] < self.attempts:
                        self.again.append(block)
                    else:
                        lost[block] = why
                    continue
                if kind == "error":
                    raise pickle.loads(value)
                on_done(block, ended.folder, value)
                self.seconds.append(time.monotonic() - ended.started)
                idle.append(ended.actor)
                self._drop(block)

    def _next(self, fresh: Iterator[Any]) -> int | None:
        """What an idle actor should do: a new block, a failed one, or one that hangs elsewhere."""
        block = next(fresh, None)
        if block is not None:
            return int(block)
        if self.again:
            return self.again.popleft()
        if not self.seconds:
            return None
        patience = max(_PATIENCE_SECONDS, _PATIENCE * statistics.median(self.seconds))
        twice = Counter(t.block for t in self.running.values())
        late = [
            t for t in self.running.values()
            if twice[t.block] == 1 and time.monotonic() - t.started > patience
        ]  # fmt: skip
        return min(late, key=lambda t: t.started).block if late else None

    def _drop(self, block: int) -> None:
        """The block is done: who still works on it is stopped; nobody reads what it staged."""
        self.begun.pop(block, None)
        self.failed.pop(block, None)
        for task in [t for t, other in self.running.items() if other.block == block]:
            ray.kill(self.running.pop(task).actor)

    def _ask(self, seen: dict[Any, int]) -> None:
        for work in self.running.values():
            try:
                seen[work.actor] = ray.get(work.actor.read.remote("images"), timeout=0.5)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
                continue  # starting, or dead: the task itself will say
