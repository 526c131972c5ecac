"""One process or many: who this one is, and how they agree.

A run has `size` ranks; each has a device, walks its slice of every batch, and holds the same
weights (`ddp`) or its share of them (`fsdp`). The only module that reads RANK and its kin, and the
only one that talks between processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from milan.errors import ConfigError, MilanError

T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)  # of a rank that waits for another: a checkpoint, a probe


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its machine: which of the GPUs it sees it has."""
    on_node: int = 1
    """How many of them are on its machine and share its cores."""

    @classmethod
    def from_environment(cls) -> Ranks | None:
        """Who torchrun, srun or a launcher of ours says this is; None if nobody says."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            defaults = (0, 1, 0, 1)
            return cls(*(int(env.get(k, d)) for k, d in zip(given, defaults, strict=True)))
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone, not by sbatch
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
            which = int(env["SLURM_JOB_ID"]) + 1009 * int(env.get("SLURM_STEP_ID", 0))
            env.setdefault("MASTER_PORT", str(20_000 + which % 20_000))
            size = int(env["SLURM_STEP_NUM_TASKS"])
            # Slurm may show each task the GPU that is its own alone (--gpus-per-task).
            local = int(env["SLURM_LOCALID"]) if torch.cuda.device_count() > 1 else 0
            return cls(int(env["SLURM_PROCID"]), size, local)
        return None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0: it writes and speaks."""
        return self.rank == 0

    def any_flags(self, flags: int) -> int:
        """The bits that any rank has set."""
        if self.size == 1:
            return flags
        both = torch.tensor([flags >> bit & 1 for bit in range(8)], dtype=torch.int32)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return sum(int(value) << bit for bit, value in enumerate(both.tolist()))

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Each number summed over the ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all ranks one after the other, on the CPU; n is the same in all."""
        if self.size == 1:
            return tensor.cpu()
        parts = [torch.empty_like(tensor, device="cpu") for _ in range(self.size)]
        dist.all_gather(parts, tensor.cpu().contiguous())
        return torch.cat(parts)

    def gather_objects(self, word: T | None) -> list[tuple[int, T]]:
        """(rank, word) of each rank that has one, in order; all ranks ask together."""
        words: list[T | None] = [word]
        if self.size > 1:
            words = [None] * self.size
            dist.all_gather_object(words, word)
        return [(rank, word) for rank, word in enumerate(words) if word is not None]

    def on_rank0(self, act: Callable[[], T]) -> T:
        """What `act` returns on rank 0, which alone calls it; its MilanError is raised on all."""
        if self.size == 1:
            return act()
        told: list[Any] = [None]
        if self.is_rank0:
            try:
                told = [act()]
            except MilanError as error:
                told = [error]
        dist.broadcast_object_list(told)
        if isinstance(told[0], MilanError):
            raise told[0]
        return told[0]


SINGLE = Ranks()


@contextmanager
def process_group(
    ranks: Ranks | None, device: torch.device
) -> Iterator[tuple[Ranks, torch.device]]:
    """Inside, this process is one of its ranks; gives them and this one's device.

    Raises ConfigError if this machine has no GPU for it.
    """
    if ranks is None or ranks.size == 1:
        yield SINGLE, device
        return
    if device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {ranks.rank} is number {ranks.local_rank} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs",
                expected="at most one rank for each GPU",
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    # Numbers and objects travel by gloo, from the CPU; gradients by what suits the device.
    kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(kind, rank=ranks.rank, world_size=ranks.size, timeout=_PATIENCE)
    yield ranks, device
    # Not after an error: whoever waits for this rank learns it when this process has ended, and
    # has said why.
    dist.destroy_process_group()


def parallelise(student: nn.Module, ranks: Ranks, kind: str) -> nn.Module:
    """What to call for a prediction, so that gradients are those of the whole batch.

    `ddp` gives a wrapper around `student`; `fsdp` shards the student itself, a block at a time, and
    needs no wrapper. Make the optimiser afterwards.
    """
    if ranks.size == 1:
        return student
    if kind == "ddp":
        # Gradients lie in the buffers they are summed in: one copy of them, not two.
        return nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    where = next(student.parameters()).device.type
    mesh = init_device_mesh(where, (ranks.size,))
    for stack in (student.encoder.blocks, student.decoder.blocks):  # type: ignore[union-attr]
        for block in stack:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "pooled_features")
    return student


def sync_gradients(network: nn.Module, now: bool) -> AbstractContextManager:
    """A micro-batch whose gradients are summed over the ranks `now`, or later with the others."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(now)  # type: ignore[operator]
    elif isinstance(network, nn.parallel.DistributedDataParallel) and not now:
        return network.no_sync()
    return nullcontext()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its shards: itself, or gathered from the ranks (all must ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` where, and sharded as, `parameter` is."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh") or value.ndim != parameter.ndim:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[07-09,12]-ib` gives gpu07-ib."""
    name = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if name is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes}", expected="names of nodes")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name[0])
