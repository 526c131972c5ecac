"""Work on features by all ranks: evaluations and embeddings start, stop and fail alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from milan.core.device import pick_device, ranks_here
from milan.core.distributed import Ranks
from milan.core.launch import as_rank, launch
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.waiting import Stopped
from milan.errors import ConfigError
from milan.evaluation.features import Context


class Machine(Protocol):
    """Settings that say where work is done."""

    @property
    def device(self) -> str:
        """auto, cuda, cpu, ..."""

    @property
    def devices(self) -> int | None:
        """Ranks on this machine; None: one a GPU."""

    @property
    def batch_size(self) -> int | None:
        """Images at once; None: as the work chooses."""


def on_ranks(
    work: Callable[[Context], dict[str, Any]],
    config: Machine,
    *,
    alone: bool = False,
    kept: str = "features that were computed stay",
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `work(context)` returns on rank 0; ranks after the first return {}.

    With several GPUs a rank is started for each, unless this process is one already, or the work
    must be `alone` in it; `work` is then pickled. Asked to stop, or by SIGINT, SIGTERM or SIGUSR1,
    it returns {"stopped_by": signal}; `kept` says what stays then. Raises what `work` does,
    ConfigError where the device's memory is full, and RankError if other ranks are out of reach.
    """
    device, given = pick_device(config.device), Ranks.from_environment()
    count = 1 if given or alone else ranks_here(config.device, device, config.devices)
    stop = stop or Stop()
    stop.kept = kept
    progress = progress if progress and not (given and given.rank) else NoProgress()
    try:
        if count > 1:
            return launch(
                partial(on_ranks, work, config, kept=kept), {}, ranks=count, restarts=0,
                restart_arguments=dict, progress=progress,
            )  # fmt: skip
        with as_rank(given, device, stop=stop, progress=progress) as (ranks, own):
            figures = work(Context(own, ranks, progress, stop))
            return figures if ranks.is_rank0 else {}
    except Stopped as stopped:
        return {"stopped_by": stopped.by}
    except torch.OutOfMemoryError:
        size = config.batch_size
        fewer = f"--batch-size {max(1, size // 2) if size else 1}"
        raise ConfigError(
            "the device's memory is full" + (f" with {size} images at once" if size else ""),
            fix=f"{fewer}, or --memory 1GB" if hasattr(config, "memory") else fewer,
        ) from None
