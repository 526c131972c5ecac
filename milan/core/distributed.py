"""Ranks: which process this is, collective operations, and data-parallel training.

A run has `size` ranks. Each has a device, takes its slice of every batch, and has all weights
(`ddp`) or a shard of them (`fsdp`). The only module that reads RANK, WORLD_SIZE and so on, and the
only one that uses torch.distributed.
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
_TIMEOUT = timedelta(minutes=30)  # of a rank that waits for another: a checkpoint, a probe


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, of how many; by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its machine, and that of its GPU among those it sees."""
    on_node: int = 1
    """How many ranks are on its machine and share its cores."""

    @classmethod
    def from_environment(cls) -> Ranks | None:
        """The rank that torchrun, srun or our own launcher set; None without any of them."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(
                int(env["RANK"]), int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1)),
            )  # fmt: skip
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun, not by sbatch
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
            step = int(env["SLURM_JOB_ID"]) + 1009 * int(env.get("SLURM_STEP_ID", 0))
            env.setdefault("MASTER_PORT", str(20_000 + step % 20_000))
            size = int(env["SLURM_STEP_NUM_TASKS"])
            # Slurm may show each task only its own GPU (--gpus-per-task).
            local = int(env["SLURM_LOCALID"]) if torch.cuda.device_count() > 1 else 0
            return cls(int(env["SLURM_PROCID"]), size, local)
        return None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def any_flags(self, flags: int) -> int:
        """Bitwise or of `flags` (8 bits) over the ranks."""
        if self.size == 1:
            return flags
        bits = torch.tensor([flags >> bit & 1 for bit in range(8)], dtype=torch.int32)
        dist.all_reduce(bits, op=dist.ReduceOp.MAX)
        return sum(int(value) << bit for bit, value in enumerate(bits.tolist()))

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Each number summed over the ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all ranks in their order, [size * n, ...] on the CPU.

        n must be the same on all ranks.
        """
        if self.size == 1:
            return tensor.cpu()
        parts = [torch.empty_like(tensor, device="cpu") for _ in range(self.size)]
        dist.all_gather(parts, tensor.cpu().contiguous())
        return torch.cat(parts)

    def gather_objects(self, value: T | None) -> list[tuple[int, T]]:
        """(rank, value) of each rank whose value is not None, in order, on all ranks."""
        values: list[T | None] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return [(rank, value) for rank, value in enumerate(values) if value is not None]

    def on_rank0(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0; its result is returned, its MilanError raised, on all ranks."""
        if self.size == 1:
            return act()
        outcome: list[Any] = [None]
        if self.is_rank0:
            try:
                outcome = [act()]
            except MilanError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], MilanError):
            raise outcome[0]
        return outcome[0]


SINGLE = Ranks()


@contextmanager
def process_group(
    ranks: Ranks | None, device: torch.device
) -> Iterator[tuple[Ranks, torch.device]]:
    """Inside, this process is a member of torch's process group; yields its ranks and its device.

    Without several ranks there is no group. A GPU becomes this process's current one. Raises
    ConfigError if the machine has no GPU for it.
    """
    if ranks is None or ranks.size == 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
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
    # Numbers and objects on the CPU go through gloo, gradients through the device's backend.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=_TIMEOUT)
    yield ranks, device
    # Not after an error: ranks that wait for this one fail when this process has ended, and by then
    # its error is reported.
    dist.destroy_process_group()


def parallelise(student: nn.Module, ranks: Ranks, kind: str) -> nn.Module:
    """The module to call for a prediction, so that gradients are those of the whole batch.

    `kind` is `ddp`, which returns a wrapper around `student`, or `fsdp`, which shards the student
    itself, block by block, and returns it. Build the optimiser afterwards.
    """
    if ranks.size == 1:
        return student
    if kind == "ddp":
        # Gradients are views of the buffers they are summed in: one copy of them, not two.
        return nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device_type = next(student.parameters()).device.type
    mesh = init_device_mesh(device_type, (ranks.size,))
    for stack in (student.encoder.blocks, student.decoder.blocks):  # type: ignore[union-attr]
        for block in stack:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "pooled_features")
    return student


def sync_gradients(network: nn.Module, now: bool) -> AbstractContextManager:
    """For a micro-batch: whether its gradients are summed over the ranks `now`, or accumulate."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(now)  # type: ignore[operator]
    elif isinstance(network, nn.parallel.DistributedDataParallel) and not now:
        return network.no_sync()
    return nullcontext()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor: itself, or its shards gathered from the ranks (all must call this)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` on the device of `parameter`, and sharded like it."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh") or value.ndim != parameter.ndim:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def first_host(nodes: str) -> str:
    """The first host of Slurm's list of nodes: `gpu[07-09,12]-ib` gives gpu07-ib.

    Raises ConfigError if `nodes` is no such list.
    """
    name = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if name is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes}", expected="names of nodes")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name[0])
