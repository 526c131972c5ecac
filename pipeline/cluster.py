"""Where work runs: a pool of Ray actors that take blocks. The only module that imports ray.

Features never pass through Ray: a worker writes its shards to staging and returns their records.
A worker that dies is replaced and its block tried again; only the driver commits, so a zombie can
harm nothing but its own staging folder.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milan.errors import MilanError

# Said before ray is imported: milan sends nothing anywhere.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

Block = tuple[int, list[int]]
"""(block, views): a unit of work."""


def map_blocks(
    worker: tuple[str, str],
    init: dict[str, Any],
    todo: Sequence[Block],
    *,
    folder_of: Callable[[int, int], Path],
    on_done: Callable[[int, Path, list[dict]], None],
    on_progress: Callable[[int], None],
    on_failure: Callable[[int, int, str], None],
    replicas: int,
    gpus: float,
    address: str | None,
    attempts: int,
) -> dict[int, str]:
    """Run `worker` (module, class) over all blocks on `replicas` actors.

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
            address=target,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if target else local),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {target}" if target else "Ray on this machine"
        raise MilanError(
            f"{where} cannot be reached: {str(error).splitlines()[0]}",
            fix="--executor local does the same work in one process",
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

        def run(self, block: int, views: list[int], folder: str) -> tuple[str, Any]:
            import pickle

            from milan.errors import MilanError

            try:
                return "records", self.worker.run(block, views, folder)
            except MilanError as error:
                return "error", pickle.dumps(error)

        def images(self) -> int:
            return self.worker.images

    return Host


class _Pool:
    def __init__(
        self, worker: tuple[str, str], init: dict, replicas: int, gpus: float, attempts: int
    ) -> None:
        # Two calls at a time: a block's work, and the question how far it is.
        self.host: Any = ray.remote(_host_class()).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=2
        )
        root = str(Path(__file__).resolve().parent.parent)
        self.arguments = (root, *worker, pickle.dumps(init))
        self.replicas, self.attempts = replicas, attempts

    def run(
        self,
        todo: Sequence[Block],
        folder_of: Callable[[int, int], Path],
        on_done: Callable[[int, Path, list[dict]], None],
        on_progress: Callable[[int], None],
        on_failure: Callable[[int, int, str], None],
    ) -> dict[int, str]:
        waiting = deque((block, views, 0) for block, views in todo)
        lost: dict[int, str] = {}
        running: dict[Any, tuple[Any, int, list[int], int, Path]] = {}
        idle = [self.host.remote(*self.arguments) for _ in range(min(self.replicas, len(todo)))]
        seen: dict[Any, int] = {}  # images by actor, the dead ones included
        while waiting or running:
            while waiting and idle:
                actor = idle.pop()
                block, views, attempt = waiting.popleft()
                folder = folder_of(block, attempt)
                task = actor.run.remote(block, views, str(folder))
                running[task] = (actor, block, views, attempt, folder)
            ready, _ = ray.wait(list(running), timeout=1.0)
            self._ask(running, seen)
            on_progress(sum(seen.values()))
            for task in ready:
                actor, block, views, attempt, folder = running.pop(task)
                try:
                    kind, value = ray.get(task)
                except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                    dead = isinstance(error, ray.exceptions.RayActorError)
                    why = str(error).strip().splitlines()[-1][:300]
                    on_failure(block, attempt, why)
                    if attempt + 1 < self.attempts:
                        waiting.append((block, views, attempt + 1))
                    else:
                        lost[block] = why
                    idle.append(self.host.remote(*self.arguments) if dead else actor)
                    continue
                if kind == "error":
                    raise pickle.loads(value)
                on_done(block, folder, value)
                idle.append(actor)
        return lost

    def _ask(self, running: dict, seen: dict) -> None:
        for actor, *_ in running.values():
            try:
                seen[actor] = ray.get(actor.images.remote(), timeout=0.5)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
                continue  # starting, or dead: the task itself will say
