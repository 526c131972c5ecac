"""Which (row, view) comes when: a pure function of (seed, epoch); ranks and workers are not in it.

Whole shards are permuted, rows are shuffled within windows of shards, and in epoch e all rows of
shard s read view (e + h(seed, s)) mod K. So an epoch sees one view of every image, K epochs see
each once, and reads stay whole shards of one view. One window of everything is a global shuffle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from torch.utils.data import Sampler

from milan.core import rng
from milan.errors import ConfigError
from milan.store.cache import TargetCache

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Order:
    """The stream of a run's images, epoch by epoch."""

    good: np.ndarray
    """Rows with targets, ascending; int64."""
    shards: np.ndarray
    """Which shard of a view holds each of them, ascending; int64 (TargetCache.shards_of)."""
    shard_size: int
    views: int
    seed: int
    batch_size: int
    """Images of an optimiser step, over all ranks."""
    window_rows: int
    """Rows shuffled together, rounded up to whole shards; at least `good`: a global shuffle."""
    replaced: np.ndarray = field(default_factory=_NONE.copy)
    """Rows of `good` whose places other rows take: found changed when a run went on."""
    held: np.ndarray = field(default_factory=_NONE.copy)
    """Rows that training never sees, ascending: the run is judged by them."""

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

    @property
    def window_shards(self) -> int:
        """Shards of one view in a window."""
        return max(1, -(-self.window_rows // self.shard_size))

    def of_epoch(self, epoch: int) -> Order:
        """Itself: what holds in an epoch. Of a run that moved to a larger store, see Stretches."""
        return self

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with."""
        return epoch * self.steps

    def at(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)"""
        return divmod(step, self.steps)

    def windows(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, views) of each window of an epoch in order, int64."""
        shards, starts = np.unique(self.shards, return_index=True)
        members = np.split(self.good, starts[1:])
        order = rng.permutation(self.seed, rng.ORDER, (0, epoch), len(shards))
        turns = [rng.bits(self.seed, rng.VIEW_TURN, (int(s),), 1)[0] for s in shards]
        turn = (np.array(turns, np.uint64) % np.uint64(self.views)).astype(np.int64)
        found = []
        for window, first in enumerate(range(0, len(shards), self.window_shards)):
            chosen = order[first : first + self.window_shards]
            inside = np.concatenate([members[s] for s in chosen])
            holders = np.repeat(chosen, [len(members[s]) for s in chosen])
            shuffle = rng.permutation(self.seed, rng.ORDER, (1 + window, epoch), len(inside))
            found.append((inside[shuffle], (epoch + turn[holders[shuffle]]) % self.views))
        return found

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, views) of an epoch in order, each int64 [good rows].

        A replaced row's place is taken by one that the epoch's steps leave over, if need be by one
        from the epoch's beginning; every other row stays where it was. Raises ConfigError if no
        row is left.
        """
        windows = self.windows(epoch)
        rows = np.concatenate([rows for rows, _ in windows])
        views = np.concatenate([views for _, views in windows])
        lost = np.isin(rows, self.replaced)
        if lost.any():
            if lost.all():
                raise ConfigError("every image has changed since extraction")
            used = self.steps * self.batch_size
            kept = np.roll(np.arange(len(rows)), -used)  # what is left over, then the beginning
            places = np.flatnonzero(lost)
            spare = np.resize(kept[~lost[kept]], len(places))
            rows[places], views[places] = rows[spare], views[spare]
        return rows, views

    def dropped(self, first: np.ndarray, later: np.ndarray) -> Order:
        """The same without the rows `first`, as if they had no targets, and `later` replaced."""
        kept, held = ~np.isin(self.good, first), ~np.isin(self.held, [*first, *later])
        return replace(
            self,
            good=self.good[kept],
            shards=self.shards[kept],
            held=self.held[held],
            replaced=later,
        )


@dataclass(frozen=True)
class Stretches:
    """The stream of a run that moved on, at the beginning of an epoch, to what its store gained."""

    parts: tuple[tuple[int, Order], ...]
    """(first epoch, order), the first from epoch 0."""

    @property
    def seed(self) -> int:
        """The run's."""
        return self.parts[0][1].seed

    @property
    def batch_size(self) -> int:
        """Images of a step, the same throughout."""
        return self.parts[0][1].batch_size

    def of_epoch(self, epoch: int) -> Order:
        """The order that holds in an epoch."""
        return next(order for first, order in reversed(self.parts) if first <= epoch)

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with."""
        ends = [first for first, _ in self.parts[1:]] + [epoch]
        return sum(
            max(0, min(end, epoch) - first) * order.steps
            for (first, order), end in zip(self.parts, ends, strict=True)
        )

    def at(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)"""
        first, order = next(p for p in reversed(self.parts) if self.first_step(p[0]) <= step)
        epochs, within = divmod(step - self.first_step(first), order.steps)
        return first + epochs, within

    def dropped(self, first: np.ndarray, later: np.ndarray) -> Stretches:
        """The same without some rows, see Order.dropped."""
        return Stretches(tuple((at, order.dropped(first, later)) for at, order in self.parts))


Stream = Order | Stretches


def order_of(
    cache: TargetCache,
    *,
    seed: int,
    batch_size: int,
    shuffle: str = "window",
    window_rows: int = 131_072,
    held_out: float = 0.0,
) -> Order:
    """The order in which training meets a store; a `global` shuffle has one window.

    `held_out` is the share of rows that training does not see.
    """
    good = cache.good_rows()
    held = validation_rows(cache, good, seed=seed, share=held_out)
    good = good[~np.isin(good, held)]
    shards = cache.shards_of(good)
    size = cache.spec.shard_size
    # Of whole shards: several generations may each end with a short one.
    window = len(np.unique(shards)) * size if shuffle == "global" else window_rows
    return Order(good, shards, size, cache.views, seed, batch_size, window, held=held)


def validation_rows(cache: TargetCache, good: np.ndarray, *, seed: int, share: float) -> np.ndarray:
    """A `share` of the `good` rows by seed, ascending; int64.

    Drawn from each stretch of rows that was added at once, so that a row keeps its role when the
    store grows; whole eights, so that up to 8 ranks need repeat none.
    """
    found = [_NONE]
    for g in cache.generations:
        if g.spec.first_view == 0:
            rows = good[g.holds_rows(good)]
            count = int(len(rows) * share) // 8 * 8
            mix = rng.permutation(seed, rng.HELD_OUT, (g.spec.first_row,), len(rows))
            found.append(rows[mix[:count]])
    return np.sort(np.concatenate(found))


def shuffle_quality(rows: np.ndarray) -> float:
    """How well a stream of rows [n] is mixed: 0 as stored, about 1 for a full permutation.

    The mean distance in the stream between images stored side by side, over (n + 1) / 3, a full
    permutation's. The displacement of single rows would not do: permuting whole shards moves every
    row far, and leaves neighbours together.
    """
    if len(rows) < 2:
        return 1.0
    places = np.argsort(rows, kind="stable")
    return float(np.abs(np.diff(places)).mean() / ((len(rows) + 1) / 3))


Address = tuple[int, np.ndarray, np.ndarray]
"""(epoch, rows, views): what a loader worker is asked for."""
JUDGED, DRAWN, KNOWN, ASKED = range(1 << 32, (1 << 32) + 4)
"""In place of an epoch: rows that a run is judged by, and that are shown, always masked alike; rows
whose pixels alone are read, to compare what the student makes of those whose label is known with
those asked for."""
REPEATED = 1 << 33
"""Added to one of these: what another rank has too, read so that all ranks take as many batches."""


class StepSampler(Sampler):
    """Addresses of micro-batches from step `start` to `stop`, for one of `ranks` ranks.

    A step's batch is cut into equal slices by rank and then into micro-batches, so any number of
    ranks walks the same stream. Seeking reads nothing that lies before. After the last step of an
    epoch e come the batches of `aside(e)`.
    """

    def __init__(
        self,
        order: Stream,
        *,
        start: int,
        stop: int,
        micro: int,
        rank: int = 0,
        ranks: int = 1,
        aside: Callable[[int], list[Address]] | None = None,
    ) -> None:
        if order.batch_size % (ranks * micro):
            raise ConfigError(
                f"batch size {order.batch_size} over {ranks} ranks in micro-batches of {micro}",
                expected="a whole number of micro-batches for every rank",
                fix=f"--batch-size {-(-order.batch_size // (ranks * micro)) * ranks * micro}",
            )
        self.order, self.start, self.stop = order, start, stop
        self.micro, self.rank, self.ranks, self.aside = micro, rank, ranks, aside

    def __len__(self) -> int:
        steps = (self.stop - self.start) * (self.order.batch_size // self.ranks // self.micro)
        epochs = range(self.order.at(self.start)[0], self.order.at(self.stop)[0])
        return steps + sum(len(self.aside_of(epoch)) for epoch in epochs)

    def __iter__(self) -> Iterator[Address]:
        share = self.order.batch_size // self.ranks
        held, rows, views = -1, _NONE, _NONE
        for step in range(self.start, self.stop):
            epoch, within = self.order.at(step)
            if epoch != held:
                held, (rows, views) = epoch, self.order.of_epoch(epoch).epoch(epoch)
            first = within * self.order.batch_size + self.rank * share
            for at in range(first, first + share, self.micro):
                yield epoch, rows[at : at + self.micro], views[at : at + self.micro]
            if step + 1 == self.order.first_step(epoch + 1):
                yield from self.aside_of(epoch)

    def aside_of(self, epoch: int) -> list[Address]:
        """This rank's batches after an epoch: as many as every other rank's, none of them empty."""
        found = []
        for kind, rows, views in self.aside(epoch) if self.aside else []:
            share, left = divmod(len(rows), self.ranks)
            if share:
                mine = slice(self.rank * share, (self.rank + 1) * share)
                parts = -(-share // self.micro)
                pieces = np.array_split(rows[mine], parts), np.array_split(views[mine], parts)
                found += [(kind, r, v) for r, v in zip(*pieces, strict=True)]
            if left:
                own = self.rank < left
                last = slice(at := share * self.ranks + (self.rank if own else 0), at + 1)
                found.append((kind if own else kind | REPEATED, rows[last], views[last]))
        return found
