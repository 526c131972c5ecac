"""Which rows and views a rank reads next, and what for: addresses of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from milan.data.order import Stream
from milan.errors import ConfigError


class Kind(IntEnum):
    """What a micro-batch is read for."""

    TRAIN = 0
    VALIDATION = 1
    """Rows never trained on; masked alike after every epoch."""
    PICTURE = 2
    """Rows whose prediction is drawn; masked alike after every epoch."""
    KNN_BANK = 3
    """Images whose labels the k-NN probe knows; only pixels are read."""
    KNN_QUERY = 4
    """Images whose labels it has to name; only pixels are read."""

    @property
    def has_targets(self) -> bool:
        """Whether the teacher's features are read too, where the objective needs them."""
        return self <= Kind.PICTURE


class Address(NamedTuple):
    """A micro-batch, as a loader worker is asked for it."""

    kind: Kind
    epoch: int
    rows: np.ndarray
    """[B] int64"""
    views: np.ndarray
    """[B] int64"""
    padding: bool = False
    """Another rank counts these rows: they are read so that all ranks take as many batches."""

    @property
    def mask_epoch(self) -> int:
        """The epoch at whose address masks are drawn; one number above 2^32 for all others."""
        if self.kind is Kind.TRAIN:
            return self.epoch
        return (1 << 32) + self.kind - 1 + (self.padding << 33)


class StepSampler(Sampler[Address]):
    """Addresses of micro-batches from step `start` to `stop`, for one of `ranks` ranks.

    A step's batch is cut into equal slices by rank and then into micro-batches, so any number of
    ranks walks the same stream. Seeking reads nothing that lies before. The last step of an epoch
    e is followed by the micro-batches of `after_epoch(e)`, which are this rank's already.
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
        after_epoch: Callable[[int], Sequence[Address]] = lambda epoch: (),
    ) -> None:
        if order.batch_size % (ranks * micro):
            raise ConfigError(
                f"batch size {order.batch_size} over {ranks} ranks in micro-batches of {micro}",
                expected="a whole number of micro-batches for every rank",
                fix=f"--batch-size {-(-order.batch_size // (ranks * micro)) * ranks * micro}",
            )
        self.order, self.start, self.stop = order, start, stop
        self.micro, self.rank, self.ranks = micro, rank, ranks
        self.after_epoch = after_epoch

    def __len__(self) -> int:
        epochs = range(self.order.position(self.start)[0], self.order.position(self.stop)[0])
        after = sum(len(self.after_epoch(epoch)) for epoch in epochs)
        return (self.stop - self.start) * self.micro_batches + after

    @property
    def micro_batches(self) -> int:
        """Of a step, on this rank."""
        return self.order.batch_size // self.ranks // self.micro

    def __iter__(self) -> Iterator[Address]:
        share = self.order.batch_size // self.ranks
        drawn, rows, views = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        for step in range(self.start, self.stop):
            epoch, within = self.order.position(step)
            if epoch != drawn:
                drawn, (rows, views) = epoch, self.order.for_epoch(epoch).epoch(epoch)
            first = within * self.order.batch_size + self.rank * share
            for at in range(first, first + share, self.micro):
                micro = slice(at, at + self.micro)
                yield Address(Kind.TRAIN, epoch, rows[micro], views[micro])
            if step + 1 == self.order.first_step(epoch + 1):
                yield from self.after_epoch(epoch)


def split_over_ranks(whole: Address, *, rank: int, ranks: int, micro: int) -> list[Address]:
    """A rank's micro-batches of `whole`: as many as every other rank's, none of them empty.

    Ranks get equal slices. Of the rows that do not divide each of the first ranks gets one more;
    the others read a row that is not theirs as padding.
    """
    rows, views = whole.rows, whole.views
    share, rest = divmod(len(rows), ranks)
    parts: list[Address] = []
    if share:
        mine, count = slice(rank * share, (rank + 1) * share), -(-share // micro)
        pieces = np.array_split(rows[mine], count), np.array_split(views[mine], count)
        parts = [whole._replace(rows=r, views=v) for r, v in zip(*pieces, strict=True)]
    if rest:
        at = share * ranks + (rank if rank < rest else 0)
        last = slice(at, at + 1)
        parts.append(whole._replace(rows=rows[last], views=views[last], padding=rank >= rest))
    return parts
