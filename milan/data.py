"""Cached targets and the pixels they belong to, joined and in order: what training reads.

The order is a pure function of (seed, epoch): whole shards are permuted, rows are shuffled within
windows of shards, and in epoch e all rows of shard s read view (e + h(seed, s)) mod K. So an epoch
sees one view of every image, K epochs see each once, and reads stay whole shards of one view.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from milan import draws
from milan.cache import TargetCache
from milan.errors import CacheError, ConfigError, DataError, ImageFault, MilanError
from milan.images import content_digest, decode
from milan.masking import mask_noise
from milan.places import Place, place
from milan.sources import ImageSource
from milan.views import View, checksum, render, unpack

_WINDOW_ROWS = 131_072  # shuffled together: near full-shuffle quality, reads of whole shards


class Batch(NamedTuple):
    """B views with their targets, as they leave a loader worker; codes are not decoded yet."""

    pixels: torch.Tensor
    """[B, S, S, 3] uint8"""
    attention: torch.Tensor
    """[B, N] float32, > 0"""
    noise: torch.Tensor
    """[B, N] float32 in (0, 1), drawn at (seed, epoch, row, view)"""
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
        self.root = None if self.stored and not data_root else find_root(cache, data_root)
        self.good = cache.good_rows()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("source", "labels")}

    @cached_property
    def source(self) -> ImageSource:
        """The images; opened in the process that reads them."""
        if self.root is None:
            self.root = find_root(self.cache, None)
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
            fix="restore the image, or extract anew with --out another.zarr",
        )


def open_cache(
    path: str | Path, *, layer: str | None = None, data_root: str | None = None
) -> CachedDataset:
    """A finished store as a torch Dataset. `data_root` is where the images lie, if they moved.

    Of a store that holds the targets of several teachers or codecs, `layer` names one.
    Raises CacheError for a store that is absent, incomplete, foreign or damaged, and DataError if
    the images are not found.
    """
    return CachedDataset(TargetCache(path, layer=layer), data_root=data_root)


def find_root(cache: TargetCache, data_root: str | None) -> Place:
    """The folder, or URL, that the manifest's paths are relative to.

    `data_root` if given; else as the store recorded it, first relative to the store (a project
    that was moved as a whole), then absolute. Raises DataError listing the places looked at.
    """
    origin = cache.generations[0].origin
    places = [place(data_root or origin["data_root"])]
    if not data_root and origin["data_root_from_store"]:
        places.insert(0, cache.path.resolve() / origin["data_root_from_store"])
    good = cache.good_rows()
    if not len(good):
        raise DataError(f"{cache.path} has targets of no image: all {cache.rows} are bad")
    first = cache.manifest.table["path"][int(good[0])].as_py()
    for root in places:
        if (root / first).exists():
            return root
    raise DataError(
        f"the images of {cache.path} are not below " + ", nor ".join(str(p) for p in places),
        expected=f"{first} in the data root",
        fix="--data-root FOLDER (or a URL)",
    )


# --- order ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Which (row, view) comes when: a pure function of its fields; ranks and workers are not."""

    good: np.ndarray
    """Rows with targets, ascending; int64."""
    shards: np.ndarray
    """Which shard of a view holds each of them, ascending; int64 (TargetCache.shards_of)."""
    shard_size: int
    views: int
    seed: int
    batch_size: int
    """Images of an optimiser step, over all ranks."""

    def __post_init__(self) -> None:
        if self.batch_size > len(self.good):
            raise ConfigError(
                f"batch size {self.batch_size} with {len(self.good)} usable images",
                expected="no more than there are images",
                fix=f"--batch-size {len(self.good)}",
            )

    @property
    def steps(self) -> int:
        """Steps an epoch; the last images, fewer than a batch, wait for another epoch's shuffle."""
        return len(self.good) // self.batch_size

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, views) of an epoch in order, each int64 [good rows]."""
        shards, starts = np.unique(self.shards, return_index=True)
        members = np.split(self.good, starts[1:])
        order = draws.permutation(self.seed, draws.ORDER, (0, epoch), len(shards))
        per_window = max(1, -(-_WINDOW_ROWS // self.shard_size))
        rows, places = [], []
        for window, first in enumerate(range(0, len(shards), per_window)):
            chosen = order[first : first + per_window]
            inside = np.concatenate([members[s] for s in chosen])
            holders = np.repeat(chosen, [len(members[s]) for s in chosen])
            shuffle = draws.permutation(self.seed, draws.ORDER, (1 + window, epoch), len(inside))
            rows.append(inside[shuffle])
            places.append(holders[shuffle])
        stream, place = np.concatenate(rows), np.concatenate(places)
        turn = {int(s): draws.bits(self.seed, draws.VIEW_TURN, (int(s),), 1)[0] for s in shards}
        turns = np.array([int(turn[int(s)] % np.uint64(self.views)) for s in shards])
        return stream, (epoch + turns[place]) % self.views


def order_of(cache: TargetCache, *, seed: int, batch_size: int) -> Order:
    """The order in which training meets a store."""
    good = cache.good_rows()
    shards = cache.shards_of(good)
    return Order(good, shards, cache.spec.shard_size, cache.views, seed, batch_size)


Address = tuple[int, np.ndarray, np.ndarray]
"""(epoch, rows, views): what a loader worker is asked for."""


class StepSampler(Sampler):
    """Addresses of micro-batches from step `start` to `stop`, for one of `ranks` ranks.

    A step's batch is cut into equal slices by rank and then into micro-batches, so any number of
    ranks walks the same stream. Seeking reads nothing that lies before.
    """

    def __init__(
        self, order: Order, *, start: int, stop: int, micro: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if order.batch_size % (ranks * micro):
            raise ConfigError(
                f"batch size {order.batch_size} over {ranks} ranks in micro-batches of {micro}",
                expected="a whole number of micro-batches for every rank",
            )
        self.order, self.start, self.stop = order, start, stop
        self.micro, self.rank, self.ranks = micro, rank, ranks

    def __len__(self) -> int:
        return (self.stop - self.start) * (self.order.batch_size // self.ranks // self.micro)

    def __iter__(self) -> Iterator[Address]:
        share = self.order.batch_size // self.ranks
        held, rows, views = -1, np.empty(0), np.empty(0)
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.order.steps)
            if epoch != held:
                held, (rows, views) = epoch, self.order.epoch(epoch)
            first = within * self.order.batch_size + self.rank * share
            for at in range(first, first + share, self.micro):
                yield epoch, rows[at : at + self.micro], views[at : at + self.micro]


class _Batches(Dataset):
    """Turns addresses into batches; runs in loader workers."""

    def __init__(self, dataset: CachedDataset, seed: int, features: bool) -> None:
        self.dataset, self.seed, self.features = dataset, seed, features

    def __getitem__(self, address: Address) -> Batch | MilanError:
        try:
            return self._load(address)
        except MilanError as error:
            return error  # raised by _Loader: DataLoader would bury it in a traceback's text

    def _load(self, address: Address) -> Batch:
        epoch, rows, views = address
        cache = self.dataset.cache
        targets = cache.read(rows, views, features=self.features)
        epochs = np.full(len(rows), epoch)
        noise = mask_noise(self.seed, epochs, rows, views, targets.attention.shape[1])
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
    """A DataLoader that raises a loader worker's MilanError as it was."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, MilanError):
                raise batch
            yield batch


def training_loader(
    dataset: CachedDataset,
    sampler: StepSampler,
    *,
    features: bool,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Micro-batches of `sampler` in its order, read ahead by `num_workers` processes.

    Workers are started by forkserver (spawn where absent): tensorstore does not survive a fork.
    """
    options: dict[str, Any] = {}
    if num_workers:
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["milan.data"])
        options = {"multiprocessing_context": context, "prefetch_factor": 4}
    return _Loader(
        _Batches(dataset, sampler.order.seed, features),
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
    # torch looks whether its worker's parent lives, but that is the fork server, which lives as
    # long as its children: a worker of a killed run would wait for ever.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
