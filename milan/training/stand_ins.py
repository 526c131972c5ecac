"""Batches of images some of which cannot be read: others stand in for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from milan.errors import ImageFault, none_readable

_NEXT = 64  # images tried where no image of a batch can be read
Read = TypeVar("Read")


def read_batch(
    rows: Sequence[int],
    read: Callable[[int], Read],
    *,
    count: int,
    name: Callable[[int], str],
) -> tuple[list[Read], list[int], np.ndarray]:
    """(what `read` gives [B], the row that it is of [B], bool [B]: is that the one asked for).

    Where `read` raises ImageFault the first image of the batch that can be read stands in. If there
    is none, as in a batch of one, it is the next of the `count` images of the split. Raises
    DataError if none of the next 64 can be read either; `name` is for its text.
    """
    faults = list[str]()

    def attempt(row: int) -> Read | None:
        try:
            return read(row)
        except ImageFault as fault:
            faults.append(f"{name(row)}: {fault}")
            return None

    pairs = [(attempt(row), row) for row in rows]
    readable = np.array([one is not None for one, _ in pairs])
    if readable.all():
        return [one for one, _ in pairs if one is not None], list(rows), readable
    behind = ((rows[-1] + 1 + step) % count for step in range(min(_NEXT, count)))
    others = ((attempt(row), row) for row in behind)
    stand_in = next((pair for pair in chain(pairs, others) if pair[0] is not None), None)
    if stand_in is None:
        behind_it = f"a batch of {len(rows)}, nor one of the {min(_NEXT, count)} behind it,"
        raise none_readable(behind_it, faults[0])
    chosen = [pair if pair[0] is not None else stand_in for pair in pairs]
    return [one for one, _ in chosen if one is not None], [row for _, row in chosen], readable
