"""Micro-batches for training, read ahead by loader workers."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from milan.core.device import copy_to
from milan.core.rng import mask_noise
from milan.core.signals import blocked_stop_signals, exit_with_parent, ignore_stop_signals
from milan.data.dataset import CachedDataset
from milan.data.prefetch import Prefetcher, Shard
from milan.data.sampler import Address, StepSampler
from milan.errors import MilanError, TrainError
from milan.store.cache import TargetCache


class Batch(NamedTuple):
    """B views with their targets, as they leave a loader worker; codes are not decoded yet."""

    pixels: torch.Tensor
    """[B, S, S, 3] uint8"""
    attention: torch.Tensor
    """[B, N] float32, > 0"""
    noise: torch.Tensor
    """[B, the student's N] float32 in (0, 1), drawn at (seed, epoch, row, view)"""
    rows: torch.Tensor
    """[B] int64"""
    views: torch.Tensor
    """[B] int64"""
    codes: torch.Tensor | None
    """[B, T, C] in the codec's dtype, or None where the objective needs no features"""
    scale: torch.Tensor | None
    """[B, T] float32, for codecs that scale"""

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; from pinned memory to CUDA the copy does not wait."""
        return self._each(lambda t: copy_to(t, device))

    def pin_memory(self) -> Batch:
        """Called by DataLoader where there is a GPU."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        moved: Any = (None if tensor is None else move(tensor) for tensor in self)
        return Batch(*moved)


class _Batches(Dataset):
    """Turns addresses into batches; runs in loader workers."""

    def __init__(
        self, dataset: CachedDataset, seed: int, features: bool, patches: int | None
    ) -> None:
        self.dataset, self.seed, self.features = dataset, seed, features
        self.patches = patches or dataset.cache.spec.tokens - 1

    def __getitem__(self, address: Address) -> Batch | MilanError:
        try:
            return self._load(address)
        except MilanError as error:
            return error  # raised by _Loader: DataLoader would bury it in a traceback's text

    def _load(self, address: Address) -> Batch:
        rows, views = address.rows, address.views
        features = self.features and address.kind.has_targets
        targets = self.dataset.cache.read(rows, views, features=features)
        epochs = np.full(len(rows), address.mask_epoch)
        noise = mask_noise(self.seed, epochs, rows, views, self.patches)
        return Batch(
            torch.from_numpy(self.dataset.pixels(rows, views)),
            torch.from_numpy(targets.attention),
            torch.from_numpy(noise),
            torch.from_numpy(rows),
            torch.from_numpy(views),
            None if targets.codes is None else torch.from_numpy(targets.codes),
            None if targets.scale is None else torch.from_numpy(targets.scale),
        )


class _Loader(DataLoader):
    """A DataLoader that raises a loader worker's MilanError as it was.

    Where shards are copied to a local disk, those of the next window are prefetched.
    """

    dataset: _Batches
    sampler: StepSampler

    def __iter__(self) -> Any:
        cache = self.dataset.dataset.cache
        prefetcher = Prefetcher(_windows(cache, self.sampler))
        if cache.generations[0].local:
            prefetcher.start()
        others = multiprocessing.active_children()
        with blocked_stop_signals():
            batches = super().__iter__()
        workers = [p for p in multiprocessing.active_children() if p not in others]
        try:
            for batch in batches:
                if isinstance(batch, MilanError):
                    raise batch
                prefetcher.consumed += 1
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError):
            _raise_if_crashed(workers)
            raise
        finally:
            prefetcher.stopped.set()
            del batches  # ends the workers now, not when an error's traceback is forgotten


def _raise_if_crashed(workers: list[Any]) -> None:
    """Raises TrainError if a loader worker crashed: a DataLoader then fails in many ways."""
    wait = multiprocessing.connection.wait
    ended = wait([w.sentinel for w in workers], timeout=2) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            code = worker.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise TrainError(
                f"a loader worker died ({how})",
                expected="memory for all of them: the kernel kills a process when there is none",
                fix="a smaller --num-workers; the same line goes on from the last checkpoint",
            ) from None


def _windows(cache: TargetCache, sampler: StepSampler) -> Iterator[tuple[int, list[Shard]]]:
    """(batches consumed at its end, shards) of every window that the sampler walks through."""
    order, start, stop = sampler.order, sampler.start, sampler.stop
    validation = 0
    for epoch in range(order.position(start)[0], order.position(stop - 1)[0] + 1):
        current, first, rows_before = order.for_epoch(epoch), order.first_step(epoch), 0
        for rows, views in current.windows(epoch):
            rows_before += len(rows)
            end = min(stop, first + min(current.steps, -(-rows_before // order.batch_size)))
            if end > start:
                batches = (end - start) * sampler.micro_batches + validation
                yield batches, cache.shards_at(rows, views)
        validation += len(sampler.after_epoch(epoch))


def training_loader(
    dataset: CachedDataset,
    sampler: StepSampler,
    *,
    features: bool,
    num_workers: int,
    pin_memory: bool = False,
    patches: int | None = None,
) -> DataLoader:
    """Micro-batches of `sampler` in its order, read ahead by `num_workers` processes.

    `features`: whether the teacher's are read. `patches`: N of the student, which the noise is
    for; default: the teacher's. Workers are started by forkserver (spawn where there is none):
    tensorstore does not survive a fork.
    """
    options: dict[str, Any] = {}
    if num_workers:
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["milan.data.loader"])
        options = {"multiprocessing_context": context, "prefetch_factor": 4}
    return _Loader(
        _Batches(dataset, sampler.order.seed, features, patches),
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
        **options,
    )


def _start_worker(_: int) -> None:
    # The cores belong to the training process.
    torch.set_num_threads(1)
    # A terminal, or a scheduler, signals the whole group; the current step still needs data.
    ignore_stop_signals()
    # torch watches its worker's parent, but that is the fork server, which lives as long as its
    # children: a worker of a killed run would wait for ever.
    Thread(target=exit_with_parent, daemon=True).start()
