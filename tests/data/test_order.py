"""Which (row, view) comes when: permutations, windows, ranks, seeking, rows taken out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from milan.data.order import Order, order_of, shuffle_quality
from milan.data.sampler import StepSampler
from milan.errors import ConfigError
from milan.store.cache import TargetCache

GOOD = np.array([0, 1, 2, 4, 5, 6, 7, 9, 10, 11])  # rows 3 and 8 of 12 are bad


def order(**changes: object) -> Order:
    fields: dict[str, Any] = {
        "train_rows": GOOD, "shard_size": 4, "views": 3, "seed": 0, "batch_size": 4,
        "window_rows": 131_072,
    } | changes  # fmt: skip
    return Order(shards=fields["train_rows"] // fields["shard_size"], **fields)


def test_an_epoch_is_a_permutation() -> None:
    """Every usable row once, in an order of its own; bad rows never."""
    seen = set()
    for epoch in range(20):
        rows, views = order().epoch(epoch)
        assert sorted(rows.tolist()) == GOOD.tolist()
        assert rows.dtype == views.dtype == np.int64
        seen.add(tuple(rows.tolist()))
    assert len(seen) == 20
    assert order(seed=1).epoch(0)[0].tolist() != order().epoch(0)[0].tolist()


@pytest.mark.parametrize("views", [1, 2, 3, 8])
def test_k_epochs_see_every_view_once(views: int) -> None:
    """From any epoch on; one view of an image an epoch."""
    for first in (0, 5):
        seen: dict[int, set[int]] = {row: set() for row in GOOD.tolist()}
        for epoch in range(first, first + views):
            for row, view in zip(*order(views=views).epoch(epoch), strict=True):
                assert view not in seen[int(row)]
                seen[int(row)].add(int(view))
        assert all(met == set(range(views)) for met in seen.values())


def test_a_shard_reads_one_view_an_epoch() -> None:
    """Else an epoch would read parts of K times as many files."""
    good = np.arange(4000)
    big = order(train_rows=good, shard_size=100, views=4, batch_size=100)
    for epoch in range(3):
        rows, views = big.epoch(epoch)
        of_shard = [set(views[rows // 100 == shard].tolist()) for shard in range(40)]
        assert all(len(met) == 1 for met in of_shard)
        # Shards begin at different views: an epoch is no sweep over one view of everything.
        assert len(set.union(*of_shard)) == 4


def test_rows_are_mixed_across_shards() -> None:
    """A batch must not come from one shard; a window too small would do that."""
    big = order(train_rows=np.arange(4000), shard_size=100, views=2, batch_size=100)
    rows, _ = big.epoch(0)
    assert min(len(set((batch // 100).tolist())) for batch in rows.reshape(40, 100)) > 25


def test_windows_hold_whole_shards() -> None:
    """Of a store larger than a window, each shard is read within one window."""
    small = order(train_rows=np.arange(1000), shard_size=100, batch_size=10, window_rows=201)
    rows, views = small.epoch(0)
    assert [len(rows) for rows, _ in small.windows(0)] == [300, 300, 300, 100]
    assert np.array_equal(np.concatenate([views for _, views in small.windows(0)]), views)
    assert sorted(rows.tolist()) == list(range(1000))
    windows = [set((rows[i : i + 300] // 100).tolist()) for i in range(0, 1000, 300)]
    assert [len(shards) for shards in windows] == [3, 3, 3, 1]
    assert set.union(*windows) == set(range(10))
    assert windows[0] != {0, 1, 2}


def test_order_is_frozen() -> None:
    """A run begun with another version is resumed at the same place."""
    rows, views = order().epoch(0)
    assert rows.tolist() == [1, 5, 4, 6, 2, 10, 9, 7, 11, 0]
    assert views.tolist() == [0, 0, 0, 0, 0, 2, 2, 0, 2, 0]
    rows, views = order().epoch(2)
    assert rows.tolist() == [1, 0, 11, 6, 9, 7, 10, 4, 2, 5]
    assert views.tolist() == [2, 2, 1, 2, 1, 2, 1, 2, 2, 2]


def test_steps_are_whole_batches() -> None:
    """10 usable rows in batches of 4: two steps, two images wait for another epoch."""
    assert order().steps == 2
    assert order(batch_size=10).steps == 1
    with pytest.raises(ConfigError, match="batch size 11 with 10 usable") as error:
        order(batch_size=11)
    assert error.value.fix == "--batch-size 10"


def walk(**changes: int) -> np.ndarray:
    """[images, 3]: (epoch, row, view) of every image that a rank meets, in order."""
    fields = {"start": 0, "stop": 7, "micro": 4} | changes
    sampler = StepSampler(order(train_rows=np.arange(30), batch_size=8), **fields)  # type: ignore[arg-type]
    pieces = list(sampler)
    assert len(pieces) == len(sampler)
    assert {len(piece.rows) for piece in pieces} <= {fields["micro"]}
    met = [
        np.stack([np.full(len(piece.rows), piece.epoch), piece.rows, piece.views], axis=1)
        for piece in pieces
    ]
    return np.concatenate([np.empty((0, 3), np.int64), *met])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_ranks_walk_one_stream(ranks: int, micro: int) -> None:
    """Any number of ranks and any micro-batch see the same images at the same step."""
    if ranks * micro > 8:
        with pytest.raises(ConfigError, match="whole number of micro-batches"):
            walk(micro=micro, ranks=ranks)
        return
    shares = [
        walk(micro=micro, rank=rank, ranks=ranks).reshape(7, 8 // ranks, 3) for rank in range(ranks)
    ]
    assert np.array_equal(np.concatenate(shares, axis=1).reshape(-1, 3), walk(micro=8))


@pytest.mark.parametrize(("micro", "ranks"), [(3, 1), (4, 3), (5, 2), (16, 1)])
def test_uneven_shares_are_refused(micro: int, ranks: int) -> None:
    """They would overlap, or drop images, in silence."""
    with pytest.raises(ConfigError, match="batch size 8"):
        walk(micro=micro, ranks=ranks)


def test_seeking_is_walking() -> None:
    """A resumed run meets the batches that the uninterrupted one would have met."""
    whole = walk(micro=2)
    assert whole[::8, 0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    for start in range(8):
        assert np.array_equal(walk(micro=2, start=start), whole[8 * start :])


def test_a_step_is_rows_of_its_epoch() -> None:
    """Steps cut the epoch's stream from its beginning."""
    rows, views = order(train_rows=np.arange(30), batch_size=8).epoch(1)
    fifth = walk()[8 * 4 : 8 * 5]
    assert np.array_equal(fifth, np.stack([np.ones(8), rows[8:16], views[8:16]], axis=1))


