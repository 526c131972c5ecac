"""Pretraining on a Ray cluster: the same run, its ranks started on several machines."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from milan.config import PretrainConfig
from milan.core.launch import free_port
from milan.core.paths import as_path
from milan.core.progress import ForwardedProgress, NoProgress, Progress
from milan.core.signals import Stop
from milan.errors import ConfigError
from milan.training.initial import check_absolute
from milan.training.pretrain import pretrain
from milan.training.run import restart_arguments
from pipeline.cluster.connect import RemoteClass
from pipeline.cluster.ranks import Machines, run_ranks


def pretrain_on_cluster(
    config: PretrainConfig,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`milan.pretrain` with a rank on each device of `config.num_nodes` machines.

    The run's folder is on a disk that all machines share, under the same path; so are the store and
    the images, or they are in a bucket. Returns what milan.pretrain does. Raises MilanError.
    """
    config.check()
    if not (config.address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"num_nodes {config.num_nodes} without a cluster",
            expected="a Ray cluster's --address or $RAY_ADDRESS; torchrun and srun need neither",
        )
    check_absolute(config.init)
    one_rank = replace(
        config,
        cache=_absolute(config.cache),
        out=_absolute(config.out),
        data_root=_absolute(config.data_root) if config.data_root else None,
        local=_absolute(config.local) if config.local else None,
        num_nodes=1,
        address=None,
        devices=1,
        device=config.device.partition(":")[0],  # Ray shows each rank one GPU, as number 0
    )
    arguments = {"cache": one_rank, "resume": resume, "overwrite": overwrite}
    return run_ranks(
        RemoteClass(__name__, "PretrainRank", arguments | {"stop_after": stop_after}),
        Machines(
            nodes=config.num_nodes,
            per_node=config.devices,
            # Of the cluster's machines: the one that this is called on need not have any.
            gpu=None if config.device == "auto" else config.device.startswith("cuda"),
            address=config.address,
        ),
        restarts=config.max_restarts,
        restart_arguments=restart_arguments(Path(config.out)),
        progress=progress or NoProgress(),
    )


class PretrainRank:
    """One rank of a pretraining, hosted by an actor; see pipeline.cluster.ranks.run_ranks."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.stop = arguments, Stop()
        self.events: deque[tuple[str, tuple, dict]] = deque()

    def port(self) -> int:
        """A port of this machine at which ranks can meet."""
        return free_port()

    def run(self, environment: dict[str, str]) -> dict[str, Any]:
        """Pretrain as the rank that the variables of `environment` describe (RANK, ...)."""
        os.environ |= environment
        return pretrain(
            **self.arguments, stop=self.stop, progress=ForwardedProgress(self.events.append)
        )

    def progress_events(self) -> list[tuple[str, tuple, dict]]:
        """The calls that its progress received since the last time, for replay."""
        return [self.events.popleft() for _ in range(len(self.events))]

    def request_stop(self, number: int) -> None:
        """Pass on the signal `number`."""
        self.stop.request(number)


def _absolute(path: str) -> str:
    """Absolute, unless it is a URL: on another machine the working folder is another."""
    parsed = as_path(path)
    return str(parsed.absolute()) if isinstance(parsed, Path) else path
