"""Micro-batches for training, read ahead by loader workers."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from threading import Lock, Thread
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, get_worker_info

from milan.core.device import MEAN, STD, copy_to, normalise
from milan.core.progress import Progress
from milan.core.rng import mask_noise, teacher_noise
from milan.core.signals import (
    Stop,
    blocked_stop_signals,
    exit_with_parent,
    how_it_ended,
    ignore_stop_signals,
    keep_sockets_short,
    without_main_module,
)
from milan.core.units import format_bytes
from milan.core.waiting import Wait
from milan.data.dataset import CachedDataset
from milan.data.feeding import Loading, batches_ahead
from milan.data.prefetch import Prefetcher, Shard
from milan.data.sampler import Address, StepSampler
from milan.errors import MilanError, TrainError
from milan.store.cache import TargetCache
from milan.store.sentences import Sentences

_POLL = 1.0  # seconds between two looks at the workers while a batch does not come
_LIMIT = 20 * 60.0  # seconds without a batch
_GRACE = 30.0  # seconds in which a batch may still come after a stop signal
_SHARED_MEMORY = "/dev/shm"
_numbers = count()  # of the channels of this process


class Batch(NamedTuple):
    """B views with their targets, as they leave a loader worker; codes are not decoded yet."""

    pixels: torch.Tensor
    """[B, H, W, 3] uint8"""
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
    ids: torch.Tensor | None = None
    """[B, L] int32: the token ids of a caption of each image, or None where none are needed"""
    texts: torch.Tensor | None = None
    """[B, C] float32 of length 1: the features of its caption, zeros without, or None"""
    others: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ()
    """Codes and scale of each other teacher, where several layers are read"""
    drops: torch.Tensor | None = None
    """[B, teachers] float32 in (0, 1), drawn at (seed, epoch, row, view): which teachers an image
    does without; None for one teacher"""
    channels: torch.Tensor | None = None
    """[B, channels, H, W] float32: what a student sees that sees no RGB, as it sees it"""

    @property
    def images(self) -> torch.Tensor:
        """What the student sees, [B, channels, H, W] float32: pixels by ImageNet's mean and
        deviation, or its own channels."""
        return normalise(self.pixels, MEAN, STD) if self.channels is None else self.channels

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; from pinned memory to CUDA the copy does not wait."""
        return each(self, lambda t: copy_to(t, device))

    def pin_memory(self) -> Batch:
        """In pages that a GPU copies from by itself."""
        return each(self, torch.Tensor.pin_memory)


AnyBatch = TypeVar("AnyBatch", bound=tuple)
"""A NamedTuple of tensors and of tuples of them, some of which may be None."""


def each(batch: AnyBatch, move: Callable[[Any], Any]) -> AnyBatch:
    """The batch with every tensor moved, or made into something else."""

    def moved(part: Any) -> Any:
        if part is None:
            return None
        return each(part, move) if isinstance(part, tuple) else move(part)

    parts: Any = map(moved, batch)
    return type(batch)(parts) if type(batch) is tuple else type(batch)(*parts)


def bytes_of(batch: tuple) -> int:
    """Bytes of all tensors of a batch."""
    return sum(part.nbytes for part in tree_leaves(batch) if part is not None)


class BatchSource(Protocol):
    """Where the batches of a loader come from; sent to its workers."""

    def load(self, address: Address) -> Any:
        """The micro-batch at `address`, a NamedTuple of tensors with `pin_memory`."""


