"""Pretraining on a Ray cluster: the same run, its ranks started on several machines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from milan.config import PretrainConfig
from milan.core.paths import as_path
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError
from milan.training.run import restart_arguments
from pipeline.cluster.pool import run_ranks


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
    alone = replace(
        config,
        cache=_absolute(config.cache),
        out=_absolute(config.out),
        data_root=_absolute(config.data_root) if config.data_root else None,
        local=_absolute(config.local) if config.local else None,
        num_nodes=1,
        address=None,
        devices=1,
    )
    return run_ranks(
        ("milan.core.launch", "Rank"),
        {"cache": alone, "resume": resume, "overwrite": overwrite, "stop_after": stop_after},
        nodes=config.num_nodes,
        per_node=config.devices,
        # Of the machines of the cluster: the one that this is called on need not have any.
        gpu=None if config.device == "auto" else config.device.startswith("cuda"),
        address=config.address,
        restarts=config.max_restarts,
        again=restart_arguments(Path(config.out)),
        progress=progress or NoProgress(),
    )


def _absolute(where: str) -> str:
    """On another machine the working folder is another."""
    found = as_path(where)
    return str(found.absolute()) if isinstance(found, Path) else where
