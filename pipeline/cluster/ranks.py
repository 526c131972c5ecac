"""Training ranks on several machines of a Ray cluster, started and restarted together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from milan.core.launch import run_with_restarts
from milan.core.progress import Progress, replay
from milan.core.signals import Stop, on_stop_signals
from milan.errors import MilanError
from pipeline.cluster.connect import RemoteClass, connected, last_line, value_of

_PLACEMENT_TIMEOUT = 60.0  # seconds in which a cluster that is large enough has room for ranks
_START_TIMEOUT = 600.0  # seconds in which the first rank has to be ready
_GRACE = 5.0  # seconds in which the other ranks may report why one crashed


@dataclass(frozen=True)
class Machines:
    """Which machines ranks run on."""

    nodes: int
    per_node: int | None
    """Ranks on each; None: one for each GPU of the smallest node that is used, or one."""
    gpu: bool | None
    """Whether each rank gets a GPU; None: if the cluster has any."""
    address: str | None
    """Of the cluster; None: $RAY_ADDRESS, or Ray started on this machine."""

    def resolved(self) -> tuple[int, bool]:
        """(ranks on each node, whether each gets a GPU), in the connected cluster.

        Raises MilanError if the cluster is too small.
        """
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = any(r.get("GPU") for r in resources) if self.gpu is None else self.gpu
        counts = sorted((int(r.get("GPU" if gpu else "CPU", 0)) for r in resources), reverse=True)
        usable = [count for count in counts if count >= (self.per_node or 1)]
        if len(usable) < self.nodes:
            kind = "GPUs" if gpu else "cores"
            raise MilanError(
                f"{self.nodes} nodes with {self.per_node or 1} {kind} each, "
                f"of a cluster with {counts}",
                fix=f"--num-nodes {max(1, len(usable))}, or fewer --devices",
            )
        return self.per_node or (usable[self.nodes - 1] if gpu else 1), gpu


def run_ranks(
    rank: RemoteClass,
    machines: Machines,
    *,
    restarts: int,
    restart_arguments: Callable[[], dict[str, Any]],
    progress: Progress,
) -> Any:
    """Run `rank` as every rank of a run on `machines`; returns what rank 0's `run` does.

    A rank has `port() -> int`, `run(environment) -> result`, `progress_events() -> list` of what
    its progress received since the last call, and `request_stop(signal)`. If one crashes, all are
    restarted as milan.core.launch.run_with_restarts says. Raises MilanError: that of a rank, a
    cluster that is too small, one crash too many.
    """
    with connected(machines.address):
        per_node, gpu = machines.resolved()
        stop = Stop()

        def attempt(arguments: dict[str, Any]) -> tuple[str | None, Any]:
            group = _RankGroup(
                RemoteClass(rank.module, rank.name, arguments), machines.nodes, per_node, gpu
            )
            try:
                return group.run(stop, progress)
            finally:
                group.release()

        return run_with_restarts(
            attempt,
            rank.arguments,
            restart_arguments=restart_arguments,
            restarts=restarts,
            ranks=machines.nodes * per_node,
            stop=stop,
            progress=progress,
        )


class _RankGroup:
    """The actors of one attempt: `per_node` ranks on each of `nodes` machines."""

    def __init__(self, rank: RemoteClass, nodes: int, per_node: int, gpu: bool) -> None:
        self.per_node = per_node
        bundle = {"CPU": float(per_node)} | ({"GPU": float(per_node)} if gpu else {})
        self.placement = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
        if not self.placement.wait(_PLACEMENT_TIMEOUT):
            remove_placement_group(self.placement)
            raise MilanError(
                f"no room for {per_node} ranks on each of {nodes} nodes within "
                f"{_PLACEMENT_TIMEOUT:.0f} s",
                expected="a cluster that is not busy with something else",
            )
        # Three calls at a time: the run, its progress, and the request to stop.
        start = rank.starter(num_cpus=1, num_gpus=int(gpu), max_concurrency=3)
        self.actors: list[Any] = [
            start(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.placement, placement_group_bundle_index=number // per_node
                )
            )
            for number in range(nodes * per_node)
        ]

    def run(self, stop: Stop, progress: Progress) -> tuple[str | None, Any]:
        """(how a rank crashed, None), or (None, what rank 0 returned)."""
        rank0, size = self.actors[0], len(self.actors)
        try:
            host, port = ray.get(
                [rank0.node.remote(), rank0.call.remote("port")], timeout=_START_TIMEOUT
            )
        except ray.exceptions.RayError as error:
            return f"rank 0 did not start ({last_line(error)})", None
        environment = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": host, "MASTER_PORT": str(value_of(port)),
            # Ray shows each process only its own GPU, which is number 0 there.
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(self.per_node),
        }  # fmt: skip
        tasks = {
            actor.call.remote("run", environment | {"RANK": str(rank)}): rank
            for rank, actor in enumerate(self.actors)
        }
        crash, result, deadline = None, None, float("inf")

        def request_stop(number: int) -> None:
            for actor in self.actors:
                actor.call.remote("request_stop", number)
            stop.request(number)

        with on_stop_signals(request_stop):
            while tasks and time.monotonic() < deadline:
                ready, _ = ray.wait(list(tasks), timeout=0.5)
                self._replay_progress(progress)
                for task in ready:
                    rank = tasks.pop(task)
                    try:
                        value = value_of(ray.get(task))
                    except ray.exceptions.RayError as error:
                        crash = crash or f"rank {rank} crashed ({last_line(error)})"
                        # The others fail with it; one of them may say why.
                        deadline = min(deadline, time.monotonic() + _GRACE)
                        continue
                    result = value if rank == 0 else result
        return crash, result

    def _replay_progress(self, progress: Progress) -> None:
        try:
            reply = ray.get(self.actors[0].call.remote("progress_events"), timeout=5.0)
        except ray.exceptions.RayError:
            return
        for event in value_of(reply):
            replay(progress, event)

    def release(self) -> None:
        """Kill the actors and give their machines back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)