class FileChannel:
    """Passes open files from loader workers to the training process, where it is made.

    Those of multiprocessing ask the sender for each file, and wait for ever for one that hangs.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(60.0)  # what is asked for was sent before
        self._arrived: dict[bytes, int] = {}
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_sender": self._sender}  # of a loader worker

    def send(self, file: int) -> bytes:
        """Send a file; returns the name by which it is received. Raises OSError."""
        name = os.urandom(16)
        socket.send_fds(self._sender, [name], [file])
        return name

    def receive(self, name: bytes) -> int:
        """The file with this name, to be closed by the caller. Raises OSError, EOFError."""
        with self._lock:
            while name not in self._arrived:
                sent, files, *_ = socket.recv_fds(self._receiver, 16, 1)
                if not sent:
                    raise EOFError("all loader workers have ended")
                if not files:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                self._arrived[sent] = files[0]
            return self._arrived.pop(name)

    def close(self) -> None:
        """Close it here, with the files that nobody asked for."""
        self._receiver.close()
        self._sender.close()
        for file in self._arrived.values():
            os.close(file)


@dataclass(frozen=True)
class _Written:
    """Where a tensor lies in the file of a batch."""

    dtype: torch.dtype
    shape: torch.Size
    first: int
    """Its first byte."""


class SharedBatch:
    """A batch on its way from a loader worker, in one nameless file in memory.

    torch would share each tensor below /dev/shm, which containers limit to 64 MB; what finds no
    room there is lost on the way, and waited for.
    """

    channels: ClassVar[dict[int, FileChannel]] = {}
    """Those of this process's loaders, by number."""

    def __init__(self, batch: Any, number: int, channel: FileChannel) -> None:
        """Sends the file through `channel`. Raises TrainError if there is no room for it."""
        self.number, self.bytes = number, 0
        try:
            file = _file_in_memory()
            try:
                self.batch = each(batch, partial(self._write, file))
                self.name = channel.send(file)
            finally:
                os.close(file)
        except OSError as error:
            raise TrainError(
                f"a loader worker cannot hand over a batch of "
                f"{format_bytes(bytes_of(batch))}: {error.strerror}",
                expected=f"memory for some batches of each loader worker (in {_SHARED_MEMORY}, "
                "where the system has no other)",
                fix="docker run --shm-size 8g, a smaller --num-workers, or --num-workers 0",
            ) from None

    def _write(self, file: int, tensor: torch.Tensor) -> _Written:
        first = at = -(-self.bytes // 64) * 64
        if not tensor.numel():  # of images without a box
            return _Written(tensor.dtype, tensor.shape, first)
        left = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        while left:
            written = os.pwrite(file, left, at)
            left, at = left[written:], at + written
        self.bytes = at
        return _Written(tensor.dtype, tensor.shape, first)

    def opened(self) -> Any:
        """The batch; its tensors lie in the file, which ends with the last of them."""
        file = self.channels[self.number].receive(self.name)
        try:
            memory = mmap.mmap(file, self.bytes)
        finally:
            os.close(file)
        return each(self.batch, partial(self._tensor, memory))

    def _tensor(self, memory: mmap.mmap, at: _Written) -> torch.Tensor:
        count = at.shape.numel()
        if not count:
            return torch.empty(at.shape, dtype=at.dtype)
        flat = torch.frombuffer(memory, dtype=at.dtype, count=count, offset=at.first)
        return flat.view(at.shape)

    def pin_memory(self) -> Any:
        """Called by DataLoader where there is a GPU."""
        return self.opened().pin_memory()


def _file_in_memory() -> int:
    """A new file without a name, that takes memory and no disk where the system allows it."""
    try:
        return os.memfd_create("milan-batch")
    except (AttributeError, OSError):  # macOS, some builds of Python, some sandboxes
        folder = _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else None
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())


class _Loaded(NamedTuple):
    """What comes back for an address, and what it took."""

    batch: Any
    """The source's, a SharedBatch with it, or a MilanError."""
    images: int = 0
    """0: not counted."""
    core_seconds: float = 0.0
    seconds: float = 0.0