# --- how well it is mixed -------------------------------------------------------------------------


def test_shuffle_quality() -> None:
    """0 as stored, 1 for a full permutation, a window's share of the rows for windows."""
    rows = np.arange(10_000)
    assert shuffle_quality(rows) < 0.001
    assert shuffle_quality(rows[::-1]) < 0.001
    assert shuffle_quality(np.random.default_rng(0).permutation(rows)) == pytest.approx(1, abs=0.03)
    # Whole shards permuted: every row is displaced, and its neighbours are still beside it.
    shards = np.random.default_rng(0).permutation(100)
    assert shuffle_quality((shards[:, None] * 100 + np.arange(100)).reshape(-1)) < 0.02
    assert shuffle_quality(np.array([5])) == 1
    for window, expected in ((10_000, 1), (5_000, 0.5), (1_000, 0.1)):
        stream, _ = order(train_rows=rows, shard_size=100, batch_size=10, window_rows=window).epoch(
            0
        )
        assert shuffle_quality(stream) == pytest.approx(expected, rel=0.15)


def test_global_is_one_window(cache: TargetCache) -> None:
    """Whatever window_rows says; and a store that fits a window is shuffled globally."""
    made = {
        name: order_of(cache, seed=3, batch_size=8, **settings)
        for name, settings in {
            "global": {"shuffle": "global", "window_rows": 8},
            "one": {"window_rows": 24},
            "three": {"window_rows": 8},
        }.items()
    }
    assert [len(o.windows(0)) for o in made.values()] == [1, 1, 3]
    streams = [np.stack(o.epoch(1)) for o in made.values()]
    assert np.array_equal(streams[0], streams[1])
    assert not np.array_equal(streams[0], streams[2])
    assert all(sorted(rows.tolist()) == list(range(24)) for rows, _ in streams)


# --- rows taken out -------------------------------------------------------------------------------


def test_without_is_as_if_never_there() -> None:
    """Rows known before a run are left out like bad ones."""
    fewer = order().without(np.array([4, 10]), GOOD[:0])
    assert fewer.train_rows.tolist() == [0, 1, 2, 5, 6, 7, 9, 11]
    assert fewer.shards.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(fewer.epoch(0)[0].tolist()) == fewer.train_rows.tolist()
    with pytest.raises(ConfigError, match="batch size 4 with 3 usable"):
        order().without(GOOD[:7], GOOD[:0])


@pytest.mark.parametrize("batch_size", [4, 5])
def test_a_replaced_row_moves_nothing_else(batch_size: int) -> None:
    """The epoch keeps its length; what is left over fills the gap, then the beginning."""
    whole, gone = order(batch_size=batch_size), GOOD[[2, 5]]
    some = replace(whole, replaced=gone)
    assert some.steps == whole.steps
    used = whole.steps * batch_size
    for epoch in range(5):
        (rows, views), (before, seen) = some.epoch(epoch), whole.epoch(epoch)
        kept = ~np.isin(before, gone)
        assert np.array_equal(rows[kept], before[kept])
        assert np.array_equal(views[kept], seen[kept])
        assert not np.isin(rows, gone).any()
        pairs = set(zip(before.tolist(), seen.tolist(), strict=True))
        assert set(zip(rows.tolist(), views.tolist(), strict=True)) <= pairs
        twice = len(GOOD) - len(gone) < used
        assert (len(set(rows[:used].tolist())) < used) == twice


def test_nothing_is_left() -> None:
    """An empty stream would be a division by nothing, much later."""
    with pytest.raises(ConfigError, match="every image has changed"):
        replace(order(), replaced=GOOD).epoch(0)
