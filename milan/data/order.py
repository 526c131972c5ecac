"""Which (row, view) comes when: a pure function of (seed, epoch); ranks and workers are not in it.

Whole shards are permuted, rows are shuffled within windows of shards, and in epoch e all rows of
shard s read view (e + h(seed, s)) mod K. So an epoch sees one view of every image, K epochs see
each once, and reads stay whole shards of one view. One window of everything is a global shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from milan.core import rng
from milan.errors import ConfigError
from milan.store.cache import TargetCache

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Order:
    """The order of a run's images, epoch by epoch."""

    train_rows: np.ndarray
    """Rows with targets that are trained on, ascending; int64."""
    shards: np.ndarray
    """Which shard of a view holds each of them, ascending; int64 (TargetCache.shards_of)."""
    shard_size: int
    views: int
    seed: int
    batch_size: int
    """Images of an optimiser step, over all ranks."""
    window_rows: int
    """Rows shuffled together, rounded up to whole shards; all rows: a global shuffle."""
    replaced: np.ndarray = field(default_factory=_NONE.copy)
    """Train rows whose places other rows take: found changed when a run was resumed."""
    validation_rows: np.ndarray = field(default_factory=_NONE.copy)
    """Rows that are never trained on, ascending."""

    def __post_init__(self) -> None:
        if self.batch_size > len(self.train_rows):
            raise ConfigError(
                f"batch size {self.batch_size} with {len(self.train_rows)} usable images",
                expected="no more than there are images",
                fix=f"--batch-size {len(self.train_rows)}",
            )

    @property
    def steps(self) -> int:
        """Steps an epoch; the last images, fewer than a batch, wait for another epoch's shuffle."""
        return len(self.train_rows) // self.batch_size

    @property
    def window_shards(self) -> int:
        """Shards of one view in a window."""
        return max(1, -(-self.window_rows // self.shard_size))

    def for_epoch(self, epoch: int) -> Order:
        """Itself: the same order holds in every epoch (GrownOrder has several)."""
        return self

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return epoch * self.steps

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)"""
        return divmod(step, self.steps)

    def windows(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, views) of each window of an epoch in order, int64."""
        shards, starts = np.unique(self.shards, return_index=True)
        members = np.split(self.train_rows, starts[1:])
        order = rng.permutation(self.seed, rng.ORDER, (0, epoch), len(shards))
        turns = [rng.bits(self.seed, rng.VIEW_TURN, (int(s),), 1)[0] for s in shards]
        turn = (np.array(turns, np.uint64) % np.uint64(self.views)).astype(np.int64)
        windows = []
        for window, first in enumerate(range(0, len(shards), self.window_shards)):
            chosen = order[first : first + self.window_shards]
            rows = np.concatenate([members[s] for s in chosen])
            shard_of_row = np.repeat(chosen, [len(members[s]) for s in chosen])
            shuffle = rng.permutation(self.seed, rng.ORDER, (1 + window, epoch), len(rows))
            windows.append((rows[shuffle], (epoch + turn[shard_of_row[shuffle]]) % self.views))
        return windows

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, views) of an epoch in order, each int64 [train rows].

        A replaced row's place is taken by one that the epoch's steps leave over, if need be by one
        from the epoch's beginning; every other row stays where it was. Raises ConfigError if no
        row is left.
        """
        windows = self.windows(epoch)
        rows = np.concatenate([rows for rows, _ in windows])
        views = np.concatenate([views for _, views in windows])
        gone = np.isin(rows, self.replaced)
        if gone.any():
            if gone.all():
                raise ConfigError(
                    "every image has changed since extraction",
                    expected="the images that the teacher saw",
                    fix="restore them, or extract to another --out",
                )
            used = self.steps * self.batch_size
            unused_first = np.roll(np.arange(len(rows)), -used)
            positions = np.flatnonzero(gone)
            spare = np.resize(unused_first[~gone[unused_first]], len(positions))
            rows[positions], views[positions] = rows[spare], views[spare]
        return rows, views

    def without(self, removed: np.ndarray, replaced: np.ndarray) -> Order:
        """The same order without some rows.

        `removed` leave it as if they had no targets; the places of `replaced` are taken by others.
        """
        train = ~np.isin(self.train_rows, removed)
        validation = ~np.isin(self.validation_rows, [*removed, *replaced])
        return replace(
            self,
            train_rows=self.train_rows[train],
            shards=self.shards[train],
            validation_rows=self.validation_rows[validation],
            replaced=replaced,
        )


@dataclass(frozen=True)
class GrownOrder:
    """The order of a run that moved on, at the beginning of an epoch, to what its store gained."""

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

    def for_epoch(self, epoch: int) -> Order:
        """The order that holds in an epoch."""
        return next(order for first, order in reversed(self.parts) if first <= epoch)

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        ends = [first for first, _ in self.parts[1:]] + [epoch]
        return sum(
            max(0, min(end, epoch) - first) * order.steps
            for (first, order), end in zip(self.parts, ends, strict=True)
        )

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)"""
        first, order = next(p for p in reversed(self.parts) if self.first_step(p[0]) <= step)
        epochs, within = divmod(step - self.first_step(first), order.steps)
        return first + epochs, within

    def without(self, removed: np.ndarray, replaced: np.ndarray) -> GrownOrder:
        """The same order without some rows, see Order.without."""
        return GrownOrder(
            tuple((first, order.without(removed, replaced)) for first, order in self.parts)
        )