class _Batches(Dataset):
    """Turns addresses into batches; runs in loader workers."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source
        self.channel: tuple[int, FileChannel] | None = None
        """Where loader workers hand over batches."""
        self.opened = False
        """Whether this process has loaded a batch, and so opened the store and the images."""

    def __getitem__(self, address: Address) -> _Loaded:
        worker = get_worker_info()
        # Of a loader worker all threads count: tensorstore has its own.
        clock = time.process_time if worker else time.thread_time
        began, busy = time.perf_counter(), clock()
        try:
            batch = self.source.load(address)
            shared = SharedBatch(batch, *self.channel) if self.channel and worker else batch
        except MilanError as error:
            return _Loaded(error)  # raised by _Loader: DataLoader would bury it in a traceback
        images, self.opened = len(address.rows) if self.opened else 0, True
        return _Loaded(shared, images, clock() - busy, time.perf_counter() - began)


class CachedBatches:
    """Views with their targets, from a store."""

    def __init__(
        self,
        dataset: CachedDataset,
        seed: int,
        features: bool,
        patches: int | None,
        tokens: bool = False,
        texts: bool = False,
    ) -> None:
        self.dataset, self.seed, self.features, self.tokens = dataset, seed, features, tokens
        self.texts = texts
        self.patches = patches or dataset.cache.spec.tokens - 1

    @cached_property
    def sentences(self) -> Sentences:
        """What images may be called; opened in the process that reads them."""
        return Sentences(self.dataset.cache)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "sentences"}

    def load(self, address: Address) -> Batch:
        """Pixels, targets, tokens and noise of a micro-batch."""
        rows, views = address.rows, address.views
        features = self.features and address.kind.has_targets
        targets = self.dataset.cache.read(rows, views, features=features)
        epochs = np.full(len(rows), address.mask_epoch)
        noise = mask_noise(self.seed, epochs, rows, views, self.patches)
        ids = None
        if self.tokens and address.kind.has_targets:
            drawn = self.sentences.draw(rows, views, address.mask_epoch, seed=self.seed)
            ids = torch.from_numpy(drawn)
        drops, teachers = None, len(targets.others) + 1
        if teachers > 1:
            drops = torch.from_numpy(teacher_noise(self.seed, epochs, rows, views, teachers))
        texts = None
        if self.texts and address.kind.has_targets:
            vectors, numbers = self.sentences.encoded(rows)
            texts, ids = torch.from_numpy(vectors), torch.from_numpy(numbers)
        if self.dataset.channels:
            pixels, channels = self.dataset.channels.load(rows, views)
        else:
            pixels, channels = self.dataset.pixels(rows, views), None
        return Batch(
            torch.from_numpy(pixels),
            torch.from_numpy(targets.attention),
            torch.from_numpy(noise),
            torch.from_numpy(rows),
            torch.from_numpy(views),
            None if targets.codes is None else torch.from_numpy(targets.codes),
            None if targets.scale is None else torch.from_numpy(targets.scale),
            ids,
            texts,
            tuple(
                (torch.from_numpy(t.codes), None if t.scale is None else torch.from_numpy(t.scale))
                for t in targets.others
            ),
            drops,
            None if channels is None else torch.from_numpy(channels),
        )


class _Loader(DataLoader):
    """A DataLoader that raises a loader worker's MilanError as it was.

    Where shards are copied to a local disk, those of the next window are prefetched.
    """

    dataset: _Batches
    wait: Wait
    windows: Callable[[], Iterator[tuple[int, list[Shard]]]] = staticmethod(lambda: iter(()))
    """What Prefetcher takes."""
    loading: Loading
    """What loading has taken so far."""

    def __iter__(self) -> Any:
        prefetcher = Prefetcher(self.windows())
        prefetcher.start()
        others = multiprocessing.active_children()
        check_locks(self.multiprocessing_context, self.num_workers)
        number = next(_numbers)
        channel = SharedBatch.channels[number] = FileChannel()
        self.dataset.channel = number, channel
        with blocked_stop_signals(), without_main_module():
            batches: Any = super().__iter__()
        workers = [p for p in multiprocessing.active_children() if p not in others]
        try:
            while (loaded := self._next(batches)) is not None:
                batch = loaded.batch
                if isinstance(batch, MilanError):
                    raise batch
                if loaded.images:
                    self.loading.add(loaded.images, loaded.core_seconds, loaded.seconds)
                prefetcher.consumed += 1
                yield batch.opened() if isinstance(batch, SharedBatch) else batch
        except (RuntimeError, OSError, EOFError):
            _raise_if_crashed(workers)
            raise
        finally:
            prefetcher.stopped.set()
            del batches  # ends the workers now, not when an error's traceback is forgotten
            for worker in workers:
                worker.kill()  # one that hangs: this process would wait for it when it ends
            del SharedBatch.channels[number]
            channel.close()

    def _next(self, batches: Any) -> Any:
        """What comes next, None at the end. Raises what `Wait.check` does."""
        self.wait.restart()
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                self.wait.check()


def check_locks(context: Any, workers: int) -> None:
    """Raises TrainError if there is no room for the locks of a DataLoader's queues.

    It would fail half made, with a traceback of its own. Each lock is a file in shared memory.
    """
    try:
        [context.Lock() for _ in range((8 + 3 * workers) if workers else 0)]
    except OSError as error:
        raise TrainError(
            f"no room for the locks of {workers} loader workers: {error.strerror}",
            expected=f"some pages of shared memory ({_SHARED_MEMORY})",
            fix="docker run --shm-size 1g, a smaller --num-workers, or --num-workers 0",
        ) from None


def _raise_if_crashed(workers: list[Any]) -> None:
    """Raises TrainError if a loader worker crashed: a DataLoader then fails in many ways."""
    wait = multiprocessing.connection.wait
    ended = wait([w.sentinel for w in workers], timeout=2) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            how, cause = how_it_ended(worker.exitcode)
            less = "a smaller --num-workers or micro_batch needs less memory, and "
            raise TrainError(
                f"a loader worker crashed ({how}); likely cause: {cause}",
                expected="loader workers that run to the end",
                fix=(less if how in ("SIGKILL", "SIGBUS") else "")
                + "--num-workers 0 reads in this process; "
                "the same line goes on from the last checkpoint",
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
    wait: Wait | None = None,
    tokens: bool = False,
    texts: bool = False,
) -> _Loader:
    """Micro-batches of `sampler` in its order, read ahead by `num_workers` processes.

    `features`: whether the teacher's are read; `tokens` and `texts`: whether captions are, and
    their features. `patches`: N of the student, which the noise is for; default: the teacher's.
    `wait`: for the workers, default `batch_wait()`.
    """
    source = CachedBatches(dataset, sampler.order.seed, features, patches, tokens, texts)
    loader = batch_loader(
        source, sampler, num_workers=num_workers, pin_memory=pin_memory, wait=wait
    )
    if dataset.cache.generations[0].local:
        loader.windows = partial(_windows, dataset.cache, sampler)
    return loader


def batch_loader(
    source: BatchSource,
    sampler: StepSampler,
    *,
    num_workers: int,
    pin_memory: bool = False,
    wait: Wait | None = None,
) -> _Loader:
    """Micro-batches of any source, as `training_loader` gives those of a store.

    Workers are started by forkserver (spawn where there is none): tensorstore does not survive a
    fork.
    """
    options: dict[str, Any] = {}
    if num_workers:
        methods = multiprocessing.get_all_start_methods()
        keep_sockets_short()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["milan.data.loader"])
        options = {
            "multiprocessing_context": context, "timeout": _POLL,
            "prefetch_factor": batches_ahead(num_workers),
        }  # fmt: skip
    loader = _Loader(
        _Batches(source),
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_unchanged,  # torch's would make lists of tuples
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
        **options,
    )
    loader.wait, loader.loading = wait or batch_wait(), Loading()
    return loader


def _unchanged(loaded: Any) -> Any:
    return loaded


def batch_wait(progress: Progress | None = None, stop: Stop | None = None) -> Wait:
    """How a run waits for loader workers; ranks wait for each other a little longer."""
    return Wait(
        "the next batch of the loader workers",
        limit=_LIMIT,
        fix="--num-workers 0 shows where reading stands still; the disk or server of the images "
        "or of the store may not answer",
        progress=progress,
        stop=stop,
        grace=_GRACE,
    )


def _start_worker(_: int) -> None:
    # The cores belong to the training process.
    torch.set_num_threads(1)
    # A terminal, or a scheduler, signals the whole group; the current step still needs data.
    ignore_stop_signals()
    # torch watches its worker's parent, but that is the fork server, which lives as long as its
    # children: a worker of a killed run would wait for ever.
    Thread(target=exit_with_parent, daemon=True).start()
