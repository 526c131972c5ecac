"""Where the teacher's copies run: in this process, on this machine's devices, or on a Ray cluster.

It is decided before a teacher is loaded, for its precision is that of the devices that run it, and
the driver need not have any of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from milan.core.device import pick_device
from milan.core.machine import cpu_count, decoding_threads
from milan.errors import ConfigError
from pipeline.config import ExtractConfig


@dataclass(frozen=True)
class Node:
    """A machine."""

    cores: int
    gpus: int


@dataclass(frozen=True)
class Hardware:
    """The machines of an extraction."""

    executor: str
    """ray or local."""
    nodes: tuple[Node, ...]
    """Those that copies of the teacher may run on."""
    on_gpu: bool
    """Whether each copy has a GPU."""
    cluster: bool = False
    """Whether the nodes are those of a cluster that was there before."""

    @property
    def precision(self) -> str:
        """`auto`: fp16 on GPUs, as the published teacher; else fp32."""
        return "fp16" if self.on_gpu else "fp32"

    def worker_device(self, device: str) -> str:
        """The setting `device` inside a worker: Ray shows it one GPU, whichever that is."""
        return "cuda" if self.executor == "ray" and self.on_gpu else device

    def driver_device(self, device: str) -> str:
        """The setting `device` for the driver's own copy, which checks the others' outputs."""
        import torch

        return "auto" if self.on_gpu and not torch.cuda.is_available() else device


@dataclass(frozen=True)
class Workers:
    """How many workers run, and with how many threads."""

    replicas: int
    """Workers, each with its copy of the teacher."""
    decode_threads: int
    """Of each worker."""
    torch_threads: int | None
    """Of each worker; None: torch's own setting."""


def hardware_of(config: ExtractConfig) -> Hardware:
    """The machines that the settings name; asks the cluster, if there is one.

    One copy of the teacher needs no cluster, so `auto` then takes this process. Raises ConfigError.
    """
    kind, _, number = config.device.partition(":")
    cluster = config.address or os.environ.get("RAY_ADDRESS")
    if cluster and config.executor != "local":
        from pipeline.cluster.connect import cluster_nodes

        executor, nodes = "ray", tuple(Node(*node) for node in cluster_nodes(config.address))
    else:
        cluster, gpus = None, 0
        if pick_device(config.device).type == "cuda":
            import torch

            gpus = 1 if number else torch.cuda.device_count()
        nodes = (Node(cpu_count(), gpus),)
        one = "local" if max(gpus, config.replicas or 1) == 1 else "ray"
        executor = one if config.executor == "auto" else config.executor
    if executor == "ray" and number:
        raise ConfigError(
            f"--device {config.device} under Ray",
            expected="--device cuda: Ray gives each worker a GPU of its own",
            fix=f"CUDA_VISIBLE_DEVICES={number}, or --executor local",
        )
    with_gpu = tuple(node for node in nodes if node.gpus)
    if kind == "cuda" and not with_gpu:
        raise ConfigError(
            f"--device {config.device}, and the cluster at {cluster} has no GPU",
            fix="--device auto or cpu",
        )
    on_gpu = kind in ("auto", "cuda") and bool(with_gpu)
    return Hardware(executor, with_gpu if on_gpu else nodes, on_gpu, bool(cluster))


def plan_workers(config: ExtractConfig, hardware: Hardware) -> Workers:
    """The workers for these machines, each node with its share of them. Raises ConfigError."""
    import torch

    nodes, local = hardware.nodes, hardware.executor == "local"
    if local and config.replicas not in (None, 1):
        raise ConfigError(
            f"--replicas {config.replicas} with --executor local", fix="--executor ray"
        )
    gpus = sum(node.gpus for node in nodes) if hardware.on_gpu else 0
    replicas = 1 if local else config.replicas or max(1, gpus)
    on_node = -(-replicas // len(nodes))
    cores = min(node.cores for node in nodes) // on_node
    threads = config.num_workers or decoding_threads(cores)
    if local or hardware.on_gpu:
        return Workers(replicas, threads, None)
    # Ray gives a worker one thread of torch, which on a CPU is too few.
    of_torch = cores if hardware.cluster else torch.get_num_threads() // on_node
    return Workers(replicas, threads, max(1, of_torch))