Stream = Order | GrownOrder


def order_of(
    cache: TargetCache,
    *,
    seed: int,
    batch_size: int,
    shuffle: str = "window",
    window_rows: int = 131_072,
    held_out: float = 0.0,
) -> Order:
    """The order in which training reads a store; a `global` shuffle has one window.

    `held_out` is the share of rows kept for validation. Rows whose images were dropped from the
    store are in it: a run takes out those it does not know yet (Order.without).
    """
    rows = cache.good_rows(with_dropped=True)
    # Drawn of the first layer's, so that a row keeps its role when another layer grows.
    first = cache.parts[0].good_rows(with_dropped=True)
    validation = draw_validation_rows(cache, first, seed=seed, share=held_out)
    validation = validation[np.isin(validation, rows)]
    train = rows[~np.isin(rows, validation)]
    shards = cache.shards_of(train)
    size = cache.spec.shard_size
    # Of whole shards: several generations may each end with a short one.
    window = len(np.unique(shards)) * size if shuffle == "global" else window_rows
    return Order(
        train, shards, size, cache.views, seed, batch_size, window, validation_rows=validation
    )


def draw_validation_rows(
    cache: TargetCache, rows: np.ndarray, *, seed: int, share: float
) -> np.ndarray:
    """A `share` of `rows` by seed, ascending; int64.

    Drawn from each range of rows that was added at once, so that a row keeps its role when the
    store grows; whole eights, so that up to 8 ranks need no padding.
    """
    drawn = [_NONE]
    for g in cache.generations:
        if g.spec.first_view == 0:
            added = rows[g.holds_rows(rows)]
            count = int(len(added) * share) // 8 * 8
            shuffle = rng.permutation(seed, rng.HELD_OUT, (g.spec.first_row,), len(added))
            drawn.append(added[shuffle[:count]])
    return np.sort(np.concatenate(drawn))


def shuffle_quality(rows: np.ndarray) -> float:
    """How well an order of rows [n] is shuffled: 0 as stored, about 1 for a full permutation.

    The mean distance in the order between images stored side by side, over (n + 1) / 3, a full
    permutation's. The displacement of single rows would not do: permuting whole shards moves every
    row far, and leaves neighbours together.
    """
    if len(rows) < 2:
        return 1.0
    positions = np.argsort(rows, kind="stable")
    return float(np.abs(np.diff(positions)).mean() / ((len(rows) + 1) / 3))
