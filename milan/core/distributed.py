"""Ranks: which process this is, collective operations, and data-parallel training.

A run has `size` ranks. Each has a device, takes its slice of every batch, and has all weights
(`ddp`) or a shard of them (`fsdp`). The only module that reads RANK, WORLD_SIZE and so on, and the
only one that uses torch.distributed.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from milan.core.device import PRECISIONS
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.core.waiting import Wait
from milan.errors import ConfigError, MilanError, RankError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)  # of a rank that waits for another: a checkpoint, a probe
_MEETING = 10 * 60.0  # seconds in which all ranks have to start
_UNSET = "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE, if torchrun did not set them"
_UNSET_SLURM = "unset SLURM_STEP_NUM_TASKS, if srun did not set it"


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
        """The rank that torchrun, srun or our own launcher set; None without any of them.

        Raises ConfigError for variables that are incomplete or contradict each other.
        """
        env = os.environ
        if "RANK" in env or "WORLD_SIZE" in env:
            size = _number("WORLD_SIZE", _UNSET, least=1)
            rank = _number("RANK", _UNSET, below=size)
            on_node = _number("LOCAL_WORLD_SIZE", _UNSET, least=1, below=size + 1, default=1)
            # One rank on each machine needs no LOCAL_RANK; two must not share a GPU.
            default = 0 if size == 1 or torch.cuda.device_count() < 2 else None
            below = on_node if "LOCAL_WORLD_SIZE" in env else size
            local = _number("LOCAL_RANK", _UNSET, below=below, default=default)
            return cls(rank, size, local, on_node)
        if "SLURM_STEP_NUM_TASKS" in env:  # set by srun, not by sbatch
            size = _number("SLURM_STEP_NUM_TASKS", _UNSET_SLURM, least=1)
            if size == 1:
                return None
            rank = _number("SLURM_PROCID", _UNSET_SLURM, below=size)
            local = _number("SLURM_LOCALID", _UNSET_SLURM, below=size)
            job = _number("SLURM_JOB_ID", _UNSET_SLURM)
            step = _number("SLURM_STEP_ID", _UNSET_SLURM, default=0)
            nodes = _text("SLURM_STEP_NODELIST", "the names of the nodes", _UNSET_SLURM)
            env.setdefault("MASTER_ADDR", first_host(nodes))
            env.setdefault("MASTER_PORT", str(20_000 + (job + 1009 * step) % 20_000))
            # Slurm may show each task only its own GPU (--gpus-per-task).
            return cls(rank, size, local if torch.cuda.device_count() > 1 else 0)
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

    def wait(self) -> None:
        """Until all ranks are here."""
        self.all_reduce_sum([0.0])

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Each number summed over the ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def add_up(self, tensor: torch.Tensor) -> None:
        """`tensor`, on its rank's device, becomes its sum over the ranks: the same bits on all.

        Its shape and dtype must be the same on all ranks.
        """
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all ranks in their order, [size * n, ...] on the CPU.

        n must be the same on all ranks.
        """
        if self.size == 1:
            return tensor.cpu()
        parts = [torch.empty_like(tensor, device="cpu") for _ in range(self.size)]
        dist.all_gather(parts, tensor.cpu().contiguous())
        return torch.cat(parts)

    def gather_rows(self, rows: torch.Tensor, *, gradient: bool) -> torch.Tensor:
        """The rows [n, ...] of all ranks in their order, [size * n, ...] on their device.

        n must be the same on all ranks. With `gradient` that of every rank reaches the rows it came
        from; the way back is a collective operation too. Without it none does, the own rows' not
        either, so that one rank learns what several do.
        """
        if self.size == 1:
            return rows if gradient else rows.detach()
        if gradient:
            return _GatherRows.apply(rows, self)
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def sum_of(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, on their device, without gradient."""
        total = value.detach().clone()
        self.add_up(total)
        return total

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


class _GatherRows(torch.autograd.Function):
    """`Ranks.gather_rows` with gradients: what all ranks say of a row is added up."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks, ctx.count = ranks, len(rows)
        return ranks.gather_rows(rows, gradient=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = ctx.ranks.sum_of(gradients[0].contiguous())
        first = ctx.ranks.rank * ctx.count
        return total[first : first + ctx.count], None


def _text(name: str, expected: str, fix: str) -> str:
    """An environment variable that must be there. Raises ConfigError."""
    if value := os.environ.get(name, "").strip():
        return value
    found = f"the environment variable {name} is " + ("empty" if name in os.environ else "not set")
    raise ConfigError(f"{found}, but {_rank_variables()}", expected=expected, fix=fix)


def _number(
    name: str, fix: str, *, least: int = 0, below: int | None = None, default: int | None = None
) -> int:
    """The number in an environment variable, `default` without it. Raises ConfigError."""
    if name not in os.environ and default is not None:
        return default
    most = "" if below is None else f" to {below - 1}"
    expected = f"a number from {least}{most}" if below is None or below - 1 > least else f"{least}"
    text = _text(name, expected, fix)
    if text.isdecimal() and least <= int(text) and (below is None or int(text) < below):
        return int(text)
    raise ConfigError(f"the environment variable {name}={text}", expected=expected, fix=fix)


def _rank_variables() -> str:
    """The variables that say that this process is one of several."""
    names = ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    return " and ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _meet(ranks: Ranks, stop: Stop | None, progress: Progress | None) -> dist.Store:
    """A store of torch's that all ranks have joined.

    torch would wait for them without a word, and without hearing a signal. Raises ConfigError,
    RankError, Stopped, and TrainError at the limit.
    """
    fix = f"start them all, or {_UNSET if 'RANK' in os.environ else _UNSET_SLURM}"
    host = _text("MASTER_ADDR", "the machine of rank 0", fix)
    port = _number("MASTER_PORT", fix, least=1, below=65_536)
    wait = Wait(
        f"all {ranks.size} ranks to meet at {host}:{port} ({_rank_variables()})",
        limit=_MEETING, fix=fix, progress=progress, stop=stop,
    )  # fmt: skip
    # torchrun's agent keeps a store for its ranks, over their restarts.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = ranks.is_rank0 and not agent
    while not serves and not _answers(host, port, fix):
        wait.check()
        time.sleep(0.2)
    results: list[dist.Store | Exception] = []
    given_up = Event()

    def join() -> None:
        try:
            # Rank 0 is its own client: another machine's address would be tried for minutes.
            store: dist.Store = dist.TCPStore(
                "localhost" if serves else host, port, ranks.size, serves,
                timeout=_TIMEOUT, wait_for_workers=False,
            )  # fmt: skip
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"milan/{attempt}", store)
            if store.add(f"rank {ranks.rank}", 1) > 1:
                raise ConfigError(
                    f"two processes are rank {ranks.rank} ({_rank_variables()})",
                    expected="a number of its own for each rank",
                    fix=fix,
                )
            store.add("here", 1)
            pause = 0.02
            while store.add("here", 0) < ranks.size and not given_up.wait(pause):
                pause = min(1.0, 2 * pause)
            results.append(store)
        except Exception as error:
            results.append(error)

    # In a thread: nothing interrupts torch while it waits for a server that does not answer.
    thread = Thread(target=join, daemon=True, name="meet")
    thread.start()
    try:
        while not results:
            thread.join(0.5)
            wait.check()
    finally:
        given_up.set()
    if isinstance(results[0], RuntimeError):
        what = "cannot serve" if serves else "cannot reach"
        raise RankError(
            f"rank {ranks.rank} {what} MASTER_ADDR={host}, MASTER_PORT={port}: "
            f"{str(results[0]).splitlines()[0][:200]}; try: {fix}"
        )
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _answers(host: str, port: int, fix: str) -> bool:
    """Whether somebody listens there. Raises ConfigError for a name that no machine has."""
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError(
            f"MASTER_ADDR={host} is the name of no machine", expected="rank 0's", fix=fix
        ) from None
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


@contextmanager
def process_group(
    ranks: Ranks | None,
    device: torch.device,
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Ranks, torch.device]]:
    """Inside, this process is a member of torch's process group; yields its ranks and its device.

    Without several ranks there is no group. A GPU becomes this process's current one. Raises
    ConfigError if the machine has no GPU for it or the environment's variables are impossible,
    RankError if ranks cannot meet or lose each other, TrainError if some do not come, and Stopped
    if a signal ends the wait for them.
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
    store = _meet(ranks, stop, progress)
    try:
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=_TIMEOUT
        )
        yield ranks, device
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RankError(
                f"rank {ranks.rank} lost the others, one of which crashed or does not answer: "
                f"{str(error).splitlines()[0][:200]}; "
                "the same line goes on from the last checkpoint"
            ) from error
        raise
    # Not after an error: ranks that wait for this one fail when this process has ended, and by then
    # its error is reported.
    dist.destroy_process_group()


def parallelise(student: nn.Module, ranks: Ranks, kind: str, precision: str = "fp32") -> nn.Module:
    """The module to call for a prediction, so that gradients are those of the whole batch.

    `kind` is `ddp`, which returns a wrapper around `student`, or `fsdp`, which shards the student
    itself, block by block, and returns it. Build the optimiser afterwards.

    Shards are float32. In `precision` bf16 or fp16 the weights of products travel in it, and the
    gradients in float32: what autocast computes with, at half of the bytes.
    """
    if ranks.size == 1:
        return student
    if kind == "ddp":
        # Gradients are views of the buffers they are summed in: one copy of them, not two.
        return nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    device_type = next(student.parameters()).device.type
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    half = PRECISIONS[precision]
    policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    deep: Any = student.deep_decoders
    for part in (student.encoder, student.decoder, *deep.values()):
        for block in part.blocks:  # type: ignore[union-attr]
            if half:  # autocast computes norms in float32
                fully_shard(_without_products(block), mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=policy)
    student.register_forward_hook(_no_view)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "pooled_features")
    return student


def _no_view(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A view as a tensor of its own: FSDP2 warns of views, which somebody might write into."""
    return output.clone() if isinstance(output, torch.Tensor) and output._is_view() else output


def _without_products(block: nn.Module) -> list[nn.Module]:
    """Modules that have weights of their own and are no linear layers."""
    owners = [m for m in block.modules() if any(True for _ in m.parameters(recurse=False))]
    return [module for module in owners if not isinstance(module, nn.Linear)]


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
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodes}", expected="names of nodes", fix=_UNSET_SLURM
        )
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name[0])
