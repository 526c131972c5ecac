"""Cached targets and the pixels they belong to, joined: what training reads."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from functools import cached_property
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from milan.core.paths import AnyPath
from milan.core.signals import blocked_stop_signals, exit_with_parent, ignore_stop_signals
from milan.data.order import DRAWN, REPEATED, Address, StepSampler
from milan.data.prefetch import Prefetcher, Shard
from milan.errors import CacheError, DataError, ImageFault, MilanError, TrainError
from milan.images.decode import content_digest, decode
from milan.images.source import ImageSource
from milan.images.views import View, checksum, render, unpack
from milan.models.masking import mask_noise
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
        """The same on `device`; from pinned memory the copy does not wait."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by DataLoader where there is a GPU."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        moved: Any = (None if tensor is None else move(tensor) for tensor in self)
        return Batch(*moved)


class CachedDataset(Dataset):
    """Every stored view of every good image: item i is view i mod K of the (i div K)-th image.

    An item is a dict: `image` uint8 [3, S, S], `features` float32 [T, C], `attention` float32
    [N], `row`, `view`, `label` (-1 if unknown). Made for one's own loop; start loader workers with
    `multiprocessing_context="forkserver"`.
    """

    def __init__(self, cache: TargetCache, *, data_root: str | None = None) -> None:
        self.cache = cache
        self.stored = cache.spec.stored_views != "none"
        # A store that keeps its views needs no originals.
        self.root = None if self.stored and not data_root else cache.find_data_root(data_root)

    def __getstate__(self) -> dict:
        # What grows with the rows is made again where it is needed.
        return {k: v for k, v in self.__dict__.items() if k not in ("source", "labels", "good")}

    @cached_property
    def good(self) -> np.ndarray:
        """Rows that have targets, ascending; int64."""
        return self.cache.good_rows()

    @cached_property
    def source(self) -> ImageSource:
        """The images; opened in the process that reads them."""
        if self.root is None:
            self.root = self.cache.find_data_root()
        return ImageSource(self.cache.manifest, self.root)

    @cached_property
    def labels(self) -> np.ndarray:
        """[rows] int64, -1 where unknown."""
        return self.cache.manifest.labels()

    def __len__(self) -> int:
        return len(self.good) * self.cache.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if any(not -len(self) <= i < len(self) for i in indices):
            raise IndexError(f"index out of range for {len(self)} views")
        at = np.asarray(indices) % len(self)
        rows, views = self.good[at // self.cache.views], at % self.cache.views
        targets = self.cache.read(rows, views)
        codes = torch.from_numpy(targets.codes)
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        features = self.cache.codec.decode(codes, scale)
        pixels = torch.from_numpy(self.pixels(rows, views)).permute(0, 3, 1, 2)
        return [
            {
                "image": pixels[i],
                "features": features[i],
                "attention": torch.from_numpy(targets.attention[i]),
                "row": int(row),
                "view": int(views[i]),
                "label": int(self.labels[row]),
            }
            for i, row in enumerate(rows)
        ]

    def pixels(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The pixels the teacher saw of (rows[i], views[i]); uint8 [B, S, S, 3].

        Raises DataError if an image is gone, has changed, or renders to other pixels than it did.
        """
        size = self.cache.view_spec.size
        out = np.empty((len(rows), size, size, 3), np.uint8)
        if self.stored:
            for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
                out[i] = self._stored(row, view)
            return out
        crops = self.cache.crops(rows, views)
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            data = b""
            try:
                data = self.source.read(row)
                out[i] = render(decode(data), View.of(crops[i]), size=size)
            except ImageFault as fault:
                raise self._changed(row, view, data, str(fault)) from None
            if checksum(out[i]) != self.cache.checksum(row, view):
                raise self._changed(row, view, data, "it renders to other pixels")
        return out

    def _stored(self, row: int, view: int) -> np.ndarray:
        """A view as the store keeps it: the picture that the teacher was shown."""
        try:
            pixels = unpack(self.cache.packed(row, view))
        except ValueError as error:
            raise CacheError(
                f"{self.cache.path}: row {row}, view {view}: {error}",
                fix=f"milan repair {self.cache.path}",
            ) from None
        if checksum(pixels) != self.cache.checksum(row, view):
            raise CacheError(
                f"{self.cache.path}: the stored view of row {row}, view {view} has other pixels",
                expected="those that the teacher saw; or this machine decodes pictures differently",
                fix=f"milan verify --deep {self.cache.path}",
            )
        return pixels

    def _changed(self, row: int, view: int, data: bytes, what: str) -> DataError:
        """What happened to an image since extraction, told apart by its content checksum."""
        key = self.cache.manifest.key(row)
        if content_digest(data) == self.cache.content_digest(row, view):
            return DataError(
                f"image {key!r} (row {row}, view {view}) is unchanged, but {what}",
                expected="the pixels that the teacher saw: this machine decodes images differently",
                fix="the Pillow version of the extraction, as the store's zarr.json records it",
            )
        return DataError(
            f"image {key!r} (row {row}) has changed since extraction: {what}",
            expected=f"the same bytes below {self.root}",
            fix="restore the image, or milan pretrain … --on-changed drop, or extract anew",
        )


def open_cache(
    path: str | AnyPath, *, layer: str | None = None, data_root: str | None = None
) -> CachedDataset:
    """A finished store as a torch Dataset. `data_root` is where the images lie, if they moved.

    Of a store that holds the targets of several teachers or codecs, `layer` names one.
    Raises CacheError for a store that is absent, incomplete, foreign or damaged, and DataError if
    the images are not found.
    """
    return CachedDataset(TargetCache(path, layer=layer), data_root=data_root)


# --- the loader -----------------------------------------------------------------------------------


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
        epoch, rows, views = address
        cache = self.dataset.cache
        targets = cache.read(rows, views, features=self.features and epoch & ~REPEATED <= DRAWN)
        epochs = np.full(len(rows), epoch)
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
    """A DataLoader that raises a loader worker's MilanError as it was, and tells what it consumed.

    Where shards are copied to a local disk, those of the next window are fetched ahead.
    """

    dataset: _Batches
    sampler: StepSampler

    def __iter__(self) -> Any:
        cache = self.dataset.dataset.cache
        ahead = Prefetcher(_windows(cache, self.sampler))
        if cache.generations[0].local:
            ahead.start()
        others = multiprocessing.active_children()
        with blocked_stop_signals():
            batches = super().__iter__()
        workers = [p for p in multiprocessing.active_children() if p not in others]
        try:
            for batch in batches:
                if isinstance(batch, MilanError):
                    raise batch
                ahead.consumed += 1
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError):
            _raise_if_died(workers)
            raise
        finally:
            ahead.stopped.set()
            del batches  # ends the workers now, not when an error's traceback is forgotten


def _raise_if_died(workers: list[Any]) -> None:
    """Raises TrainError if one of them did: a DataLoader then fails in many ways."""
    wait = multiprocessing.connection.wait
    dead = wait([w.sentinel for w in workers], timeout=2) if workers else []
    for worker in workers:
        if worker.sentinel in dead:
            code = worker.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise TrainError(
                f"a loader worker died ({how})",
                expected="memory for all of them: the kernel kills what has none left",
                fix="a smaller --num-workers; the same line goes on from the last checkpoint",
            ) from None


def _windows(cache: TargetCache, sampler: StepSampler) -> Iterator[tuple[int, list[Shard]]]:
    """(batches consumed when it is over, shards) of every window that the sampler walks through."""
    stream, start, stop = sampler.order, sampler.start, sampler.stop
    per_step, aside = stream.batch_size // sampler.ranks // sampler.micro, 0
    for epoch in range(stream.at(start)[0], stream.at(stop - 1)[0] + 1):
        order, first, rows_before = stream.of_epoch(epoch), stream.first_step(epoch), 0
        for rows, views in order.windows(epoch):
            rows_before += len(rows)
            end = min(stop, first + min(order.steps, -(-rows_before // order.batch_size)))
            if end > start:
                yield (end - start) * per_step + aside, cache.shards_at(rows, views)
        aside += len(sampler.aside_of(epoch))


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

    `patches`: of the student, which the noise is for; default: the teacher's.

    Workers are started by forkserver (spawn where absent): tensorstore does not survive a fork.
    """
    options: dict[str, Any] = {}
    if num_workers:
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["milan.data.dataset"])
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
    # A terminal, or a scheduler, tells the whole group to stop; the step in hand still needs data.
    ignore_stop_signals()
    # torch looks whether its worker's parent lives, but that is the fork server, which lives as
    # long as its children: a worker of a killed run would wait for ever.
    Thread(target=exit_with_parent, daemon=True).start()
